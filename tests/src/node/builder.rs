//! Describes a node.

use std::path::PathBuf;
use std::time::Duration;

/// Time from power-on to the node's first word. It takes 6 s on an idle computer; emulation on one
/// that is busy with builds takes many times that.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(300);

/// Memory of a node when nothing is said.
const MEMORY_MIB: u32 = 4096;

/// CPUs of a node when nothing is said.
const CPUS: u32 = 2;

/// Environment variable that chooses this computer as the node.
pub const NODE_VARIABLE: &str = "PERICARP_NODE";

/// A device behind the node's IOMMU, in a group of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// An NVMe controller with one namespace.
    Nvme,
    /// A virtio disk.
    VirtioBlk,
    /// A function of the display class.
    VirtioGpu,
    /// QEMU's teaching device: MSI and no MSI-X, and memory access to any address that it is told.
    Edu,
    /// A disk whose only interrupt is its pin.
    PinOnly,
    /// A network card, which no driver that is built into a guest's kernel drives.
    NetworkCard,
}

/// What the node runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A machine in QEMU.
    Qemu,
    /// This computer.
    Host,
}

/// A node to be.
#[derive(Debug, Clone)]
pub struct Builder {
    pub(super) name: String,
    pub(super) kind: Option<Kind>,
    pub(super) memory_mib: u32,
    pub(super) cpus: u32,
    pub(super) icount: bool,
    pub(super) devices: Vec<Device>,
    pub(super) numa_nodes: u32,
    pub(super) state_disk: Option<PathBuf>,
    pub(super) install_pericarp: bool,
    pub(super) boot_timeout: Duration,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            name: "node".to_owned(),
            kind: None,
            memory_mib: MEMORY_MIB,
            cpus: CPUS,
            icount: false,
            devices: Vec::new(),
            numa_nodes: 1,
            state_disk: None,
            install_pericarp: true,
            boot_timeout: BOOT_TIMEOUT,
        }
    }
}

impl Builder {
    /// Names the node, and its folder of results.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// What it runs on; without, [`NODE_VARIABLE`] says it, else QEMU.
    #[must_use]
    pub fn kind(mut self, kind: Kind) -> Self {
        self.kind = Some(kind);
        self
    }

    /// Its memory.
    #[must_use]
    pub fn memory_mib(mut self, mebibytes: u32) -> Self {
        self.memory_mib = mebibytes;
        self
    }

    /// Its CPUs.
    #[must_use]
    pub fn cpus(mut self, count: u32) -> Self {
        self.cpus = count;
        self
    }

    /// Counts instructions instead of time: one CPU, and figures that repeat.
    #[must_use]
    pub fn icount(mut self) -> Self {
        self.icount = true;
        self
    }

    /// Adds a device behind the node's IOMMU.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.devices.push(device);
        self
    }

    /// Divides its CPUs and memory evenly between that many NUMA nodes.
    #[must_use]
    pub fn numa_nodes(mut self, count: u32) -> Self {
        self.numa_nodes = count;
        self
    }

    /// Keeps what containerd, kubelet, CNI and etcd write in this file, an ext4 file system, which
    /// another node can be booted with.
    #[must_use]
    pub fn state_disk(mut self, file: impl Into<PathBuf>) -> Self {
        self.state_disk = Some(file.into());
        self
    }

    /// Leaves Pericarp out of the node, even when it is built.
    #[must_use]
    pub fn without_pericarp(mut self) -> Self {
        self.install_pericarp = false;
        self
    }

    /// Changes the time it gets to boot.
    #[must_use]
    pub fn boot_timeout(mut self, timeout: Duration) -> Self {
        self.boot_timeout = timeout;
        self
    }
}
