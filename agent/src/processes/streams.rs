//! Connections that the host opened to the stream port: their header line, and those that wait for
//! their process.
//!
//! Only the host gets here (the peer's context id is checked at accept). Limits:
//! [`STREAM_HEADER_BYTES_MAX`] for a header, [`HEADER_WAIT`] for its arrival,
//! [`STREAMS_PENDING_MAX`] connections that no process has taken.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, AsRawFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, recv},
};
use pericarp_protocol::{
    limits::{STREAM_HEADER_BYTES_MAX, STREAMS_PENDING_MAX},
    stream::Header,
};
use tokio::{io::AsyncWriteExt, net::UnixStream, time::timeout};

use crate::{ground::log, processes::forward};

/// How long a connection may take to say what it is for.
const HEADER_WAIT: Duration = Duration::from_secs(10);

/// Why a stream cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    /// No connection with this number waits.
    #[error("{role}: the host opened no stream {id}")]
    Unknown {
        /// The field of the request.
        role: &'static str,
        /// The number.
        id: u64,
    },
    /// Too many wait.
    #[error("{STREAMS_PENDING_MAX} streams already wait for a process")]
    Full,
    /// The number is taken.
    #[error("a stream {0} already waits for a process")]
    Duplicate(u64),
    /// The header did not come, or was none.
    #[error("bad stream header: {0}")]
    Header(String),
    /// The connection broke.
    #[error("stream broke")]
    Io(#[from] io::Error),
}

/// Streams that wait for their process.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    pending: Mutex<HashMap<u64, UnixStream>>,
}

impl Streams {
    /// Serves one new connection up to its header's answer, and beyond when it is a forwarded port.
    pub(crate) async fn serve(self: Arc<Self>, mut stream: UnixStream) {
        let header = match timeout(HEADER_WAIT, read_header(&stream)).await {
            Ok(Ok(header)) => header,
            Ok(Err(error)) => return refuse(&mut stream, &error).await,
            Err(_) => {
                let error = StreamError::Header("none came in time".to_owned());
                return refuse(&mut stream, &error).await;
            }
        };
        match header {
            Header::Process(id) => self.keep(id, stream).await,
            Header::Tcp(address, port) => match forward::connect(address, port).await {
                Ok(target) => {
                    if stream.write_all(b"ok\n").await.is_ok() {
                        forward::copy(stream, target).await;
                    }
                }
                Err(error) => refuse(&mut stream, &StreamError::Io(error)).await,
            },
        }
    }

    /// Takes stream `id` for the field `role` of a request.
    pub(crate) fn take(&self, role: &'static str, id: u64) -> Result<UnixStream, StreamError> {
        self.lock()
            .remove(&id)
            .ok_or(StreamError::Unknown { role, id })
    }

    async fn keep(&self, id: u64, mut stream: UnixStream) {
        if let Err(error) = self.check_room(id) {
            return refuse(&mut stream, &error).await;
        }
        // The host must not name the stream before it has the answer, so answering first loses
        // nothing.
        if let Err(error) = stream.write_all(b"ok\n").await {
            log::warn(format_args!(
                "stream {id} broke before its process came: {error}"
            ));
            return;
        }
        self.lock().insert(id, stream);
    }

    fn check_room(&self, id: u64) -> Result<(), StreamError> {
        let mut pending = self.lock();
        if pending.contains_key(&id) {
            return Err(StreamError::Duplicate(id));
        }
        if pending.len() >= STREAMS_PENDING_MAX {
            pending.retain(|_, stream| !hung_up(stream));
        }
        if pending.len() >= STREAMS_PENDING_MAX {
            return Err(StreamError::Full);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, UnixStream>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn refuse(stream: &mut UnixStream, error: &StreamError) {
    // The peer may be gone; then there is nobody to tell.
    let _ = stream
        .write_all(format!("error {}\n", log::chain(error)).as_bytes())
        .await;
}

fn hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok()
        && fds[0]
            .revents()
            .is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
}

/// Reads the header line and not a byte more: what follows belongs to the process.
async fn read_header(stream: &UnixStream) -> Result<Header, StreamError> {
    let mut line = Vec::with_capacity(STREAM_HEADER_BYTES_MAX);
    loop {
        stream.readable().await?;
        let mut buffer = [0u8; STREAM_HEADER_BYTES_MAX];
        let room = STREAM_HEADER_BYTES_MAX - line.len();
        let peeked = stream.try_io(tokio::io::Interest::READABLE, || {
            recv(stream.as_raw_fd(), &mut buffer[..room], MsgFlags::MSG_PEEK)
                .map_err(io::Error::from)
        });
        let peeked = match peeked {
            Ok(0) => return Err(StreamError::Header("the connection ended first".to_owned())),
            Ok(peeked) => peeked,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error.into()),
        };
        let newline = buffer[..peeked].iter().position(|byte| *byte == b'\n');
        let length = newline.map_or(peeked, |index| index + 1);
        let taken = stream.try_read(&mut buffer[..length])?;
        line.extend_from_slice(&buffer[..taken]);
        if newline.is_some() && taken == length {
            line.pop();
            return Header::parse(&line).map_err(|error| StreamError::Header(error.to_string()));
        }
        if line.len() >= STREAM_HEADER_BYTES_MAX {
            return Err(StreamError::Header("it is too long".to_owned()));
        }
    }
}
