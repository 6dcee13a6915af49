//! Configuration space of one function: current values in memory that the guest reads, and which
//! bits it may change.

use std::{
    ops::Range,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use pericarp_sys::mapping::SharedWords;

use super::Slot;

/// Bytes of configuration space of a function (PCI Express §7.2.2).
pub(crate) const FUNCTION_BYTES: usize = 4096;

/// Words of the part that PCI 3.0 knows; we use no more.
const WORDS: usize = 64;

/// Command register: memory decoding.
const COMMAND_MEMORY: u32 = 1 << 1;
/// Command register: what the guest may set: memory decoding, bus mastering, interrupt disable.
const COMMAND_WRITABLE: u32 = COMMAND_MEMORY | 1 << 2 | 1 << 10;
/// Status register: there is a capability list.
const STATUS_CAPABILITIES: u32 = 1 << (16 + 4);
/// Header type: other functions of this device may be present.
const MULTIFUNCTION: u32 = 1 << (16 + 7);
/// BAR of memory space: 64-bit.
const BAR_64: u32 = 0b100;

/// Registers by word: identity, command and status, class, header type, first BAR, subsystem,
/// capabilities.
const IDENTITY: usize = 0;
const COMMAND: usize = 1;
const CLASS: usize = 2;
const HEADER: usize = 3;
const BARS: usize = 4;
const SUBSYSTEM: usize = 11;
const CAPABILITIES: usize = 13;

/// Where capabilities begin, in bytes.
const CAPABILITIES_START: usize = 0x40;

/// What identifies a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) revision: u8,
    /// Class, subclass and programming interface.
    pub(crate) class: u32,
    pub(crate) subsystem_vendor: u16,
    pub(crate) subsystem: u16,
    /// Other functions of the same device may appear, now or later.
    pub(crate) multifunction: bool,
}

/// What a write changed, for the function to act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Changed {
    /// A BAR, or memory decoding.
    Decoding,
    /// A word of the capabilities, by its byte offset.
    Capability(usize),
    /// Nothing that matters to anyone.
    Nothing,
}

/// The registers of one function.
#[derive(Debug)]
pub(crate) struct ConfigSpace {
    bus: Arc<SharedWords>,
    first: usize,
    writable: [u32; WORDS],
    next_capability: usize,
    last_capability: Option<usize>,
}

impl ConfigSpace {
    /// Makes the function of `slot` visible, without BARs and capabilities. Nothing is decoded yet.
    pub(crate) fn new(bus: Arc<SharedWords>, slot: Slot, identity: &Identity) -> Self {
        let mut space = Self {
            bus,
            first: usize::from(slot) * (FUNCTION_BYTES / 4),
            writable: [0; WORDS],
            next_capability: CAPABILITIES_START,
            last_capability: None,
        };
        for index in 0..WORDS {
            space.set(index, 0);
        }
        space.set(COMMAND, STATUS_CAPABILITIES);
        space.set(CLASS, identity.class << 8 | u32::from(identity.revision));
        space.set(
            HEADER,
            if identity.multifunction {
                MULTIFUNCTION
            } else {
                0
            },
        );
        let subsystem = u32::from(identity.subsystem) << 16;
        space.set(SUBSYSTEM, subsystem | u32::from(identity.subsystem_vendor));
        space.writable[COMMAND] = COMMAND_WRITABLE;
        // Last, because a guest that scans sees the function from here on.
        space.set(
            IDENTITY,
            u32::from(identity.device) << 16 | u32::from(identity.vendor),
        );
        space
    }

    /// Makes a function visible whose registers somebody else has worked out: their values, and
    /// the bits that the guest may change.
    pub(crate) fn show(
        bus: Arc<SharedWords>,
        slot: Slot,
        words: &[u32; WORDS],
        writable: [u32; WORDS],
    ) -> Self {
        let space = Self {
            bus,
            first: usize::from(slot) * (FUNCTION_BYTES / 4),
            writable,
            next_capability: WORDS * 4,
            last_capability: None,
        };
        // The identity last, because a guest that scans sees the function from there on.
        for (index, value) in words.iter().enumerate().rev() {
            space.set(index, *value);
        }
        space
    }

