//! Group ownership of a volume (`fsGroup` of Kubernetes' security context).
//!
//! As kubelet does it: every file gets the group and, for the group, reading and writing;
//! directories searching and set-group-id as well. Symbolic links are neither followed nor changed:
//! another container may be using the volume.

use std::{
    ffi::CStr,
    fs::{self, File, Permissions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::Path,
};

use nix::{
    dir::Dir,
    fcntl::{AtFlags, OFlag, openat},
    sys::stat::{FileStat, Mode, SFlag, fstat},
    unistd::{Gid, fchownat},
};
use pericarp_protocol::guest::FsGroup;

use crate::ground::files::descriptor_path;

/// Deepest directory that is entered: each level holds two descriptors.
const DEPTH_MAX: usize = 256;

const FILE_BITS: u32 = 0o660;
const DIRECTORY_BITS: u32 = 0o2770;

/// Gives the volume mounted at `root` to the group.
pub(super) fn apply(root: &Path, group: &FsGroup) -> io::Result<()> {
    let root: OwnedFd = File::open(root)?.into();
    let stat = fstat(&root)?;
    if group.on_root_mismatch
        && stat.st_gid == group.group_id
        && stat.st_mode & DIRECTORY_BITS == DIRECTORY_BITS
    {
        return Ok(());
    }
    let gid = Gid::from_raw(group.group_id);
    give_children(&root, gid, 0)?;
    // The root last: it is what says that the work is complete.
    give(&root, &stat, gid)
}

fn give_children(directory: &OwnedFd, gid: Gid, depth: usize) -> io::Result<()> {
    if depth >= DEPTH_MAX {
        return Err(io::Error::other(format!(
            "directories are nested deeper than {DEPTH_MAX}"
        )));
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut entries = Dir::openat(directory.as_fd(), c".", flags, Mode::empty())?;
    for entry in entries.iter() {
        let entry = entry?;
        let name: &CStr = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let found = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(directory, name, found, Mode::empty())?;
        let stat = fstat(&file)?;
        match kind(&stat) {
            SFlag::S_IFLNK => continue,
            SFlag::S_IFDIR => give_children(&file, gid, depth + 1)?,
            _ => {}
        }
        give(&file, &stat, gid)?;
    }
    Ok(())
}

fn give(file: &OwnedFd, stat: &FileStat, gid: Gid) -> io::Result<()> {
    fchownat(file, c"", None, Some(gid), AtFlags::AT_EMPTY_PATH)?;
    let bits = if kind(stat) == SFlag::S_IFDIR {
        DIRECTORY_BITS
    } else {
        FILE_BITS
    };
    let mode = stat.st_mode & 0o7777 | bits;
    // chmod(2) has no form for a descriptor opened by O_PATH but this one.
    fs::set_permissions(descriptor_path(file), Permissions::from_mode(mode))
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn links_are_left_alone_and_the_rest_is_given() {
        let outside = tempfile::NamedTempFile::new().unwrap();
        let before = fs::metadata(outside.path()).unwrap().mode();
        let volume = tempfile::tempdir().unwrap();
        fs::create_dir(volume.path().join("d")).unwrap();
        fs::write(volume.path().join("d/f"), "x").unwrap();
        symlink(outside.path(), volume.path().join("link")).unwrap();
        let group_id = nix::unistd::getgid().as_raw();
        let group = FsGroup {
            group_id,
            ..Default::default()
        };
        apply(volume.path(), &group).unwrap();
        let mode = |name| fs::metadata(volume.path().join(name)).unwrap().mode() & 0o7777;
        assert_eq!(mode("d") & DIRECTORY_BITS, DIRECTORY_BITS);
        assert_eq!(mode("d/f") & FILE_BITS, FILE_BITS);
        assert_eq!(fs::metadata(outside.path()).unwrap().mode(), before);
    }
}
