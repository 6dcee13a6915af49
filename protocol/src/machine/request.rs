//! What the shim asks of the VMM.

use super::ALIGNMENT_BYTES;
use super::device::{Descriptor, Device, DeviceName, RateLimit};
use super::wire::{FieldError, List, Text, wire_choice, wire_code, wire_struct};

/// Longest kernel command line in bytes (`COMMAND_LINE_SIZE` of x86 is 2048 with its NUL).
pub const COMMAND_LINE_BYTES_MAX: usize = 2047;

/// Longest list of CPU features in bytes.
pub const CPU_FEATURES_BYTES_MAX: usize = 512;

/// Most vCPUs of a machine: the APIC ids that 8 bits of the topology leaves carry.
pub const VCPUS_MAX: u16 = 256;

/// Least memory that our kernel boots in.
pub const MEMORY_BYTES_MIN: u64 = 32 << 20;

/// Most memory of a machine: what 46 bits of physical address leave below the window of 64-bit
/// BARs.
pub const MEMORY_BYTES_MAX: u64 = 16 << 40;

wire_code! {
    /// What pages guest memory is made of. The memfd was made to match.
    PageKind {
        /// 4 KiB pages.
        Base = 1,
        /// 4 KiB pages, and the kernel is advised to merge them to 2 MiB.
        Transparent = 2,
        /// hugetlb pages of 2 MiB.
        Huge2M = 3,
        /// hugetlb pages of 1 GiB.
        Huge1G = 4,
    }
}

wire_code! {
    /// What CPU the guest sees before the feature list is applied.
    CpuMode {
        /// The host's, less what KVM cannot give.
        Host = 1,
        /// x86-64-v2 of the psABI: moves between all hosts of the last decade.
        BaselineV2 = 2,
        /// x86-64-v3 of the psABI.
        BaselineV3 = 3,
    }
}

wire_struct! {
    /// The whole machine but its devices.
    Machine {
        /// vCPUs that run.
        vcpus: u16,
        /// vCPUs that the guest sees; those beyond `vcpus` are parked until ResizeVcpus.
        vcpus_max: u16,
        /// Memory at boot; a multiple of the page.
        memory_bytes: u64,
        /// Memory with all that the `mem` device can plug; equal to `memory_bytes` without such a
        /// device.
        memory_max_bytes: u64,
        /// What pages the memory files are made of.
        pages: PageKind,
        /// What CPU the guest sees.
        cpu: CpuMode,
        /// Features to add or take away, as `-xsave,+avx2`; names of `/proc/cpuinfo`.
        cpu_features: Text<CPU_FEATURES_BYTES_MAX>,
        /// `/dev/kvm`.
        kvm: Descriptor,
        /// The file of the memory at boot. Of a machine that goes on from a saved one: the file
        /// that was its memory then; it is mapped privately and never written.
        memory: Descriptor,
        /// The file of the memory that can be plugged, if any can.
        pluggable: List<Descriptor, 1>,
        /// What [`Request::Save`] wrote: the machine goes on from there instead of booting. The
        /// rest of the description, and the devices in their order, are those of the saved
        /// machine; kernel and initramfs are not read.
        saved: List<Descriptor, 1>,
        /// The kernel: an ELF with a PVH note, or a bzImage.
        kernel: Descriptor,
        /// An initramfs, or none.
        initramfs: List<Descriptor, 1>,
        /// The kernel's command line.
        command_line: Text<COMMAND_LINE_BYTES_MAX>,
        /// User to become; not 0.
        uid: u32,
        /// Group to become; not 0.
        gid: u32,
    }
}

wire_struct! {
    /// A request without parameters.
    #[derive(Copy, Default)]
    Nothing {}
}

wire_struct! {
    /// A request about one device.
    Named {
        /// Which one.
        device: DeviceName,
    }
}

wire_struct! {
    /// A new size in bytes.
    #[derive(Copy)]
    Bytes {
        /// The size.
        bytes: u64,
    }
}

wire_struct! {
    /// A new number of vCPUs.
    #[derive(Copy)]
    Vcpus {
        /// How many run.
        count: u16,
    }
}

wire_struct! {
    /// Where a machine is written down.
    #[derive(Copy)]
    Save {
        /// A file open for writing. Memory is not in it: that is in the machine's own file.
        state: Descriptor,
    }
}

wire_code! {
    /// Which limit of a device.
    Direction {
        /// The only one (disk).
        Both = 1,
        /// Towards the guest.
        Receive = 2,
        /// From the guest.
        Transmit = 3,
    }
}

wire_struct! {
    /// A new limit for a device.
    NewLimit {
        /// Which device.
        device: DeviceName,
        /// Which of its limits.
        direction: Direction,
        /// The limit.
        limit: RateLimit,
    }
}

