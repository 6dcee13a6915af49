//! The one ioctl of vhost-net that no crate offers on a descriptor that someone else opened.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// `_IOW(VHOST_VIRTIO, 0x30, struct vhost_vring_file)` (Linux `include/uapi/linux/vhost.h`).
const VHOST_NET_SET_BACKEND: u32 = 0x4008_af30;

/// `struct vhost_vring_file`.
#[repr(C)]
struct VringFile {
    index: u32,
    fd: i32,
}

/// Connects a ring of vhost-net (0 receives, 1 transmits) to a tap, or stops it with `None`: once
/// this returns, the kernel touches the ring no more.
///
/// # Errors
/// The descriptor is no vhost-net, the ring is not set up, or the tap is none.
pub fn set_backend(
    vhost: BorrowedFd<'_>,
    ring: u32,
    tap: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let file = VringFile {
        index: ring,
        fd: tap.map_or(-1, |tap| tap.as_raw_fd()),
    };
    // SAFETY: the kernel reads one `vhost_vring_file` from the pointer, which is valid for the
    // call. Which memory it then touches was fixed by the ring addresses and the memory table set
    // before.
    let rc = unsafe {
        libc::ioctl(
            vhost.as_raw_fd(),
            VHOST_NET_SET_BACKEND as _,
            &raw const file,
        )
    };
    if rc < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
