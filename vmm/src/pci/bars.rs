//! Which function decodes an address now, and where BARs begin that are there at boot.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, PoisonError, RwLock},
};

use super::{PciFunction, Slot};

/// A BAR's place.
#[derive(Debug, Clone)]
struct Placed {
    end: u64,
    slot: Slot,
    bar: u8,
    function: Arc<dyn PciFunction>,
}

/// Decoded ranges. Guests choose them, so they may wish for anything: a range that overlaps another
/// one, or reaches out of the windows, is not decoded.
#[derive(Debug)]
pub(crate) struct Bars {
    windows: [Range<u64>; 2],
    placed: RwLock<BTreeMap<u64, Placed>>,
}

impl Bars {
    /// No range is decoded yet.
    pub(crate) fn new(windows: [Range<u64>; 2]) -> Self {
        Self {
            windows,
            placed: RwLock::default(),
        }
    }

    /// Decodes `range` for a BAR and nothing else for it. False: the range is not to be had.
    pub(crate) fn place(
        &self,
        slot: Slot,
        bar: u8,
        range: Option<Range<u64>>,
        function: &Arc<dyn PciFunction>,
    ) -> bool {
        let mut placed = self.placed.write().unwrap_or_else(PoisonError::into_inner);
        placed.retain(|_, other| (other.slot, other.bar) != (slot, bar));
        let Some(range) = range else { return true };
        let inside = |window: &Range<u64>| window.start <= range.start && range.end <= window.end;
        let before = placed.range(..range.end).next_back();
        let overlaps = before.is_some_and(|(_, other)| other.end > range.start);
        if overlaps || !self.windows.iter().any(inside) {
            return false;
        }
        let value = Placed {
            end: range.end,
            slot,
            bar,
            function: Arc::clone(function),
        };
        placed.insert(range.start, value);
        true
    }

    /// Forgets all BARs of a function.
    pub(crate) fn remove(&self, slot: Slot) {
        let mut placed = self.placed.write().unwrap_or_else(PoisonError::into_inner);
        placed.retain(|_, other| other.slot != slot);
    }

    /// Who decodes `length` bytes at `address`: function, BAR, and offset.
    pub(crate) fn find(
        &self,
        address: u64,
        length: u64,
    ) -> Option<(Arc<dyn PciFunction>, u8, u64)> {
        let placed = self.placed.read().unwrap_or_else(PoisonError::into_inner);
        let (start, found) = placed.range(..=address).next_back()?;
        let inside = address.checked_add(length)? <= found.end;
        inside.then(|| (Arc::clone(&found.function), found.bar, address - start))
    }
}

/// Hands out addresses of a window to BARs that are there at boot; guests place later ones
/// themselves.
#[derive(Debug)]
pub(crate) struct Allocator {
    free: Range<u64>,
}

impl Allocator {
    /// All of `window` is free.
    pub(crate) fn new(window: Range<u64>) -> Self {
        Self { free: window }
    }

    /// The next `size` bytes, aligned to `size`, a power of two.
    pub(crate) fn take(&mut self, size: u64) -> Option<u64> {
        self.take_aligned(size, size)
    }

    /// The next `size` bytes at a multiple of `alignment`.
    pub(crate) fn take_aligned(&mut self, size: u64, alignment: u64) -> Option<u64> {
        let start = self.free.start.checked_next_multiple_of(alignment)?;
        let end = start
            .checked_add(size)
            .filter(|end| *end <= self.free.end)?;
        self.free.start = end;
        Some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Silent;

    impl PciFunction for Silent {
        fn write_config(&self, _: u16, _: &[u8]) {}
        fn read_bar(&self, _: u8, _: u64, _: &mut [u8]) {}
        fn write_bar(&self, _: u8, _: u64, _: &[u8]) {}
    }

    #[test]
    fn ranges_do_not_overlap_nor_leave_the_windows() {
        let bars = Bars::new([0x1000..0x2000, 0x10_0000..0x20_0000]);
        let function: Arc<dyn PciFunction> = Arc::new(Silent);
        assert!(bars.place(8, 0, Some(0x10_0000..0x10_8000), &function));
        assert!(!bars.place(16, 0, Some(0x10_4000..0x10_c000), &function));
        assert!(!bars.place(16, 0, Some(0xf_c000..0x10_4000), &function));
        assert!(!bars.place(16, 0, Some(0x1f_c000..0x20_4000), &function));
        assert!(!bars.place(16, 0, Some(0x3000..0x4000), &function));
        assert!(bars.place(16, 0, Some(0x1000..0x2000), &function));
        assert!(bars.find(0x1ffc, 4).is_some());
        assert!(bars.find(0x1ffe, 4).is_none());
        assert!(bars.find(0x8000, 4).is_none());
        assert!(
            bars.place(8, 0, Some(0x10_8000..0x11_0000), &function),
            "it moves"
        );
        assert!(bars.find(0x10_0000, 4).is_none());
        assert_eq!(bars.find(0x10_8010, 4).map(|found| found.2), Some(0x10));
        bars.remove(8);
        assert!(bars.find(0x10_8010, 4).is_none());
    }

    #[test]
    fn hundreds_of_gigabytes_fit_the_upper_window() {
        let mut allocator = Allocator::new(1 << 39..1 << 40);
        assert_eq!(allocator.take(0x8000), Some(1 << 39));
        assert_eq!(allocator.take(128 << 30), Some((1 << 39) + (128 << 30)));
        assert_eq!(allocator.take(256 << 30), Some((1 << 39) + (256 << 30)));
        assert_eq!(allocator.take(256 << 30), None);
    }
}
