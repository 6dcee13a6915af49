//! Functions of the host in this machine: their slots, their groups, and their view of its memory.
//!
//! All functions share one container, in which guest memory lies where the guest has it. It is
//! mapped, and so pinned as a whole, when the first function comes, and given back when the last
//! has gone; in between nothing is discarded ([`Discard`]).

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};
use pericarp_protocol::machine::{FieldError, Function as Description};
use pericarp_sys::vfio::Container;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::memory::Memory;
use crate::{
    arch::layout,
    control::Descriptors,
    devices::{
        passthrough::function::{FunctionError, PassedFunction},
        virtio::{discard::Pin, transport::Surroundings},
    },
    pci::Slot,
};

/// Why a function did not become one of the machine's.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PassthroughError {
    /// A field of the request.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The function itself.
    #[error(transparent)]
    Function(#[from] FunctionError),
    /// The kernel does not let this much memory be pinned.
    #[error(
        "guest memory of {bytes} bytes cannot be pinned for the device: raise LimitMEMLOCK of \
            containerd's service, or give the pod less memory"
    )]
    Pinned {
        /// What would be pinned.
        bytes: u64,
    },
    /// A system call.
    #[error("{step}: {source}")]
    Host {
        /// Which step.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn at(step: &'static str) -> impl Fn(io::Error) -> PassthroughError {
    move |source| PassthroughError::Host { step, source }
}

/// The functions' view of memory. Dropped after the last function.
#[derive(Debug)]
struct Space {
    container: Container,
    _pin: Pin,
}

/// KVM's list of groups, by which it knows whether devices see the caches of processors. A machine
/// has one, for good.
#[derive(Debug)]
struct KvmGroups(DeviceFd);

/// A group of which functions are in the machine.
#[derive(Debug)]
struct Held {
    descriptor: OwnedFd,
    functions: usize,
}

/// A function in its slot.
#[derive(Debug)]
struct Passed {
    function: Arc<PassedFunction>,
    group: u32,
}

/// The functions of a machine.
#[derive(Debug, Default)]
pub(super) struct Passthrough {
    functions: BTreeMap<Slot, Passed>,
    groups: BTreeMap<u32, Held>,
    space: Option<Space>,
    kvm: Option<KvmGroups>,
}

impl Space {
    fn new(container: Container, memory: &Memory) -> Result<Self, PassthroughError> {
        // Nothing is discarded from here on, so that what is mapped stays what the guest sees.
        let pin = memory.discard.pin();
        let space = Self {
            container,
            _pin: pin,
        };
        for region in memory.guest.iter() {
            let (start, bytes) = (region.start_addr().0, region.len());
            let mapped = space.container.map(&memory.guest, start, bytes);
            mapped.map_err(|error| match error.raw_os_error() {
                Some(libc::ENOMEM) => PassthroughError::Pinned { bytes },
                _ => at("mapping guest memory for devices")(error),
            })?;
        }
        Ok(space)
    }
}

impl KvmGroups {
    fn new(vm: &VmFd) -> io::Result<Self> {
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..Default::default()
        };
        Ok(Self(vm.create_device(&mut device)?))
    }

    fn tell(&self, group: &OwnedFd, act: u32) -> io::Result<()> {
        let descriptor = group.as_raw_fd();
        let attribute = kvm_device_attr {
            group: KVM_DEV_VFIO_FILE,
            attr: u64::from(act),
            addr: std::ptr::from_ref(&descriptor).expose_provenance() as u64,
            flags: 0,
        };
        Ok(self.0.set_device_attr(&attribute)?)
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        // The container's end does it too.
        let _ = self.container.unmap_all();
    }
}

impl Passthrough {
    /// Whether the function at `slot` is one of these.
    pub(super) fn get(&self, slot: Slot) -> Option<&Arc<PassedFunction>> {
        self.functions.get(&slot).map(|passed| &passed.function)
    }

    /// Puts a function into `place`.
    pub(super) fn add(
        &mut self,
        description: &Description,
        descriptors: &mut Descriptors,
        place: (Slot, bool),
        memory: &Memory,
        around: &Surroundings,
    ) -> Result<(), PassthroughError> {
        let function = descriptors.take("Function.function", description.function)?;
        let group = descriptors.take("Function.group", description.group)?;
        let container = descriptors.take("Function.container", description.container)?;
        if self.space.is_none() {
            let container = Container::new(container).map_err(at("Function.container"))?;
            self.space = Some(Space::new(container, memory)?);
        }
        if self.kvm.is_none() {
            let groups = KvmGroups::new(&around.vm).map_err(at("KVM's list of groups"))?;
            self.kvm = Some(groups);
        }
        let added = self.attach(
            description.group_number,
            group,
            function,
            place,
            memory,
            around,
        );
        if added.is_err() {
            self.tidy();
        }
        added
    }

    fn attach(
        &mut self,
        number: u32,
        group: OwnedFd,
        function: OwnedFd,
        place: (Slot, bool),
        memory: &Memory,
        around: &Surroundings,
    ) -> Result<(), PassthroughError> {
        if let (Some(kvm), false) = (&self.kvm, self.groups.contains_key(&number)) {
            let told = kvm.tell(&group, KVM_DEV_VFIO_FILE_ADD);
            told.map_err(at("KVM's list of groups"))?;
            let held = Held {
                descriptor: group,
                functions: 0,
            };
            self.groups.insert(number, held);
        }
        let length = |range: &std::ops::Range<u64>| range.end - range.start;
        let rooms = [&layout::WINDOW_32, &memory.layout.window_64].map(length);
        let function = PassedFunction::attach(function, place, rooms, around.clone())?;
        if let Some(held) = self.groups.get_mut(&number) {
            held.functions += 1;
        }
        let passed = Passed {
            function,
            group: number,
        };
        self.functions.insert(place.0, passed);
        Ok(())
    }

    /// Takes the function at `slot` away and resets it; true when there was one.
    pub(super) fn remove(&mut self, slot: Slot) -> bool {
        let Some(passed) = self.functions.remove(&slot) else {
            return false;
        };
        passed.function.detach();
        if let Some(held) = self.groups.get_mut(&passed.group) {
            held.functions -= 1;
        }
        self.tidy();
        true
    }

    /// Gives back groups without functions and, without groups, the memory.
    fn tidy(&mut self) {
        let kvm = self.kvm.as_ref();
        self.groups.retain(|_, held| {
            if held.functions == 0
                && let Some(kvm) = kvm
            {
                // KVM holds the group open until then.
                let _ = kvm.tell(&held.descriptor, KVM_DEV_VFIO_FILE_DEL);
            }
            held.functions > 0
        });
        if self.groups.is_empty() {
            self.space = None;
        }
    }
}
