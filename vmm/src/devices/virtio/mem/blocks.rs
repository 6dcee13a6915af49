//! Which blocks of the region are plugged, and what may be done to them: the policy of the device,
//! without any I/O.

use super::request::{Answer, State};

/// Blocks of one region: 16 TiB of 2 MiB, a map of 1 MiB.
pub(crate) const BLOCKS_MAX: u64 = 1 << 23;

const WORD_BITS: u64 = u64::BITS as u64;

/// The region's blocks. A block is named by its number; a range by its first and its length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blocks {
    start: u64,
    block_bytes: u64,
    count: u64,
    plugged: u64,
    map: Vec<u64>,
}

/// A range of blocks that lies in the region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    first: u64,
    count: u64,
}

impl Blocks {
    /// A region without a plugged block. The caller has checked the sizes: `region_bytes` is a
    /// multiple of `block_bytes`, at most [`BLOCKS_MAX`] of them.
    pub(crate) fn new(start: u64, block_bytes: u64, region_bytes: u64) -> Self {
        let count = region_bytes / block_bytes;
        let words = usize::try_from(count.div_ceil(WORD_BITS)).expect("bounded by BLOCKS_MAX");
        Self {
            start,
            block_bytes,
            count,
            plugged: 0,
            map: vec![0; words],
        }
    }

    /// Which blocks are plugged, one bit each.
    pub(crate) fn map(&self) -> &[u64] {
        &self.map
    }

    /// Takes over such a map; false when it is one of another region.
    pub(crate) fn set_map(&mut self, map: &[u64]) -> bool {
        let spare = self.map.len() as u64 * WORD_BITS - self.count;
        let beyond = map
            .last()
            .is_some_and(|last| spare > 0 && last >> (WORD_BITS - spare) != 0);
        if map.len() != self.map.len() || beyond {
            return false;
        }
        self.map.copy_from_slice(map);
        self.plugged = map.iter().map(|word| u64::from(word.count_ones())).sum();
        true
    }

    /// Bytes of all plugged blocks.
    pub(crate) fn plugged_bytes(&self) -> u64 {
        self.plugged * self.block_bytes
    }

    /// Address and length in bytes of a range.
    pub(crate) fn extent(&self, range: Range) -> (u64, u64) {
        (
            self.start + range.first * self.block_bytes,
            range.count * self.block_bytes,
        )
    }

    /// The whole region.
    pub(crate) fn all(&self) -> Range {
        Range {
            first: 0,
            count: self.count,
        }
    }

    /// Checks a range that the driver named: aligned, not empty, inside the region.
    pub(crate) fn range(&self, address: u64, blocks: u16) -> Option<Range> {
        let offset = address.checked_sub(self.start)?;
        let first = offset / self.block_bytes;
        let count = u64::from(blocks);
        let fits = offset.is_multiple_of(self.block_bytes)
            && count > 0
            && first.checked_add(count)? <= self.count;
        fits.then_some(Range { first, count })
    }

    /// State of a range.
    pub(crate) fn state(&self, range: Range) -> State {
        let plugged = self.plugged_in(range);
        if plugged == range.count {
            State::Plugged
        } else if plugged == 0 {
            State::Unplugged
        } else {
            State::Mixed
        }
    }

    /// Whether a range may be plugged when `requested_bytes` are wanted in all (§5.15.6.1).
    pub(crate) fn may_plug(&self, range: Range, requested_bytes: u64) -> Result<(), Answer> {
        if self.plugged_in(range) != 0 {
            return Err(Answer::Error);
        }
        if (self.plugged + range.count) * self.block_bytes > requested_bytes {
            return Err(Answer::Nack);
        }
        Ok(())
    }

    /// Whether a range may be unplugged (§5.15.6.2).
    pub(crate) fn may_unplug(&self, range: Range) -> Result<(), Answer> {
        if self.plugged_in(range) == range.count {
            Ok(())
        } else {
            Err(Answer::Error)
        }
    }

