//! The virtual machine: made from its description, then told what to do.
//!
//! ```text
//!  Machine::new --add * n--> assembled --boot--> vCPUs at the gate --resume--> running <--> paused
//!  (Start)      (AddDevice)              (Run)                                 add, remove, ...
//! ```
//!
//! All of it belongs to the event loop's thread; vCPU threads hold what [`vcpu::Context`] names.

mod bus;
pub(crate) mod descriptors;
mod devices;
pub(crate) mod errors;
mod memory;
mod passthrough;
mod peers;
pub(crate) mod vcpu;

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    sync::{Arc, atomic::Ordering::Relaxed},
};

use kvm_ioctls::{Kvm, VcpuFd};
use pericarp_protocol::machine::{
    Counter, Device, DeviceKind, DeviceStatistics, Direction, FieldError, Function, List,
    Machine as Description, NewLimit, PciAddress, Statistics, Text,
};
use pericarp_sys::{
    kvm::{self, Slots},
    mapping::{Backing, FileMapping},
};

use self::{
    bus::Bus,
    descriptors::Descriptors,
    errors::MachineError,
    memory::Memory,
    passthrough::Passthrough,
    vcpu::{Context, Exits, Gate, Vcpus},
};
use crate::{
    arch,
    devices::virtio::{
        device::{Broken, Command, Readiness, VirtioDevice},
        transport::{BAR_BYTES, Surroundings, VirtioFunction},
    },
    event_loop::{Doorbell, End, FunctionPoller, Waiter},
    pci::{
        Slot,
        bars::{Allocator, Bars},
        root::{self, Root},
        routes::Routes,
    },
};

/// Alignment of a device's region: a memory section of Linux, within which nothing else may lie
/// (128 MiB).
const REGION_ALIGNMENT_BYTES: u64 = 128 << 20;

/// A device on the bus, by its name.
#[derive(Debug)]
struct Attached {
    slot: Slot,
    permanent: bool,
    /// KVM's slot of its region.
    region: Option<u32>,
}

/// A kind that a machine has once, so that requests need not name the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Single {
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

    fn kind(self) -> &'static str {
        match self {
            Self::Balloon => "balloon",
            Self::Mem => "mem",
        }
    }
}

