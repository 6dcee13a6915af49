//! Paths of an image, resolved beneath its root only.
//!
//! What exists is resolved by the kernel (`RESOLVE_IN_ROOT`, openat2(2)). What does not exist yet
//! is made name by name, each opened without following it, so that a symbolic link is read by us
//! and leads no further than the root, and a link that is changed meanwhile leads to an error at
//! worst.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat},
    sys::stat::{Mode, SFlag, fstat, mkdirat},
};

/// Most symbolic links on the way of one path: `MAXSYMLINKS` of the kernel.
const LINKS_MAX: usize = 40;

/// Most names of one path, those of links included: PATH_MAX holds no more.
const NAMES_MAX: usize = 4096;

/// What to make where nothing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Make {
    Directory,
    File,
}

/// Opens `path` beneath `root` as a place, not for reading.
pub(super) fn open(root: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    open_with(root, path, OFlag::O_PATH)
}

/// Opens `path` beneath `root` as a place; a symbolic link is an error, wherever in `path` it is.
pub(super) fn open_without_links(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS,
        );
    Ok(openat2(root, path, how)?)
}

/// Opens `path` beneath `root` with `flags`.
pub(super) fn open_with(root: BorrowedFd<'_>, path: &str, flags: OFlag) -> io::Result<OwnedFd> {
    let path = if path.trim_matches('/').is_empty() {
        "."
    } else {
        path
    };
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    loop {
        match openat2(root, path, how) {
            // EAGAIN: something was renamed while the kernel resolved ".."; openat2(2) says to try
            // again.
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            result => return Ok(result?),
        }
    }
}

/// Opens `path` beneath `root` as a place and makes what is missing: directories on the way, and
/// `make` at its end.
pub(super) fn create(root: BorrowedFd<'_>, path: &str, make: Make) -> io::Result<OwnedFd> {
    match open(root, path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        result => return result,
    }
    let mut walk = Walk::new(root, path)?;
    while let Some(name) = walk.next_name() {
        let last = walk.names.is_empty();
        walk.enter(&name, if last { make } else { Make::Directory })?;
    }
    walk.into_place()
}

/// The directory of `path` beneath `root`, made when missing, and the last name, whose own link is
/// not followed.
pub(super) fn parent(root: BorrowedFd<'_>, path: &str) -> io::Result<(OwnedFd, String)> {
    let trimmed = path.trim_end_matches('/');
    let (directory, name) = trimmed.rsplit_once('/').unwrap_or(("", trimmed));
    if matches!(name, "" | "." | "..") || name.contains('\0') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok((create(root, directory, Make::Directory)?, name.to_owned()))
}

/// Where a walk stands: the directories from the root on, and the names that are left.
struct Walk {
    root: OwnedFd,
    places: Vec<OwnedFd>,
    names: VecDeque<String>,
    links: usize,
}

impl Walk {
    fn new(root: BorrowedFd<'_>, path: &str) -> io::Result<Self> {
        let root = root.try_clone_to_owned()?;
        let mut walk = Self {
            root,
            places: Vec::new(),
            names: VecDeque::new(),
            links: 0,
        };
        walk.prepend(path)?;
        Ok(walk)
    }

    fn prepend(&mut self, path: &str) -> io::Result<()> {
        let names = path.split('/').filter(|name| !matches!(*name, "" | "."));
        for name in names.collect::<Vec<_>>().into_iter().rev() {
            self.names.push_front(name.to_owned());
        }
        if self.names.len() > NAMES_MAX {
            return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        }
        Ok(())
    }

    fn next_name(&mut self) -> Option<String> {
        self.names.pop_front()
    }

