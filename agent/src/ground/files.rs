//! Small files of `/proc`, `/sys` and cgroupfs, and descriptors.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use tokio::io::unix::AsyncFd;

/// Largest pseudo file in bytes that is read: `memory.stat` and `/proc/self/mountinfo` of a full
/// guest stay far below.
const PSEUDO_FILE_BYTES_MAX: u64 = 4 << 20;

/// Reads a small file of a pseudo file system.
pub(crate) fn read(path: impl AsRef<Path>) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(PSEUDO_FILE_BYTES_MAX)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// Writes a value to a file of a pseudo file system with one `write(2)`, and makes no file.
pub(crate) fn write(path: impl AsRef<Path>, value: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

/// The path by which a descriptor of this process can be named in calls that take no descriptor.
pub(crate) fn descriptor_path(fd: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Registers the owner of a descriptor with the runtime, so that tasks can wait for it.
#[expect(
    deprecated,
    reason = "its successor is unsafe for owners that close early; `OwnedFd` and `Inotify` close \
        when dropped"
)]
pub(crate) fn watch<T: AsRawFd>(owner: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::new(owner)
}
