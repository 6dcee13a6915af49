//! What the node has that a VM can be made of.

use pericarp_runtime_config::HostCapacity;

/// Reads the node's CPUs and memory.
pub(crate) fn read() -> HostCapacity {
    HostCapacity {
        cpus: online_cpus(),
        memory_bytes: host_memory(),
    }
}

fn online_cpus() -> u32 {
    let count = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN)
        .ok()
        .flatten();
    count
        .and_then(|count| u32::try_from(count).ok())
        .unwrap_or(1)
}

fn host_memory() -> u64 {
    nix::sys::sysinfo::sysinfo()
        .map(|info| info.ram_total())
        .unwrap_or(u64::MAX)
}
