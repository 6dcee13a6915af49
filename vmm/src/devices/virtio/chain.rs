//! The parser of descriptor chains (virtio 1.2 §2.7), and what else devices ask of a queue.
//!
//! [`walk`] takes a chain off a queue and checks it whole. Two views are built on it:
//! [`super::buffers`] borrows guest memory and copies nothing, for requests that end with the call;
//! [`super::segments`] keeps guest addresses, for requests that are in flight.
//!
//! `virtio_queue`'s iterator ends silently when a chain is cut (a loop, an index past the table, a
//! nested indirect table). A device must know: it reports such a chain as `Broken` and does not
//! serve a short request. A chain is walked once, at most as far as its queue is long.

use std::sync::atomic::Ordering;

use pericarp_sys::guest_io::{Segment, VECTORS_MAX};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::device::Activation;

/// The most descriptors of one chain: what `readv` takes in one call. The queue's size bounds it
/// first (§2.7.5.3.1).
pub(crate) const SEGMENTS_MAX: usize = 1024;

const _: () = assert!(SEGMENTS_MAX <= VECTORS_MAX);

/// A chain that the driver built against the specification, or a queue that it set up so. The
/// number is the index of the chain's first descriptor.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChainError {
    /// The available index ran ahead of the queue, or the rings are not in memory.
    #[error("the queue is not usable: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// A chain without a descriptor, or one that does not end: a loop, a bad index, a bad indirect
    /// table. Or one that is too short for the request in it.
    #[error("descriptor chain {0} is cut, loops or is too short")]
    Malformed(u16),
    /// More descriptors than the queue's size or [`SEGMENTS_MAX`] (§2.7.5.3.1).
    #[error("descriptor chain {0} is longer than its queue")]
    TooLong(u16),
    /// A readable descriptor follows a writable one (§2.7.4.2).
    #[error("descriptor chain {0} has a readable descriptor after a writable one")]
    Unordered(u16),
    /// A descriptor points outside guest memory.
    #[error("descriptor chain {0} points outside guest memory")]
    OutsideMemory(u16),
}

/// A descriptor points outside guest memory.
#[derive(Debug)]
pub(super) struct Outside;

/// Takes the next chain and passes each descriptor to `visit`, with whether the device may write to
/// it. `visit` checks that it lies in guest memory. Returns the index of the chain's first
/// descriptor, or `None` if the driver has made no more chains available.
///
/// # Errors
/// The driver broke a rule of the specification; see [`ChainError`].
pub(super) fn walk(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    mut visit: impl FnMut(Segment, bool) -> Result<(), Outside>,
) -> Result<Option<u16>, ChainError> {
    let descriptors_max = usize::from(queue.size()).min(SEGMENTS_MAX);
    let Some(descriptors) = queue.iter(memory)?.next() else {
        return Ok(None);
    };
    let head = descriptors.head_index();
    let (mut complete, mut writes) = (false, false);
    for (count, descriptor) in descriptors.enumerate() {
        if count >= descriptors_max {
            return Err(ChainError::TooLong(head));
        }
        let writable = descriptor.is_write_only();
        if writes && !writable {
            return Err(ChainError::Unordered(head));
        }
        writes |= writable;
        let segment = Segment {
            address: descriptor.addr(),
            len: usize::try_from(descriptor.len()).expect("usize holds a u32"),
        };
        visit(segment, writable).map_err(|Outside| ChainError::OutsideMemory(head))?;
        complete = !descriptor.has_next();
    }
    if complete {
        Ok(Some(head))
    } else {
        Err(ChainError::Malformed(head))
    }
}

/// Gives back the chain that [`walk`] took last, untouched.
pub(crate) fn unpop(queue: &mut Queue) {
    queue.go_to_previous_position();
}

/// Whether the driver has made a chain available that was not taken.
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

#[cfg(test)]
mod tests;
