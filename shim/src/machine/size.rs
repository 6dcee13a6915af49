//! What a VM boots with, and what it can become without a new boot.

use pericarp_runtime_config::{Demand, HostCapacity, HugePages, Settings, Sizing, Vm};

use crate::errors::CallError;

/// Granularity of plugged memory: Linux' largest free block, which its driver works in.
pub(crate) const BLOCK_BYTES: u64 = 4 << 20;

/// Most that the VM of a pod can become without a new boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Most {
    /// vCPUs, those parked included.
    pub(crate) vcpus: u32,
    /// Memory, what can be plugged included.
    pub(crate) memory_bytes: u64,
}

impl Most {
    /// For a VM that boots with `boot`.
    pub(crate) fn of(vm: &Vm, boot: Sizing, host: HostCapacity) -> Self {
        let bound = |most: u32| if most == 0 { host.cpus } else { most };
        let spare = boot.vcpus.saturating_add(vm.spare_vcpus);
        let vcpus = spare.min(bound(vm.max_vcpus)).max(boot.vcpus);
        let most_bytes = match vm.max_memory_mib {
            0 => host.memory_bytes,
            mib => mib << 20,
        };
        // The pool of huge pages is the operator's to divide: nothing of it is kept for later.
        let plugged = if vm.huge_pages == HugePages::None {
            most_bytes.saturating_sub(boot.memory_bytes) / BLOCK_BYTES * BLOCK_BYTES
        } else {
            0
        };
        Self {
            vcpus,
            memory_bytes: boot.memory_bytes + plugged,
        }
    }

    /// Whether there is memory to plug.
    pub(crate) fn plugs(&self, boot: Sizing) -> bool {
        self.memory_bytes > boot.memory_bytes
    }
}

/// What a VM boots with and can become.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// What the pod asked for.
    pub(crate) demand: Demand,
    /// What the host has.
    pub(crate) host: HostCapacity,
    /// What the VM boots with.
    pub(crate) boot: Sizing,
    /// What it can become.
    pub(crate) most: Most,
}

impl Plan {
    /// For a pod that asks for this.
    pub(crate) fn of(
        settings: &Settings,
        demand: Demand,
        host: HostCapacity,
    ) -> Result<Self, CallError> {
        let boot = Sizing::of(&settings.vm, &demand, host)
            .map_err(|error| CallError::Invalid(error.to_string()))?;
        let mut most = Most::of(&settings.vm, boot, host);
        if !settings.security.passthrough_devices.is_empty() {
            // A function may reach all memory, so all of it is pinned: none is kept for later.
            most.memory_bytes = boot.memory_bytes;
        }
        Ok(Self {
            demand,
            host,
            boot,
            most,
        })
    }
}

#[cfg(test)]
mod tests {
    use pericarp_runtime_config::Config;

    use super::*;

    const MIB: u64 = 1 << 20;
    const HOST: HostCapacity = HostCapacity {
        cpus: 8,
        memory_bytes: 16 << 30,
    };

    #[test]
    fn what_a_vm_can_become() {
        let boot = Sizing {
            vcpus: 1,
            memory_bytes: 130 * MIB,
        };
        let mut vm = Config::default().settings.vm;
        let most = Most::of(&vm, boot, HOST);
        assert_eq!(most.vcpus, 1 + vm.spare_vcpus);
        assert!(most.plugs(boot) && most.memory_bytes <= HOST.memory_bytes);
        assert_eq!((most.memory_bytes - boot.memory_bytes) % BLOCK_BYTES, 0);
        vm.max_vcpus = 1;
        vm.max_memory_mib = 130;
        let most = Most::of(&vm, boot, HOST);
        assert_eq!((most.vcpus, most.plugs(boot)), (1, false));
        vm.max_memory_mib = 0;
        vm.huge_pages = HugePages::Size2Mib;
        assert!(!Most::of(&vm, boot, HOST).plugs(boot));
    }

    #[test]
    fn memory_that_functions_of_the_host_reach_stays_as_it_is() {
        let mut settings = Config::default().settings;
        let plan = |settings: &Settings| Plan::of(settings, Demand::default(), HOST).unwrap();
        assert!(plan(&settings).most.plugs(plan(&settings).boot));
        let function = pericarp_runtime_config::PciSelector::parse("10de:2331");
        settings.security.passthrough_devices = vec![function.unwrap()];
        assert!(!plan(&settings).most.plugs(plan(&settings).boot));
    }
}
