//! The file that a guest's memory is made of.
//!
//! Transparent huge pages of a memfd depend on a setting of the whole host (`shmem_enabled`), which
//! is "never" on most. A tmpfs of our own may have them whatever the host says, and it needs no
//! place in any mount namespace: it is made detached, holds one nameless file, and goes when the
//! file goes.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, openat},
    sys::{
        memfd::{MFdFlags, memfd_create},
        stat::Mode,
    },
};

use crate::fscontext::FsContext;

/// What the file's pages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// 4 KiB.
    Base,
    /// 4 KiB, and 2 MiB wherever the kernel is advised so and has them.
    Transparent,
    /// hugetlb, 2 MiB.
    Huge2M,
    /// hugetlb, 1 GiB.
    Huge1G,
}

/// Makes a file of `bytes`, close-on-exec, none of it allocated.
///
/// # Errors
/// The kernel's: `EPERM` for [`Pages::Transparent`] without `CAP_SYS_ADMIN`, `EINVAL` for a size
/// that is no multiple of the page.
pub fn create(bytes: u64, pages: Pages) -> io::Result<OwnedFd> {
    let kind = match pages {
        Pages::Transparent => return create_transparent(bytes),
        Pages::Base => MFdFlags::empty(),
        Pages::Huge2M => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
        Pages::Huge1G => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_1GB,
    };
    let file = File::from(memfd_create("guest-memory", kind | MFdFlags::MFD_CLOEXEC)?);
    file.set_len(bytes)?;
    Ok(file.into())
}

fn create_transparent(bytes: u64) -> io::Result<OwnedFd> {
    let context = FsContext::open(c"tmpfs")?;
    context.set_string(c"huge", c"advise")?;
    // The default is half of the host's memory; what limits a guest is its cgroup.
    context.set_string(c"size", c"0")?;
    let mount = context.mount(libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NODEV)?;
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let file = File::from(openat(
        mount.as_fd(),
        ".",
        flags,
        Mode::S_IRUSR | Mode::S_IWUSR,
    )?);
    file.set_len(bytes)?;
    Ok(file.into())
}
