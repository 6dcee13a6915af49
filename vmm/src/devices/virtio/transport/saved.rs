//! A whole function as plain data: registers, vectors, configuration space and the device (D8).

use serde::{Deserialize, Serialize};

use super::{
    super::saved::{DeviceState, Saved},
    VirtioFunction, lock,
    registers::Registers,
};
use crate::{devices::virtio::device::Broken, pci::msix::SavedVector};

/// A stopped function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedFunction {
    config: Vec<u32>,
    registers: Registers,
    vectors: Vec<SavedVector>,
    device: Saved,
}

impl SavedFunction {
    /// Whether nothing was in flight that another device could not go on with.
    pub(crate) fn is_whole(&self) -> bool {
        match self.device.state {
            DeviceState::Fs { unanswered } => unanswered == 0,
            _ => true,
        }
    }
}

impl VirtioFunction {
    /// Stops the device and gives all that a function in its place needs to go on. The vCPUs stand
    /// still, and what the driver asked for by its status has been done ([`Self::work`]).
    pub(crate) fn save(&self) -> SavedFunction {
        let device = lock(&self.device).save();
        let vectors = self.msix.save();
        let saved = SavedFunction {
            config: lock(&self.config).save(),
            registers: lock(&self.registers).clone(),
            vectors,
            device,
        };
        self.reset();
        saved
    }

    /// Makes a fresh function go on where a saved one stood, with the guest's memory as it was.
    pub(crate) fn restore(&self, saved: &SavedFunction) -> Result<(), Broken> {
        let unfit = |what: &str| self.broken(format!("saved {what} are those of another device"));
        if !saved.registers.fit(&lock(&self.registers)) {
            return Err(unfit("registers"));
        }
        if !lock(&self.config).restore(&saved.config) {
            return Err(unfit("configuration registers"));
        }
        if !self.msix.restore(&saved.vectors) {
            return Err(unfit("vectors"));
        }
        let mut registers = lock(&self.registers);
        *registers = saved.registers.clone();
        registers.show(&self.common);
        self.vectors.update(&registers);
        drop(registers);
        let [_, _, low, high] = lock(&self.config).word(self.msix_capability).to_le_bytes();
        self.decode();
        self.show_common();
        // Before the device goes on: it may interrupt at once, and what comes before is lost.
        self.msix.set_control(u16::from_le_bytes([low, high]));
        let restored = lock(&self.device).restore(&saved.device.state);
        restored.map_err(|error| self.broken(error.to_string()))?;
        if saved.registers.is_live() {
            self.activate(&saved.device.queues)?;
            // What lay in the rings was announced to the one before.
            self.kick_all();
        }
        Ok(())
    }
}
