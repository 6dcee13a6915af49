//! What a disk is made from, and whether its descriptor will do.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl},
    sys::stat::{SFlag, fstat},
    unistd::{Whence, lseek64},
};

use super::request::{QUEUES_MAX, SECTOR_BYTES, SERIAL_BYTES};
use crate::devices::virtio::rate_limiter::Rates;

/// When a write is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cache {
    /// When the host's page cache has it; a flush makes it durable.
    WriteBack,
    /// When it is durable.
    WriteThrough,
    /// As [`Self::WriteBack`], and a flush is answered at once: for disks that die with the pod.
    Unsafe,
}

/// What a disk is made from.
#[derive(Debug, Clone)]
pub(crate) struct Parameters {
    /// Writes are refused.
    pub(crate) read_only: bool,
    /// What the driver reads as its serial; at most [`SERIAL_BYTES`] bytes.
    pub(crate) serial: String,
    /// Number of queues.
    pub(crate) queues: u16,
    /// When a write is complete.
    pub(crate) cache: Cache,
    /// Limits for both directions together.
    pub(crate) limit: Rates,
}

/// Why a disk could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The number of queues is out of range.
    #[error("disk {name}: {queues} queues wanted, 1 to {QUEUES_MAX} are possible")]
    Queues { name: String, queues: u16 },
    /// The serial is too long.
    #[error("disk {name}: serial is longer than {SERIAL_BYTES} bytes")]
    Serial { name: String },
    /// The descriptor is neither a file nor a block device.
    #[error("disk {name}: file is neither a regular file nor a block device")]
    Kind { name: String },
    /// The descriptor may not be used so.
    #[error("disk {name}: file is not open for {wanted}")]
    Access { name: String, wanted: &'static str },
    /// Its size cannot be read.
    #[error("disk {name}: reading the size of file: {source}")]
    Size { name: String, source: io::Error },
    /// No eventfd or timer.
    #[error("disk {name}: {source}")]
    Descriptor { name: String, source: io::Error },
}

/// Tells a regular file (true) from a block device (false), and checks that it is open as it must
/// be.
pub(super) fn check_file(name: &str, file: &OwnedFd, read_only: bool) -> Result<bool, Error> {
    let kind = fstat(file).map(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT);
    let is_file = match kind {
        Ok(SFlag::S_IFREG) => true,
        Ok(SFlag::S_IFBLK) => false,
        _ => {
            return Err(Error::Kind {
                name: name.to_owned(),
            });
        }
    };
    let flags = fcntl(file, FcntlArg::F_GETFL).unwrap_or(0);
    let access = OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE;
    let wanted = match (access, read_only) {
        (OFlag::O_RDWR, _) | (OFlag::O_RDONLY, true) => return Ok(is_file),
        (OFlag::O_RDONLY, false) => "writing: open it so, or set read_only",
        _ => "reading",
    };
    Err(Error::Access {
        name: name.to_owned(),
        wanted,
    })
}

/// Whole sectors of the file. Seeking works on block devices, and the position is used by nobody.
pub(super) fn size(file: impl AsFd) -> io::Result<u64> {
    let bytes = u64::try_from(lseek64(file.as_fd(), 0, Whence::SeekEnd)?).unwrap_or(0);
    Ok(bytes - bytes % SECTOR_BYTES)
}

/// Whether the file system can give back a range: asked about one past the end, where there is
/// nothing to lose.
pub(super) fn can_punch(file: &OwnedFd) -> bool {
    let Ok(end) = lseek64(file, 0, Whence::SeekEnd) else {
        return false;
    };
    let past_the_end = end - end % 4096 + 4096;
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, mode, past_the_end, 4096).is_ok()
}
