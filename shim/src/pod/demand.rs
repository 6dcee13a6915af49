//! What the containers of a pod may use, and what their VM needs for it.

use oci_spec::runtime::LinuxResources;
use pericarp_runtime_config::{Demand, HostCapacity, Sizing, Vm};

use crate::errors::CallError;

/// The kernel's default period of a CPU quota, in which demands are counted here.
const PERIOD_US: u64 = 100_000;

/// What one container may use, as its specification or its last update says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ContainerLimits {
    memory_bytes: Option<u64>,
    cpu_quota_us: Option<u64>,
    cpu_shares: Option<u64>,
}

impl ContainerLimits {
    /// Returns the limits of `resources`, and those of `self` where `resources` name none.
    pub(crate) fn updated(self, resources: &LinuxResources) -> Self {
        let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
        let mut limits = self;
        if let Some(limit) = resources
            .memory()
            .as_ref()
            .and_then(|memory| memory.limit())
        {
            limits.memory_bytes = positive(limit);
        }
        let Some(cpu) = resources.cpu() else {
            return limits;
        };
        if let Some(quota) = cpu.quota() {
            let period = cpu.period().unwrap_or(PERIOD_US).max(1);
            let scaled = |quota: u64| quota.saturating_mul(PERIOD_US).div_ceil(period);
            limits.cpu_quota_us = positive(quota).map(scaled);
        }
        if let Some(shares) = cpu.shares() {
            limits.cpu_shares = Some(shares);
        }
        limits
    }

    /// Returns the limits of a specification.
    pub(crate) fn of(spec: &oci_spec::runtime::Spec) -> Self {
        let linux = spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        resources.map_or_else(Self::default, |resources| {
            Self::default().updated(resources)
        })
    }
}

/// What the pod may use when one of its containers goes from `old` to `new`.
///
/// kubelet tells a runtime the pod's own sum when the pod begins, and only containers' limits
/// later. A container whose limit is the pod's is the pod's only one, or one without a limit in a
/// pod with pod-level resources, whose limit kubelet gives it.
fn moved(pod: Option<u64>, old: Option<u64>, new: Option<u64>) -> Option<u64> {
    match (pod, old, new) {
        (Some(pod), Some(old), Some(new)) if old == pod => Some(new),
        (Some(pod), Some(old), Some(new)) => Some(pod.saturating_sub(old).saturating_add(new)),
        (pod, _, Some(new)) => pod.max(Some(new)),
        (pod, _, None) => pod,
    }
}

/// What the containers of a pod need of their VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PodDemand {
    demand: Demand,
    /// There is a container without a memory limit in a pod with one: it may use what a pod without
    /// a limit may.
    unlimited: bool,
}

impl PodDemand {
    /// Returns the demand that containerd told when the pod began.
    pub(crate) fn new(mut demand: Demand) -> Self {
        if let Some(quota) = demand.cpu_quota_us {
            let period = demand.cpu_period_us.unwrap_or(PERIOD_US).max(1);
            demand.cpu_quota_us = Some(quota.saturating_mul(PERIOD_US).div_ceil(period));
        }
        demand.cpu_period_us = Some(PERIOD_US);
        Self {
            demand,
            unlimited: false,
        }
    }

    /// Returns the demand after one container went from `old` to `new`.
    pub(crate) fn changed(mut self, old: ContainerLimits, new: ContainerLimits) -> Self {
        let demand = &mut self.demand;
        demand.memory_limit_bytes = moved(
            demand.memory_limit_bytes,
            old.memory_bytes,
            new.memory_bytes,
        );
        demand.cpu_quota_us = moved(demand.cpu_quota_us, old.cpu_quota_us, new.cpu_quota_us);
        demand.cpu_shares = moved(demand.cpu_shares, old.cpu_shares, new.cpu_shares);
        self
    }

    /// Returns the demand by limits alone, without extra memory for containers that have none.
    pub(crate) fn limited(mut self) -> Self {
        self.unlimited = false;
        self
    }