    fn get(&self, index: usize) -> u32 {
        self.bus[self.first + index].load(Relaxed)
    }

    fn set(&self, index: usize, value: u32) {
        self.bus[self.first + index].store(value, Relaxed);
    }

    /// The values of all registers.
    pub(crate) fn save(&self) -> Vec<u32> {
        (0..WORDS).map(|index| self.get(index)).collect()
    }

    /// Takes over what the guest may write, from a function with the same registers otherwise;
    /// false when it is another one.
    pub(crate) fn restore(&mut self, saved: &[u32]) -> bool {
        let fixed = |index: usize, value: u32| value & !self.writable[index];
        let same = (0..WORDS).zip(saved).all(|(index, saved)| {
            let ours = fixed(index, self.get(index));
            ours == fixed(index, *saved)
        });
        if saved.len() != WORDS || !same {
            return false;
        }
        for (index, saved) in saved.iter().enumerate() {
            let value = fixed(index, self.get(index)) | saved & self.writable[index];
            self.set(index, value);
        }
        true
    }

    /// Takes the function out of the guest's sight.
    pub(crate) fn clear(&self) {
        for index in 0..WORDS {
            self.set(index, 0);
        }
    }

    /// Adds a 64-bit memory BAR of `size` bytes, a power of two of at least a page, at register
    /// `bar` and the next. A start of 0 leaves it to the guest.
    pub(crate) fn add_bar(&mut self, bar: u8, size: u64, start: u64) {
        assert!(size.is_power_of_two() && size >= 4096 && start.is_multiple_of(size));
        let index = BARS + usize::from(bar);
        let [low, high] = halves(!(size - 1));
        self.writable[index] = low;
        self.writable[index + 1] = high;
        let [low, high] = halves(start);
        self.set(index, low | BAR_64);
        self.set(index + 1, high);
        if start != 0 {
            self.set(COMMAND, self.get(COMMAND) | COMMAND_MEMORY);
        }
    }

    /// Where a BAR is decoded now, if it is.
    pub(crate) fn bar(&self, bar: u8, size: u64) -> Option<Range<u64>> {
        let high = self.get(BARS + usize::from(bar) + 1);
        self.decoded(bar, size, high)
    }

    /// As [`Self::bar`], for one that takes a single register.
    pub(crate) fn narrow_bar(&self, bar: u8, size: u64) -> Option<Range<u64>> {
        self.decoded(bar, size, 0)
    }

    fn decoded(&self, bar: u8, size: u64, high: u32) -> Option<Range<u64>> {
        if self.get(COMMAND) & COMMAND_MEMORY == 0 {
            return None;
        }
        let low = self.get(BARS + usize::from(bar)) & !0xf;
        let start = u64::from(low) | u64::from(high) << 32;
        let end = start.checked_add(size)?;
        (start != 0).then_some(start..end)
    }

    /// Adds a capability: `bytes` without its two bytes of header, `writable` bits in the same
    /// places. Returns its offset.
    pub(crate) fn add_capability(&mut self, id: u8, bytes: &[u8], writable: &[u8]) -> usize {
        let offset = self.next_capability;
        let length = (2 + bytes.len()).next_multiple_of(4);
        assert!(
            offset + length <= WORDS * 4,
            "the capabilities of a virtio function fit"
        );
        self.set_byte(offset, id);
        for (index, byte) in bytes.iter().enumerate() {
            self.set_byte(offset + 2 + index, *byte);
        }
        for (index, bits) in writable.iter().enumerate() {
            let at = offset + 2 + index;
            self.writable[at / 4] |= u32::from(*bits) << (at % 4 * 8);
        }
        let link = u8::try_from(offset).expect("below 256");
        match self.last_capability {
            Some(last) => self.set_byte(last + 1, link),
            None => self.set(CAPABILITIES, u32::from(link)),
        }
        self.last_capability = Some(offset);
        self.next_capability = offset + length;
        offset
    }