wire_choice! {
    /// A request.
    Request {
        /// The machine. First of all, once.
        Start(Machine) = 1,
        /// A device: attached at boot before Run, plugged in after it. The reply is
        /// [`super::Success::Added`].
        AddDevice(Device) = 2,
        /// Build the jail and boot. Once.
        Run(Nothing) = 3,
        /// Stop every vCPU.
        Pause(Nothing) = 4,
        /// Let them run again.
        Resume(Nothing) = 5,
        /// Take a device away; the guest has let go of it before.
        RemoveDevice(Named) = 6,
        /// Memory in all: boot memory and what the `mem` device shall plug. The guest obeys in its
        /// own time.
        ResizeMemory(Bytes) = 7,
        /// vCPUs that run. More: before the agent brings them online; fewer: after it took them
        /// offline.
        ResizeVcpus(Vcpus) = 8,
        /// Bytes that the balloon shall take from the guest.
        SetBalloon(Bytes) = 9,
        /// A limit of a device.
        SetRateLimit(NewLimit) = 10,
        /// The disk's file has a new size: tell the guest.
        ResizeDisk(Named) = 11,
        /// Counters of the machine; the reply is [`super::Success::Statistics`].
        Statistics(Nothing) = 12,
        /// Counters of a device; the reply is [`super::Success::DeviceStatistics`].
        DeviceStatistics(Named) = 13,
        /// End the machine at once and the process with it.
        Shutdown(Nothing) = 14,
        /// Write a paused machine down, so that others go on from there. It has no plugged memory
        /// then, and does not run again.
        Save(Save) = 15,
    }
}

impl PageKind {
    /// The page's size in bytes, as far as the sizes of memory must be multiples of it.
    #[must_use]
    pub const fn alignment_bytes(self) -> u64 {
        match self {
            Self::Base | Self::Transparent | Self::Huge2M => ALIGNMENT_BYTES,
            Self::Huge1G => 1 << 30,
        }
    }
}

impl Request {
    /// Checks what the encoding cannot.
    ///
    /// # Errors
    /// Names the first field that is out of its bounds.
    pub fn check(&self) -> Result<(), FieldError> {
        match self {
            Self::Start(machine) => machine.check(),
            Self::AddDevice(device) => device.check(),
            Self::ResizeVcpus(Vcpus { count }) if !(1..=VCPUS_MAX).contains(count) => {
                let reason = format!("{count} is not between 1 and {VCPUS_MAX}");
                Err(FieldError::new("Vcpus.count", reason))
            }
            _ => Ok(()),
        }
    }
}

impl Machine {
    /// Checks what the encoding cannot.
    ///
    /// # Errors
    /// Names the first field that is out of its bounds.
    pub fn check(&self) -> Result<(), FieldError> {
        if self.vcpus_max > VCPUS_MAX {
            let reason = format!("{} is more than {VCPUS_MAX}", self.vcpus_max);
            return Err(FieldError::new("Machine.vcpus_max", reason));
        }
        if self.vcpus == 0 || self.vcpus > self.vcpus_max {
            let reason = format!("{} is not between 1 and {}", self.vcpus, self.vcpus_max);
            return Err(FieldError::new("Machine.vcpus", reason));
        }
        self.check_memory()?;
        let plugs = self.memory_max_bytes > self.memory_bytes;
        if plugs == self.pluggable.as_slice().is_empty() {
            let reason = if plugs {
                "memory_max_bytes is more than memory_bytes, and there is no file for the rest"
            } else {
                "no memory can be plugged"
            };
            return Err(FieldError::new("Machine.pluggable", reason));
        }
        for (field, id) in [("Machine.uid", self.uid), ("Machine.gid", self.gid)] {
            if id == 0 || id == u32::MAX {
                return Err(FieldError::new(field, format!("{id} is no id to drop to")));
            }
        }
        Ok(())
    }

    fn check_memory(&self) -> Result<(), FieldError> {
        let page = self.pages.alignment_bytes();
        let sizes = [
            ("Machine.memory_bytes", self.memory_bytes),
            ("Machine.memory_max_bytes", self.memory_max_bytes),
        ];
        for (field, bytes) in sizes {
            if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&bytes) {
                let reason =
                    format!("{bytes} is not between {MEMORY_BYTES_MIN} and {MEMORY_BYTES_MAX}");
                return Err(FieldError::new(field, reason));
            }
            if !bytes.is_multiple_of(page) {
                return Err(FieldError::new(
                    field,
                    format!("{bytes} is no multiple of {page}"),
                ));
            }
        }
        if self.memory_max_bytes < self.memory_bytes {
            let reason = format!("{} is below memory_bytes", self.memory_max_bytes);
            return Err(FieldError::new("Machine.memory_max_bytes", reason));
        }
        Ok(())
    }
}
