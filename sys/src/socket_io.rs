//! Sends from and receives into guest memory over a stream socket: no copy, no blocking, no
//! SIGPIPE.
//!
//! The ranges come as [`VolatileSlice`]s, which only guest memory hands out and which carry the
//! proof that they lie inside it.

use std::{
    io, mem,
    os::fd::{AsRawFd, BorrowedFd},
};

use vm_memory::VolatileSlice;

/// Ranges that one call takes; a caller with more gets a short count and calls again. A guest's
/// packet is one to two ranges, or a page list of up to 17 with zero-copy sends.
pub const RANGES_MAX: usize = 32;

/// Receives into `ranges`, in their order, and returns the count of bytes; 0 is the end of the
/// stream.
///
/// # Errors
/// `WouldBlock` when nothing is there, whatever the socket's own mode is; else what `recvmsg`
/// answers.
pub fn receive(socket: BorrowedFd<'_>, ranges: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut vectors = vectors(ranges);
    let mut message = message(&mut vectors, ranges.len());
    // SAFETY:
    // - `message` points to `vectors`, which outlives the call, and counts no more entries than
    //   were filled.
    // - Each entry is pointer and length of a `VolatileSlice`, valid for writes for the life of the
    //   borrow.
    // - The kernel writes there as another party of shared memory: Rust code only reads it by
    //   volatile accesses.
    let rc = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    usize::try_from(rc).map_err(|_| io::Error::last_os_error())
}

/// Sends `ranges`, in their order, and returns the count of bytes that the socket took.
///
/// # Errors
/// `WouldBlock` when the socket is full, whatever its own mode is; `BrokenPipe` when the other end
/// reads no more (no signal is raised); else what `sendmsg` answers.
pub fn send(socket: BorrowedFd<'_>, ranges: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut vectors = vectors(ranges);
    let message = message(&mut vectors, ranges.len());
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: as in `receive`; the kernel only reads from the ranges.
    let rc = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
    usize::try_from(rc).map_err(|_| io::Error::last_os_error())
}

fn vectors(ranges: &[VolatileSlice<'_>]) -> [libc::iovec; RANGES_MAX] {
    let mut vectors = [libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }; RANGES_MAX];
    for (vector, range) in vectors.iter_mut().zip(ranges) {
        vector.iov_base = range.ptr_guard_mut().as_ptr().cast();
        vector.iov_len = range.len();
    }
    vectors
}

fn message(vectors: &mut [libc::iovec; RANGES_MAX], ranges: usize) -> libc::msghdr {
    // SAFETY: all-zero bytes are a valid `msghdr`: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = ranges.min(RANGES_MAX);
    message
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::{fd::AsFd, unix::net::UnixStream},
    };

    use super::*;

    #[test]
    fn ranges_go_and_come_in_order() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let (mut one, mut two) = ([0u8; 3], [0u8; 4]);
        near.write_all(b"abcdefg").unwrap();
        let ranges = [
            VolatileSlice::from(&mut one[..]),
            VolatileSlice::from(&mut two[..]),
        ];
        assert_eq!(receive(far.as_fd(), &ranges).unwrap(), 7);
        assert_eq!(send(far.as_fd(), &ranges).unwrap(), 7);
        let mut back = [0; 7];
        near.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"abcdefg");
        assert_eq!((&one, &two), (b"abc", b"defg"));
    }

    #[test]
    fn neither_direction_blocks_or_signals() {
        let (near, far) = UnixStream::pair().unwrap();
        let mut bytes = vec![7u8; 64 << 10];
        let ranges = [VolatileSlice::from(&mut bytes[..])];
        let error = receive(far.as_fd(), &ranges).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        // Bounded by the socket's buffer, which the kernel keeps far below 1024 x 64 KiB.
        let error = (0..1024)
            .find_map(|_| send(far.as_fd(), &ranges).err())
            .unwrap();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(near);
        let error = send(far.as_fd(), &ranges).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn more_ranges_than_a_call_takes_give_a_short_count() {
        let (_near, far) = UnixStream::pair().unwrap();
        let mut bytes = [1u8; RANGES_MAX + 9];
        let ranges: Vec<_> = bytes.chunks_mut(1).map(VolatileSlice::from).collect();
        assert_eq!(send(far.as_fd(), &ranges).unwrap(), RANGES_MAX);
    }
}
