//! Devices come and go, before the machine boots and while it runs.

use std::{fs::File, os::fd::AsFd, sync::Arc};

use pericarp_protocol::machine::{Device, DeviceKind, Function, PciAddress};
use pericarp_sys::mapping::{Backing, FileMapping};

use super::{Machine, descriptors::Descriptors, devices, errors::MachineError};
use crate::{
    devices::virtio::{
        device::VirtioDevice,
        transport::{BAR_BYTES, VirtioFunction},
    },
    event_loop::FunctionPoller,
    pci::{Slot, root},
};

/// Alignment of a device's region: a memory section of Linux, within which nothing else may lie
/// (128 MiB).
const REGION_ALIGNMENT_BYTES: u64 = 128 << 20;

/// A device on the bus, by its name.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) slot: Slot,
    permanent: bool,
    /// KVM's slot of its region.
    region: Option<u32>,
}

/// A kind that a machine has once, so that requests need not name the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Single {
    Balloon,
    Mem,
}

impl Single {
    fn of(kind: &DeviceKind) -> Option<Self> {
        match kind {
            DeviceKind::Balloon(_) => Some(Self::Balloon),
            DeviceKind::Mem(_) => Some(Self::Mem),
            _ => None,
        }
    }

    pub(super) fn kind(self) -> &'static str {
        match self {
            Self::Balloon => "balloon",
            Self::Mem => "mem",
        }
    }
}

impl Machine {
    /// Attaches a device: at boot with its BAR placed, later without, because the guest places it.
    pub(crate) fn add(
        &mut self,
        device: &Device,
        descriptors: &mut Descriptors,
    ) -> Result<PciAddress, MachineError> {
        let name = device.name.as_str().to_owned();
        if self.names.contains_key(&name) {
            return Err(MachineError::Exists(name));
        }
        let single = Single::of(&device.kind);
        if let Some(other) = single.and_then(|single| self.single.get(&single)) {
            return Err(MachineError::Single(other.clone()));
        }
        let permanent = devices::is_permanent(&device.kind);
        let hot = self.vcpus.is_some();
        if hot && matches!(device.kind, DeviceKind::Mem(_) | DeviceKind::Fs(_)) {
            return Err(MachineError::State(
                "Device.kind: mem and fs cannot be added to a running machine",
            ));
        }
        if let DeviceKind::Function(function) = &device.kind {
            return self.pass_through(name, function, descriptors);
        }
        let mut made = devices::make(device, descriptors, &self.memory)?;
        let place = self.pci_slots.take(permanent && !hot);
        let place = place.ok_or(MachineError::Exhausted("slot"))?;
        let slot = place.0;
        let region = match self.map_region(made.as_mut()) {
            Ok(region) => region,
            Err(error) => {
                self.pci_slots.give_back(slot);
                return Err(error);
            }
        };
        if let Err(error) = self.attach(made, place, hot) {
            if let Some(region) = region {
                // The memory slot goes with the machine if KVM cannot delete it.
                let _ = self.memory_slots.remove(region);
            }
            self.pci_slots.give_back(slot);
            return Err(error);
        }
        let attached = Attached {
            slot,
            permanent,
            region,
        };
        if let Some(single) = single {
            self.single.insert(single, name.clone());
        }
        self.names.insert(name, attached);
        Ok(root::address_of(slot))
    }

    /// Puts a device on the bus.
    fn attach(
        &mut self,
        device: Box<dyn VirtioDevice>,
        place: (Slot, bool),
        hot: bool,
    ) -> Result<(), MachineError> {
        let bar = if hot {
            Some(0)
        } else {
            self.window.take(BAR_BYTES)
        };
        let bar = bar.ok_or(MachineError::Exhausted("address"))?;
        let poller = Arc::new(FunctionPoller::new(Arc::clone(&self.waiter), place.0));
        let function = VirtioFunction::attach(device, place, bar, self.platform.clone(), poller);
        let function = function.map_err(MachineError::host("device registers"))?;
        self.functions.insert(place.0, function);
        Ok(())
    }

    /// Attaches a passthrough device; the guest places its BARs.
    fn pass_through(
        &mut self,
        name: String,
        function: &Function,
        descriptors: &mut Descriptors,
    ) -> Result<PciAddress, MachineError> {
        if !self.memory.layout.pluggable.is_empty() {
            return Err(MachineError::State(
                "Device.kind: passthrough devices and pluggable memory exclude each other",
            ));
        }
        let place = self.pci_slots.take(false);
        let place = place.ok_or(MachineError::Exhausted("slot"))?;
        let (memory, platform) = (&self.memory, &self.platform);
        let added = self
            .passthrough
            .add(function, descriptors, place, memory, platform);
        if let Err(error) = added {
            self.pci_slots.give_back(place.0);
            return Err(error.into());
        }
        let attached = Attached {
            slot: place.0,
            permanent: false,
            region: None,
        };
        self.names.insert(name, attached);
        Ok(root::address_of(place.0))
    }

    /// Maps the region of a device that has one.
    fn map_region(&mut self, device: &mut dyn VirtioDevice) -> Result<Option<u32>, MachineError> {
        let (Some(size), Some(file)) = (device.region_size(), device.region_file()) else {
            return Ok(None);
        };
        let host = MachineError::host;
        let file = File::from(file.try_clone_to_owned().map_err(host("region"))?);
        let too_large = |_| MachineError::Exhausted("address");
        let file_bytes = file.metadata().map_err(host("region"))?.len();
        let file_bytes = usize::try_from(file_bytes).map_err(too_large)?;
        let length = usize::try_from(size).map_err(too_large)?;
        let mapping = FileMapping::new(file.as_fd(), file_bytes, length).map_err(host("region"))?;
        let room = size.next_multiple_of(REGION_ALIGNMENT_BYTES);
        let address = self.regions.take_aligned(room, REGION_ALIGNMENT_BYTES);
        let address = address.ok_or(MachineError::Exhausted("address"))?;
        let backing = Backing::File(Arc::new(mapping));
        let slot = self
            .memory_slots
            .add(address, backing)
            .map_err(host("region"))?;
        device.set_region(address);
        Ok(Some(slot))
    }

    /// Removes a device.
    pub(crate) fn remove(&mut self, name: &str) -> Result<(), MachineError> {
        let unknown = || MachineError::NotFound(name.to_owned());
        let attached = self.names.get(name).ok_or_else(unknown)?;
        if attached.permanent {
            return Err(MachineError::State(
                "device: a device of this kind cannot be removed",
            ));
        }
        let attached = self.names.remove(name).ok_or_else(unknown)?;
        if let Some(function) = self.functions.remove(&attached.slot) {
            function.detach();
        }
        self.passthrough.remove(attached.slot);
        if let Some(region) = attached.region {
            self.memory_slots
                .remove(region)
                .map_err(MachineError::host("region"))?;
        }
        self.pci_slots.give_back(attached.slot);
        Ok(())
    }
}
