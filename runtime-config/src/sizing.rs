//! How large a pod's VM is: from the pod's own limits, else from the configuration's defaults.
//! Pure.

use std::collections::BTreeMap;

use crate::keys::{VCPUS_MAX, Vm};
use crate::kind::quoted;

/// Annotation of containerd: length of the CPU period in microseconds.
pub const CPU_PERIOD_ANNOTATION: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// Annotation of containerd: CPU time of all containers per period in microseconds; 0 or less is no
/// limit.
pub const CPU_QUOTA_ANNOTATION: &str = "io.kubernetes.cri.sandbox-cpu-quota";
/// Annotation of containerd: CPU weight of all containers, 1024 for each requested CPU.
pub const CPU_SHARES_ANNOTATION: &str = "io.kubernetes.cri.sandbox-cpu-shares";
/// Annotation of containerd: memory limit of all containers in bytes; 0 is no limit.
pub const MEMORY_ANNOTATION: &str = "io.kubernetes.cri.sandbox-memory";

/// CPU weight of one CPU in Kubernetes.
const SHARES_PER_CPU: u64 = 1024;
/// The kernel's default period, taken when a quota comes without one.
const DEFAULT_PERIOD_US: u64 = 100_000;
const MIB: u64 = 1 << 20;

/// What a pod asks for; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// CPU time per period in microseconds.
    pub cpu_quota_us: Option<u64>,
    /// The period in microseconds.
    pub cpu_period_us: Option<u64>,
    /// CPU weight, 1024 for each requested CPU.
    pub cpu_shares: Option<u64>,
    /// Memory that the containers may use together, in bytes.
    pub memory_limit_bytes: Option<u64>,
}

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostCapacity {
    /// Online CPUs.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
}

/// The size of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizing {
    /// vCPUs.
    pub vcpus: u32,
    /// All memory of the guest in bytes: a multiple of the page size that backs it.
    pub memory_bytes: u64,
}

/// Why a pod has no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizingError {
    /// An annotation of containerd that is no number.
    #[error("annotation {annotation:?}: found {found}; allowed: a whole number")]
    NotANumber {
        /// Which one.
        annotation: &'static str,
        /// Its value, quoted.
        found: String,
    },
    /// A guest with this little memory does not boot.
    #[error(
        "{field} is {asked_bytes} bytes, too little memory to boot a VM: the least is \
            {least_bytes} bytes \
         (`vm.min_memory_mib` = {min_mib} less `vm.guest_reserve_mib` = {reserve_mib})"
    )]
    MemoryTooSmall {
        /// What asked for it.
        field: &'static str,
        /// What it asked for.
        asked_bytes: u64,
        /// What it has to ask for at least.
        least_bytes: u64,
        /// `vm.min_memory_mib`.
        min_mib: u64,
        /// `vm.guest_reserve_mib`.
        reserve_mib: u64,
    },
    /// More memory than the operator gives one pod.
    #[error(
        "{field} is {asked_bytes} bytes; with `vm.guest_reserve_mib` = {reserve_mib} that is more \
            than \
         `vm.max_memory_mib` = {max_mib}"
    )]
    MemoryTooLarge {
        /// What asked for it.
        field: &'static str,
        /// What it asked for.
        asked_bytes: u64,
        /// `vm.max_memory_mib`.
        max_mib: u64,
        /// `vm.guest_reserve_mib`.
        reserve_mib: u64,
    },
    /// More CPUs than the operator gives one pod.
    #[error("{field} needs {asked} vCPUs, more than `vm.max_vcpus` = {max}")]
    TooManyVcpus {
        /// What asked for them.
        field: &'static str,
        /// How many.
        asked: u64,
        /// `vm.max_vcpus`.
        max: u32,
    },
}

