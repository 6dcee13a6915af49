//! The root bus: configuration space in memory, functions by slot, and the order in which slots are
//! given out.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use pericarp_protocol::machine::PciAddress;
use pericarp_sys::mapping::SharedWords;

use super::{
    PciFunction, Slot,
    config::{ConfigSpace, FUNCTION_BYTES, Identity},
};

/// Functions on the bus.
const SLOTS: usize = 256;

/// Functions of a device.
const FUNCTIONS: u8 = 8;

/// Devices, the host bridge's included, whose first function never goes away, so that more
/// functions can be found behind it. Each costs a guest seven reads at boot; with four of them 64
/// functions fit: 32 first ones and 32 behind these.
pub(crate) const PERMANENT_DEVICES_MAX: usize = 5;

/// Our host bridge: the vendor number is Red Hat's, the device number that of a generic PCIe host
/// bridge of QEMU.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0,
    subsystem: 0,
    multifunction: true,
};

/// The bus.
#[derive(Debug)]
pub(crate) struct Root {
    words: Arc<SharedWords>,
    functions: RwLock<BTreeMap<Slot, Arc<dyn PciFunction>>>,
}

/// Which slots are taken.
#[derive(Debug)]
pub(crate) struct SlotAllocator {
    taken: [bool; SLOTS],
    permanent: Vec<u8>,
}

impl SlotAllocator {
    /// Only the host bridge is there.
    pub(crate) fn new() -> Self {
        let mut taken = [false; SLOTS];
        taken[0] = true;
        Self {
            taken,
            permanent: vec![0],
        }
    }

    /// Takes a slot. Linux looks for functions 1 to 7 of a device only where it found function 0
    /// with the multifunction bit, so further functions go only behind permanent ones. The second
    /// value is that bit.
    pub(crate) fn take(&mut self, permanent: bool) -> Option<(Slot, bool)> {
        let first = (1..32)
            .map(|device| device * FUNCTIONS)
            .find(|slot| self.is_free(*slot));
        if let Some(slot) = first {
            let shared = permanent && self.permanent.len() < PERMANENT_DEVICES_MAX;
            if shared {
                self.permanent.push(slot / FUNCTIONS);
            }
            self.taken[usize::from(slot)] = true;
            return Some((slot, shared));
        }
        let slot = self.permanent.iter().find_map(|device| {
            (1..FUNCTIONS)
                .map(|function| device * FUNCTIONS + function)
                .find(|slot| self.is_free(*slot))
        })?;
        self.taken[usize::from(slot)] = true;
        Some((slot, false))
    }

    fn is_free(&self, slot: Slot) -> bool {
        !self.taken[usize::from(slot)]
    }

    /// Gives a slot back.
    pub(crate) fn give_back(&mut self, slot: Slot) {
        self.taken[usize::from(slot)] = false;
    }
}

/// How the guest and the shim call a slot.
pub(crate) fn address_of(slot: Slot) -> PciAddress {
    PciAddress {
        segment: 0,
        bus: 0,
        device: slot / FUNCTIONS,
        function: slot % FUNCTIONS,
    }
}

impl Root {
    /// A bus with its host bridge.
    pub(crate) fn new() -> std::io::Result<Self> {
        let words = Arc::new(SharedWords::new(SLOTS * FUNCTION_BYTES)?);
        ConfigSpace::new(Arc::clone(&words), 0, &HOST_BRIDGE);
        Ok(Self {
            words,
            functions: RwLock::default(),
        })
    }

    /// Memory of the configuration spaces.
    pub(crate) fn words(&self) -> &Arc<SharedWords> {
        &self.words
    }

    /// Connects a function whose [`ConfigSpace`] is in place.
    pub(crate) fn attach(&self, slot: Slot, function: Arc<dyn PciFunction>) {
        let mut functions = self
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        functions.insert(slot, function);
    }

    /// Disconnects a function.
    pub(crate) fn detach(&self, slot: Slot) {
        let mut functions = self
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        functions.remove(&slot);
    }

    /// The guest reads configuration space with an exit: only where its instruction had to be
    /// emulated.
    pub(crate) fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let index = usize::try_from(at / 4).unwrap_or(usize::MAX);
            let word = self.words.get(index);
            let value = word.map_or(u32::MAX, |w| w.load(std::sync::atomic::Ordering::Relaxed));
            *byte = value.to_le_bytes()[usize::try_from(at % 4).expect("below 4")];
        }
    }

    /// The guest writes `data` at an offset in ECAM.
    pub(crate) fn write_config(&self, offset: u64, data: &[u8]) {
        const FUNCTION: u64 = FUNCTION_BYTES as u64;
        let Ok(slot) = Slot::try_from(offset / FUNCTION) else {
            return;
        };
        let offset = u16::try_from(offset % FUNCTION).expect("below 4096");
        let function = {
            let functions = self
                .functions
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            functions.get(&slot).cloned()
        };
        let Some(function) = function else { return };
        // A write of 8 bytes is two of 4.
        for (offset, part) in (offset..).step_by(4).zip(data.chunks(4)) {
            function.write_config(offset, part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixty_four_functions_fit_and_come_back() {
        let mut slots = SlotAllocator::new();
        let mut taken = Vec::new();
        while let Some((slot, shared)) = slots.take(taken.len() < 6) {
            assert!(!taken.contains(&slot));
            assert_eq!(shared, taken.len() < PERMANENT_DEVICES_MAX - 1);
            taken.push(slot);
        }
        assert!(taken.len() >= 64, "{}", taken.len());
        slots.give_back(taken[40]);
        assert_eq!(slots.take(false), Some((taken[40], false)));
    }

    #[test]
    fn absent_functions_read_as_absent_and_swallow_writes() {
        let root = Root::new().unwrap();
        let mut data = [0; 4];
        root.read_config(0, &mut data);
        assert_eq!(data, [0x36, 0x1b, 0x08, 0x00]);
        root.read_config(8 << 12, &mut data);
        assert_eq!(data, [0; 4]);
        root.read_config((1 << 20) - 2, &mut data);
        assert_eq!(data, [0, 0, 0xff, 0xff]);
        for offset in [0, 1, 0xfff, 8 << 12, (1 << 20) - 1, 1 << 20, u64::MAX] {
            root.write_config(offset, &[0xff; 8]);
        }
    }
}
