//! The table of every setting, declared once: type, unit, range, default, documentation, and may a
//! pod override it.
//!
//! `pod` rows may be overridden by the annotation `pericarp.dev/<section>.<key>` when the operator
//! names them in `security.allowed_annotations`; `node` rows never. A row that names a path of the
//! host, weakens the wall around the VMM, or belongs to the node as a whole is `node`.

use std::path::PathBuf;

use crate::choice::{CpuModel, HugePages, LogLevel, TemplateUse, VirtiofsCache};
use crate::kind::{CpuFeature, Item, Kind, Setting, Value};
use crate::nearest::nearest;
use crate::pci::{DeviceResource, PciAddress, PciSelector};
use crate::table::{pod, settings};

/// Most vCPUs of one VM. KVM allows more, but each is a thread, a stack and a row in the guest's
/// tables.
pub const VCPUS_MAX: u64 = 256;
/// Most guest memory in MiB: 4 TiB, which keeps every guest address below 2^46.
pub const MEMORY_MIB_MAX: u64 = 4 << 20;
/// Largest rate limit: 1 Tbit/s, 1 TiB/s and 10^8 requests per second are beyond every device.
const RATE_MAX: u64 = 1 << 30;
/// Longest time-out: one hour.
const TIMEOUT_MS_MAX: u64 = 3_600_000;

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// `section.name`; with [`crate::ANNOTATION_PREFIX`] before it, the annotation's name.
    pub path: &'static str,
    /// The TOML table that the key stands in.
    pub section: &'static str,
    /// The key inside its table.
    pub name: &'static str,
    /// What it does.
    pub doc: &'static str,
    /// Type and range.
    pub kind: Kind,
    /// Default, in the spelling of annotations.
    pub default: &'static str,
    /// May a pod override it, if the operator allows.
    pub pod_may_override: bool,
}

impl Key {
    /// The default as a checked value.
    #[must_use]
    pub fn default_value(&self) -> Value {
        self.kind
            .parse_text(self.default)
            .expect("a test parses the default of every row")
    }
}