    fn place(&self) -> BorrowedFd<'_> {
        self.places.last().unwrap_or(&self.root).as_fd()
    }

    fn into_place(mut self) -> io::Result<OwnedFd> {
        Ok(self.places.pop().unwrap_or(self.root))
    }

    fn enter(&mut self, name: &str, make: Make) -> io::Result<()> {
        if name == ".." {
            // Above the root is the root.
            self.places.pop();
            return Ok(());
        }
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let found = match openat(self.place(), name, flags, Mode::empty()) {
            Err(Errno::ENOENT) => {
                self.make(name, make)?;
                openat(self.place(), name, flags, Mode::empty())?
            }
            result => result?,
        };
        let kind = SFlag::from_bits_truncate(fstat(&found)?.st_mode) & SFlag::S_IFMT;
        if kind != SFlag::S_IFLNK {
            self.places.push(found);
            return Ok(());
        }
        self.links += 1;
        if self.links > LINKS_MAX {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        let target = readlinkat(&found, "")?;
        let target = target
            .to_str()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EILSEQ))?;
        if target.starts_with('/') {
            self.places.clear();
        }
        self.prepend(target)
    }

    fn make(&self, name: &str, make: Make) -> io::Result<()> {
        let made = match make {
            Make::Directory => mkdirat(self.place(), name, Mode::from_bits_truncate(0o755)),
            Make::File => {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
                openat(self.place(), name, flags, Mode::from_bits_truncate(0o644)).map(drop)
            }
        };
        match made {
            // Somebody else made it between our look and now; what it is shows when it is opened.
            Err(Errno::EEXIST) | Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::unix::fs::symlink,
    };

    use proptest::prelude::*;

    use super::*;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("root")).unwrap();
        let root = File::open(folder.path().join("root")).unwrap();
        (folder, root.into())
    }

    #[test]
    fn missing_things_are_made_beneath() {
        let (folder, root) = root();
        create(root.as_fd(), "/a/b/c", Make::File).unwrap();
        assert!(folder.path().join("root/a/b/c").is_file());
        create(root.as_fd(), "a/d/", Make::Directory).unwrap();
        assert!(folder.path().join("root/a/d").is_dir());
    }

    #[test]
    fn dangling_links_lead_beneath_too() {
        let (folder, root) = root();
        let base = folder.path().join("root");
        fs::create_dir(base.join("etc")).unwrap();
        symlink("../run/resolve/resolv.conf", base.join("etc/resolv.conf")).unwrap();
        create(root.as_fd(), "/etc/resolv.conf", Make::File).unwrap();
        assert!(base.join("run/resolve/resolv.conf").is_file());
        symlink("/../../../escaped", base.join("out")).unwrap();
        create(root.as_fd(), "/out/file", Make::File).unwrap();
        assert!(base.join("escaped/file").is_file());
        assert!(!folder.path().join("escaped").exists());
    }

    #[test]
    fn circles_end() {
        let (folder, root) = root();
        let base = folder.path().join("root");
        symlink("two", base.join("one")).unwrap();
        symlink("one", base.join("two")).unwrap();
        let error = create(root.as_fd(), "/one", Make::File).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn the_last_name_is_not_followed_for_a_parent() {
        let (folder, root) = root();
        symlink("/etc/passwd", folder.path().join("root/null")).unwrap();
        let (_, name) = parent(root.as_fd(), "/null").unwrap();
        assert_eq!(name, "null");
        assert!(parent(root.as_fd(), "/a/..").is_err());
        assert!(parent(root.as_fd(), "/a/\0").is_err());
        assert!(parent(root.as_fd(), "/").is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        // Any path through any link stays beneath: everything that is made lies in `root`.
        #[test]
        fn nothing_is_made_outside(
            link in "[./a]{1,12}",
            path in "(l|a|b|\\.|\\.\\.)(/(l|a|b|\\.|\\.\\.)){0,6}",
        ) {
            let (folder, root) = root();
            let _ = symlink(&link, folder.path().join("root/l"));
            let _ = create(root.as_fd(), &path, Make::Directory);
            let outside: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
            prop_assert_eq!(outside.len(), 1);
        }
    }
}
