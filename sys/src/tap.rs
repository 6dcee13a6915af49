//! ioctls on a tap descriptor. All of them act through the descriptor alone, so they work from
//! another network namespace and without any capability (Linux `drivers/net/tun.c`,
//! `__tun_chr_ioctl`).

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

/// The guest takes packets without a checksum.
pub const OFFLOAD_CSUM: u32 = 0x01;
/// The guest takes TCP over IPv4 larger than the MTU.
pub const OFFLOAD_TSO4: u32 = 0x02;
/// The guest takes TCP over IPv6 larger than the MTU.
pub const OFFLOAD_TSO6: u32 = 0x04;
/// The guest takes such TCP with ECN bits set.
pub const OFFLOAD_TSO_ECN: u32 = 0x08;
/// The guest takes UDP larger than the MTU.
pub const OFFLOAD_UFO: u32 = 0x10;

/// What kind of descriptor it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TapKind {
    /// Carries Ethernet frames, not IP packets.
    pub tap: bool,
    /// Each packet begins with a virtio-net header.
    pub vnet_header: bool,
    /// Has several queues.
    pub multi_queue: bool,
}

/// Opens a queue of the tap `name` in the caller's network namespace, and makes the tap when there
/// is none. It carries a virtio-net header and is non-blocking. This alone needs CAP_NET_ADMIN.
///
/// # Errors
/// `/dev/net/tun` is missing, the name is too long, or the kernel refuses.
pub fn open(name: &str, multi_queue: bool) -> io::Result<OwnedFd> {
    use nix::fcntl::{OFlag, open};
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let tap = open("/dev/net/tun", flags, nix::sys::stat::Mode::empty())?;
    // SAFETY: all-zero bytes are a valid `ifreq`: integers and byte arrays.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero: the name's end.
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let mut kind = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi_queue {
        kind |= libc::IFF_MULTI_QUEUE;
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(kind).expect("all below 0x8000");
    // SAFETY: TUNSETIFF reads and writes one `ifreq` at the pointer, which is valid for the call.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
    Ok(tap)
}

/// Reads what the descriptor is.
///
/// # Errors
/// It is no tun or tap descriptor, or is attached to no interface.
pub fn kind(tap: BorrowedFd<'_>) -> io::Result<TapKind> {
    // SAFETY: all-zero bytes are a valid `ifreq`: integers and byte arrays.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes one `ifreq` to the pointer, which is valid for the call.
    let rc = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) };
    check(rc)?;
    // SAFETY: the kernel has filled `ifru_flags`; every bit pattern of a short is valid.
    let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
    Ok(TapKind {
        tap: flags & libc::IFF_TAP != 0,
        vnet_header: flags & libc::IFF_VNET_HDR != 0,
        multi_queue: flags & libc::IFF_MULTI_QUEUE != 0,
    })
}

/// Sets which unfinished packets the guest takes: any of the `OFFLOAD_` bits.
///
/// # Errors
/// The kernel does not know one of the bits.
pub fn set_offload(tap: BorrowedFd<'_>, offloads: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
    check(unsafe {
        libc::ioctl(
            tap.as_raw_fd(),
            libc::TUNSETOFFLOAD as _,
            libc::c_ulong::from(offloads),
        )
    })
}

/// Sets how long the header before each packet is.
///
/// # Errors
/// The descriptor has no header, or the kernel refuses the length.
pub fn set_vnet_header_size(tap: BorrowedFd<'_>, size_bytes: i32) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int from the pointer, which is valid for the call.
    check(unsafe {
        libc::ioctl(
            tap.as_raw_fd(),
            libc::TUNSETVNETHDRSZ as _,
            &raw const size_bytes,
        )
    })
}

/// Attaches a queue to its interface or detaches it; a detached queue gets no packets.
///
/// # Errors
/// The queue already is so, the interface has one queue only, or it is gone.
pub fn set_queue_attached(tap: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `ifreq`: integers and byte arrays.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flag = if attached {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(flag).expect("both flags are below 0x800");
    // SAFETY: TUNSETQUEUE reads one `ifreq` from the pointer, which is valid for the call.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETQUEUE as _, &raw const request) })
}

fn check(rc: libc::c_int) -> io::Result<()> {
    if rc < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn descriptors_of_another_kind_are_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(kind(file.as_fd()).is_err());
        assert!(set_offload(file.as_fd(), OFFLOAD_CSUM).is_err());
        assert!(set_vnet_header_size(file.as_fd(), 12).is_err());
        assert!(set_queue_attached(file.as_fd(), true).is_err());
    }
}
