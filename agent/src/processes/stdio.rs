//! Standard streams of processes: a pipe or a terminal on one side, a connection of the host on the
//! other.
//!
//! ```text
//!           without a terminal                                 with one
//! stdin   stream ──pump_in──> pipe                 stream ──pump_in───> ┐
//! stdout  pipe ──pump_out──> stream                stream <──pump_out── ┴ PTY master
//! stderr  pipe ──pump_out──> stream
//! ```
//!
//! - End of a stdin stream closes the process's stdin. (A terminal has no such end: its user types
//!   one.)
//! - End of a process's output shuts the stream down for writing.
//! - A reader that is gone closes the pipe, so that the process gets `SIGPIPE`, as under runc.
//! - Output counts as delivered when the pipe is at its end, or was found empty after the process
//!   had ended: a daemon that
//!   it left behind may hold the pipe for ever.
//!
//! No copy is buffered beyond [`BUFFER_BYTES`] a direction, and an idle stream has no buffer at
//! all.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::{pipe2, read, write},
};
use pericarp_protocol::guest;
use tokio::{
    io::{AsyncWriteExt, Interest, unix::AsyncFd},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinSet,
};

use crate::{
    container::Stdio,
    ground::files,
    processes::{
        reaper::ExitWatch,
        streams::{StreamError, Streams},
    },
};

/// Bytes copied at once: a pipe's default capacity.
const BUFFER_BYTES: usize = 64 << 10;

/// Why streams cannot be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    /// A stream cannot be had.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A terminal has no stderr of its own.
    #[error("streams.stderr: a process with a terminal has no stderr of its own")]
    TerminalStderr,
    /// The guest is out of descriptors.
    #[error("cannot make pipes for a process")]
    Host(#[from] io::Error),
}

/// Streams of a process that is being made.
#[derive(Debug)]
pub(crate) struct Prepared {
    /// Stream into the process, and its pipe unless there is a terminal.
    input: Option<(Input, Option<OwnedFd>)>,
    /// Streams out of the process with their pipes; without a pipe from the terminal.
    outputs: Vec<(OwnedWriteHalf, Option<OwnedFd>)>,
}

/// A stream into a process. Its other half is kept for as long: dropping it would tell the host
/// that nobody reads.
type Input = (OwnedReadHalf, Option<OwnedWriteHalf>);

