//! Read-only and back: an attribute of each mount, which does not propagate.
//!
//! The file-system daemon has copies of our mounts in a namespace of its own, and theirs is what
//! the guest meets. A thread joins that namespace to change them. A copy is known by the peer group
//! that it receives mounts from: ours.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat},
    sched::{CloneFlags, setns, unshare},
    sys::stat::Mode,
};
use pericarp_sys::mount_tree;

use crate::storage::mountinfo::{self, Mount};

/// The file-system daemon.
#[derive(Debug)]
pub(super) struct Daemon {
    /// Its directory in `/proc`, whose files are gone with it.
    process: OwnedFd,
    /// Where it has the shared directory.
    root: PathBuf,
}

impl Daemon {
    /// The process `pid`, a child of this one, which has the shared directory at `root`.
    pub(super) fn of(pid: i32, root: &Path) -> io::Result<Self> {
        let process = File::open(format!("/proc/{pid}"))?;
        Ok(Self {
            process: process.into(),
            root: root.to_owned(),
        })
    }

    fn open(&self, name: &str) -> io::Result<File> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        Ok(openat(&self.process, name, flags, Mode::empty())?.into())
    }

    fn mounts(&self) -> io::Result<Vec<Mount>> {
        let mut text = Vec::new();
        self.open("mountinfo")?.read_to_end(&mut text)?;
        Ok(mountinfo::parse(&text))
    }
}

/// A mount to be changed: it must be the one with that id.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    path: PathBuf,
    id: u64,
}

/// Makes the mounts at `own` beneath `shared`/`name` read-only or writable, here and for the
/// daemon. Those that are gone are passed over.
pub(super) fn set_read_only(
    (shared, name): (&Path, &Path),
    own: &[PathBuf],
    daemon: &Daemon,
    read_only: bool,
) -> io::Result<()> {
    let ours = mountinfo::parse(&fs::read(mountinfo::OWN)?);
    let theirs = daemon.mounts()?;
    let (point, their_point) = (shared.join(name), daemon.root.join(name));
    let (here, there) = targets(&ours, &theirs, &point, &their_point, own)?;
    let namespace = daemon.open("ns/mnt")?;
    change_or_undo(&here, read_only)?;
    let change = || {
        // Only a thread with a root of its own can change to another mount namespace.
        unshare(CloneFlags::CLONE_FS)?;
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNS)?;
        change_or_undo(&there, read_only)
    };
    let changed = thread::scope(|scope| scope.spawn(change).join());
    let changed = changed.unwrap_or_else(|_| Err(io::Error::other("a thread panicked")));
    if changed.is_err() {
        let _ = change_all(&here, !read_only);
    }
    changed
}

/// The mounts at `own` beneath `point` here, and their copies beneath `their_point`.
fn targets(
    ours: &[Mount],
    theirs: &[Mount],
    point: &Path,
    their_point: &Path,
    own: &[PathBuf],
) -> io::Result<(Vec<Target>, Vec<Target>)> {
    let (mut here, mut there) = (Vec::new(), Vec::new());
    for way in own {
        let (path, their_path) = (join(point, way), join(their_point, way));
        let Some(mount) = ours.iter().rfind(|mount| mount.point == path) else {
            continue;
        };
        let copy = theirs.iter().rfind(|copy| {
            copy.point == their_path && mount.shared.is_some() && copy.master == mount.shared
        });
        if let Some(copy) = copy {
            there.push(Target {
                path: their_path,
                id: copy.id,
            });
            here.push(Target { path, id: mount.id });
        } else if way.as_os_str().is_empty() {
            let reason = "the file-system daemon does not have the mount";
            return Err(io::Error::other(reason));
        }
    }
    Ok((here, there))
}

/// Without the slash that joining an empty path leaves at the end.
fn join(point: &Path, way: &Path) -> PathBuf {
    if way.as_os_str().is_empty() {
        point.to_owned()
    } else {
        point.join(way)
    }
}

/// Changes all, or none if it can be helped.
fn change_or_undo(targets: &[Target], read_only: bool) -> io::Result<()> {
    change_all(targets, read_only).inspect_err(|_| {
        let _ = change_all(targets, !read_only);
    })
}

fn change_all(targets: &[Target], read_only: bool) -> io::Result<()> {
    let (set, clear) = if read_only {
        (libc::MOUNT_ATTR_RDONLY, 0)
    } else {
        (0, libc::MOUNT_ATTR_RDONLY)
    };
    let root = File::open("/")?;
    for target in targets {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let mount = nix::fcntl::openat2(&root, &target.path, how)?;
        if mount_tree::mount_id(mount.as_fd())? != target.id {
            return Err(io::Error::other(format!(
                "{}: something else was mounted there meanwhile",
                target.path.display()
            )));
        }
        mount_tree::set_attributes(mount.as_fd(), set, clear, false)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_known_by_their_peer_group() {
        let ours = mountinfo::parse(
            b"40 1 8:1 / /s/1 ro shared:7 - ext4 d rw\n\
              41 40 8:2 / /s/1/in ro shared:8 - ext4 e rw\n\
              42 40 8:3 / /s/1/late ro shared:9 - ext4 f rw\n",
        );
        let theirs = mountinfo::parse(
            b"50 1 8:1 / /1 ro master:7 - ext4 d rw\n\
              51 50 8:2 / /1/in ro master:8 - ext4 e rw\n\
              52 50 8:9 / /1/late ro master:1 - ext4 x rw\n",
        );
        let own: Vec<PathBuf> = ["", "in", "late", "gone"].map(PathBuf::from).into();
        let find = |theirs| targets(&ours, theirs, Path::new("/s/1"), Path::new("/1"), &own);
        let (here, there) = find(&theirs).unwrap();
        let target = |path: &str, id| Target {
            path: path.into(),
            id,
        };
        assert_eq!(here, [target("/s/1", 40), target("/s/1/in", 41)]);
        assert_eq!(there, [target("/1", 50), target("/1/in", 51)]);
        assert!(find(&theirs[1..]).is_err());
    }
}
