//! Ports of the pod that the host forwards: one connection of the host is one TCP connection inside
//! the pod.
//!
//! The pod's network namespace is the guest's own, so the agent simply connects.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use tokio::{
    net::{TcpStream, UnixStream},
    time::timeout,
};

/// How long a connection inside the pod may take.
const CONNECT_WAIT: Duration = Duration::from_secs(10);

/// Buffer of each direction of a forwarded connection in bytes.
const BUFFER_BYTES: usize = 16 << 10;

/// Connects to a listener in the pod.
pub(crate) async fn connect(address: IpAddr, port: u16) -> io::Result<TcpStream> {
    let target = SocketAddr::new(address, port);
    match timeout(CONNECT_WAIT, TcpStream::connect(target)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(io::Error::new(
            error.kind(),
            format!("cannot connect to {target} in the pod: {error}"),
        )),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("cannot connect to {target} in the pod: no answer"),
        )),
    }
}

/// Copies both directions, each until its own end, so that half-closed connections work.
pub(crate) async fn copy(mut host: UnixStream, mut target: TcpStream) {
    // An error ends the connection on both sides, which is all that either can be told.
    let _ = tokio::io::copy_bidirectional_with_sizes(
        &mut host,
        &mut target,
        BUFFER_BYTES,
        BUFFER_BYTES,
    )
    .await;
}
