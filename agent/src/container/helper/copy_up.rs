//! `tmpcopyup`: a tmpfs that begins with what its mount point holds.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    dir::{Dir, Type},
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::stat::{FileStat, Mode, SFlag, fchmod, fstatat, mkdirat},
    unistd::{fchown, fchownat, symlinkat},
};

use crate::ground::beneath;

/// Deepest directory that is copied: each level holds two descriptors.
const DEPTH_MAX: usize = 64;

/// Most files that are copied; what is bigger belongs on a volume.
const ENTRIES_MAX: usize = 65_536;

/// Copies what is in the directory `from` into the directory `to`, with owners and modes. Devices
/// and sockets are left out.
pub(super) fn copy(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    let from = beneath::open_with(from.as_fd(), "/", flags)?;
    let to = beneath::open_with(to.as_fd(), "/", flags)?;
    let mut left = ENTRIES_MAX;
    copy_directory(from, &to, DEPTH_MAX, &mut left)
}

fn copy_directory(from: OwnedFd, to: &OwnedFd, depth: usize, left: &mut usize) -> io::Result<()> {
    if depth == 0 {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    let keep = from.try_clone()?;
    for entry in Dir::from_fd(from)?.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        *left = left
            .checked_sub(1)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))?;
        let stat = fstatat(&keep, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        match entry.file_type().or_else(|| file_type(&stat)) {
            Some(Type::Directory) => {
                mkdirat(to, name, Mode::S_IRWXU)?;
                let flags =
                    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let inner = openat(to, name, flags, Mode::empty())?;
                copy_directory(
                    openat(&keep, name, flags, Mode::empty())?,
                    &inner,
                    depth - 1,
                    left,
                )?;
                dress(&inner, &stat)?;
            }
            Some(Type::File) => {
                let read = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let write = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
                let mut source = File::from(openat(&keep, name, read, Mode::empty())?);
                let copy = openat(to, name, write, Mode::S_IRUSR | Mode::S_IWUSR)?;
                io::copy(&mut source, &mut File::from(copy.try_clone()?))?;
                dress(&copy, &stat)?;
            }
            Some(Type::Symlink) => {
                let target = readlinkat(&keep, name)?;
                symlinkat(target.as_os_str(), to, name)?;
                let (uid, gid) = (Some(stat.st_uid.into()), Some(stat.st_gid.into()));
                fchownat(to, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn file_type(stat: &FileStat) -> Option<Type> {
    match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFDIR => Some(Type::Directory),
        SFlag::S_IFREG => Some(Type::File),
        SFlag::S_IFLNK => Some(Type::Symlink),
        _ => None,
    }
}

/// Owner first: giving a file away takes its set-id bits.
fn dress(file: &OwnedFd, stat: &FileStat) -> io::Result<()> {
    fchown(file, Some(stat.st_uid.into()), Some(stat.st_gid.into()))?;
    Ok(fchmod(file, Mode::from_bits_truncate(stat.st_mode))?)
}
