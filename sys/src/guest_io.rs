//! `readv` and `writev` straight to and from guest memory: no copy, and no reference to memory that
//! the guest may change.
//!
//! A [`Segment`] is what a guest names: an address and a length, not yet checked. [`vectors`] is
//! the one place that turns segments into pointers, and refuses what is outside the guest's memory.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// The most vectors that one call takes (`UIO_MAXIOV` of the kernel).
pub const VECTORS_MAX: usize = 1024;

/// A range of guest memory as a guest named it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub address: GuestAddress,
    /// Its length in bytes.
    pub len: usize,
}

/// Reads from `file` at its position into the segments, in their order.
///
/// # Errors
/// A segment lies outside guest memory (`EFAULT`), there are more than [`VECTORS_MAX`] vectors
/// (`EINVAL`), or what `readv` answers.
pub fn read(
    file: BorrowedFd<'_>,
    memory: &GuestMemoryMmap,
    segments: &[Segment],
) -> io::Result<usize> {
    let vectors = vectors(memory, segments)?;
    // SAFETY:
    // - `vectors` holds pointer and length of ranges that lie inside mappings of `memory`, which
    //   the borrow keeps alive.
    // - The kernel writes there as another party of shared memory: Rust code only reads it by
    //   volatile accesses.
    let rc = unsafe { libc::readv(file.as_raw_fd(), vectors.as_ptr(), count(&vectors)) };
    usize::try_from(rc).map_err(|_| io::Error::last_os_error())
}

/// Writes the segments, in their order, to `file` at its position.
///
/// # Errors
/// As [`read`].
pub fn write(
    file: BorrowedFd<'_>,
    memory: &GuestMemoryMmap,
    segments: &[Segment],
) -> io::Result<usize> {
    let vectors = vectors(memory, segments)?;
    // SAFETY: as in `read`; the kernel only reads from the ranges.
    let rc = unsafe { libc::writev(file.as_raw_fd(), vectors.as_ptr(), count(&vectors)) };
    usize::try_from(rc).map_err(|_| io::Error::last_os_error())
}

/// Turns segments into pointers. A segment that crosses from one region into an adjoining one
/// becomes two vectors.
pub(crate) fn vectors(
    memory: &GuestMemoryMmap,
    segments: &[Segment],
) -> io::Result<Vec<libc::iovec>> {
    let mut vectors = Vec::with_capacity(segments.len());
    for segment in segments {
        for slice in memory.get_slices(segment.address, segment.len) {
            let slice = slice.map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
            if vectors.len() == VECTORS_MAX {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            vectors.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
    }
    Ok(vectors)
}

fn count(vectors: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(vectors.len()).expect("bounded by VECTORS_MAX")
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Seek, Write},
        os::fd::AsFd,
    };

    use vm_memory::Bytes;

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 0x1000),
            (GuestAddress(0x1000), 0x1000),
            (GuestAddress(0x8000), 0x1000),
        ])
        .unwrap()
    }

    fn segment(address: u64, len: usize) -> Segment {
        Segment {
            address: GuestAddress(address),
            len,
        }
    }

    #[test]
    fn segments_across_adjoining_regions_round_trip() {
        let memory = memory();
        let path = std::env::temp_dir().join(format!("guest-io-{}", std::process::id()));
        let mut file = std::fs::File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all(b"0123456789").unwrap();
        file.rewind().unwrap();
        let segments = [segment(0xffc, 8), segment(0x8000, 2)];
        assert_eq!(read(file.as_fd(), &memory, &segments).unwrap(), 10);
        let mut seen = [0; 8];
        memory.read_slice(&mut seen, GuestAddress(0xffc)).unwrap();
        assert_eq!(&seen, b"01234567");

        file.rewind().unwrap();
        assert_eq!(write(file.as_fd(), &memory, &segments[..1]).unwrap(), 8);
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "0123456789");
    }

    #[test]
    fn segments_outside_memory_are_refused() {
        let memory = memory();
        for bad in [
            segment(0x2000, 1),
            segment(0x1fff, 2),
            segment(u64::MAX, 2),
            segment(0x8fff, 0x1000),
            segment(0, usize::MAX),
        ] {
            assert_eq!(
                vectors(&memory, &[segment(0, 4), bad])
                    .unwrap_err()
                    .raw_os_error(),
                Some(libc::EFAULT),
                "{bad:?}"
            );
        }
        assert!(vectors(&memory, &vec![segment(0, 1); VECTORS_MAX]).is_ok());
        assert_eq!(
            vectors(&memory, &vec![segment(0, 1); VECTORS_MAX + 1])
                .unwrap_err()
                .raw_os_error(),
            Some(libc::EINVAL)
        );
    }
}