    fn set_byte(&self, offset: usize, byte: u8) {
        let shift = offset % 4 * 8;
        let value = self.get(offset / 4) & !(0xff << shift) | u32::from(byte) << shift;
        self.set(offset / 4, value);
    }

    /// The word at a byte offset.
    pub(crate) fn word(&self, offset: usize) -> u32 {
        self.get(offset / 4)
    }

    /// The guest writes: only the bits it may change do. What crosses a word or lies beyond is
    /// dropped.
    pub(crate) fn write(&mut self, offset: u16, data: &[u8]) -> Changed {
        let offset = usize::from(offset);
        let (index, at) = (offset / 4, offset % 4);
        if index >= WORDS || data.is_empty() || at + data.len() > 4 {
            return Changed::Nothing;
        }
        let (mut value, mut mask) = (0, 0);
        for (position, byte) in data.iter().enumerate() {
            value |= u32::from(*byte) << ((at + position) * 8);
            mask |= 0xff << ((at + position) * 8);
        }
        let mask = mask & self.writable[index];
        if mask == 0 {
            return Changed::Nothing;
        }
        self.set(index, self.get(index) & !mask | value & mask);
        match index {
            COMMAND | BARS..SUBSYSTEM => Changed::Decoding,
            _ if offset >= CAPABILITIES_START => Changed::Capability(index * 4),
            _ => Changed::Nothing,
        }
    }
}

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IDENTITY_OF_TEST: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_8000,
        subsystem_vendor: 0x1af4,
        subsystem: 0x40,
        multifunction: false,
    };

    fn space() -> ConfigSpace {
        let bus = Arc::new(SharedWords::new(FUNCTION_BYTES).unwrap());
        let mut space = ConfigSpace::new(bus, 0, &IDENTITY_OF_TEST);
        space.add_bar(0, 0x8000, 0);
        space
    }

    #[test]
    fn a_bar_is_sized_and_moved() {
        let mut space = space();
        assert_eq!(space.bar(0, 0x8000), None);
        space.write(0x10, &u32::MAX.to_le_bytes());
        space.write(0x14, &u32::MAX.to_le_bytes());
        assert_eq!(
            (space.word(0x10), space.word(0x14)),
            (0xffff_8004, u32::MAX)
        );
        space.write(0x10, &0x8000_u32.to_le_bytes());
        space.write(0x14, &0x80_u32.to_le_bytes());
        assert_eq!(space.bar(0, 0x8000), None, "not decoded yet");
        assert_eq!(space.write(4, &[2, 0]), Changed::Decoding);
        assert_eq!(space.bar(0, 0x8000), Some(0x80_0000_8000..0x80_0001_0000));
    }

    #[test]
    fn capabilities_are_linked_and_partly_writable() {
        let mut space = space();
        let first = space.add_capability(9, &[4, 1, 0], &[]);
        let second = space.add_capability(0x11, &[3, 0], &[0, 0xc0]);
        assert_eq!(space.word(0x34), u32::try_from(first).unwrap());
        assert_eq!(
            usize::try_from(space.word(first) >> 8 & 0xff).unwrap(),
            second
        );
        let changed = space.write(u16::try_from(second).unwrap() + 2, &[0xff, 0xff]);
        assert_eq!(changed, Changed::Capability(second));
        assert_eq!(space.word(second), 0xc003_0011);
    }

    proptest! {
        #[test]
        fn hostile_writes_change_only_what_they_may(
            writes in prop::collection::vec(
                (any::<u16>(), prop::collection::vec(any::<u8>(), 0..9)), 0..64)
        ) {
            let mut space = space();
            for (offset, data) in writes {
                space.write(offset, &data);
            }
            prop_assert_eq!(space.word(0), 0x1042_1af4);
            prop_assert_eq!(space.word(0x10) & 0x7fff, 4);
            prop_assert_eq!(space.word(0x2c), 0x40_1af4);
            let _ = space.bar(0, 0x8000);
        }
    }
}