/// The machine.
#[derive(Debug)]
pub(crate) struct Machine {
    description: Description,
    kvm: Kvm,
    kernel: File,
    initramfs: Option<File>,
    memory: Memory,
    slots: Arc<Slots>,
    around: Surroundings,
    waiter: Arc<Waiter>,
    bus: Arc<Bus>,
    pci_slots: root::Slots,
    window: Allocator,
    regions: Allocator,
    names: BTreeMap<String, Attached>,
    single: BTreeMap<Single, String>,
    functions: BTreeMap<Slot, Arc<VirtioFunction>>,
    passthrough: Passthrough,
    exits: Arc<Exits>,
    vcpus: Option<Vcpus>,
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
        let file = descriptors.take("Machine.memory", description.memory)?;
        let bits = arch::machine::address_bits(&kvm)?;
        let sizes = (description.memory_bytes, description.memory_max_bytes);
        let layout = arch::layout::plan(sizes.0, sizes.1, bits)?;
        let vm =
            Arc::new(kvm::create_vm(&kvm).map_err(arch::machine::KvmError::at("create machine"))?);
        arch::machine::set_up(&vm)?;
        let slots = Arc::new(Slots::new(Arc::clone(&vm)));
        let memory = memory::map(&description, layout, file, &slots)?;
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
            around: Surroundings {
                routes: Arc::new(Routes::new(Arc::clone(&vm))),
                vm,
                slots: Arc::clone(&slots),
                memory: Arc::clone(&memory.guest),
                root,
                bars,
                doorbell,
                interrupts: Arc::default(),
            },
            memory,
            slots,
            waiter,
            bus: Arc::new(bus),
            pci_slots: root::Slots::new(),
            names: BTreeMap::new(),
            single: BTreeMap::new(),
            functions: BTreeMap::new(),
            passthrough: Passthrough::default(),
            exits: Arc::default(),
            vcpus: None,
            resizing: false,
            description,
        })
    }

    /// What vCPU threads wake.
    pub(crate) fn doorbell(&self) -> &Arc<Doorbell> {
        &self.around.doorbell
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
        if hot && matches!(device.kind, DeviceKind::Mem(_)) {
            return Err(MachineError::State(
                "Device.kind: mem is there from the start or never",
            ));
        }
        if let DeviceKind::Function(function) = &device.kind {
            return self.pass_through(name, function, descriptors);
        }
        let mut made = devices::make(device, descriptors, &self.memory)?;
        let region = self.map_region(made.as_mut())?;
        let taken = self.pci_slots.take(permanent && !hot);
        let place = taken.ok_or(MachineError::Exhausted("slot"))?;
        let bar = if hot {
            Some(0)
        } else {
            self.window.take(BAR_BYTES)
        };
        let bar = bar.ok_or(MachineError::Exhausted("address"))?;
        let slot = place.0;
        let poller = Arc::new(FunctionPoller::new(Arc::clone(&self.waiter), slot));
        let function = VirtioFunction::attach(made, place, bar, self.around.clone(), poller);
        let function = function.map_err(MachineError::host("device registers"))?;
        self.functions.insert(slot, function);
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

    /// Puts a function of the host on the bus; the guest places its BARs.
    fn pass_through(
        &mut self,
        name: String,
        function: &Function,
        descriptors: &mut Descriptors,
    ) -> Result<PciAddress, MachineError> {
        if !self.memory.layout.pluggable.is_empty() {
            return Err(MachineError::State(
                "Device.kind: a machine with pluggable memory gets no function of the host",
            ));
        }
        let place = self.pci_slots.take(false);
        let place = place.ok_or(MachineError::Exhausted("slot"))?;
        let (memory, around) = (&self.memory, &self.around);
        let added = self
            .passthrough
            .add(function, descriptors, place, memory, around);
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
        let slot = self.slots.add(address, backing).map_err(host("region"))?;
        device.set_region(address);
        Ok(Some(slot))
    }

    /// Takes a device away.
    pub(crate) fn remove(&mut self, name: &str) -> Result<(), MachineError> {
        let unknown = || MachineError::NotFound(name.to_owned());
        let attached = self.names.get(name).ok_or_else(unknown)?;
        if attached.permanent {
            return Err(MachineError::State(
                "device: this kind stays for the machine's life",
            ));
        }
        let attached = self.names.remove(name).ok_or_else(unknown)?;
        if let Some(function) = self.functions.remove(&attached.slot) {
            function.detach();
        }
        self.passthrough.remove(attached.slot);
        if let Some(region) = attached.region {
            self.slots
                .remove(region)
                .map_err(MachineError::host("region"))?;
        }
        self.pci_slots.give_back(attached.slot);
        Ok(())
    }

    /// Loads the kernel and prepares every vCPU.
    pub(crate) fn boot(&mut self) -> Result<Vec<VcpuFd>, MachineError> {
        let description = &self.description;
        let count = description.vcpus_max;
        let entry = arch::boot::load(
            &self.memory.guest,
            &self.memory.layout,
            count,
            &mut self.kernel,
            self.initramfs.as_mut(),
            description.command_line.as_str(),
        )?;
        let features = description.cpu_features.as_str();
        let template = arch::cpu::template(&self.kvm, description.cpu, features, count)?;
        let mut vcpus = Vec::new();
        for id in 0..count {
            let vcpu = self.around.vm.create_vcpu(u64::from(id));
            let vcpu = vcpu.map_err(arch::machine::KvmError::at("create vCPU"))?;
            let entry = (id == 0).then_some(&entry);
            arch::cpu::prepare(&vcpu, id, &template, entry)?;
            vcpus.push(vcpu);
        }
        if let Some(first) = vcpus.first() {
            let ecam = arch::layout::ECAM;
            // A page fault less for each function that a scan of the bus looks at. Before Linux
            // 6.11 there is no such call.
            let _ = kvm::pre_fault(first, ecam.start, ecam.end - ecam.start);
        }
        Ok(vcpus)
    }

    /// Starts the vCPU threads, which wait at the gate.
    pub(crate) fn spawn(
        &mut self,
        vcpus: Vec<VcpuFd>,
        confine: fn() -> io::Result<()>,
    ) -> Result<(), MachineError> {
        let gate = Arc::new(Gate::new(self.description.vcpus));
        let context = || Context {
            bus: Arc::clone(&self.bus),
            gate: Arc::clone(&gate),
            exits: Arc::clone(&self.exits),
            doorbell: Arc::clone(&self.around.doorbell),
        };
        let vcpus = Vcpus::spawn(vcpus, context, confine);
        self.vcpus = Some(vcpus.map_err(MachineError::host("vCPU threads"))?);
        Ok(())
    }

    fn vcpus(&self) -> Result<&Vcpus, MachineError> {
        self.vcpus
            .as_ref()
            .ok_or(MachineError::State("the machine does not run yet"))
    }

    /// Lets the vCPUs run.
    pub(crate) fn resume(&self) -> Result<(), MachineError> {
        self.vcpus()?.open();
        Ok(())
    }

    /// Stops them.
    pub(crate) fn pause(&self) -> Result<(), MachineError> {
        self.vcpus()?.close();
        Ok(())
    }

    /// How many vCPUs run.
    pub(crate) fn resize_vcpus(&self, count: u16) -> Result<(), MachineError> {
        let vcpus = self.vcpus()?;
        let (_, most) = vcpus.counts();
        if usize::from(count) > most {
            let reason = format!("{count} is more than vcpus_max = {most}");
            return Err(FieldError::new("Vcpus.count", reason).into());
        }
        vcpus.allow(count);
        Ok(())
    }

    fn function(&self, name: &str) -> Result<&Arc<VirtioFunction>, MachineError> {
        let attached = self.names.get(name);
        attached
            .and_then(|attached| self.functions.get(&attached.slot))
            .ok_or_else(|| MachineError::NotFound(name.to_owned()))
    }

    /// Has one device do something.
    pub(crate) fn command(&self, name: &str, command: Command) -> Result<(), MachineError> {
        let function = self.function(name)?;
        let result = function.device().command(command);
        function.note_config_change();
        Ok(result?)
    }

    /// A limit of a device.
    pub(crate) fn set_limit(&self, new: &NewLimit) -> Result<(), MachineError> {
        let rates = devices::rates(&new.limit);
        let command = match new.direction {
            Direction::Both => Command::Limit(rates),
            Direction::Receive => Command::ReceiveLimit(rates),
            Direction::Transmit => Command::TransmitLimit(rates),
        };
        self.command(new.device.as_str(), command)
    }

    /// Has a device that there is once in a machine take `bytes` as its goal.
    fn resize(&mut self, device: Single, bytes: u64) -> Result<(), MachineError> {
        let Some(name) = self.single.get(&device) else {
            return Err(MachineError::NotFound(device.kind().to_owned()));
        };
        self.command(name, Command::Resize(bytes))?;
        self.resizing = true;
        Ok(())
    }

    /// The memory that the guest has, once, when what was asked for last is reached.
    pub(crate) fn take_reached(&mut self) -> Option<u64> {
        if !self.resizing {
            return None;
        }
        let reached = |device: Single| {
            let Some(name) = self.single.get(&device) else {
                return Some(0);
            };
            let progress = self.function(name).ok()?.device().progress()?;
            (progress.goal_bytes == progress.actual_bytes).then_some(progress.actual_bytes)
        };
        let (plugged, ballooned) = (reached(Single::Mem)?, reached(Single::Balloon)?);
        self.resizing = false;
        Some((self.description.memory_bytes + plugged).saturating_sub(ballooned))
    }

    /// Memory in all.
    pub(crate) fn resize_memory(&mut self, bytes: u64) -> Result<(), MachineError> {
        let (least, most) = (
            self.description.memory_bytes,
            self.description.memory_max_bytes,
        );
        if !(least..=most).contains(&bytes) {
            let reason = format!("{bytes} is not between {least} and {most}");
            return Err(FieldError::new("Bytes.bytes", reason).into());
        }
        self.resize(Single::Mem, bytes - least)
    }

    /// What the balloon takes.
    pub(crate) fn set_balloon(&mut self, bytes: u64) -> Result<(), MachineError> {
        self.resize(Single::Balloon, bytes)
    }

    /// Counters of the machine.
    pub(crate) fn statistics(&self) -> Result<Statistics, MachineError> {
        let host = MachineError::host("statistics");
        let blocks = self.memory.file.metadata().map_err(host)?.blocks();
        let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF);
        let peak_kib = usage.map_or(0, |usage| u64::try_from(usage.max_rss()).unwrap_or(0));
        let vcpus = self.vcpus.as_ref().map_or(0, |vcpus| vcpus.counts().0);
        Ok(Statistics {
            exits_io: self.exits.io.load(Relaxed),
            exits_mmio: self.exits.mmio.load(Relaxed),
            exits_other: self.exits.other.load(Relaxed),
            exits_interrupted: self.exits.interrupted.load(Relaxed),
            interrupts: self.around.interrupts.load(Relaxed),
            resident_peak_bytes: peak_kib << 10,
            guest_resident_bytes: blocks * 512,
            vcpus: u64::from(vcpus),
            memory_bytes: self.description.memory_bytes,
        })
    }

    /// Counters of a device.
    pub(crate) fn device_statistics(&self, name: &str) -> Result<DeviceStatistics, MachineError> {
        let counters = self.function(name)?.device().counters();
        let counters = counters.into_iter().map(|(name, value)| Counter {
            name: Text::lossy(name),
            value,
        });
        let counters = List::new("DeviceStatistics.counters", counters.collect())?;
        Ok(DeviceStatistics { counters })
    }

    /// Work that a vCPU rang for. Gives the names of devices that broke.
    pub(crate) fn work(&mut self) -> Vec<(String, Broken)> {
        let slots = self.around.doorbell.take_slots();
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

    /// The function of the host whose registers others do not reach, and why, once.
    pub(crate) fn take_apart(&mut self) -> Option<(String, String)> {
        let (slot, reason) = self.passthrough.take_apart()?;
        Some((self.name_of(slot), reason))
    }

    fn name_of(&self, slot: Slot) -> String {
        let mut names = self.names.iter();
        let name = names.find(|(_, attached)| attached.slot == slot);
        name.map(|(name, _)| name.clone()).unwrap_or_default()
    }

    /// How it ended, if it did.
    pub(crate) fn ended(&self) -> Option<End> {
        self.around.doorbell.ended()
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

/// The version of KVM's interface, the only one there ever was.
const KVM_VERSION: i32 = 12;

fn open_kvm(description: &Description, descriptors: &mut Descriptors) -> Result<Kvm, MachineError> {
    let kvm = kvm::from_descriptor(descriptors.take("Machine.kvm", description.kvm)?);
    if kvm.get_api_version() != KVM_VERSION {
        return Err(FieldError::new("Machine.kvm", "it is not /dev/kvm").into());
    }
    Ok(kvm)
}
