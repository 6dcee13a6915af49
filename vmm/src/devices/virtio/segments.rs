//! Takes descriptor chains off a queue and turns them into checked segments (virtio 1.2 §2.7):
//! guest addresses that a request under way may keep, where [`super::chain`] gives slices that
//! borrow the memory.
//!
//! `virtio-queue` ends a chain silently where it is malformed: a loop, an index past the table, a
//! nested indirect table. A device must know, so this module tells a whole chain from a cut one,
//! and refuses what the specification forbids: a device-readable descriptor after a writable one,
//! an empty chain, and memory that is not the guest's.
//!
//! Hostile guest: each chain is walked once, at most [`SEGMENTS_MAX`] descriptors far; any
//! violation is an error that the device reports as broken.

use std::sync::{
    Arc,
    atomic::{Ordering, fence},
};

use pericarp_sys::guest_io::{Segment, VECTORS_MAX};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// The most descriptors of one chain: what `readv` takes in one call. The queue's size bounds it
/// first (§2.7.5.3.1).
pub(crate) const SEGMENTS_MAX: usize = 1024;

const _: () = assert!(SEGMENTS_MAX <= VECTORS_MAX);

// Layout of the split queue's rings (§2.7.6, §2.7.8).
const USED_HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;
const AVAIL_HEADER_BYTES: u64 = 4;
const AVAIL_ELEMENT_BYTES: u64 = 2;
/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const AVAIL_NO_INTERRUPT: u16 = 1;

/// What was wrong with a chain.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChainError {
    /// The available index ran ahead of the queue, or the rings are not in memory.
    #[error("the available ring is unusable: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A chain without a descriptor, or one that does not end: a loop, a bad index, a bad indirect
    /// table.
    #[error("descriptor chain {0} does not end properly")]
    Malformed(u16),
    /// More descriptors than the queue's size or [`SEGMENTS_MAX`].
    #[error("descriptor chain {0} is longer than its queue")]
    TooLong(u16),
    /// A readable descriptor follows a writable one (§2.7.4.2).
    #[error("descriptor chain {0} has a readable descriptor after a writable one")]
    Unordered(u16),
    /// A descriptor points outside the guest's memory.
    #[error("descriptor chain {0} points outside the guest's memory")]
    OutsideMemory(u16),
}

/// A chain whose every segment lies in the guest's memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Index of its first descriptor: what the used ring names.
    pub(crate) head: u16,
    /// What the device reads.
    pub(crate) readable: Vec<Segment>,
    /// What the device writes.
    pub(crate) writable: Vec<Segment>,
}

impl Chain {
    /// Takes the next chain, if the driver made one available.
    pub(crate) fn take(
        queue: &mut Queue,
        memory: &Arc<GuestMemoryMmap>,
    ) -> Result<Option<Self>, ChainError> {
        let longest = usize::from(queue.size()).min(SEGMENTS_MAX);
        let Some(mut descriptors) = queue.iter(memory.as_ref())?.next() else {
            return Ok(None);
        };
        let head = descriptors.head_index();
        let mut chain = Self {
            head,
            ..Self::default()
        };
        let mut ends = false;
        for descriptor in descriptors.by_ref() {
            if chain.readable.len() + chain.writable.len() == longest {
                return Err(ChainError::TooLong(head));
            }
            let segment = Segment {
                address: descriptor.addr(),
                len: usize::try_from(descriptor.len()).expect("usize holds a u32"),
            };
            if !memory.check_range(segment.address, segment.len) {
                return Err(ChainError::OutsideMemory(head));
            }
            if descriptor.is_write_only() {
                chain.writable.push(segment);
            } else if chain.writable.is_empty() {
                chain.readable.push(segment);
            } else {
                return Err(ChainError::Unordered(head));
            }
            ends = !descriptor.has_next();
        }
        if ends {
            Ok(Some(chain))
        } else {
            Err(ChainError::Malformed(head))
        }
    }

    /// Bytes that the device may read.
    pub(crate) fn readable_len(&self) -> u64 {
        total(&self.readable)
    }

    /// Bytes that the device may write.
    pub(crate) fn writable_len(&self) -> u64 {
        total(&self.writable)
    }

    /// Copies from the readable part at `offset`; false when it is shorter than that.
    #[must_use]
    pub(crate) fn read_at(&self, memory: &GuestMemoryMmap, offset: usize, data: &mut [u8]) -> bool {
        let mut filled = 0;
        for segment in part(&self.readable, offset, data.len()) {
            let piece = &mut data[filled..filled + segment.len];
            if memory.read_slice(piece, segment.address).is_err() {
                return false;
            }
            filled += segment.len;
        }
        filled == data.len()
    }

    /// Copies to the writable part at `offset`; false when it is shorter than that.
    #[must_use]
    pub(crate) fn write_at(&self, memory: &GuestMemoryMmap, offset: usize, data: &[u8]) -> bool {
        write_segments(memory, &self.writable, offset, data)
    }
}

