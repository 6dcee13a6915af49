//! Bringing up `lo` of a fresh network namespace, where netlink would need a runtime.

use std::{
    io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// `IFF_UP` of uapi/linux/if.h, in the width of `ifr_flags`.
const UP: libc::c_short = 1;

/// Sets the interface `lo` of the calling thread's network namespace up.
///
/// # Errors
/// The kernel's.
pub fn bring_up() -> io::Result<()> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::socket(libc::AF_INET, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for this call, so nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero bytes are a valid `ifreq`: an empty name and zero flags.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *place = byte.cast_signed();
    }
    // The flags of a loopback interface before it is up; the kernel keeps those that cannot be
    // changed (netdevice(7)).
    request.ifr_ifru.ifru_flags = UP;
    // SAFETY: SIOCSIFFLAGS reads one `ifreq` whose name is NUL-terminated (the array was zeroed);
    // it lives through the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
