//! Functions of the host in this machine: their slots, their groups, and their view of its memory.
//!
//! All functions share one view of memory, in which guest memory lies where the guest has it: the
//! container of their groups or, where the kernel has it, an address space of iommufd. It is
//! mapped, and so pinned as a whole, when the first function comes, and given back when the last
//! has gone; in between nothing is discarded ([`Discard`]). Two and more functions reach each other
//! in it too ([`super::peers`]).

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};
use pericarp_protocol::machine::{FieldError, Function as Description};
use pericarp_sys::{iommufd::Iommufd, mapping::DeviceMapping, vfio::Container};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{
    descriptors::Descriptors,
    memory::Memory,
    peers::{self, Peers},
};
use crate::{
    arch::layout,
    devices::{
        passthrough::function::{FunctionError, PassedFunction},
        virtio::{discard::Pin, transport::Platform},
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
    /// Somebody has it.
    #[error(
        "it is in use by another pod or process, or another function of its group is in use by the \
            host"
    )]
    Busy,
    /// The host cannot confine it.
    #[error(
        "this host cannot keep a device from sending any interrupt it likes: switch interrupt \
            remapping on in the firmware"
    )]
    Interrupts,
    /// Some passthrough devices use VFIO groups and some iommufd.
    #[error("Function.group: cannot mix VFIO groups and iommufd in one VM")]
    Mixed,
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

/// How functions reach memory.
#[derive(Debug)]
enum View {
    /// Their groups are in it.
    Container(Container),
    /// They are in it themselves.
    Iommufd(Iommufd),
}

/// The functions' view of memory. Dropped after the last function.
#[derive(Debug)]
struct Space {
    view: View,
    peers: Peers,
    bytes: u64,
    _pin: Pin,
}

/// Names a file that KVM knows: a group by its number or, with iommufd, a function also by its
/// slot.
type FileKey = (u32, Option<Slot>);

/// KVM's list of groups and functions, by which it knows whether devices see the caches of
/// processors. A machine has one, for good.
#[derive(Debug)]
struct KvmGroups(DeviceFd);

/// A group of which functions are in the machine, or a function that came without one.
#[derive(Debug)]
struct Held {
    descriptor: OwnedFd,
    functions: usize,
}

/// A function in its slot.
#[derive(Debug)]
struct Passed {
    function: Arc<PassedFunction>,
    file: FileKey,
}

/// The functions of a machine.
#[derive(Debug, Default)]
pub(super) struct Passthrough {
    functions: BTreeMap<Slot, Passed>,
    files: BTreeMap<FileKey, Held>,
    space: Option<Space>,
    kvm: Option<KvmGroups>,
    /// Whose registers others do not reach, and why.
    peer_failure: Option<(Slot, String)>,
}

impl View {
    fn map(&self, memory: &Arc<GuestMemoryMmap>, start: u64, bytes: u64) -> io::Result<()> {
        match self {
            Self::Container(container) => container.map(memory, start, bytes),
            Self::Iommufd(iommufd) => iommufd.map(memory, start, bytes),
        }
    }

    fn unmap_all(&self) -> io::Result<()> {
        match self {
            Self::Container(container) => container.unmap_all(),
            Self::Iommufd(iommufd) => iommufd.unmap_all(),
        }
    }
}

impl peers::View for View {
    fn give(&self, address: u64, registers: &Arc<DeviceMapping>) -> io::Result<()> {
        match self {
            Self::Container(container) => container.map_registers(address, registers),
            Self::Iommufd(iommufd) => iommufd.map_registers(address, registers),
        }
    }

    fn take(&self, address: u64) -> io::Result<()> {
        match self {
            Self::Container(container) => container.unmap_registers(address),
            Self::Iommufd(iommufd) => iommufd.unmap_registers(address),
        }
    }
}

impl Space {
    fn new(view: View, memory: &Memory) -> Result<Self, PassthroughError> {
        // Nothing is discarded from here on, so that what is mapped stays what the guest sees.
        let pin = memory.discard.pin();
        let mut space = Self {
            view,
            peers: Peers::default(),
            bytes: 0,
            _pin: pin,
        };
        for region in memory.guest.iter() {
            let (start, bytes) = (region.start_addr().0, region.len());
            space.bytes += bytes;
            let mapped = space.view.map(&memory.guest, start, bytes);
            mapped.map_err(|error| space.explain(error))?;
        }
        Ok(space)
    }

    fn explain(&self, error: io::Error) -> PassthroughError {
        match error.raw_os_error() {
            Some(libc::ENOMEM) => PassthroughError::Pinned { bytes: self.bytes },
            _ => at("mapping guest memory for devices")(error),
        }
    }

