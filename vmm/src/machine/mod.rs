//! The virtual machine: made from its description, then told what to do.
//!
//! ```text
//!  Machine::new --add * n--> assembled --boot--> vCPUs at the gate --resume--> running <--> paused
//!  (Start)      (AddDevice)              (Run)                                 add, remove, ...
//! ```
//!
//! All of it belongs to the event loop's thread; vCPU threads hold what [`vcpu::Context`] names.
//!
//! | module | what it does |
//! |---|---|
//! | [`boot`] | kernel, vCPUs and their threads |
//! | [`hotplug`] | devices come and go |
//! | [`commands`] | sizes, limits and counters of a machine that runs |
//! | [`vcpu`] | the vCPU threads and the gate that holds them |
//! | [`bus`] | port and memory accesses of vCPUs |
//! | [`devices`], [`passthrough`] | devices from their descriptions |
//! | [`peers`] | what passthrough devices reach of each other |
//! | [`memory`] | guest memory |
//! | [`saved`] | a whole machine as plain data |
//! | [`descriptors`], [`errors`] | what comes with a request, and why it failed |

mod boot;
mod bus;
mod commands;
pub(crate) mod descriptors;
mod devices;
pub(crate) mod errors;
mod hotplug;
mod memory;
mod passthrough;
mod peers;
pub(crate) mod saved;
mod vcpu;

use std::{collections::BTreeMap, fs::File, sync::Arc};

use kvm_ioctls::Kvm;
use pericarp_protocol::machine::{FieldError, Machine as Description};
use pericarp_sys::{
    kvm::{self, MemorySlots},
    mapping::Backing,
};

use self::{
    bus::Bus,
    descriptors::Descriptors,
    errors::MachineError,
    hotplug::{Attached, Single},
    memory::Memory,
    passthrough::Passthrough,
    saved::SavedMachine,
    vcpu::{Exits, Vcpus},
};
use crate::{
    arch,
    devices::virtio::{
        device::{Broken, Readiness},
        transport::{Platform, VirtioFunction},
    },
    event_loop::{Doorbell, End, Waiter},
    pci::{
        Slot,
        bars::{Allocator, Bars},
        root::{self, Root},
        routes::Routes,
    },
};

/// The machine.
#[derive(Debug)]
pub(crate) struct Machine {
    description: Description,
    kvm: Kvm,
    kernel: File,
    initramfs: Option<File>,
    memory: Memory,
    memory_slots: Arc<MemorySlots>,
    platform: Platform,
    waiter: Arc<Waiter>,
    bus: Arc<Bus>,
    pci_slots: root::SlotAllocator,
    window: Allocator,
    regions: Allocator,
    names: BTreeMap<String, Attached>,
    single: BTreeMap<Single, String>,
    functions: BTreeMap<Slot, Arc<VirtioFunction>>,
    passthrough: Passthrough,
    exits: Arc<Exits>,
    vcpus: Option<Vcpus>,
    /// Where it goes on from, until it does.
    saved: Option<Box<SavedMachine>>,
    was_saved: bool,
    /// A new size of memory was asked for and has not been reached.
    resizing: bool,
}

impl Machine {
    /// Makes the machine without devices and vCPUs.
    pub(crate) fn new(
        description: Description,
        descriptors: &mut Descriptors,
        waiter: Arc<Waiter>,
    ) -> Result<Self, MachineError> {
        let kvm = open_kvm(&description, descriptors)?;
        let kernel = File::from(descriptors.take("Machine.kernel", description.kernel)?);
        let initramfs = match description.initramfs.as_slice() {
            [file] => Some(File::from(descriptors.take("Machine.initramfs", *file)?)),
            _ => None,
        };
        let saved = open_saved(&description, descriptors)?;
        let files = memory_files(&description, descriptors, saved.is_some())?;
        let bits = arch::machine::address_bits(&kvm)?;
        let sizes = (description.memory_bytes, description.memory_max_bytes);
        let layout = arch::layout::plan(sizes.0, sizes.1, bits)?;
        let vm =
            Arc::new(kvm::create_vm(&kvm).map_err(arch::machine::KvmError::at("create machine"))?);
        arch::machine::set_up(&vm)?;
        let slots = Arc::new(MemorySlots::new(Arc::clone(&vm)));
        let memory = memory::map(&description, layout, files, &slots)?;
        let host = MachineError::host;
        let root = Arc::new(Root::new().map_err(host("configuration space"))?);
        let words = Backing::Words(Arc::clone(root.words()));
        slots
            .add(arch::layout::ECAM.start, words)
            .map_err(host("configuration space"))?;
        let windows = [arch::layout::WINDOW_32, memory.layout.window_64.clone()];
        let bars = Arc::new(Bars::new(windows));
        let doorbell = Arc::new(Doorbell::new().map_err(host("doorbell"))?);
        let bus = Bus::new(Arc::clone(&root), Arc::clone(&bars), Arc::clone(&doorbell));
        Ok(Self {
            kvm,
            kernel,
            initramfs,
            window: Allocator::new(memory.layout.window_64.clone()),
            regions: Allocator::new(memory.layout.regions.clone()),
            platform: Platform {
                routes: Arc::new(Routes::new(Arc::clone(&vm))),
                vm,
                memory_slots: Arc::clone(&slots),
                memory: Arc::clone(&memory.guest),
                root,
                bars,
                doorbell,
                interrupts: Arc::default(),
            },
            memory,
            memory_slots: slots,
            waiter,
            bus: Arc::new(bus),
            pci_slots: root::SlotAllocator::new(),
            names: BTreeMap::new(),
            single: BTreeMap::new(),
            functions: BTreeMap::new(),
            passthrough: Passthrough::default(),
            exits: Arc::default(),
            vcpus: None,
            saved,
            was_saved: false,
            resizing: false,
            description,
        })
    }

