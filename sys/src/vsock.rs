//! vsock sockets as plain descriptors.
//!
//! Reading, writing and shutting down work on them as on any stream socket, so callers may wrap
//! them in the types of unix stream sockets; only addresses differ, and those are dealt with here.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::Duration,
};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, getpeername,
    listen, socket,
};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// `SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD` of linux/vm_sockets.h, which takes a `timeval`.
const CONNECT_TIMEOUT: libc::c_int = 6;

/// Connects to `port` of context `cid`, and waits for the answer; `patience` is in the place of the
/// two seconds that vsock(7) has.
///
/// # Errors
/// The kernel's: `ECONNRESET` when nobody listens there, `ENODEV` without a vsock device,
/// `ETIMEDOUT` without an answer.
pub fn connect_to(cid: u32, port: u32, patience: Duration) -> io::Result<OwnedFd> {
    let socket = new(SockFlag::empty())?;
    let time = libc::timeval {
        tv_sec: i64::try_from(patience.as_secs()).map_err(io::Error::other)?,
        tv_usec: i64::from(patience.subsec_micros()),
    };
    let size = libc::socklen_t::try_from(size_of_val(&time)).map_err(io::Error::other)?;
    // SAFETY: the option reads `size` bytes, which `time` has.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            CONNECT_TIMEOUT,
            (&raw const time).cast(),
            size,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    connect(socket.as_raw_fd(), &VsockAddr::new(cid, port))?;
    Ok(socket)
}

/// Listens on `port`; accepting does not block.
///
/// # Errors
/// The kernel's.
pub fn listen_on(port: u32) -> io::Result<OwnedFd> {
    let socket = new(SockFlag::SOCK_NONBLOCK)?;
    bind(
        socket.as_raw_fd(),
        &VsockAddr::new(libc::VMADDR_CID_ANY, port),
    )?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

/// Accepts a connection, and says which context it comes from. The connection does not block.
///
/// # Errors
/// The kernel's: `EAGAIN` when none waits.
pub fn accept_from(listener: &OwnedFd) -> io::Result<(OwnedFd, u32)> {
    let fd = accept4(
        listener.as_raw_fd(),
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
    )?;
    // SAFETY: accept4(2) just made this descriptor for this call, so nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let peer: VsockAddr = getpeername(socket.as_raw_fd())?;
    Ok((socket, peer.cid()))
}

fn new(flags: SockFlag) -> io::Result<OwnedFd> {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Vsock, SockType::Stream, flags, None)?)
}