    /// Lets a function see it. One of a group does already: the shim has put the group in.
    fn admit(&self, function: &OwnedFd) -> Result<(), PassthroughError> {
        let View::Iommufd(iommufd) = &self.view else {
            return Ok(());
        };
        let admitted = iommufd.admit(function.as_fd());
        admitted.map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY | libc::EINVAL) => PassthroughError::Busy,
            Some(libc::EPERM) => PassthroughError::Interrupts,
            _ => self.explain(error),
        })
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

    fn set_file(&self, file: &OwnedFd, act: u32) -> io::Result<()> {
        let descriptor = file.as_raw_fd();
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
        // The view's end does it too.
        let _ = self.view.unmap_all();
    }
}

impl Passthrough {
    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.functions.is_empty()
    }

    /// The function at `slot`, if it is one of these.
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
        platform: &Platform,
    ) -> Result<(), PassthroughError> {
        let function = descriptors.take("Function.function", description.function)?;
        let group = description.group.as_slice().first();
        let group = group.map(|group| descriptors.take("Function.group", *group));
        let group = group.transpose()?;
        let view = descriptors.take("Function.view", description.view)?;
        let space = match self.space.take() {
            Some(space) => space,
            None => {
                let view = match &group {
                    Some(_) => Container::new(view).map(View::Container),
                    None => Iommufd::new(view).map(View::Iommufd),
                };
                Space::new(view.map_err(at("Function.view"))?, memory)?
            }
        };
        let by_group = matches!(space.view, View::Container(_));
        let space = self.space.insert(space);
        if by_group != group.is_some() {
            return Err(PassthroughError::Mixed);
        }
        let alone = group.is_none().then_some(place.0);
        let key = (description.group_number, alone);
        let held_file = match group {
            Some(group) => group,
            None => function.try_clone().map_err(at("Function.function"))?,
        };
        let added = Self::add_to_kvm(&mut self.kvm, &mut self.files, (key, held_file), platform)
            .and_then(|()| space.admit(&function))
            .and_then(|()| self.attach(key, function, place, memory, platform));
        if added.is_err() {
            self.tidy();
        }
        added
    }

    /// Adds a group or function to those that KVM knows.
    fn add_to_kvm(
        kvm: &mut Option<KvmGroups>,
        files: &mut BTreeMap<FileKey, Held>,
        (key, descriptor): (FileKey, OwnedFd),
        platform: &Platform,
    ) -> Result<(), PassthroughError> {
        let failed = at("KVM's list of groups");
        if files.contains_key(&key) {
            return Ok(());
        }
        let kvm = match kvm {
            Some(kvm) => kvm,
            None => kvm.insert(KvmGroups::new(&platform.vm).map_err(&failed)?),
        };
        kvm.set_file(&descriptor, KVM_DEV_VFIO_FILE_ADD)
            .map_err(failed)?;
        let held = Held {
            descriptor,
            functions: 0,
        };
        files.insert(key, held);
        Ok(())
    }

    fn attach(
        &mut self,
        key: FileKey,
        function: OwnedFd,
        place: (Slot, bool),
        memory: &Memory,
        platform: &Platform,
    ) -> Result<(), PassthroughError> {
        let length = |range: &std::ops::Range<u64>| range.end - range.start;
        let rooms = [&layout::WINDOW_32, &memory.layout.window_64].map(length);
        let function = PassedFunction::attach(function, place, rooms, platform.clone())?;
        if let Some(held) = self.files.get_mut(&key) {
            held.functions += 1;
        }
        let passed = Passed {
            function,
            file: key,
        };
        self.functions.insert(place.0, passed);
        Ok(())
    }

    /// Takes the function at `slot` away and resets it; true when there was one.
    pub(super) fn remove(&mut self, slot: Slot) -> bool {
        let Some(passed) = self.functions.remove(&slot) else {
            return false;
        };
        // Before its registers are no more what they were, or somebody else's.
        self.share();
        passed.function.detach();
        if let Some(held) = self.files.get_mut(&passed.file) {
            held.functions -= 1;
        }
        self.tidy();
        true
    }

    /// Has every function reach what the bus decodes of the others now, and nothing else of them.
    pub(super) fn share(&mut self) {
        let Some(space) = &mut self.space else { return };
        let alone = self.functions.len() < 2;
        let functions = self.functions.iter().filter(|_| !alone);
        let wanted = functions.flat_map(|(slot, passed)| {
            let parts = passed.function.decoded().into_iter();
            parts.map(|(address, registers)| (address, (*slot, registers)))
        });
        let refusal = space.peers.follow(&space.view, &wanted.collect());
        self.peer_failure = self.peer_failure.take().or(refusal);
    }

    /// The function whose BARs its peers cannot reach, and why. Returned once.
    pub(super) fn take_peer_failure(&mut self) -> Option<(Slot, String)> {
        self.peer_failure.take()
    }

    /// Gives back groups without functions and, without any, the memory.
    fn tidy(&mut self) {
        let kvm = self.kvm.as_ref();
        self.files.retain(|_, held| {
            if held.functions == 0
                && let Some(kvm) = kvm
            {
                // KVM holds it open until then.
                let _ = kvm.set_file(&held.descriptor, KVM_DEV_VFIO_FILE_DEL);
            }
            held.functions > 0
        });
        if self.files.is_empty() {
            self.space = None;
        }
    }
}
