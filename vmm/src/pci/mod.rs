//! One PCI Express root bus without bridges (PCI Express base specification 6.0; PCI local bus
//! specification 3.0 §6).
//!
//! A guest reads configuration space without an exit: the bus's ECAM range is memory of ours that
//! the guest may only read. Writes exit and come to [`root::Root::write_config`], and the function
//! answers by changing what is read. This is why every register is kept in [`config::ConfigSpace`]
//! as its current value and nothing is computed at a read.
//!
//! Functions are addressed by slot: device number times 8 plus function number, as in the ECAM
//! address.

pub(crate) mod bars;
pub(crate) mod config;
pub(crate) mod msix;
pub(crate) mod root;
pub(crate) mod routes;

use std::fmt::Debug;

/// Device and function number on the bus.
pub(crate) type Slot = u8;

/// A function on the bus. Calls come from the vCPU thread that trapped.
pub(crate) trait PciFunction: Debug + Send + Sync {
    /// The guest wrote `data` (1, 2 or 4 bytes, within a word) to configuration space.
    fn write_config(&self, offset: u16, data: &[u8]);
    /// The guest read from a BAR.
    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]);
    /// The guest wrote to a BAR.
    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]);
}
