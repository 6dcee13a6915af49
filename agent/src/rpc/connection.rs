//! The way to the host: dials, says hello, serves requests on that connection, and streams on a
//! port.
//!
//! ```text
//! dial (2, AGENT_PORT) ── Hello ── rest of the set-up ── ttrpc requests ──(connection ends)──┐
//!            └──────────────────────────────────────────────── dial again ── Hello ──────────┤
//!                                                                 └─(refused)── power off    │
//! listen STREAM_PORT ──── one task a connection: header, then a process or a forwarded port
//! ```
//!
//! In a restored machine every connection is reset, and the VMM accepts another dial. When the host
//! is gone for good, nobody answers.
//!
//! A vsock socket is read, written and shut down by the calls of a unix stream socket, so both
//! transports are one type after their set-up. Only connections from the host ([`HOST_CID`]) are
//! accepted: a container that can make vsock sockets is turned away before a byte of it is read.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream},
    },
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use nix::sys::socket::{Shutdown, shutdown};
use pericarp_protocol::{
    AGENT_PORT, GUEST_PROTOCOL_MAJOR, GUEST_PROTOCOL_MINOR, STREAM_PORT, guest::Hello, guest_ttrpc,
    limits::HELLO_BYTES_MAX,
};
use protobuf::Message as _;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, ReadBuf, unix::AsyncFd},
    net::UnixStream,
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};
use ttrpc::asynchronous::{Server, transport::Listener};

use crate::{
    ground::{clock, files, kernel, log},
    machine::init::{self, Options},
    pod::{Pod, blocking, events},
    rpc::Service,
};

/// vsock context of the host (vsock(7)).
const HOST_CID: u32 = 2;

/// Connections to the stream port that are in their header or forward a port. Those of processes
/// are counted by `STREAMS_PENDING_MAX` and the number of processes.
const STREAM_TASKS_MAX: usize = 1024;

/// How long the host may take to answer the dial. It has a deadline of its own
/// (`timeouts.agent_ready_ms`) and ends the VM then; on a busy node two seconds pass soon.
const DIAL_MAX: Duration = Duration::from_secs(3600);

/// How long a later dial may take: when the host is gone, the VMM refuses it at once.
const DIAL_AGAIN_MAX: Duration = Duration::from_secs(10);

/// How long the answer to a power-off may travel.
const ANSWER_WAIT: Duration = Duration::from_millis(200);