    /// Returns the demand with one more container.
    pub(crate) fn joined(mut self, limits: ContainerLimits) -> Self {
        self.unlimited |= limits.memory_bytes.is_none();
        self
    }

    /// Returns the VM size that fits.
    pub(crate) fn sizing(&self, vm: &Vm, host: HostCapacity) -> Result<Sizing, CallError> {
        let mut demand = self.demand;
        if let (Some(limit), true) = (demand.memory_limit_bytes, self.unlimited) {
            let more = vm.default_memory_mib << 20;
            demand.memory_limit_bytes = Some(limit.saturating_add(more));
        }
        Sizing::of(vm, &demand, host).map_err(|error| CallError::Invalid(error.to_string()))
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

    fn vm() -> Vm {
        Config::default().settings.vm
    }

    fn limits(memory_mib: Option<u64>, quota: Option<u64>) -> ContainerLimits {
        ContainerLimits {
            memory_bytes: memory_mib.map(|mib| mib * MIB),
            cpu_quota_us: quota,
            cpu_shares: None,
        }
    }

    fn pod(memory_mib: Option<u64>, quota: Option<u64>) -> PodDemand {
        PodDemand::new(Demand {
            cpu_quota_us: quota.map(|quota| quota / 2),
            cpu_period_us: Some(PERIOD_US / 2),
            memory_limit_bytes: memory_mib.map(|mib| mib * MIB),
            ..Demand::default()
        })
    }

    fn size(wanted: PodDemand) -> (u32, u64) {
        let sizing = wanted.sizing(&vm(), HOST).unwrap();
        let reserve = vm().guest_reserve_mib;
        (sizing.vcpus, sizing.memory_bytes / MIB - reserve)
    }

    #[test]
    fn the_vm_follows_its_containers() {
        let two = pod(Some(192), Some(150_000));
        assert_eq!(size(two), (2, 192));
        let (before, after) = (
            limits(Some(64), Some(50_000)),
            limits(Some(128), Some(250_000)),
        );
        let raised = two.changed(before, after);
        assert_eq!(size(raised), (4, 256));
        assert_eq!(raised.changed(after, before), two);
        // The only container, or all of a pod with pod-level resources: the limit is the pod's.
        let level = limits(Some(192), Some(150_000));
        let raised = two.changed(level, limits(Some(320), Some(450_000)));
        assert_eq!(size(raised), (5, 320));
        assert_eq!(
            size(raised.changed(limits(Some(320), None), level)),
            (5, 192)
        );
    }

    #[test]
    fn a_pod_without_limits_has_the_defaults_and_what_is_asked_beyond() {
        let none = pod(None, None);
        assert_eq!(size(none), (1, 512));
        assert_eq!(size(none.joined(limits(None, None))), (1, 512));
        let large = limits(Some(1024), Some(300_000));
        assert_eq!(
            size(none.changed(ContainerLimits::default(), large)),
            (3, 1024)
        );
        // One without a limit beside one with: it may use what a pod without may.
        let mixed = pod(Some(64), None).joined(limits(None, None));
        assert_eq!(size(mixed), (1, 64 + 512));
        assert_eq!(size(mixed.joined(limits(Some(8), None))), (1, 64 + 512));
    }

    #[test]
    fn limits_of_a_specification_and_of_updates() {
        let resources = |text: &str| serde_json::from_str::<LinuxResources>(text).unwrap();
        let first = ContainerLimits::default().updated(&resources(
            r#"{"memory": {"limit": 67108864}, "cpu": {"quota": 25000, "period": 50000,
                "shares": 512}}"#,
        ));
        assert_eq!(
            first,
            ContainerLimits {
                cpu_shares: Some(512),
                ..limits(Some(64), Some(50_000))
            }
        );
        assert_eq!(first.updated(&resources("{}")), first);
        let lifted = resources(r#"{"memory": {"limit": -1}, "cpu": {"quota": -1}}"#);
        let lifted = first.updated(&lifted);
        assert_eq!((lifted.memory_bytes, lifted.cpu_quota_us), (None, None));
    }
}
