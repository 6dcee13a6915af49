//! Resolves paths beneath a directory whose content is not trusted: a root file system, a volume,
//! or what the host shares.
//!
//! The kernel resolves them (openat2(2)), and [`Links`] says how symbolic links are treated. Links
//! are read here only where something must be created on the way beneath a root file system. Such a
//! link never leads out of the root, and a link that changes meanwhile causes an error at worst.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path},
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

/// Deepest path of a request, in components.
const PATH_COMPONENTS_MAX: usize = 64;

/// How often a path is resolved again because something on it was renamed meanwhile.
const ATTEMPTS_MAX: usize = 64;

/// What becomes of a symbolic link on a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Links {
    /// It is an error. Mounts are crossed.
    Refused,
    /// It is followed as long as it stays beneath the directory and on its mount.
    Beneath,
    /// It is followed as in a process whose root is the directory.
    InRoot,
}

/// What to make where nothing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Make {
    Directory,
    File,
}

/// Opens `path` beneath `directory` with `flags`.
pub(crate) fn resolve(
    directory: BorrowedFd<'_>,
    path: &Path,
    links: Links,
    flags: OFlag,
) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let resolve = match links {
        Links::Refused => ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS,
        Links::Beneath => ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_XDEV,
        Links::InRoot => ResolveFlag::RESOLVE_IN_ROOT,
    };
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(resolve | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let mut attempts = 0;
    loop {
        attempts += 1;
        match openat2(directory, path, how) {
            // EAGAIN: something was renamed while the kernel resolved ".."; openat2(2) says to try
            // again.
            Err(Errno::EAGAIN | Errno::EINTR) if attempts < ATTEMPTS_MAX => {}
            result => return Ok(result?),
        }
    }
}

/// Opens `path` beneath `root`, a root file system, as a place, not for reading.
pub(crate) fn open(root: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    open_with(root, path, OFlag::O_PATH)
}

/// Opens `path` beneath `root`, a root file system, with `flags`.
pub(crate) fn open_with(root: BorrowedFd<'_>, path: &str, flags: OFlag) -> io::Result<OwnedFd> {
    let path = path.trim_start_matches('/');
    resolve(root, Path::new(path), Links::InRoot, flags)
}

/// The components of an absolute `path` beneath `base`, if it lies strictly beneath it and holds no
/// `..`.
pub(crate) fn components<'a>(base: &Path, path: &'a Path) -> Option<Vec<&'a str>> {
    let rest = path.strip_prefix(base).ok()?;
    let mut names = Vec::new();
    for component in rest.components() {
        match component {
            Component::Normal(name) => names.push(name.to_str()?),
            _ => return None,
        }
    }
    (!names.is_empty() && names.len() <= PATH_COMPONENTS_MAX).then_some(names)
}

/// Opens `names` beneath `base` as a place without following links, and makes what is missing:
/// directories on the way, and `missing` at the end. Without `missing` nothing is made.
pub(crate) fn open_names(
    base: &Path,
    names: &[&str],
    missing: Option<Make>,
) -> io::Result<OwnedFd> {
    let mut directory: OwnedFd = File::open(base)?.into();
    for (index, name) in names.iter().enumerate() {
        let last = index + 1 == names.len();
        // Without `O_NOFOLLOW`: with it openat2(2) would open a last component that is a link,
        // rather than refuse it.
        let open = |directory: &OwnedFd| {
            resolve(
                directory.as_fd(),
                Path::new(name),
                Links::Refused,
                OFlag::O_PATH,
            )
        };
        directory = match (open(&directory), missing) {
            (Err(error), Some(missing)) if error.kind() == io::ErrorKind::NotFound => {
                let (missing, file_mode) = (if last { missing } else { Make::Directory }, 0o600);
                make(directory.as_fd(), name, missing, file_mode)?;
                open(&directory)?
            }
            (result, _) => result?,
        };
    }
    Ok(directory)
}

fn make(parent: BorrowedFd<'_>, name: &str, make: Make, file_mode: u32) -> io::Result<()> {
    let made = match make {
        Make::Directory => mkdirat(parent, name, Mode::from_bits_truncate(0o755)),
        Make::File => {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
            openat(parent, name, flags, Mode::from_bits_truncate(file_mode)).map(drop)
        }
    };
    match made {
        // Somebody else made it between our look and now; what it is shows when it is opened.
        Err(Errno::EEXIST) | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Opens `path` beneath `root` as a place and makes what is missing: directories on the way, and
/// `make` at its end.
pub(crate) fn create(root: BorrowedFd<'_>, path: &str, make: Make) -> io::Result<OwnedFd> {
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
pub(crate) fn parent(root: BorrowedFd<'_>, path: &str) -> io::Result<(OwnedFd, String)> {
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
                self::make(self.place(), name, make, 0o644)?;
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
}

#[cfg(test)]
#[path = "beneath_tests.rs"]
mod tests;
