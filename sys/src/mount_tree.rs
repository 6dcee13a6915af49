//! What [`crate::fscontext`] leaves out of the mount API: propagation, attributes and id mapping by
//! `mount_setattr(2)`, ids of mounts by `statx(2)`.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Sets the propagation (`MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE` or `MS_UNBINDABLE`) of the mount
/// that `mount` is open on, and of those beneath it when `recursive`.
///
/// # Errors
/// The kernel's.
pub fn set_propagation(mount: BorrowedFd<'_>, kind: u64, recursive: bool) -> io::Result<()> {
    set(mount, &attributes(0, 0, kind), recursive)
}

/// Sets and clears `MOUNT_ATTR_*` of the mount that `mount` is open on, and of those beneath it
/// when `recursive`.
///
/// # Errors
/// The kernel's.
pub fn set_attributes(
    mount: BorrowedFd<'_>,
    set_: u64,
    clear: u64,
    recursive: bool,
) -> io::Result<()> {
    set(mount, &attributes(set_, clear, 0), recursive)
}

/// Shows the files of the mount with their owners mapped as the user namespace `user_namespace`
/// maps them. Only a mount that is attached nowhere can be changed so.
///
/// # Errors
/// `EINVAL` when its file system does not support it, `EPERM` when it is mapped already; else the
/// kernel's.
pub fn map_ids(
    mount: BorrowedFd<'_>,
    user_namespace: BorrowedFd<'_>,
    recursive: bool,
) -> io::Result<()> {
    let descriptor = u64::try_from(user_namespace.as_raw_fd()).map_err(io::Error::other)?;
    let mapped = libc::mount_attr {
        userns_fd: descriptor,
        ..attributes(libc::MOUNT_ATTR_IDMAP, 0, 0)
    };
    set(mount, &mapped, recursive)
}

fn attributes(attr_set: u64, attr_clr: u64, propagation: u64) -> libc::mount_attr {
    libc::mount_attr {
        attr_set,
        attr_clr,
        propagation,
        userns_fd: 0,
    }
}

fn set(mount: BorrowedFd<'_>, attributes: &libc::mount_attr, recursive: bool) -> io::Result<()> {
    let recursion = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the structure lives through the call and its true size is given; the path is a static
    // empty string and the descriptor is borrowed for the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursion,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The id of the mount that `place` is open on, as `/proc/<pid>/mountinfo` has it. A mount that
/// ended may have had it before.
///
/// # Errors
/// `ENOSYS` when the kernel does not tell it (before 5.8); else the kernel's.
pub fn mount_id(place: BorrowedFd<'_>) -> io::Result<u64> {
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the structure is writable and lives through the call; the path is a static empty
    // string and the descriptor is borrowed for the call.
    let result = unsafe {
        libc::statx(
            place.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC,
            libc::STATX_MNT_ID,
            found.as_mut_ptr(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroes are a valid structure, and the kernel wrote valid values over them.
    let found = unsafe { found.assume_init() };
    if found.stx_mask & libc::STATX_MNT_ID == 0 {
        return Err(io::Error::from_raw_os_error(libc::ENOSYS));
    }
    Ok(found.stx_mnt_id)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::fd::AsFd,
    };

    use super::*;

    #[test]
    fn the_id_of_a_mount_is_the_one_of_mountinfo() {
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let of_proc = text
            .lines()
            .find(|line| line.contains(" /proc rw"))
            .unwrap();
        let id = mount_id(File::open("/proc/self").unwrap().as_fd()).unwrap();
        assert_eq!(of_proc.split(' ').next(), Some(id.to_string().as_str()));
    }
}
