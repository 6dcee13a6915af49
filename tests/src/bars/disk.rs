//! What is written to a disk: a series of writes of every size and alignment that both sides can
//! compute, so that the node can tell from the file alone which of them arrived.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Result, bail};

use super::pattern::{self, Numbers};

/// Bytes of the disk that writes may touch.
pub const DISK_BYTES: u64 = 64 << 20;

/// One write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Write {
    /// Where.
    pub offset: u64,
    /// How much.
    pub len: u64,
    /// Of which stream; its position is `offset`.
    pub seed: u64,
}

/// The writes of a seed. Sizes go from one unit over odd ones to a mebibyte, at offsets of any
/// alignment of `unit` bytes: 1 through the guest's page cache, 512 past it.
#[must_use]
pub fn writes(seed: u64, unit: u64, count: u64) -> Vec<Write> {
    let mut numbers = Numbers::new(seed);
    (0..count)
        .map(|number| {
            // Powers of two and their neighbours, then anything.
            let power = 1_u64 << numbers.below(21);
            let len = match number % 4 {
                0 => power,
                1 => power + 1,
                2 => power.saturating_sub(1),
                _ => numbers.below(1 << 20),
            };
            let len = len.max(1).next_multiple_of(unit);
            let offset = numbers.below(DISK_BYTES - len) / unit * unit;
            Write {
                offset,
                len,
                seed: seed << 32 | number,
            }
        })
        .collect()
}

/// Writes one of them.
pub fn write(file: &File, write: &Write, buffer: &mut [u8]) -> Result<()> {
    let bytes = &mut buffer[..usize::try_from(write.len)?];
    pattern::fill(write.seed, write.offset, bytes);
    Ok(file.write_all_at(bytes, write.offset)?)
}

/// What a disk holds after the first `settled` writes, when those after may have arrived too:
/// every byte must be that of the last settled write to it or of a later one, or zero if none
/// settled.
pub fn check(file: &File, writes: &[Write], settled: usize) -> Result<u64> {
    let mut buffer = vec![0; 1 << 20];
    // Byte ranges whose content is decided, newest first.
    let mut checked = 0;
    for (number, write) in writes[..settled].iter().enumerate() {
        let later = &writes[number + 1..];
        let mut position = write.offset;
        let end = write.offset + write.len;
        while position < end {
            if let Some(over) = later.iter().find(|w| covers(w, position)) {
                position = over.offset + over.len;
                continue;
            }
            let next = later
                .iter()
                .map(|w| w.offset)
                .filter(|offset| *offset > position)
                .fold(end, u64::min);
            let len = usize::try_from((next - position).min(1 << 20))?;
            file.read_exact_at(&mut buffer[..len], position)?;
            if let Some(at) = pattern::difference(write.seed, position, &buffer[..len]) {
                bail!("write {number} of {settled} settled is not at byte {at}");
            }
            checked += len as u64;
            position += len as u64;
        }
    }
    Ok(checked)
}

fn covers(write: &Write, position: u64) -> bool {
    (write.offset..write.offset + write.len).contains(&position)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settled_writes_are_found_and_missing_ones_too() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(DISK_BYTES).unwrap();
        let plan = writes(9, 1, 60);
        let mut buffer = vec![0; 2 << 20];
        for one in &plan[..40] {
            write(&file, one, &mut buffer).unwrap();
        }
        assert!(check(&file, &plan, 40).unwrap() > 1 << 20);
        assert!(check(&file, &plan, 41).is_err(), "the 41st is not there");
        for (unit, one) in writes(9, 512, 99).iter().map(|one| (512, one)) {
            assert!(one.offset % unit == 0 && one.len % unit == 0);
            assert!(one.offset + one.len <= DISK_BYTES);
        }
    }
}
