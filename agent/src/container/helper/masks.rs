//! Paths of the kernel that a container must not read (`linux.maskedPaths`), or must not change
//! (`linux.readonlyPaths`).

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::sys::stat::{SFlag, fstat};
use pericarp_sys::fscontext::{DetachedMount, FsContext};

use super::{super::error::ContainerError, Step};
use crate::ground::beneath;

/// Makes `paths` and all beneath them read-only; a path that does not exist is skipped.
pub(super) fn make_read_only(root: BorrowedFd<'_>, paths: &[String]) -> Result<(), ContainerError> {
    for path in paths {
        let object = || format!("linux.readonlyPaths {path}");
        let Some(target) = existing(root, path).step("open", object())? else {
            continue;
        };
        let copy = DetachedMount::clone_of(target.as_fd(), true).step("clone", object())?;
        copy.set_attributes(libc::MOUNT_ATTR_RDONLY, 0, true)
            .step("make read-only", object())?;
        copy.attach(target.as_fd()).step("mount", object())?;
    }
    Ok(())
}

/// Covers `paths`: files by `null`, directories by an empty one.
pub(super) fn mask(
    root: BorrowedFd<'_>,
    paths: &[String],
    null: DetachedMount,
) -> Result<(), ContainerError> {
    let mut file = Cover::Detached(null);
    let mut directory = Cover::Missing;
    for path in paths {
        let object = || format!("linux.maskedPaths {path}");
        let Some(target) = existing(root, path).step("open", object())? else {
            continue;
        };
        let stat = fstat(&target).step("read", object())?;
        let is_directory =
            SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR;
        if is_directory && matches!(directory, Cover::Missing) {
            directory = Cover::Detached(empty_directory().step("create", "an empty directory")?);
        }
        let cover = if is_directory {
            &mut directory
        } else {
            &mut file
        };
        cover.put(target.as_fd()).step("mask", object())?;
    }
    Ok(())
}

fn existing(root: BorrowedFd<'_>, path: &str) -> io::Result<Option<OwnedFd>> {
    match beneath::open(root, path) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            Ok(None)
        }
        result => result.map(Some),
    }
}

fn empty_directory() -> io::Result<DetachedMount> {
    let context = FsContext::open(c"tmpfs")?;
    context.set_string(c"nr_blocks", c"1")?;
    context.mount(
        libc::MOUNT_ATTR_RDONLY
            | libc::MOUNT_ATTR_NOSUID
            | libc::MOUNT_ATTR_NODEV
            | libc::MOUNT_ATTR_NOEXEC,
    )
}

/// One mount for all paths of a kind: only a mount that is attached can be cloned, so the first is
/// attached itself.
enum Cover {
    Missing,
    Detached(DetachedMount),
    Attached(OwnedFd),
}

impl Cover {
    fn put(&mut self, target: BorrowedFd<'_>) -> io::Result<()> {
        match std::mem::replace(self, Self::Missing) {
            Self::Missing => Err(io::Error::from_raw_os_error(libc::ENOENT)),
            Self::Detached(mount) => {
                let kept = mount.as_fd().try_clone_to_owned()?;
                mount.attach(target)?;
                *self = Self::Attached(kept);
                Ok(())
            }
            Self::Attached(kept) => {
                let copy = DetachedMount::clone_of(kept.as_fd(), false)?;
                *self = Self::Attached(kept);
                copy.attach(target)
            }
        }
    }
}
