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
    fcntl::{FcntlArg, OFlag, SealFlag, fcntl, openat},
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

/// Makes a file of `bytes`, close-on-exec, none of it allocated, and sealed to that size where the
/// kernel can: a nameless file of a tmpfs has no seals.
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
    let flags = kind | MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create("guest-memory", flags)?);
    file.set_len(bytes)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_is_for_good() {
        let file = File::from(create(4 << 20, Pages::Base).unwrap());
        for bytes in [2 << 20, 8 << 20] {
            assert!(file.set_len(bytes).is_err(), "{bytes}");
        }
        assert_eq!(file.metadata().unwrap().len(), 4 << 20);
    }
}
