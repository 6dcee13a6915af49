//! Making tap interfaces (Linux `Documentation/networking/tuntap.rst`).

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

/// Longest name of an interface in bytes, without the NUL (`IFNAMSIZ` - 1).
pub const INTERFACE_NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// Opens one queue of the tap `name` in the calling thread's network namespace, and makes the tap if there is none. Packets
/// carry a virtio-net header. The tap goes with its last descriptor.
///
/// # Errors
/// The name is too long, or what open(2) and TUNSETIFF say.
pub fn open_tap_queue(name: &str, multi_queue: bool) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() > INTERFACE_NAME_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "name of a tap"));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: `ifreq` is plain old data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "all the flags are below 0x8000"
    )]
    {
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
    }
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives across the call and whose name ends with a NUL, because
    // its length was checked above.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}
