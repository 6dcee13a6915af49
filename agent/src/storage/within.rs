//! A place within a volume that containers write: `subPath` of Kubernetes, for volumes that kubelet
//! cannot see.
//!
//! Nothing out of the volume is ever reached: the kernel resolves every path beneath the volume's
//! root (`RESOLVE_BENEATH`, openat2(2)), as a whole for what is there, and a directory is made in
//! the place that was resolved. As with kubelet, symbolic links that stay in the volume are
//! followed.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::{Mode, fchmod, mkdirat},
    unistd::fchown,
};
use pericarp_protocol::guest::Directory;

use crate::ground::beneath::{self, Links};

/// Most names of one place: as deep as paths of requests may be.
const NAMES_MAX: usize = 64;

/// Opens the place that `names` lead to from `volume`, not for reading; directories that are
/// missing are made.
pub(super) fn open(volume: BorrowedFd<'_>, names: &[Directory]) -> io::Result<OwnedFd> {
    if names.len() > NAMES_MAX {
        let reason = format!("more than {NAMES_MAX} names");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    let mut place = volume.try_clone_to_owned()?;
    let mut path = String::new();
    for directory in names {
        let name = directory.name.as_str();
        if matches!(name, "" | "." | "..") || name.contains(['/', '\0']) {
            let reason = format!("{name:?} is not a name");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        if !path.is_empty() {
            path.push('/');
        }
        path.push_str(name);
        place = match resolve(volume, &path) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                make(place.as_fd(), directory)?;
                resolve(volume, &path)?
            }
            found => found?,
        };
    }
    Ok(place)
}

fn resolve(volume: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    let place = beneath::resolve(volume, Path::new(path), Links::Beneath, OFlag::O_PATH);
    place.map_err(|error| match error.raw_os_error() {
        Some(libc::EXDEV) => io::Error::other("it leads out of the volume"),
        _ => error,
    })
}

fn make(parent: BorrowedFd<'_>, directory: &Directory) -> io::Result<()> {
    let name = directory.name.as_str();
    match mkdirat(parent, name, Mode::S_IRWXU) {
        Ok(()) => {}
        // Somebody else was here first, or a link that leads nowhere is: the next look tells.
        Err(Errno::EEXIST) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let made = openat(parent, name, flags, Mode::empty())?;
    let owner = Some(directory.owner_id.into());
    fchown(&made, owner, Some(directory.group_id.into()))?;
    fchmod(&made, Mode::from_bits_truncate(directory.mode & 0o7777))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::unix::fs::{MetadataExt, symlink},
    };

    use nix::sys::stat::fstat;
    use proptest::prelude::*;

    use super::*;

    /// A volume beside which something else is.
    fn volume() -> (tempfile::TempDir, OwnedFd) {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("volume")).unwrap();
        fs::write(folder.path().join("secret"), "").unwrap();
        let volume = File::open(folder.path().join("volume")).unwrap();
        (folder, volume.into())
    }

    fn names(path: &str) -> Vec<Directory> {
        let name = |name: &str| Directory {
            name: name.to_owned(),
            mode: 0o2751,
            owner_id: nix::unistd::getuid().as_raw(),
            group_id: nix::unistd::getgid().as_raw(),
            ..Default::default()
        };
        path.split('/').map(name).collect()
    }

    fn is_at(place: &OwnedFd, path: &Path) -> bool {
        fstat(place).unwrap().st_ino == path.metadata().unwrap().ino()
    }

    #[test]
    fn what_is_missing_is_made_as_asked() {
        let (folder, volume) = volume();
        let place = open(volume.as_fd(), &names("a/b")).unwrap();
        let made = folder.path().join("volume/a/b");
        assert!(is_at(&place, &made));
        assert_eq!(made.metadata().unwrap().mode() & 0o7777, 0o2751);
        assert!(is_at(
            &open(volume.as_fd(), &[]).unwrap(),
            &folder.path().join("volume")
        ));
    }

    #[test]
    fn what_is_there_is_taken_as_it_is() {
        let (folder, volume) = volume();
        let base = folder.path().join("volume");
        fs::create_dir(base.join("d")).unwrap();
        fs::write(base.join("d/file"), "x").unwrap();
        let before = base.join("d").metadata().unwrap().mode();
        let place = open(volume.as_fd(), &names("d/file")).unwrap();
        assert!(is_at(&place, &base.join("d/file")));
        assert_eq!(base.join("d").metadata().unwrap().mode(), before);
        symlink("d/../d", base.join("link")).unwrap();
        let place = open(volume.as_fd(), &names("link/file")).unwrap();
        assert!(is_at(&place, &base.join("d/file")));
        let error = open(volume.as_fd(), &names("d/file/x")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTDIR));
    }

    #[test]
    fn nothing_else_is_reached() {
        let (folder, volume) = volume();
        let base = folder.path().join("volume");
        symlink("../secret", base.join("up")).unwrap();
        symlink("/etc", base.join("etc")).unwrap();
        symlink("nowhere", base.join("dangling")).unwrap();
        symlink("circle", base.join("circle")).unwrap();
        for path in [
            "up",
            "etc",
            "etc/passwd",
            "dangling",
            "dangling/x",
            "circle",
        ] {
            assert!(open(volume.as_fd(), &names(path)).is_err(), "{path}");
        }
        for name in ["", ".", "..", "a/b", "a\0"] {
            let mut one = names("a");
            one[0].name = name.to_owned();
            assert!(open(volume.as_fd(), &one).is_err(), "{name:?}");
        }
        let deep = vec!["d"; NAMES_MAX + 1].join("/");
        assert!(open(volume.as_fd(), &names(&deep)).is_err());
        assert!(!base.join("nowhere").exists());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        // Whatever a container made of the volume: all that is made lies in it.
        #[test]
        fn nothing_is_made_outside(
            link in "[./ab]{1,12}",
            path in "(l|a|b)(/(l|a|b)){0,6}",
        ) {
            let (folder, volume) = volume();
            let _ = symlink(&link, folder.path().join("volume/l"));
            let _ = open(volume.as_fd(), &names(&path));
            prop_assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        }
    }
}
