//! What a unix socket did not take at once of the guest's data. It is empty while the reader keeps
//! up, takes no memory then, and is bounded by the room that the guest was granted (the connection
//! refuses more before it gets here).

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::sys::socket::{MsgFlags, sendmsg};

use super::super::buffers::Buffers;

/// Bytes copied out of guest memory at once.
const COPY_BYTES: usize = 4096;

/// Data on its way to a unix socket.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    bytes: VecDeque<u8>,
}

impl Backlog {
    /// Bytes held.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Takes all that is left of `data`.
    pub(crate) fn append(&mut self, data: &mut Buffers<'_>) {
        let mut piece = [0; COPY_BYTES];
        while data.len() > 0 {
            let count = data.read(&mut piece);
            self.bytes.extend(&piece[..count]);
        }
    }

    /// Sends what the socket takes now, and returns the count of bytes.
    ///
    /// # Errors
    /// `WouldBlock` when it takes nothing; else the socket is of no use any more.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let (front, back) = self.bytes.as_slices();
        let pieces = [IoSlice::new(front), IoSlice::new(back)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let count = sendmsg::<()>(socket.as_raw_fd(), &pieces, &[], flags, None)?;
        self.bytes.drain(..count);
        if self.bytes.is_empty() {
            self.clear();
        }
        Ok(count)
    }

    /// Drops what is held, with its memory.
    pub(crate) fn clear(&mut self) {
        self.bytes = VecDeque::new();
    }
}