    /// What vCPU threads wake.
    pub(crate) fn doorbell(&self) -> &Arc<Doorbell> {
        &self.platform.doorbell
    }

    /// What answers the accesses of a guest that is played.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Its functions.
    #[cfg(test)]
    pub(crate) fn functions(&self) -> &BTreeMap<Slot, Arc<VirtioFunction>> {
        &self.functions
    }

    /// Its memory.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Work that a vCPU rang for. Gives the names of devices that broke.
    pub(crate) fn work(&mut self) -> Vec<(String, Broken)> {
        let slots = self.platform.doorbell.take_slots();
        let mut moved = false;
        for passed in slots.iter().filter_map(|slot| self.passthrough.get(*slot)) {
            passed.map();
            moved = true;
        }
        if moved {
            self.passthrough.share();
        }
        slots
            .into_iter()
            .filter_map(|slot| self.serve(slot, VirtioFunction::work))
            .collect()
    }

    /// A descriptor of a device is ready.
    pub(crate) fn ready(
        &self,
        slot: Slot,
        token: u32,
        ready: Readiness,
    ) -> Option<(String, Broken)> {
        self.serve(slot, |function| function.ready(token, ready))
    }

    fn serve(
        &self,
        slot: Slot,
        act: impl FnOnce(&VirtioFunction) -> Result<(), Broken>,
    ) -> Option<(String, Broken)> {
        // A removed device may have been rung for a moment before.
        let function = self.functions.get(&slot)?;
        let broken = act(function).err()?;
        function.set_broken();
        Some((self.name_of(slot), broken))
    }

    /// The passthrough device whose BARs its peers cannot reach, and why. Returned once.
    pub(crate) fn take_peer_failure(&mut self) -> Option<(String, String)> {
        let (slot, reason) = self.passthrough.take_peer_failure()?;
        Some((self.name_of(slot), reason))
    }

    fn name_of(&self, slot: Slot) -> String {
        let mut names = self.names.iter();
        let name = names.find(|(_, attached)| attached.slot == slot);
        name.map(|(name, _)| name.clone()).unwrap_or_default()
    }

    /// How it ended, if it did.
    pub(crate) fn ended(&self) -> Option<End> {
        self.platform.doorbell.ended()
    }

    /// Memory that it has at most.
    pub(crate) fn memory_max_bytes(&self) -> u64 {
        self.description.memory_max_bytes
    }

    /// User and group to become.
    pub(crate) fn ids(&self) -> (u32, u32) {
        (self.description.uid, self.description.gid)
    }
}

fn open_saved(
    description: &Description,
    descriptors: &mut Descriptors,
) -> Result<Option<Box<SavedMachine>>, MachineError> {
    let Some(file) = description.saved.as_slice().first() else {
        return Ok(None);
    };
    let file = descriptors.take("Machine.saved", *file)?;
    Ok(Some(Box::new(SavedMachine::read(file, description)?)))
}

fn memory_files(
    description: &Description,
    descriptors: &mut Descriptors,
    private: bool,
) -> Result<memory::Files, MachineError> {
    let boot = descriptors.take("Machine.memory", description.memory)?;
    let pluggable = description.pluggable.as_slice().first();
    let pluggable = pluggable.map(|file| descriptors.take("Machine.pluggable", *file));
    Ok(memory::Files {
        boot,
        private,
        pluggable: pluggable.transpose()?,
    })
}

/// The version of KVM's interface, the only one there ever was.
const KVM_VERSION: i32 = 12;

fn open_kvm(description: &Description, descriptors: &mut Descriptors) -> Result<Kvm, MachineError> {
    let kvm = kvm::from_descriptor(descriptors.take("Machine.kvm", description.kvm)?);
    if kvm.get_api_version() != KVM_VERSION {
        return Err(FieldError::new("Machine.kvm", "it is not /dev/kvm").into());
    }
    Ok(kvm)
}
