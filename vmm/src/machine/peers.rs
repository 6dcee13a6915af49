//! Peer-to-peer DMA between passthrough devices, where kernel and IOMMU support it.
//!
//! BAR ranges that the guest accesses directly are also mapped in the IOMMU at the same addresses.
//! The bus decodes them there, so they overlap neither memory nor another device, and they exclude
//! the MSI-X table. A single device has no peers, and nothing is mapped for it.
//!
//! Hostile guest: it moves BARs as it likes. Each turn of the event loop looks once at the BARs
//! that there are and maps and takes away what has changed, however often it moved in between; what
//! the kernel refuses is not tried again before it has moved.

use std::{collections::BTreeMap, io, sync::Arc};

use pericarp_sys::mapping::DeviceMapping;

use crate::pci::Slot;

/// BAR ranges by the address at which the bus decodes them, with the slot of their device.
pub(super) type BarRanges = BTreeMap<u64, (Slot, Arc<DeviceMapping>)>;

/// What registers can be put into.
pub(super) trait View {
    /// Functions reach `registers` at `address` from now on.
    fn give(&self, address: u64, registers: &Arc<DeviceMapping>) -> io::Result<()>;
    /// And no more.
    fn take(&self, address: u64) -> io::Result<()>;
}

/// What the kernel was asked for.
#[derive(Debug)]
struct Given {
    slot: Slot,
    registers: Arc<DeviceMapping>,
    /// It was not refused.
    mapped: bool,
}

/// What functions reach of each other.
#[derive(Debug, Default)]
pub(super) struct Peers {
    given: BTreeMap<u64, Given>,
    reported: bool,
}

impl Peers {
    /// Makes what functions reach what is `wanted`. What goes does so first, so that two BARs can
    /// change places. Gives the first refusal ever: whose registers, and why.
    pub(super) fn follow(
        &mut self,
        view: &impl View,
        wanted: &BarRanges,
    ) -> Option<(Slot, String)> {
        let mut refusal = None;
        let stays = |address: &u64, given: &Given| {
            let same = |(_, registers): &(Slot, _)| Arc::ptr_eq(registers, &given.registers);
            wanted.get(address).is_some_and(same)
        };
        let gone: Vec<u64> = self
            .given
            .iter()
            .filter(|(address, given)| !stays(address, given))
            .map(|(address, _)| *address)
            .collect();
        for address in gone {
            let Some(given) = self.given.remove(&address) else {
                continue;
            };
            if given.mapped
                && let Err(error) = view.take(address)
            {
                let reason = format!("registers at {address:#x} cannot be taken away: {error}");
                refusal.get_or_insert((given.slot, reason));
                // It is tried again with the next change.
                self.given.insert(address, given);
            }
        }
        for (address, (slot, registers)) in wanted {
            if self.given.contains_key(address) {
                continue;
            }
            let given = view.give(*address, registers);
            let mapped = given.is_ok();
            if let Err(error) = given {
                let reason = format!("the kernel maps no registers at {address:#x}: {error}");
                refusal.get_or_insert((*slot, reason));
            }
            let given = Given {
                slot: *slot,
                registers: Arc::clone(registers),
                mapped,
            };
            self.given.insert(*address, given);
        }
        refusal.filter(|_| !std::mem::replace(&mut self.reported, true))
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, os::fd::AsFd};

    use super::*;

    /// Writes down what it is asked for, and refuses what lies above.
    #[derive(Default)]
    struct Recorder(RefCell<Vec<String>>);

    const REFUSED: u64 = 1 << 40;

    impl View for Recorder {
        fn give(&self, address: u64, _: &Arc<DeviceMapping>) -> io::Result<()> {
            self.0.borrow_mut().push(format!("give {address:#x}"));
            if address >= REFUSED {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            Ok(())
        }

        fn take(&self, address: u64) -> io::Result<()> {
            self.0.borrow_mut().push(format!("take {address:#x}"));
            Ok(())
        }
    }

    fn registers() -> Arc<DeviceMapping> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        Arc::new(DeviceMapping::new(file.as_fd(), 0, 4096).unwrap())
    }

    fn wanted(parts: &[(u64, Slot, &Arc<DeviceMapping>)]) -> BarRanges {
        let parts = parts.iter();
        parts
            .map(|(address, slot, registers)| (*address, (*slot, Arc::clone(registers))))
            .collect()
    }

    #[test]
    fn bars_are_followed_and_may_change_places() {
        let (mut peers, view) = (Peers::default(), Recorder::default());
        let (a, b) = (registers(), registers());
        let mut follow = |parts: &[(u64, Slot, &Arc<DeviceMapping>)]| {
            assert_eq!(peers.follow(&view, &wanted(parts)), None);
            view.0.take()
        };
        let both = follow(&[(0x1000, 8, &a), (0x2000, 16, &b)]);
        assert_eq!(both, ["give 0x1000", "give 0x2000"]);
        let same = follow(&[(0x1000, 8, &a), (0x2000, 16, &b)]);
        assert!(same.is_empty(), "{same:?}");
        let turned = follow(&[(0x1000, 16, &b), (0x2000, 8, &a)]);
        let words = ["take 0x1000", "take 0x2000", "give 0x1000", "give 0x2000"];
        assert_eq!(turned, words);
        let moved = follow(&[(0x1000, 16, &b), (0x3000, 8, &a)]);
        assert_eq!(moved, ["take 0x2000", "give 0x3000"]);
        assert_eq!(follow(&[]), ["take 0x1000", "take 0x3000"]);
        assert_eq!(Arc::strong_count(&a), 1, "nothing is kept");
    }

    #[test]
    fn what_is_refused_is_told_once_and_tried_once() {
        let (mut peers, view) = (Peers::default(), Recorder::default());
        let (a, b) = (registers(), registers());
        let parts = wanted(&[(0x1000, 8, &a), (REFUSED, 16, &b)]);
        let (slot, reason) = peers.follow(&view, &parts).unwrap();
        assert_eq!(slot, 16);
        assert!(reason.contains("0x10000000000"), "{reason}");
        assert_eq!(view.0.take().len(), 2);
        assert_eq!(peers.follow(&view, &parts), None);
        assert!(view.0.take().is_empty(), "it is not tried again");
        let moved = wanted(&[(0x1000, 8, &a), (2 * REFUSED, 16, &b)]);
        assert_eq!(peers.follow(&view, &moved), None, "it was reported");
        assert_eq!(view.0.take(), ["give 0x20000000000"], "nothing to take");
    }
}
