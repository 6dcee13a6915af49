//! Port-forwarding: connections to the loopback of the pod's network namespace on the host reach
//! listeners in the guest.
//!
//! containerd answers `PortForward` by dialling `localhost:<port>` inside the namespace (containerd
//! `internal/cri/server/sandbox_portforward_linux.go`), first IPv4, then IPv6. Nothing of the pod
//! listens there: its listeners are in the guest. So one listener of ours answers every port of
//! that namespace ([`pericarp_sys::sk_lookup`]) and carries each connection over a stream of its
//! own to the same port of the guest's loopback. Frames that arrive from outside never get there:
//! they are redirected to the guest before the namespace's stack sees them.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener},
    os::fd::AsFd,
    path::Path,
    sync::Arc,
};

use nix::sched::{CloneFlags, setns};
use pericarp_protocol::stream::Header;
use pericarp_sys::sk_lookup::{AllPorts, listen_on_all_ports};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tracing::{debug, warn};

use crate::guest::agent_client::Agent;

/// Connections carried at once; further ones wait to be accepted.
const CONNECTIONS_MAX: usize = 256;

/// Begins to forward for the namespace; a host that cannot is reported, and the pod runs without.
pub(crate) fn start(namespace: &Path, agent: &Agent) {
    match open(namespace) {
        Ok((listener, held)) => {
            let agent = agent.clone();
            tokio::spawn(async move {
                serve(listener, agent).await;
                drop(held);
            });
        }
        Err(error) => {
            warn!(%error, "port-forward will not work: the kernel has no socket lookup programs")
        }
    }
}

fn open(namespace: &Path) -> io::Result<(TcpListener, AllPorts)> {
    let file = File::open(namespace)?;
    let opened = std::thread::scope(|scope| {
        let opener = scope.spawn(|| {
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            // With IPv6 switched off there is IPv4 still.
            StdListener::bind((Ipv6Addr::UNSPECIFIED, 0))
                .or_else(|_| StdListener::bind((Ipv4Addr::UNSPECIFIED, 0)))
        });
        opener
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })?;
    opened.set_nonblocking(true)?;
    let held = listen_on_all_ports(file.as_fd(), &opened)?;
    Ok((TcpListener::from_std(opened)?, held))
}

async fn serve(listener: TcpListener, agent: Agent) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(error) => {
                debug!(%error, "a forwarded connection was lost before it was accepted");
                continue;
            }
        };
        let agent = agent.clone();
        tokio::spawn(async move {
            if let Err(error) = carry(connection, &agent).await {
                debug!(%error, "a forwarded connection ended");
            }
            drop(place);
        });
    }
}

async fn carry(mut connection: TcpStream, agent: &Agent) -> io::Result<()> {
    let dialled = connection.local_addr()?;
    let mut stream = match agent.open_stream(&header(dialled)).await {
        Ok(stream) => stream,
        Err(error) => {
            // Nobody listens: a reset is as near to a refusal as an accepted connection comes.
            connection.set_zero_linger()?;
            return Err(io::Error::other(error.to_string()));
        }
    };
    copy_bidirectional(&mut connection, &mut stream)
        .await
        .map(drop)
}

/// An IPv4 connection arrives at an IPv6 socket under a mapped address.
fn header(dialled: SocketAddr) -> Header {
    let loopback = match dialled.ip().to_canonical() {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    Header::Tcp(loopback, dialled.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_kept() {
        let of = |text: &str| header(text.parse().unwrap()).to_string();
        assert_eq!(of("127.0.0.1:80"), "tcp 127.0.0.1 80\n");
        assert_eq!(of("[::ffff:127.0.0.1]:80"), "tcp 127.0.0.1 80\n");
        assert_eq!(of("[::1]:443"), "tcp ::1 443\n");
    }
}