impl Prepared {
    /// Takes the streams that a request names. Returns the ends that the process gets.
    pub(crate) fn new(
        streams: &Streams,
        ids: &guest::Streams,
        terminal: bool,
    ) -> Result<(Self, Stdio), StdioError> {
        if terminal {
            return Ok((Self::terminal(streams, ids)?, Stdio::default()));
        }
        let mut prepared = Self {
            input: None,
            outputs: Vec::new(),
        };
        let mut stdio = Stdio {
            stdin: Some(null(OFlag::O_RDONLY)?),
            stdout: Some(null(OFlag::O_WRONLY)?),
            stderr: Some(null(OFlag::O_WRONLY)?),
        };
        if ids.stdin != 0 {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)?;
            let stream = streams.take("streams.stdin", ids.stdin)?;
            stdio.stdin = Some(reader);
            prepared.input = Some((input(stream), Some(writer)));
        }
        for (role, id, end) in [
            ("streams.stdout", ids.stdout, &mut stdio.stdout),
            ("streams.stderr", ids.stderr, &mut stdio.stderr),
        ] {
            if id != 0 {
                let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)?;
                let stream = streams.take(role, id)?;
                *end = Some(writer);
                prepared.outputs.push((write_half(stream), Some(reader)));
            }
        }
        Ok((prepared, stdio))
    }

    /// One stream for both directions when the request names the same number twice, or one each.
    fn terminal(streams: &Streams, ids: &guest::Streams) -> Result<Self, StdioError> {
        if ids.stderr != 0 {
            return Err(StdioError::TerminalStderr);
        }
        let mut prepared = Self {
            input: None,
            outputs: Vec::new(),
        };
        if ids.stdout != 0 {
            let stream = streams.take("streams.stdout", ids.stdout)?;
            if ids.stdin == ids.stdout {
                let (reader, writer) = stream.into_split();
                prepared.input = Some(((reader, None), None));
                prepared.outputs.push((writer, None));
            } else {
                prepared.outputs.push((write_half(stream), None));
            }
        }
        if ids.stdin != 0 && ids.stdin != ids.stdout {
            let stream = streams.take("streams.stdin", ids.stdin)?;
            prepared.input = Some((input(stream), None));
        }
        Ok(prepared)
    }

    /// Starts copying, once the process is there.
    pub(crate) fn run(
        self,
        master: Option<OwnedFd>,
        exit: &ExitWatch,
    ) -> io::Result<ProcessStreams> {
        let terminal = master.map(endpoint).transpose()?.map(Arc::new);
        let (close_stdin, closing) = watch::channel(false);
        let (undelivered, delivered) = watch::channel(0usize);
        let undelivered = Arc::new(undelivered);
        let mut pumps = JoinSet::new();
        for (stream, pipe) in self.outputs {
            let source = match (pipe, &terminal) {
                (Some(pipe), _) => Arc::new(endpoint(pipe)?),
                (None, Some(terminal)) => Arc::clone(terminal),
                (None, None) => continue,
            };
            let owed = Owed::new(&undelivered);
            pumps.spawn(pump_out(source, stream, exit.clone(), owed));
        }
        if let Some((stream, pipe)) = self.input {
            match (pipe, &terminal) {
                (Some(pipe), _) => {
                    let pipe = Arc::new(endpoint(pipe)?);
                    pumps.spawn(pump_into_pipe(stream, pipe, closing));
                }
                (None, Some(terminal)) => {
                    pumps.spawn(pump_in(stream, Arc::clone(terminal), closing));
                }
                (None, None) => {}
            }
        }
        Ok(ProcessStreams {
            terminal,
            close_stdin,
            delivered,
            _pumps: pumps,
        })
    }
}

/// Running streams of a process; dropping it ends the copying.
#[derive(Debug)]
pub(crate) struct ProcessStreams {
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    close_stdin: watch::Sender<bool>,
    delivered: watch::Receiver<usize>,
    _pumps: JoinSet<()>,
}

impl ProcessStreams {
    /// Closes the process's stdin once what has arrived for it is written.
    pub(crate) fn close_stdin(&self) {
        self.close_stdin.send_replace(true);
    }

    /// Sets the size of the terminal; `None` when there is none.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> Option<io::Result<()>> {
        let terminal = self.terminal.as_ref()?;
        Some(pericarp_sys::guest::set_terminal_size(
            terminal.get_ref().as_fd(),
            columns,
            rows,
        ))
    }

    /// Waits until every output was delivered.
    pub(crate) fn delivered(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut delivered = self.delivered.clone();
        async move {
            // All senders gone means all pumps gone, which is as good.
            let _ = delivered.wait_for(|owed| *owed == 0).await;
        }
    }
}

/// One output that is not delivered yet.
struct Owed(Option<Arc<watch::Sender<usize>>>);

impl Owed {
    fn new(count: &Arc<watch::Sender<usize>>) -> Self {
        count.send_modify(|owed| *owed += 1);
        Self(Some(Arc::clone(count)))
    }

    fn settle(&mut self) {
        if let Some(count) = self.0.take() {
            count.send_modify(|owed| *owed -= 1);
        }
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        self.settle();
    }
}