/// The row of a path such as `vm.default_vcpus`.
#[must_use]
pub fn key(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// What to write instead of a key that no pod may override.
pub(crate) fn explain_overridable(found: &str) -> String {
    let names = KEYS
        .iter()
        .filter(|key| key.pod_may_override)
        .map(|key| key.path);
    if key(found).is_some() {
        return "only keys that a pod may override, and this one is the node's alone".to_owned();
    }
    match nearest(found, names) {
        Some(name) => format!("keys that a pod may override; the nearest is {name:?}"),
        None => "keys that a pod may override".to_owned(),
    }
}

const fn integer(unit: &'static str, min: u64, max: u64) -> Kind {
    Kind::Integer { unit, min, max }
}

const fn list(item: Item, items_max: usize) -> Kind {
    Kind::List { item, items_max }
}

settings! {
    /// Where the installed parts are.
    paths: Paths {
        /// Guest kernel: an uncompressed ELF file with a PVH entry note.
        kernel: PathBuf = Kind::Path, "/usr/share/pericarp/vmlinux", node;
        /// Guest image: a read-only EROFS file system that holds the agent.
        image: PathBuf = Kind::Path, "/usr/share/pericarp/guest.erofs", node;
        /// Initial RAM disk to boot from instead of the image.
        initramfs: Option<PathBuf> = Kind::OptionalPath, "", node;
        /// Image of drivers for passed-through devices: a read-only EROFS file system with modules
        /// for the guest's kernel, their firmware, and what containers with such devices get
        /// besides (docs/gpu.md).
        modules: Option<PathBuf> = Kind::OptionalPath, "", node;
        /// The virtual machine monitor.
        vmm: PathBuf = Kind::Path, "/usr/libexec/pericarp/pericarp-vmm", node;
        /// The file-system daemon that shares directories of the host with a guest.
        virtiofsd: PathBuf = Kind::Path, "/usr/libexec/pericarp/virtiofsd", node;
        /// State of running pods, one directory each.
        run_dir: PathBuf = Kind::Path, "/run/pericarp", node;
    }

    /// The guest kernel.
    kernel: Kernel {
        /// Words added to the end of the guest kernel's command line.
        extra_parameters: String = Kind::Text { bytes_max: 1024 }, "", pod;
    }

    /// Size and shape of the VM.
    vm: Vm {
        /// vCPUs of a pod without a CPU limit; a CPU request above it counts instead.
        default_vcpus: u32 = integer("", 1, VCPUS_MAX), "1", pod;
        /// Most vCPUs of one pod; a pod that asks for more is refused. 0 means as many as the host
        /// has, and a pod that asks for more gets these.
        max_vcpus: u32 = integer("", 0, VCPUS_MAX), "0", node;
        /// vCPUs that a pod can be given beyond those that it starts with, by resizing it in place.
        /// Each costs the guest some memory, used or not.
        spare_vcpus: u32 = integer("", 0, VCPUS_MAX), "0", pod;
        /// Memory for the containers of a pod without a memory limit.
        default_memory_mib: u64 = integer("MiB", 1, MEMORY_MIB_MAX), "512", pod;
        /// Most memory of one VM; a pod that asks for more is refused. 0 means the host's memory,
        /// and a pod that asks for more gets this.
        max_memory_mib: u64 = integer("MiB", 0, MEMORY_MIB_MAX), "0", node;
        /// Memory for the guest's kernel and agent, added to what the containers may use.
        guest_reserve_mib: u64 = integer("MiB", 0, 4096), "64", node;
        /// Smallest VM that boots and starts a container; a pod whose VM would be smaller is
        /// refused.
        min_memory_mib: u64 = integer("MiB", 32, 4096), "72", node;
        /// Processor that the guest sees: the host's own, or a level that is the same on every
        /// node.
        cpu_model: CpuModel = Kind::Choice(CpuModel::WORDS), "host", pod;
        /// CPU features shown to or hidden from the guest against the model's choice, such as
        /// "-xsave".
        cpu_features: Vec<CpuFeature> = list(Item::CpuFeature, 64), "", node;
        /// Pages of the host that back guest memory. Huge pages come from the host's hugetlb pool.
        huge_pages: HugePages = Kind::Choice(HugePages::WORDS), "none", pod;
        /// Give memory that the guest freed back to the host.
        free_page_reporting: bool = Kind::Bool, "true", pod;
        /// Start pods from a template: a machine of the same shape that was saved when its agent
        /// was ready and before it held pod data (docs/templates.md).
        template: TemplateUse = Kind::Choice(TemplateUse::WORDS), "auto", pod;
    }

    /// Network interfaces of the VM.
    network: Network {
        /// Pairs of queues of each interface; at most one per vCPU is used.
        queues: u32 = integer("", 1, 16), "1", pod;
        /// Move packets in the host's kernel (vhost-net) instead of in the VMM.
        vhost: bool = Kind::Bool, "true", pod;
        /// Most traffic into each interface of the pod; 0 is no limit.
        receive_kbit_per_s: u64 = integer("kbit/s", 0, RATE_MAX), "0", pod;
        /// Most traffic out of each interface of the pod; 0 is no limit.
        transmit_kbit_per_s: u64 = integer("kbit/s", 0, RATE_MAX), "0", pod;
    }

    /// Disks and shared directories.
    storage: Storage {
        /// Size of the disk that holds what containers write to their root file systems; blocks are
        /// taken only when written.
        scratch_size_mib: u64 = integer("MiB", 64, MEMORY_MIB_MAX), "10240", pod;
        /// Most bytes per second of each disk; 0 is no limit.
        disk_kib_per_s: u64 = integer("KiB/s", 0, RATE_MAX), "0", pod;
        /// Most requests per second of each disk; 0 is no limit.
        disk_requests_per_s: u64 = integer("requests/s", 0, RATE_MAX), "0", pod;
        /// How long the guest may keep what it read from image layers and volumes that the host
        /// shares.
        virtiofs_cache: VirtiofsCache = Kind::Choice(VirtiofsCache::WORDS), "auto", pod;
        /// Worker threads of each file-system daemon; 0 serves requests on one thread without a
        /// pool.
        virtiofs_threads: u32 = integer("", 0, 64), "0", pod;
    }

    /// Devices of the host.
    devices: Devices {
        /// What `pericarp device-plugin` offers to the kubelet: a name and the functions that are
        /// meant. Pods ask for it as `pericarp.dev/<name>`.
        resources: Vec<DeviceResource> = list(Item::DeviceResource, 64), "", node;
        /// Functions that a pod has in its VM from before its first container until its end, for
        /// all of its containers. Those of their IOMMU groups come along, and
        /// `security.passthrough_devices` must name each.
        functions: Vec<PciAddress> = list(Item::PciAddress, 16), "", pod;
    }

    /// How long to wait before a pod is declared broken.
    timeouts: Timeouts {
        /// From the VMM's start to the agent's first word.
        agent_ready_ms: u64 = integer("ms", 100, TIMEOUT_MS_MAX), "30000", pod;
        /// Answer of the agent or the VMM to an ordinary request.
        rpc_ms: u64 = integer("ms", 100, TIMEOUT_MS_MAX), "10000", node;
        /// How long a container may take to end after SIGKILL. Past that, the whole VM is ended,
        /// and with it every container of the pod.
        kill_ms: u64 = integer("ms", 100, TIMEOUT_MS_MAX), "6000", node;
    }

    /// The wall.
    security: Security {
        /// Keys that pods may override by annotation, such as "vm.default_memory_mib". Nothing is
        /// allowed unless it is named here.
        allowed_annotations: Vec<String> = list(Item::Overridable, 64), "", node;
        /// Host PCI devices that pods may be given, by address or by vendor and device id. All
        /// functions of an IOMMU group go together, and each must be named.
        passthrough_devices: Vec<PciSelector> = list(Item::PciDevice, 256), "", node;
        /// First user and group id of the VMMs. Each VM takes one of its own, so that one VMM
        /// cannot reach another; nothing else on the node may use these ids.
        vmm_uid_base: u32 = integer("", 1_000, 2_147_000_000), "2000000000", node;
        /// How many user ids from `vmm_uid_base` on belong to VMMs; bounds the pods of a node.
        vmm_uid_count: u32 = integer("", 1, 131_072), "65536", node;
        /// Apply containers' seccomp profiles in the guest.
        guest_seccomp: bool = Kind::Bool, "true", node;
    }

    /// What is written down.
    log: Log {
        /// Least important lines that the shim writes to containerd's log; containerd's own debug
        /// level asks for `debug`.
        level: LogLevel = Kind::Choice(LogLevel::WORDS), "info", node;
        /// Keep the beginning of each guest kernel's log in the pod's state directory, for a
        /// diagnosis.
        guest_kernel: bool = Kind::Bool, "true", node;
    }
}