    /// Marks every block of a range.
    pub(crate) fn set(&mut self, range: Range, plugged: bool) {
        let before = self.plugged_in(range);
        for (word, mask) in words(range) {
            if plugged {
                self.map[word] |= mask;
            } else {
                self.map[word] &= !mask;
            }
        }
        let now = if plugged { range.count } else { 0 };
        self.plugged = self.plugged + now - before;
    }

    fn plugged_in(&self, range: Range) -> u64 {
        words(range)
            .map(|(word, mask)| u64::from((self.map[word] & mask).count_ones()))
            .sum()
    }
}

/// The words of the map that a range touches, with the bits it has in each.
fn words(range: Range) -> impl Iterator<Item = (usize, u64)> {
    let end = range.first + range.count;
    (range.first / WORD_BITS..end.div_ceil(WORD_BITS)).map(move |word| {
        let from = range.first.max(word * WORD_BITS) - word * WORD_BITS;
        let to = end.min((word + 1) * WORD_BITS) - word * WORD_BITS;
        let mask = (u64::MAX >> (WORD_BITS - (to - from))) << from;
        (usize::try_from(word).expect("bounded by BLOCKS_MAX"), mask)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const BLOCK: u64 = 2 << 20;
    const START: u64 = 1 << 32;
    const COUNT: u64 = 200;

    #[test]
    fn ranges_must_be_aligned_and_inside() {
        let blocks = Blocks::new(START, BLOCK, COUNT * BLOCK);
        assert!(blocks.range(START, 200).is_some());
        assert!(blocks.range(START + 199 * BLOCK, 1).is_some());
        for (address, count) in [
            (START - BLOCK, 1),
            (START + 1, 1),
            (START + BLOCK / 2, 1),
            (START, 0),
            (START, 201),
            (START + 199 * BLOCK, 2),
            (START + 200 * BLOCK, 1),
            (0, 1),
            (u64::MAX, 1),
            (u64::MAX - BLOCK + 1, u16::MAX),
        ] {
            assert_eq!(blocks.range(address, count), None, "{address:#x} {count}");
        }
    }

    proptest! {
        /// Any requests give the same answers as a plain set of numbers.
        #[test]
        fn answers_match_a_model(
            requests in proptest::collection::vec((0u8..4, 0u64..210, 0u16..80, 0u64..300), 1..300),
        ) {
            let mut blocks = Blocks::new(START, BLOCK, COUNT * BLOCK);
            let mut model = BTreeSet::new();
            for (kind, first, count, requested) in requests {
                let end = first + u64::from(count);
                let inside = count > 0 && end <= COUNT;
                let range = blocks.range(START + first * BLOCK, count);
                prop_assert_eq!(range.is_some(), inside);
                let Some(range) = range else { continue };
                let extent = (START + first * BLOCK, u64::from(count) * BLOCK);
                prop_assert_eq!(blocks.extent(range), extent);
                let have = model.range(first..end).count() as u64;
                match kind {
                    0 => {
                        let wanted = if have > 0 {
                            Err(Answer::Error)
                        } else if model.len() as u64 + u64::from(count) > requested {
                            Err(Answer::Nack)
                        } else {
                            Ok(())
                        };
                        let got = blocks.may_plug(range, requested * BLOCK);
                        prop_assert_eq!(got, wanted);
                        if got.is_ok() {
                            blocks.set(range, true);
                            model.extend(first..end);
                        }
                    }
                    1 => {
                        let got = blocks.may_unplug(range);
                        prop_assert_eq!(got.is_ok(), have == u64::from(count));
                        if got.is_ok() {
                            blocks.set(range, false);
                            model.retain(|block| !(first..end).contains(block));
                        }
                    }
                    2 if requested < 30 => {
                        blocks.set(blocks.all(), false);
                        model.clear();
                    }
                    _ => {
                        let wanted = match have {
                            0 => State::Unplugged,
                            have if have == u64::from(count) => State::Plugged,
                            _ => State::Mixed,
                        };
                        prop_assert_eq!(blocks.state(range), wanted);
                    }
                }
                prop_assert_eq!(blocks.plugged_bytes(), model.len() as u64 * BLOCK);
            }
        }
    }
}