/// Copies from a process to the host until the process's side ends or the host's side breaks.
async fn pump_out(
    source: Arc<AsyncFd<OwnedFd>>,
    mut stream: OwnedWriteHalf,
    mut exit: ExitWatch,
    mut owed: Owed,
) {
    let mut ended = false;
    loop {
        // Readiness is only a hint to try: after the exit it is the read itself that tells whether
        // the pipe is empty.
        if ended {
            let Ok(mut guard) = source.readable().await else {
                return;
            };
            guard.clear_ready();
        } else {
            tokio::select! {
                guard = source.readable() => match guard {
                    Ok(mut guard) => guard.clear_ready(),
                    Err(_) => return,
                },
                _ = exit.wait_for(Option::is_some) => ended = true,
            }
        }
        match drain(&source, &mut stream).await {
            Drained::Empty if ended => owed.settle(),
            Drained::Empty => {}
            Drained::Ended | Drained::Broken => break,
        }
    }
    // Dropping the half shuts the stream down for writing.
}

enum Drained {
    /// Nothing more for now.
    Empty,
    /// The process closed its side.
    Ended,
    /// The host closed its side.
    Broken,
}

async fn drain(source: &AsyncFd<OwnedFd>, stream: &mut OwnedWriteHalf) -> Drained {
    let mut buffer = Vec::new();
    loop {
        if buffer.is_empty() {
            buffer = vec![0; BUFFER_BYTES];
        }
        match read(source.get_ref(), &mut buffer) {
            Ok(0) => return Drained::Ended,
            Ok(length) => {
                if stream.write_all(&buffer[..length]).await.is_err() {
                    return Drained::Broken;
                }
            }
            Err(nix::Error::EAGAIN) => return Drained::Empty,
            Err(nix::Error::EINTR) => {}
            // A PTY master whose slaves are all closed says EIO (pty(7)).
            Err(_) => return Drained::Ended,
        }
    }
}

/// As [`pump_in`], until the process closes its end of the pipe: the host learns that by the end of
/// the stream.
async fn pump_into_pipe(
    stream: Input,
    pipe: Arc<AsyncFd<OwnedFd>>,
    closing: watch::Receiver<bool>,
) {
    tokio::select! {
        () = pump_in(stream, Arc::clone(&pipe), closing) => {}
        // poll(2): the write end of a pipe without readers is in error.
        _ = pipe.ready(Interest::ERROR) => {}
    }
}

/// Copies from the host to a process until either side ends or the host asks to close.
async fn pump_in(
    (stream, _kept): Input,
    sink: Arc<AsyncFd<OwnedFd>>,
    mut closing: watch::Receiver<bool>,
) {
    let mut asked = false;
    while !asked {
        tokio::select! {
            ready = stream.readable() => if ready.is_err() { return },
            // The sender lives as long as this task.
            _ = closing.wait_for(|asked| *asked) => asked = true,
        }
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let found = match stream.try_read(&mut buffer) {
                // Readiness is known to the runtime with a delay; what has arrived is known to the
                // socket.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && asked => {
                    read(stream.as_ref(), &mut buffer).map_err(io::Error::from)
                }
                other => other,
            };
            match found {
                Ok(0) => return,
                Ok(length) => {
                    if write_all(&sink, &buffer[..length]).await.is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return,
            }
        }
    }
}

async fn write_all(sink: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let length = sink
            .async_io(Interest::WRITABLE, |fd| {
                write(fd, bytes).map_err(io::Error::from)
            })
            .await?;
        bytes = &bytes[length..];
    }
    Ok(())
}

fn null(mode: OFlag) -> io::Result<OwnedFd> {
    nix::fcntl::open(
        "/dev/null",
        mode | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .map_err(io::Error::from)
}

/// Registers our end of a pipe or terminal with the runtime.
fn endpoint(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    files::watch(fd)
}

/// The half of an output stream that is used. The host sends nothing on it.
fn write_half(stream: UnixStream) -> OwnedWriteHalf {
    stream.into_split().1
}

fn input(stream: UnixStream) -> Input {
    let (reader, writer) = stream.into_split();
    (reader, Some(writer))
}
