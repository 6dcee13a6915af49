//! Endless streams of bytes that differ by their seed, made and checked at the speed of a copy: a
//! table of pseudo-random bytes over and over, with seed and position written across each page.
//! Lost, doubled and reordered bytes show, and so do bytes of another stream.

use std::sync::OnceLock;

/// A prime, so that no power of two is a multiple of the period.
const TABLE_BYTES: usize = 65_521;
/// Distance of the stamps.
const STAMP_EVERY: u64 = 4096;
const STAMP_BYTES: u64 = 16;

fn table() -> &'static [u8] {
    static TABLE: OnceLock<Vec<u8>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut numbers = Numbers::new(1);
        (0..TABLE_BYTES).map(|_| numbers.byte()).collect()
    })
}

/// Writes the bytes of stream `seed` from `position` on.
pub fn fill(seed: u64, position: u64, bytes: &mut [u8]) {
    let table = table();
    let period = TABLE_BYTES as u64;
    let mut at = usize::try_from((position % period + seed % period) % period).unwrap_or(0);
    let mut rest = &mut *bytes;
    while !rest.is_empty() {
        let count = rest.len().min(TABLE_BYTES - at);
        let (head, tail) = rest.split_at_mut(count);
        head.copy_from_slice(&table[at..at + count]);
        rest = tail;
        at = 0;
    }
    let end = position + bytes.len() as u64;
    let mut stamp = position / STAMP_EVERY * STAMP_EVERY;
    while stamp < end {
        let text = u128::from(seed) << 64 | u128::from(stamp);
        for (at, byte) in (stamp..stamp + STAMP_BYTES).zip(text.to_le_bytes()) {
            if (position..end).contains(&at)
                && let Ok(index) = usize::try_from(at - position)
            {
                bytes[index] = byte;
            }
        }
        stamp += STAMP_EVERY;
    }
}

/// Where `bytes` differ from stream `seed` at `position`, if they do.
#[must_use]
pub fn difference(seed: u64, position: u64, bytes: &[u8]) -> Option<u64> {
    let mut wanted = vec![0; bytes.len()];
    fill(seed, position, &mut wanted);
    if wanted == bytes {
        return None;
    }
    let index = wanted.iter().zip(bytes).position(|(a, b)| a != b);
    index.map(|index| position + index as u64)
}

/// Pseudo-random numbers, the same on both sides.
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// The series of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next one (SplitMix64: Steele, Lea, Flood 2014).
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// One below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end.max(1)
    }

    fn byte(&mut self) -> u8 {
        self.number().to_le_bytes()[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_whole_and_differences_are_found() {
        let mut whole = vec![0; 300_000];
        fill(7, 1000, &mut whole);
        let mut pieces = Vec::new();
        let mut numbers = Numbers::new(3);
        while pieces.len() < whole.len() {
            let count = usize::try_from(numbers.below(9000)).unwrap();
            let mut piece = vec![0; count.min(whole.len() - pieces.len())];
            fill(7, 1000 + pieces.len() as u64, &mut piece);
            pieces.extend(piece);
        }
        assert_eq!(whole, pieces);
        assert_eq!(difference(7, 1000, &whole), None);
        assert!(difference(8, 1000, &whole).is_some(), "another stream");
        assert!(
            difference(7, 1000 + 65_521, &whole).is_some(),
            "a period later"
        );
        whole[200_000] ^= 1;
        assert_eq!(difference(7, 1000, &whole), Some(201_000));
    }
}
