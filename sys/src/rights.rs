//! Receives bytes together with descriptors (`SCM_RIGHTS` of unix(7)).
//!
//! `nix` fails when the kernel had to leave descriptors out, and leaks those that it did install.
//! Here they are owned in any case, and the caller learns that some are missing.

use std::{
    io, mem,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// The most descriptors of one message (`SCM_MAX_FD` of the kernel).
pub(crate) const DESCRIPTORS_MAX: usize = 253;

/// Words that hold the control message of [`DESCRIPTORS_MAX`] descriptors, and their alignment.
const CONTROL_WORDS: usize = (size_of::<libc::cmsghdr>()
    + DESCRIPTORS_MAX * size_of::<libc::c_int>())
.div_ceil(size_of::<u64>());

/// What one call received.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) length: usize,
    pub(crate) descriptors: Vec<OwnedFd>,
    /// The buffer was too small for the message.
    pub(crate) bytes_lost: bool,
    /// The process could not take all descriptors.
    pub(crate) descriptors_lost: bool,
}

/// Receives once; descriptors are close-on-exec.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    receive_into(socket, buffer, &mut [0; CONTROL_WORDS])
}

fn receive_into(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    control: &mut [u64],
) -> io::Result<Received> {
    let mut vector = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all-zero bytes are a valid `msghdr`: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(control);
    // SAFETY: `message` names the two exclusively borrowed buffers with their lengths, and both
    // outlive the call.
    let rc = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let length = usize::try_from(rc).map_err(|_| io::Error::last_os_error())?;
    Ok(Received {
        length,
        // SAFETY: the kernel has filled `message` and its control buffer in this call.
        descriptors: unsafe { take_descriptors(&message) },
        bytes_lost: message.msg_flags & libc::MSG_TRUNC != 0,
        descriptors_lost: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// # Safety
/// The kernel has just filled `message`, and nobody else takes its descriptors.
unsafe fn take_descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: the kernel set the length of the control buffer to what it filled, whose headers say
    // how long their data is; the macros stay inside it.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: as above; headers are aligned because the buffer is.
    while let Some(header) = unsafe { next.as_ref() } {
        if (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: computes a size and touches no memory.
            let head_bytes = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = header.cmsg_len.saturating_sub(head_bytes) / size_of::<libc::c_int>();
            // SAFETY: as above.
            let data = unsafe { libc::CMSG_DATA(next) }.cast::<libc::c_int>();
            for index in 0..count {
                // SAFETY: the header counts this many numbers. The kernel has just made these
                // descriptors for this message, so nothing else owns them.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(data.add(index).read_unaligned()) });
            }
        }
        // SAFETY: as above.
        next = unsafe { libc::CMSG_NXTHDR(message, next) };
    }
    descriptors
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, os::fd::AsFd};

    use super::*;
    use crate::seqpacket;

    #[test]
    fn descriptors_without_room_are_told_and_none_leaks() {
        /// Room for two of the three.
        const WORDS: usize = 3;
        let (left, right) = seqpacket::pair().unwrap();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        seqpacket::send(left.as_fd(), b"hello", &[writer.as_fd(); 3]).unwrap();
        drop(writer);
        let mut buffer = [0; 8];
        let received = receive_into(right.as_fd(), &mut buffer, &mut [0; WORDS]).unwrap();
        assert_eq!(&buffer[..received.length], b"hello");
        assert!(received.descriptors_lost);
        assert_eq!(received.descriptors.len(), 2);
        drop(received);
        let end = File::from(reader).read(&mut buffer).unwrap();
        assert_eq!(end, 0, "all writers are closed");
    }

    #[test]
    fn as_many_as_the_kernel_sends_are_taken() {
        let (left, right) = seqpacket::pair().unwrap();
        let sent = [left.as_fd(); DESCRIPTORS_MAX];
        seqpacket::send(left.as_fd(), b"hello", &sent).unwrap();
        let received = receive(right.as_fd(), &mut [0; 8]).unwrap();
        assert_eq!(received.descriptors.len(), DESCRIPTORS_MAX);
        assert!(!received.descriptors_lost && !received.bytes_lost);
    }
}