/// Why the host cannot be reached or spoken to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    /// Nobody answered.
    #[error("cannot connect to the host at {address}")]
    Dial {
        /// Port or path.
        address: String,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// The stream port cannot be had.
    #[error("cannot listen for streams at {address}")]
    Listen {
        /// Port or path.
        address: String,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// The hello could not be written.
    #[error("cannot say hello to the host")]
    Hello(#[source] io::Error),
    /// The hello outgrew its bound: a fault of the agent.
    #[error("the hello has {0} bytes, more than {HELLO_BYTES_MAX}")]
    HelloTooLong(usize),
    /// The request server could not start.
    #[error("cannot serve requests")]
    Serve(#[source] ttrpc::Error),
    /// The kernel refused what the agent needs.
    #[error("cannot set up the agent")]
    SetUp(#[source] io::Error),
}

/// Dials the host and serves it until it goes away.
pub(crate) async fn serve(options: Options, started_us: u64) -> Result<(), ConnectionError> {
    let streams = StreamListener::new(&options)?;
    let mut host = dial(&options, DIAL_MAX)?;
    say_hello(&mut host, started_us).await?;
    init::set_up(&options);

    let pod = Arc::new(Pod::new(options.clone()).map_err(ConnectionError::SetUp)?);
    tokio::spawn(Arc::clone(&pod.reaper).run());
    tokio::spawn({
        let pod = Arc::clone(&pod);
        async move { pod.oom.run().await }
    });
    tokio::spawn(events::report_removals(Arc::clone(&pod.events)));
    tokio::spawn(accept_streams(streams, Arc::clone(&pod)));

    let service = guest_ttrpc::create_agent(Arc::new(Service::new(Arc::clone(&pod))));
    let (connections, mut accepted) = mpsc::channel(1);
    let incoming = futures::stream::poll_fn(move |context| accepted.poll_recv(context));
    let mut server = Server::new()
        .add_listener(Listener::new(incoming))
        .register_service(service);
    server.start().await.map_err(ConnectionError::Serve)?;
    while serve_until_the_end(&pod, host, &connections).await {
        let Ok(next) = dial_again(&options, started_us).await else {
            // Nobody answers: the host is gone for good.
            pod.end_everything().await;
            break;
        };
        host = next;
    }
    pod.power_off();
    Ok(())
}

/// Serves `host` until the connection ends. Returns false when the host asked for a power-off.
async fn serve_until_the_end(
    pod: &Pod,
    host: UnixStream,
    connections: &mpsc::Sender<io::Result<HostConnection>>,
) -> bool {
    let watched = watch_errors(&host);
    let (gone, mut host_gone) = oneshot::channel();
    let connection = HostConnection {
        stream: host,
        gone: Some(gone),
    };
    // Cannot fail: the server outlives this function.
    let _ = connections.send(Ok(connection)).await;
    tokio::select! {
        // Whichever way the sender goes, the connection has ended.
        _ = &mut host_gone => true,
        () = error_of(watched) => true,
        () = pod.powering_off.notified() => {
            // Everything has ended; the host hangs up once it has read its answer.
            let _ = timeout(ANSWER_WAIT, host_gone).await;
            false
        }
    }
}

/// A second handle of the connection, for [`error_of`].
fn watch_errors(host: &UnixStream) -> io::Result<UnixStream> {
    let handle = host.as_fd().try_clone_to_owned()?;
    UnixStream::from_std(handle.into())
}

/// Waits for an error of the connection and shuts it down. Linux reports a reset vsock socket as
/// failed but not as readable (`vsock_poll`), so its reader does not wake by itself.
async fn error_of(watched: io::Result<UnixStream>) {
    let Ok(watched) = watched else {
        // Without a second handle, only the server's reads notice the end.
        return std::future::pending().await;
    };
    if watched.ready(Interest::ERROR).await.is_ok() {
        // It may be shut down already.
        let _ = shutdown(watched.as_raw_fd(), Shutdown::Both);
    }
}

async fn dial_again(options: &Options, started_us: u64) -> Result<UnixStream, ConnectionError> {
    let mut host = {
        let options = options.clone();
        blocking(move || dial(&options, DIAL_AGAIN_MAX))
            .await
            .map_err(|error| ConnectionError::SetUp(io::Error::other(error)))??
    };
    say_hello(&mut host, started_us).await?;
    Ok(host)
}

fn dial(options: &Options, patience: Duration) -> Result<UnixStream, ConnectionError> {
    let (address, stream) = match options {
        Options::Guest => (
            format!("vsock {HOST_CID}:{AGENT_PORT}"),
            pericarp_sys::vsock::connect_to(HOST_CID, AGENT_PORT, patience)
                .map(StdUnixStream::from),
        ),
        Options::Developer { socket, .. } => {
            (socket.display().to_string(), StdUnixStream::connect(socket))
        }
    };
    stream
        .and_then(|stream| {
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)
        })
        .map_err(|source| ConnectionError::Dial { address, source })
}

async fn say_hello(host: &mut UnixStream, started_us: u64) -> Result<(), ConnectionError> {
    let hello = Hello {
        protocol_major: GUEST_PROTOCOL_MAJOR,
        protocol_minor: GUEST_PROTOCOL_MINOR,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: kernel::release(),
        started_us,
        ready_us: clock::boot_time_us(),
        features: features(),
        ..Default::default()
    };
    let body = hello
        .write_to_bytes()
        .map_err(|error| ConnectionError::Hello(io::Error::other(error)))?;
    let length = u32::try_from(body.len())
        .ok()
        .filter(|_| body.len() <= HELLO_BYTES_MAX)
        .ok_or(ConnectionError::HelloTooLong(body.len()))?;
    let mut frame = length.to_le_bytes().to_vec();
    frame.extend_from_slice(&body);
    host.write_all(&frame).await.map_err(ConnectionError::Hello)
}

/// What this kernel and image have that another might lack.
fn features() -> Vec<String> {
    let mut features = Vec::new();
    if files::read("/sys/module/apparmor/parameters/enabled")
        .is_ok_and(|text| text.starts_with('Y'))
    {
        features.push("apparmor".to_owned());
    }
    features
}

/// The request connection, which tells when it ends.
struct HostConnection {
    stream: UnixStream,
    gone: Option<oneshot::Sender<()>>,
}

impl AsyncRead for HostConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(context, buffer);
        let ended = match &result {
            Poll::Ready(Ok(())) => buffer.filled().len() == before && buffer.remaining() > 0,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if ended && let Some(gone) = self.gone.take() {
            // Nobody listens when the agent is ending already.
            let _ = gone.send(());
        }
        result
    }
}

impl AsyncWrite for HostConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Where streams arrive.
enum StreamListener {
    Vsock(AsyncFd<OwnedFd>),
    Unix(tokio::net::UnixListener),
}

impl StreamListener {
    fn new(options: &Options) -> Result<Self, ConnectionError> {
        match options {
            Options::Guest => pericarp_sys::vsock::listen_on(STREAM_PORT)
                .and_then(files::watch)
                .map(Self::Vsock)
                .map_err(|source| ConnectionError::Listen {
                    address: format!("vsock port {STREAM_PORT}"),
                    source,
                }),
            Options::Developer { streams, .. } => {
                listen_unix(streams)
                    .map(Self::Unix)
                    .map_err(|source| ConnectionError::Listen {
                        address: streams.display().to_string(),
                        source,
                    })
            }
        }
    }

    async fn accept(&self) -> io::Result<UnixStream> {
        match self {
            Self::Unix(listener) => Ok(listener.accept().await?.0),
            Self::Vsock(listener) => loop {
                let accept = |fd: &OwnedFd| pericarp_sys::vsock::accept_from(fd);
                let (socket, cid) = listener.async_io(Interest::READABLE, accept).await?;
                if cid == HOST_CID {
                    return UnixStream::from_std(StdUnixStream::from(socket));
                }
                log::warn(format_args!("refused a stream from vsock context {cid}"));
            },
        }
    }
}

fn listen_unix(path: &PathBuf) -> io::Result<tokio::net::UnixListener> {
    let listener = StdUnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener)
}

async fn accept_streams(listener: StreamListener, pod: Arc<Pod>) {
    let room = Arc::new(Semaphore::new(STREAM_TASKS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok(stream) => {
                let streams = Arc::clone(&pod.streams);
                tokio::spawn(async move {
                    streams.serve(stream).await;
                    drop(permit);
                });
            }
            Err(error) => {
                log::warn(format_args!("cannot accept a stream: {error}"));
                // Out of descriptors, most likely: let others run and give some back first.
                tokio::task::yield_now().await;
            }
        }
    }
}
