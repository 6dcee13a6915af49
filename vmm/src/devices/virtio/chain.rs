//! Descriptor chains as devices use them: popped whole, checked whole, then read and written
//! through [`Buffers`], which borrow guest memory and copy nothing. A request that outlives its
//! call uses [`super::segments`] instead.
//!
//! `virtio_queue`'s iterator ends silently when a chain is cut (a loop, an index past the table, an
//! address outside memory). [`pop`] tells such a chain from a complete one, so that a device
//! answers it with `Broken` rather than with a short request.

use std::{io, os::fd::BorrowedFd, sync::atomic::Ordering};

use pericarp_sys::socket_io;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemory as _, GuestMemoryMmap, Permissions, VolatileSlice};

use super::device::Activation;

/// A chain that the driver built against the specification, or a queue that it set up so.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChainError {
    /// The queue's rings or its available index.
    #[error("queue is not usable: {0}")]
    Queue(virtio_queue::Error),
    /// A loop, an index past the table, a nested or misaligned indirect table, a table outside
    /// memory, or no descriptor.
    #[error("descriptor chain {head} is cut or loops")]
    Cut {
        /// Index of its first descriptor.
        head: u16,
    },
    /// virtio 1.2 §2.7.5.3.1: no chain is longer than the queue.
    #[error("descriptor chain {head} is longer than its queue")]
    TooLong {
        /// Index of its first descriptor.
        head: u16,
    },
    /// virtio 1.2 §2.7.4.2: device-writable buffers come after device-readable ones.
    #[error("descriptor chain {head} has a readable buffer behind a writable one")]
    Order {
        /// Index of its first descriptor.
        head: u16,
    },
    /// A buffer that is not wholly in guest memory.
    #[error("descriptor chain {head} names a buffer outside guest memory")]
    Outside {
        /// Index of its first descriptor.
        head: u16,
    },
}

/// One request of the driver.
#[derive(Debug)]
pub(crate) struct Chain<'m> {
    /// Index of its first descriptor, for the used ring.
    pub(crate) head: u16,
    /// What the driver wrote for the device.
    pub(crate) readable: Buffers<'m>,
    /// Where the device may write.
    pub(crate) writable: Buffers<'m>,
}

/// Guest buffers, consumed from the front.
#[derive(Debug, Default)]
pub(crate) struct Buffers<'m> {
    ranges: Vec<VolatileSlice<'m>>,
    first: usize,
    len: usize,
}

/// Takes the next chain, or `None` when the driver has made no more available.
///
/// # Errors
/// The driver broke a rule of the specification; see [`ChainError`].
pub(crate) fn pop<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemoryMmap,
) -> Result<Option<Chain<'m>>, ChainError> {
    let chain_descriptors_max = usize::from(queue.size());
    let Some(descriptors) = queue.iter(memory).map_err(ChainError::Queue)?.next() else {
        return Ok(None);
    };
    let head = descriptors.head_index();
    let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
    let (mut complete, mut writes) = (false, false);
    for (count, descriptor) in descriptors.enumerate() {
        if count >= chain_descriptors_max {
            return Err(ChainError::TooLong { head });
        }
        // Not by the ranges: a descriptor of no bytes has none.
        let (buffers, access) = if descriptor.is_write_only() {
            writes = true;
            (&mut writable, Permissions::Write)
        } else if writes {
            return Err(ChainError::Order { head });
        } else {
            (&mut readable, Permissions::Read)
        };
        let len = usize::try_from(descriptor.len()).map_err(|_| ChainError::Outside { head })?;
        let slices = memory
            .get_slices(descriptor.addr(), len, access)
            .map_err(|_| ChainError::Outside { head })?;
        for slice in slices {
            buffers.push(slice.map_err(|_| ChainError::Outside { head })?);
        }
        complete = !descriptor.has_next();
    }
    if complete {
        Ok(Some(Chain {
            head,
            readable,
            writable,
        }))
    } else {
        Err(ChainError::Cut { head })
    }
}

/// Gives back the chain that [`pop`] took last, untouched.
pub(crate) fn unpop(queue: &mut Queue) {
    queue.go_to_previous_position();
}

/// Whether the driver has made a chain available that was not popped.
///
/// # Errors
/// The available ring is not in guest memory.
pub(crate) fn is_waiting(queue: &Queue, memory: &GuestMemoryMmap) -> Result<bool, ChainError> {
    let available = queue
        .avail_idx(memory, Ordering::Acquire)
        .map_err(ChainError::Queue)?;
    Ok(available.0 != queue.next_avail())
}

impl Activation {
    /// Has [`super::device::VirtioDevice::queue_kicked`] called again once other devices had their
    /// turn.
    pub(crate) fn kick_again(&self, queue: u16) {
        if let Some(queue) = self.queues.iter().find(|active| active.index == queue) {
            // Fails only when the counter is at its top, and then the kick is pending already.
            let _ = queue.kick.write(1);
        }
    }
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

/// Reads device configuration that is held as its bytes; bytes past the end read as zero.
pub(crate) fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(rest) = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
    else {
        return;
    };
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}

#[cfg(test)]
mod tests;