impl Demand {
    /// Reads the annotations that containerd puts on a sandbox; absent ones are no limit.
    pub fn from_annotations(annotations: &BTreeMap<String, String>) -> Result<Self, SizingError> {
        let number = |annotation: &'static str| match annotations.get(annotation) {
            None => Ok(None),
            // CRI sends int64, where -1 as well as 0 mean no limit.
            Some(text) => text
                .parse::<i64>()
                .map(|number| u64::try_from(number).ok().filter(|number| *number > 0))
                .map_err(|_| SizingError::NotANumber {
                    annotation,
                    found: quoted(text),
                }),
        };
        Ok(Self {
            cpu_quota_us: number(CPU_QUOTA_ANNOTATION)?,
            cpu_period_us: number(CPU_PERIOD_ANNOTATION)?,
            cpu_shares: number(CPU_SHARES_ANNOTATION)?,
            memory_limit_bytes: number(MEMORY_ANNOTATION)?,
        })
    }

    fn vcpus(&self, default_vcpus: u32) -> (&'static str, u64) {
        match self.cpu_quota_us {
            Some(quota) => {
                let period = self.cpu_period_us.unwrap_or(DEFAULT_PERIOD_US).max(1);
                (
                    "the pod's CPU limit (resources.limits.cpu)",
                    quota.div_ceil(period),
                )
            }
            None => {
                let requested = self.cpu_shares.unwrap_or(0).div_ceil(SHARES_PER_CPU);
                if requested > u64::from(default_vcpus) {
                    ("the pod's CPU request (resources.requests.cpu)", requested)
                } else {
                    ("`vm.default_vcpus`", default_vcpus.into())
                }
            }
        }
    }
}

impl Sizing {
    /// The size of the VM of a pod: what it asks for and the guest's own reserve, within the
    /// operator's bounds.
    ///
    /// A limit is an upper bound, and it may lawfully be above what the host has: then the VM gets
    /// what the host has, as a container would. A bound that the operator set is different: beyond
    /// it the pod is refused.
    pub fn of(vm: &Vm, demand: &Demand, host: HostCapacity) -> Result<Self, SizingError> {
        Ok(Self {
            vcpus: vcpus(vm, demand, host)?,
            memory_bytes: memory_bytes(vm, demand, host)?,
        })
    }
}

fn vcpus(vm: &Vm, demand: &Demand, host: HostCapacity) -> Result<u32, SizingError> {
    let (field, asked) = demand.vcpus(vm.default_vcpus);
    if vm.max_vcpus != 0 && asked > u64::from(vm.max_vcpus) {
        return Err(SizingError::TooManyVcpus {
            field,
            asked,
            max: vm.max_vcpus,
        });
    }
    let most = u64::from(host.cpus.max(1)).min(VCPUS_MAX);
    Ok(u32::try_from(asked.clamp(1, most)).expect("most is at most VCPUS_MAX"))
}

fn memory_bytes(vm: &Vm, demand: &Demand, host: HostCapacity) -> Result<u64, SizingError> {
    let (field, asked_bytes) = match demand.memory_limit_bytes {
        Some(bytes) => ("the pod's memory limit (resources.limits.memory)", bytes),
        None => ("`vm.default_memory_mib`", vm.default_memory_mib * MIB),
    };
    let (reserve_mib, min_mib, max_mib) =
        (vm.guest_reserve_mib, vm.min_memory_mib, vm.max_memory_mib);
    let total = asked_bytes.saturating_add(reserve_mib * MIB);
    if total < min_mib * MIB {
        let least_bytes = (min_mib - reserve_mib) * MIB;
        return Err(SizingError::MemoryTooSmall {
            field,
            asked_bytes,
            least_bytes,
            min_mib,
            reserve_mib,
        });
    }
    if max_mib != 0 && total > max_mib * MIB {
        return Err(SizingError::MemoryTooLarge {
            field,
            asked_bytes,
            max_mib,
            reserve_mib,
        });
    }
    let align = vm.huge_pages.alignment_bytes();
    // Never below the smallest VM, also on a host that reports nonsense; rounded down at the top,
    // up elsewhere.
    let most = (host.memory_bytes / align * align).max(min_mib * MIB);
    Ok(total.min(most).next_multiple_of(align))
}

#[cfg(test)]
#[path = "sizing_tests.rs"]
mod tests;
