//! Gives pages of guest memory back to the host: for the balloon, for free page reporting and for
//! pluggable memory.
//!
//! Guest memory is a shared mapping of a file, so only a hole in the file returns memory, and it
//! does for every process that maps it. The memory of a machine that goes on from a saved one is
//! private: its pages are given back by advice, and are then what they were when it was saved. That
//! is as good, because drivers expect nothing of a page that they gave away (virtio 1.2 §5.5.6;
//! the guest's kernel zeroes pages when it gives them out, not when they are freed). Nothing may
//! be discarded while a device that is passed through has memory pinned: it would go on using the
//! old pages while the guest sees new ones.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
};
use pericarp_sys::mapping::give_back;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::device::GuestMemory;

/// Whether pages may be discarded: shared by all devices that do and all that pin memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Discard {
    pins: Arc<AtomicU32>,
}

/// While one of these lives, nothing is discarded.
#[derive(Debug)]
pub(crate) struct Pin {
    pins: Arc<AtomicU32>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.pins.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Why pages were not discarded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiscardError {
    /// Something has pinned guest memory.
    #[error("guest memory is pinned by a device that is passed through")]
    Pinned,
    /// The range is not guest memory.
    #[error("{0:#x} is outside the guest's memory")]
    Outside(u64),
    /// The kernel refuses.
    #[error("giving back {len} bytes at {address:#x}: {source}")]
    Host {
        address: u64,
        len: u64,
        source: io::Error,
    },
}

impl Discard {
    /// Forbids discarding until the result is dropped. What is discarded at this moment is complete
    /// when it returns to the event loop, which is where devices are added too.
    pub(crate) fn pin(&self) -> Pin {
        self.pins.fetch_add(1, Ordering::SeqCst);
        Pin {
            pins: self.pins.clone(),
        }
    }

    /// Gives the pages of a range back. Shared ones read as zero afterwards. The range may span
    /// regions.
    pub(crate) fn discard(
        &self,
        memory: &GuestMemory,
        address: u64,
        len: u64,
    ) -> Result<(), DiscardError> {
        if self.pins.load(Ordering::SeqCst) != 0 {
            return Err(DiscardError::Pinned);
        }
        let (mut at, mut left) = (address, len);
        while left > 0 {
            let (region, offset) = memory
                .to_region_addr(GuestAddress(at))
                .ok_or(DiscardError::Outside(at))?;
            let here = left.min(region.len() - offset.0);
            punch(region, offset.0, here).map_err(|source| DiscardError::Host {
                address: at,
                len: here,
                source,
            })?;
            at += here;
            left -= here;
        }
        Ok(())
    }
}

fn punch(region: &GuestRegionMmap, offset: u64, len: u64) -> io::Result<()> {
    let Some(file) = region.file_offset() else {
        return give_back(region, offset, len);
    };
    let start = file.start().checked_add(offset).ok_or(Errno::EINVAL)?;
    let offset = i64::try_from(start).map_err(|_| Errno::EINVAL)?;
    let len = i64::try_from(len).map_err(|_| Errno::EINVAL)?;
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file.file(), mode, offset, len)?)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{fs::File, os::unix::fs::MetadataExt};

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use vm_memory::{Bytes, FileOffset, GuestMemoryMmap};

    use super::*;

    /// Guest memory on a memfd as the machine has it: two regions with a hole between them. The
    /// file tells how much of it is resident.
    pub(crate) fn memory(low_bytes: u64, high_start: u64, high_bytes: u64) -> (GuestMemory, File) {
        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(low_bytes + high_bytes).unwrap();
        let part = |offset| Some(FileOffset::new(file.try_clone().unwrap(), offset));
        let low = usize::try_from(low_bytes).unwrap();
        let high = usize::try_from(high_bytes).unwrap();
        let memory = GuestMemoryMmap::from_ranges_with_files(&[
            (GuestAddress(0), low, part(0)),
            (GuestAddress(high_start), high, part(low_bytes)),
        ])
        .unwrap();
        (Arc::new(memory), file)
    }

    /// Bytes of the file that occupy memory.
    pub(crate) fn resident_bytes(file: &File) -> u64 {
        file.metadata().unwrap().blocks() * 512
    }

    #[test]
    fn pages_go_back_and_read_as_zero() {
        let (memory, file) = memory(1 << 20, 1 << 20, 1 << 20);
        let all = vec![7u8; 2 << 20];
        memory.write_slice(&all, GuestAddress(0)).unwrap();
        assert_eq!(resident_bytes(&file), 2 << 20);
        let discard = Discard::default();
        // Across the border of two adjoining regions.
        discard.discard(&memory, (1 << 20) - 8192, 16384).unwrap();
        assert_eq!(resident_bytes(&file), (2 << 20) - 16384);
        let byte: u8 = memory.read_obj(GuestAddress(1 << 20)).unwrap();
        assert_eq!(byte, 0);
        assert!(matches!(
            discard.discard(&memory, (2 << 20) - 4096, 8192),
            Err(DiscardError::Outside(_))
        ));
        assert!(discard.discard(&memory, u64::MAX - 4095, 4096).is_err());
    }

    #[test]
    fn nothing_is_discarded_while_memory_is_pinned() {
        let (memory, file) = memory(1 << 20, 1 << 30, 1 << 20);
        memory.write_slice(&[7; 4096], GuestAddress(0)).unwrap();
        let discard = Discard::default();
        let pin = discard.clone().pin();
        let refused = discard.discard(&memory, 0, 4096);
        assert!(matches!(refused, Err(DiscardError::Pinned)));
        assert_eq!(resident_bytes(&file), 4096);
        drop(pin);
        discard.discard(&memory, 0, 4096).unwrap();
        assert_eq!(resident_bytes(&file), 0);
    }
}