/// Copies `data` to `segments` at `offset`; false when they are shorter than that.
#[must_use]
pub(crate) fn write_segments(
    memory: &GuestMemoryMmap,
    segments: &[Segment],
    offset: usize,
    data: &[u8],
) -> bool {
    let mut done = 0;
    for segment in part(segments, offset, data.len()) {
        let piece = &data[done..done + segment.len];
        if memory.write_slice(piece, segment.address).is_err() {
            return false;
        }
        done += segment.len;
    }
    done == data.len()
}

/// Sum of lengths: at most [`SEGMENTS_MAX`] times 4 GiB.
pub(crate) fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| segment.len as u64).sum()
}

/// The bytes `offset..offset + len` of segments laid end to end, or fewer when these are shorter.
pub(crate) fn part(segments: &[Segment], offset: usize, len: usize) -> Vec<Segment> {
    let (mut skip, mut want) = (offset, len);
    let mut found = Vec::with_capacity(segments.len());
    for segment in segments {
        if want == 0 {
            break;
        }
        if skip >= segment.len {
            skip -= segment.len;
            continue;
        }
        let taken = want.min(segment.len - skip);
        // Cannot overflow: the whole segment was found to lie in memory.
        let address = GuestAddress(segment.address.0 + skip as u64);
        found.push(Segment {
            address,
            len: taken,
        });
        want -= taken;
        skip = 0;
    }
    found
}

/// Puts several chains in the used ring and shows them to the driver all at once: a packet over
/// several buffers must not be seen in part (§5.1.6.4.1).
pub(crate) fn add_used_together(
    queue: &mut Queue,
    memory: &Arc<GuestMemoryMmap>,
    used: &[(u16, u32)],
) -> Result<(), ChainError> {
    let Some(((last_head, last_len), earlier)) = used.split_last() else {
        return Ok(());
    };
    for (head, len) in earlier {
        let slot = u64::from(queue.next_used() % queue.size());
        let address = GuestAddress(queue.used_ring())
            .checked_add(USED_HEADER_BYTES + slot * USED_ELEMENT_BYTES)
            .ok_or(virtio_queue::Error::AddressOverflow)?;
        let mut element = [0; 8];
        element[..4].copy_from_slice(&u32::from(*head).to_le_bytes());
        element[4..].copy_from_slice(&len.to_le_bytes());
        memory
            .write_slice(&element, address)
            .map_err(virtio_queue::Error::GuestMemory)?;
        queue.set_next_used(queue.next_used().wrapping_add(1));
    }
    Ok(queue.add_used(memory.as_ref(), *last_head, *last_len)?)
}

/// Whether the driver wants an interrupt for what was put in the used ring since the last one
/// (§2.7.7, §2.7.10). To be used with [`add_used_together`], of which `virtio_queue`'s own count
/// does not know.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    signalled_at: u16,
}

impl Signals {
    /// Nothing that the queue holds so far is to be told.
    pub(crate) fn since(queue: &Queue) -> Self {
        Self {
            signalled_at: queue.next_used(),
        }
    }

    /// Asks, and takes it that the driver is then told.
    pub(crate) fn due(
        &mut self,
        queue: &Queue,
        memory: &Arc<GuestMemoryMmap>,
    ) -> Result<bool, ChainError> {
        let now = queue.next_used();
        if now == self.signalled_at {
            return Ok(false);
        }
        // The used index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let ring = GuestAddress(queue.avail_ring());
        if !queue.event_idx_enabled() {
            self.signalled_at = now;
            let flags = load(memory, ring)?;
            return Ok(flags & AVAIL_NO_INTERRUPT == 0);
        }
        let offset = AVAIL_HEADER_BYTES + u64::from(queue.size()) * AVAIL_ELEMENT_BYTES;
        let address = ring
            .checked_add(offset)
            .ok_or(virtio_queue::Error::AddressOverflow)?;
        let wanted_at = load(memory, address)?;
        let before = std::mem::replace(&mut self.signalled_at, now);
        let since_wanted = now.wrapping_sub(wanted_at).wrapping_sub(1);
        Ok(since_wanted < now.wrapping_sub(before))
    }
}

fn load(memory: &GuestMemoryMmap, address: GuestAddress) -> Result<u16, ChainError> {
    let value: u16 = memory
        .load(address, Ordering::Relaxed)
        .map_err(virtio_queue::Error::GuestMemory)?;
    Ok(u16::from_le(value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A part names the same bytes, in the same order, as cutting a list of all of them.
        #[test]
        fn a_part_is_a_cut(
            lens in proptest::collection::vec(0usize..20, 0..10),
            offset in 0usize..120,
            len in 0usize..120,
        ) {
            let segments: Vec<Segment> = lens
                .iter()
                .zip(0u64..)
                .map(|(len, index)| Segment { address: GuestAddress(index * 100), len: *len })
                .collect();
            let bytes = |segments: &[Segment]| -> Vec<u64> {
                let all = segments.iter();
                all.flat_map(|segment| segment.address.0..segment.address.0 + segment.len as u64)
                    .collect()
            };
            let wanted: Vec<u64> = bytes(&segments).into_iter().skip(offset).take(len).collect();
            let found = part(&segments, offset, len);
            prop_assert_eq!(total(&found), wanted.len() as u64);
            prop_assert_eq!(bytes(&found), wanted);
        }
    }
}
