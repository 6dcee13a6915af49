//! What a path of the host stands for: a place in a file system, whatever mounts lead to it.
//!
//! kubelet gives a container a `subPath` as a bind mount of its own, and the same volume has other
//! paths for other containers. The mount that a path ends in tells its file system and the path in
//! there (proc_pid_mountinfo(5)), which are the same for all of them.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use pericarp_sys::mount_tree;

use crate::storage::mountinfo::{self, Mount};

/// A file or directory of the host, opened with `O_PATH`.
#[derive(Debug)]
pub(super) struct Source {
    file: File,
    /// Device and inode number.
    pub(super) identity: (u64, u64),
    /// Whether it is a directory.
    pub(super) is_directory: bool,
}

/// Where a source is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Location {
    /// `major:minor` of its file system.
    pub(super) device: String,
    /// Its path within the file system.
    pub(super) path: PathBuf,
    /// Its path on the host, without symbolic links.
    pub(super) host_path: PathBuf,
    /// The mount that it was reached by refuses writes.
    pub(super) read_only: bool,
}

impl Source {
    /// Opens `path`, which is followed if it is a link.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = libc::O_PATH | libc::O_CLOEXEC;
        Self::of(File::options().read(true).custom_flags(flags).open(path)?)
    }

    fn of(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            identity: (metadata.dev(), metadata.ino()),
            is_directory: metadata.is_dir(),
            file,
        })
    }

    /// Opens what is at `way` beneath this directory. No symbolic link is followed and no mount is
    /// crossed on the way: behind a mount lies something that other paths do not lead to.
    pub(super) fn beneath(&self, way: &Path) -> io::Result<Self> {
        if way.as_os_str().is_empty() {
            return Self::of(self.file.try_clone()?);
        }
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(
                ResolveFlag::RESOLVE_BENEATH
                    | ResolveFlag::RESOLVE_NO_SYMLINKS
                    | ResolveFlag::RESOLVE_NO_MAGICLINKS
                    | ResolveFlag::RESOLVE_NO_XDEV,
            );
        Self::of(openat2(&self.file, way, how)?.into())
    }

    /// Whether what is at `way` beneath this directory is `other`.
    pub(super) fn leads_to(&self, way: &Path, other: &Self) -> bool {
        self.beneath(way)
            .is_ok_and(|found| found.identity == other.identity)
    }

    /// Where it is; `None` when no path leads to it, because it was deleted or its mount detached.
    pub(super) fn location(&self, mounts: &[Mount]) -> io::Result<Option<Location>> {
        let id = mount_tree::mount_id(self.file.as_fd())?;
        let link = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let host_path = fs::read_link(link)?;
        Ok(locate(mounts, id, host_path))
    }
}

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Where `host_path` is, which ends in the mount `id`. The kernel appends ` (deleted)` to the path
/// of what was deleted: what is found there, if anything, is then something else, which the caller
/// finds out by its inode.
fn locate(mounts: &[Mount], id: u64, host_path: PathBuf) -> Option<Location> {
    let mount = mounts.iter().find(|mount| mount.id == id)?;
    let mut path = Path::new("/").join(mountinfo::plain(&mount.root)?);
    let beneath = host_path.strip_prefix(&mount.point).ok()?;
    if !beneath.as_os_str().is_empty() {
        path.push(beneath);
    }
    Some(Location {
        device: mount.device.clone(),
        path,
        host_path,
        read_only: mount.is_read_only(),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const MOUNTS: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
80 22 8:2 / /k/pods/u/volumes/kubernetes.io~csi/pv rw - ext4 /dev/sdb rw
81 22 8:2 /a\\040b/c /k/pods/u/volume-subpaths/pv/app/0 rw - ext4 /dev/sdb rw
82 22 8:1 /k/pods/u/volumes/kubernetes.io~empty-dir/e/sub /k/pods/u/volume-subpaths/e/app/1 rw - \
ext4 /dev/sda1 rw
83 22 8:2 /gone//deleted /k/pods/u/volume-subpaths/pv/app/2 rw - ext4 /dev/sdb rw
";

    fn located(id: u64, host_path: &str) -> Option<(String, String)> {
        let found = locate(&mountinfo::parse(MOUNTS.as_bytes()), id, host_path.into())?;
        assert_eq!(found.host_path, Path::new(host_path));
        Some((found.device, found.path.to_str().unwrap().to_owned()))
    }

    #[test]
    fn a_bind_mount_is_where_its_file_system_has_it() {
        let at = |device: &str, path: &str| Some((device.to_owned(), path.to_owned()));
        let pv = "/k/pods/u/volumes/kubernetes.io~csi/pv";
        assert_eq!(located(80, pv), at("8:2", "/"));
        assert_eq!(located(80, &format!("{pv}/a b/c")), at("8:2", "/a b/c"));
        let sub = "/k/pods/u/volume-subpaths/pv/app/0";
        assert_eq!(located(81, sub), at("8:2", "/a b/c"));
        assert_eq!(located(81, &format!("{sub}/d")), at("8:2", "/a b/c/d"));
        let empty = "/k/pods/u/volumes/kubernetes.io~empty-dir/e/sub";
        assert_eq!(
            located(82, "/k/pods/u/volume-subpaths/e/app/1"),
            at("8:1", empty)
        );
        assert_eq!(located(22, empty), at("8:1", empty));
        assert_eq!(located(22, "/"), at("8:1", "/"));
    }

    #[test]
    fn what_has_no_path_is_nowhere() {
        assert_eq!(located(83, "/k/pods/u/volume-subpaths/pv/app/2"), None);
        assert_eq!(located(99, "/k"), None);
        assert_eq!(located(80, "/k/pods/u/volumes/kubernetes.io~csi/pvx"), None);
    }

    #[test]
    fn ways_lead_neither_out_nor_through_links() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("a/b")).unwrap();
        symlink("a", folder.path().join("link")).unwrap();
        let whole = Source::open(folder.path()).unwrap();
        let inside = Source::open(&folder.path().join("a/b")).unwrap();
        assert!(whole.is_directory && whole.leads_to(Path::new("a/b"), &inside));
        assert!(whole.leads_to(Path::new(""), &whole));
        for way in ["a", "link/b", "../x", "/", "missing"] {
            assert!(!whole.leads_to(Path::new(way), &inside), "{way}");
        }
        assert!(!whole.leads_to(
            Path::new("link"),
            &Source::open(&folder.path().join("a")).unwrap()
        ));
    }
}
