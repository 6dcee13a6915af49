//! A view of a descriptor chain as buffers that borrow guest memory and copy nothing. A request
//! that outlives its call uses [`super::segments`] instead.

use std::{io, os::fd::BorrowedFd};

use pericarp_sys::socket_io;
use virtio_queue::Queue;
use vm_memory::{GuestMemory as _, GuestMemoryMmap, Permissions, VolatileSlice};

use super::chain::{ChainError, Outside, walk};

/// One request of the driver.
#[derive(Debug)]
pub(crate) struct BufferChain<'m> {
    /// Index of its first descriptor, for the used ring.
    pub(crate) head: u16,
    /// What the driver wrote for the device.
    pub(crate) readable: Buffers<'m>,
    /// Where the device may write.
    pub(crate) writable: Buffers<'m>,
}

impl<'m> BufferChain<'m> {
    /// Takes the next chain, or `None` if the driver has made no more available.
    ///
    /// # Errors
    /// The driver broke a rule of the specification; see [`ChainError`].
    pub(crate) fn take(
        queue: &mut Queue,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<Self>, ChainError> {
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        let head = walk(queue, memory, |segment, writes| {
            let (buffers, access) = if writes {
                (&mut writable, Permissions::Write)
            } else {
                (&mut readable, Permissions::Read)
            };
            let slices = memory.get_slices(segment.address, segment.len, access);
            for slice in slices.map_err(|_| Outside)? {
                buffers.push(slice.map_err(|_| Outside)?);
            }
            Ok(())
        })?;
        Ok(head.map(|head| Self {
            head,
            readable,
            writable,
        }))
    }
}

/// Guest buffers, consumed from the front.
#[derive(Debug, Default)]
pub(crate) struct Buffers<'m> {
    ranges: Vec<VolatileSlice<'m>>,
    first: usize,
    len: usize,
}

impl<'m> Buffers<'m> {
    fn push(&mut self, range: VolatileSlice<'m>) {
        self.len += range.len();
        self.ranges.push(range);
    }

    /// Bytes left.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The ranges left, in order.
    pub(crate) fn ranges(&self) -> &[VolatileSlice<'m>] {
        &self.ranges[self.first..]
    }

    /// Forgets the first `count` bytes, or all when there are fewer.
    pub(crate) fn advance(&mut self, count: usize) {
        let mut rest = count.min(self.len);
        self.len -= rest;
        while rest > 0 {
            let range = &mut self.ranges[self.first];
            if rest < range.len() {
                *range = range.offset(rest).expect("less than the length");
                return;
            }
            rest -= range.len();
            self.first += 1;
        }
    }

    /// The `count` bytes (or as many as there are) behind the first `skip`, without consuming
    /// anything.
    pub(crate) fn view(&self, skip: usize, count: usize) -> Self {
        let mut view = Self::default();
        let (mut skip, mut rest) = (skip, count);
        for range in self.ranges() {
            let behind = skip.min(range.len());
            skip -= behind;
            let taken = rest.min(range.len() - behind);
            if taken > 0 {
                view.push(range.subslice(behind, taken).expect("inside the range"));
            }
            rest -= taken;
        }
        view
    }

    /// Copies out and consumes up to `bytes.len()` bytes; returns how many.
    pub(crate) fn read(&mut self, bytes: &mut [u8]) -> usize {
        let mut copied = 0;
        for range in self.ranges() {
            if copied == bytes.len() {
                break;
            }
            copied += range.copy_to(&mut bytes[copied..]);
        }
        self.advance(copied);
        copied
    }

    /// Copies out and consumes exactly `N` bytes, or nothing when there are fewer.
    pub(crate) fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.len < N {
            return None;
        }
        let mut bytes = [0; N];
        self.read(&mut bytes);
        Some(bytes)
    }

    /// Copies in and consumes up to `bytes.len()` bytes; returns how many.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> usize {
        let mut copied = 0;
        for range in self.ranges() {
            let count = range.len().min(bytes.len() - copied);
            if count == 0 && copied == bytes.len() {
                break;
            }
            range.copy_from(&bytes[copied..copied + count]);
            copied += count;
        }
        self.advance(copied);
        copied
    }

    /// Sends as much as the socket takes, and consumes it.
    ///
    /// # Errors
    /// See [`socket_io::send`].
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let count = socket_io::send(socket, self.ranges())?;
        self.advance(count);
        Ok(count)
    }

    /// Receives as much as is there and fits, and consumes that much room.
    ///
    /// # Errors
    /// See [`socket_io::receive`].
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let count = socket_io::receive(socket, self.ranges())?;
        self.advance(count);
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
