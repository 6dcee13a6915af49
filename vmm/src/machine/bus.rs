//! What answers a vCPU's port and memory accesses.

use std::sync::Arc;

use crate::{
    arch::layout,
    event_loop::{Doorbell, End},
    pci::{bars::Bars, root::Root},
};

/// SLP_EN of the sleep control register (ACPI 6.5 §4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;

/// pvpanic: the guest's kernel panicked (QEMU's `docs/specs/pvpanic.rst`).
const PANICKED: u8 = 1;

/// Whether a vCPU goes on after an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// It does.
    Continue,
    /// The machine ends.
    Stop,
}

/// The machine's address spaces as far as they trap.
#[derive(Debug)]
pub(crate) struct Bus {
    root: Arc<Root>,
    bars: Arc<Bars>,
    doorbell: Arc<Doorbell>,
}

impl Bus {
    /// The bus of a machine.
    pub(crate) fn new(root: Arc<Root>, bars: Arc<Bars>, doorbell: Arc<Doorbell>) -> Self {
        Self {
            root,
            bars,
            doorbell,
        }
    }

    /// A load from where no memory is: nobody there reads as ones.
    pub(crate) fn read_memory(&self, address: u64, data: &mut [u8]) {
        if layout::ECAM.contains(&address) {
            self.root.read_config(address - layout::ECAM.start, data);
            return;
        }
        match self.bars.find(address, data.len() as u64) {
            Some((function, bar, offset)) => function.read_bar(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    /// A store to where no memory is, or memory that the guest may only read.
    pub(crate) fn write_memory(&self, address: u64, data: &[u8]) {
        if layout::ECAM.contains(&address) {
            self.root.write_config(address - layout::ECAM.start, data);
        } else if let Some((function, bar, offset)) = self.bars.find(address, data.len() as u64) {
            function.write_bar(bar, offset, data);
        }
    }

    /// A read of a port.
    pub(crate) fn read_port(&self, port: u16, data: &mut [u8]) {
        let value = match port {
            layout::PORT_PANIC => PANICKED,
            layout::PORT_SLEEP_CONTROL | layout::PORT_SLEEP_STATUS | layout::PORT_RESET => 0,
            _ => 0xff,
        };
        data.fill(value);
    }

    /// A write to a port.
    pub(crate) fn write_port(&self, port: u16, data: &[u8]) -> Flow {
        let end = match (port, data) {
            (layout::PORT_SLEEP_CONTROL, [value, ..]) if value & SLEEP_ENABLE != 0 => End::PowerOff,
            (layout::PORT_RESET, [layout::RESET_VALUE, ..]) => End::Reset,
            (layout::PORT_PANIC, [value, ..]) if value & PANICKED != 0 => {
                self.doorbell.panicked();
                return Flow::Continue;
            }
            _ => return Flow::Continue,
        };
        self.doorbell.end(end);
        Flow::Stop
    }
}
