//! A view of a descriptor chain as checked segments: guest addresses that a request in flight may
//! keep, where [`super::buffers`] borrows the memory.

use std::sync::Arc;

use pericarp_sys::guest_io::Segment;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::chain::{ChainError, Outside, walk};

/// A chain whose every segment lies in guest memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SegmentChain {
    /// Index of its first descriptor, for the used ring.
    pub(crate) head: u16,
    /// What the device reads.
    pub(crate) readable: Vec<Segment>,
    /// What the device writes.
    pub(crate) writable: Vec<Segment>,
}

impl SegmentChain {
    /// Takes the next chain, or `None` if the driver has made no more available.
    ///
    /// # Errors
    /// The driver broke a rule of the specification; see [`ChainError`].
    pub(crate) fn take(
        queue: &mut Queue,
        memory: &Arc<GuestMemoryMmap>,
    ) -> Result<Option<Self>, ChainError> {
        let mut chain = Self::default();
        let head = walk(queue, memory, |segment, writes| {
            if !memory.check_range(segment.address, segment.len) {
                return Err(Outside);
            }
            let segments = if writes {
                &mut chain.writable
            } else {
                &mut chain.readable
            };
            segments.push(segment);
            Ok(())
        })?;
        Ok(head.map(|head| Self { head, ..chain }))
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

/// Sum of lengths: at most [`super::chain::SEGMENTS_MAX`] times 4 GiB.
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
