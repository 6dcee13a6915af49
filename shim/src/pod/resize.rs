//! The size of a pod's VM while it lives: it follows the limits of the pod's containers.
//!
//! ```text
//! Update of a container ──> change: the pod's demand ──> VM grows, if it must
//!                           agent: the container's own limits
//!                           settle ──> VM shrinks, if it may
//! ```
//!
//! kubelet raises the pod's cgroup before its containers' limits and lowers it after them, so the
//! guest has given memory back when the answer of an Update goes out. Above what the VM booted with
//! memory is plugged and unplugged (virtio-mem); below it a balloon holds what the pod must not
//! have. vCPUs beyond those of the boot are parked until they are wanted.
//!
//! One task owns the size: changes come to it one after another, and nobody holds a lock while the
//! guest works.

use std::{path::PathBuf, time::Duration};

use oci_spec::runtime::LinuxResources;
use pericarp_protocol::{
    guest::{OnlineResourcesRequest, UpdateContainerRequest},
    machine::{Bytes, Request, Vcpus},
};
use pericarp_runtime_config::{Demand, HostCapacity, Sizing, Vm};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use crate::{
    errors::CallError,
    guest::agent_client::{Agent, agent_call},
    host::placement,
    machine::{
        client::Machine,
        size::{BLOCK_BYTES, Plan},
    },
    pod::{self, Pod},
};

/// Changes that wait for their turn.
const QUEUE_MAX: usize = 64;

/// The kernel's default period of a CPU quota, in which demands are counted here.
const PERIOD_US: u64 = 100_000;

/// How long a guest may take to give memory back, before the rest is left with it: kubelet waits
/// for the answer.
const GIVE_BACK: Duration = Duration::from_secs(5);

/// What one container may use, as its specification or its last update says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    memory_bytes: Option<u64>,
    cpu_quota_us: Option<u64>,
    cpu_shares: Option<u64>,
}

impl Limits {
    /// Those of `resources`; what they do not name is as in `self`.
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

    /// Those of a specification.
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

/// What the containers of a pod want of its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    demand: Demand,
    /// There is a container without a memory limit in a pod with one: it may use what a pod without
    /// a limit may.
    unlimited: bool,
}

impl Wanted {
    fn new(mut demand: Demand) -> Self {
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

    fn changed(mut self, old: Limits, new: Limits) -> Self {
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

    /// What they want by their limits alone.
    fn limited(mut self) -> Self {
        self.unlimited = false;
        self
    }

    fn joined(mut self, limits: Limits) -> Self {
        self.unlimited |= limits.memory_bytes.is_none();
        self
    }

    fn sizing(&self, vm: &Vm, host: HostCapacity) -> Result<Sizing, CallError> {
        let mut demand = self.demand;
        if let (Some(limit), true) = (demand.memory_limit_bytes, self.unlimited) {
            let more = vm.default_memory_mib << 20;
            demand.memory_limit_bytes = Some(limit.saturating_add(more));
        }
        Sizing::of(vm, &demand, host).map_err(|error| CallError::Invalid(error.to_string()))
    }
}

/// What the owner of the size works with.
#[derive(Debug)]
pub(crate) struct Parts {
    /// The VMM.
    pub(crate) machine: Machine,
    /// The agent.
    pub(crate) agent: Agent,
    /// The pod's settings of its VM.
    pub(crate) vm: Vm,
    /// What the VM booted with and can become.
    pub(crate) plan: Plan,
    /// The sandbox's state directory.
    pub(crate) state: PathBuf,
    /// How long a guest may take for what it was asked.
    pub(crate) limit: Duration,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// A container comes with these limits.
    Join(Limits),
    /// A container's limits go from one to the other.
    Change(Limits, Limits),
    /// What is not wanted any more may go.
    Settle,
}

#[derive(Debug)]
struct Turn {
    step: Step,
    reply: oneshot::Sender<Result<(), CallError>>,
}

/// The size of a pod's VM.
#[derive(Debug, Clone)]
pub(crate) struct Size {
    turns: mpsc::Sender<Turn>,
}

impl Size {
    /// Of a VM that has just booted.
    pub(crate) fn follow(parts: Parts) -> Self {
        let (turns, mut receiver) = mpsc::channel::<Turn>(QUEUE_MAX);
        tokio::spawn(async move {
            let mut owner = Owner {
                wanted: Wanted::new(parts.plan.demand),
                now: parts.plan.boot,
                parts,
            };
            while let Some(turn) = receiver.recv().await {
                let _ = turn.reply.send(owner.take(turn.step).await);
            }
        });
        Self { turns }
    }

    async fn turn(&self, step: Step) -> Result<(), CallError> {
        let (reply, answer) = oneshot::channel();
        let gone = || CallError::Gone("the VM's size has no owner any more".to_owned());
        let turn = Turn { step, reply };
        self.turns.send(turn).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Makes room for a container with these limits.
    pub(crate) async fn join(&self, limits: Limits) -> Result<(), CallError> {
        self.turn(Step::Join(limits)).await
    }

    /// Grows the VM, if it must, for a container whose limits change.
    pub(crate) async fn change(&self, old: Limits, new: Limits) -> Result<(), CallError> {
        self.turn(Step::Change(old, new)).await
    }

    /// Shrinks the VM to what its containers may use.
    pub(crate) async fn settle(&self) -> Result<(), CallError> {
        self.turn(Step::Settle).await
    }
}

/// `Update`: the OCI `linux.resources` object as JSON.
pub(crate) async fn update(pod: &Pod, id: &str, resources: &[u8]) -> Result<(), CallError> {
    let container = pod.container(id)?;
    container.init.expect_alive("update")?;
    if container.pause {
        return Ok(());
    }
    let mut parsed: LinuxResources = serde_json::from_slice(resources)
        .map_err(|error| CallError::Invalid(format!("resources: not OCI resources: {error}")))?;
    let old = container.limits();
    let new = old.updated(&parsed);
    let wish = container.wish().clone();
    container.wish().update(&parsed);
    if let Err(error) = pod.settle_place() {
        *container.wish() = wish;
        pod.resettle_place();
        return Err(error);
    }
    placement::keep_on_host(&mut parsed);
    let request = UpdateContainerRequest {
        container_id: id.to_owned(),
        oci_resources: serde_json::to_vec(&parsed)
            .map_err(|error| CallError::host("resources", error))?,
        ..Default::default()
    };
    pod.size.change(old, new).await?;
    if let Err(error) = agent_call!(pod.agent, update_container, &request) {
        *container.wish() = wish;
        pod.resettle_place();
        pod.size.change(new, old).await?;
        pod.size.settle().await?;
        return Err(error);
    }
    container.note_limits(new);
    pod.size.settle().await
}

struct Owner {
    parts: Parts,
    wanted: Wanted,
    now: Sizing,
}

impl Owner {
    async fn take(&mut self, step: Step) -> Result<(), CallError> {
        let wanted = match step {
            Step::Join(limits) => self.wanted.joined(limits),
            Step::Change(old, new) => self.wanted.changed(old, new),
            Step::Settle => self.wanted,
        };
        let (vm, host) = (&self.parts.vm, self.parts.plan.host);
        self.check(wanted.limited().sizing(vm, host)?)?;
        // A container without a limit may use what can be had.
        let mut target = wanted.sizing(vm, host)?;
        target.memory_bytes = target.memory_bytes.min(self.parts.plan.most.memory_bytes);
        let (vcpus, memory_bytes) = match step {
            Step::Settle => (target.vcpus, target.memory_bytes),
            _ => (
                target.vcpus.max(self.now.vcpus),
                target.memory_bytes.max(self.now.memory_bytes),
            ),
        };
        if vcpus != self.now.vcpus {
            self.set_vcpus(vcpus).await?;
        }
        if memory_bytes != self.now.memory_bytes {
            self.set_memory(memory_bytes).await?;
        }
        self.wanted = wanted;
        Ok(())
    }

    /// What cannot be had without a new boot is refused by name.
    fn check(&self, target: Sizing) -> Result<(), CallError> {
        let most = self.parts.plan.most;
        if target.vcpus > most.vcpus {
            return Err(CallError::Invalid(format!(
                "resources.limits.cpu needs {} vCPUs: this VM booted with {} and \
                 `vm.spare_vcpus` = {} to spare",
                target.vcpus, self.parts.plan.boot.vcpus, self.parts.vm.spare_vcpus
            )));
        }
        if target.memory_bytes > most.memory_bytes {
            return Err(CallError::Invalid(format!(
                "resources.limits.memory needs a VM of {} bytes: this one can have {}",
                target.memory_bytes, most.memory_bytes
            )));
        }
        Ok(())
    }

    async fn set_vcpus(&mut self, count: u32) -> Result<(), CallError> {
        let allowed = Vcpus {
            count: u16::try_from(count).unwrap_or(u16::MAX),
        };
        let allow = Request::ResizeVcpus(allowed);
        let grows = count > self.now.vcpus;
        if grows {
            self.parts
                .machine
                .request(allow.clone(), Vec::new())
                .await?;
        }
        let mut request = OnlineResourcesRequest::new();
        request.vcpus = count;
        let online = agent_call!(self.parts.agent, online_resources, &request)?.vcpus;
        if online != count {
            // A vCPU that the guest still runs must not be stopped.
            return Err(CallError::Host(format!(
                "the guest has {online} vCPUs online instead of {count}"
            )));
        }
        if !grows {
            self.parts.machine.request(allow, Vec::new()).await?;
        }
        info!(from = self.now.vcpus, to = count, "vCPUs");
        self.now.vcpus = count;
        self.note();
        Ok(())
    }

    async fn set_memory(&mut self, wanted_bytes: u64) -> Result<(), CallError> {
        let boot_bytes = self.parts.plan.boot.memory_bytes;
        let above = wanted_bytes.saturating_sub(boot_bytes);
        // Whole blocks; the top may be a part of one less.
        let most_above = self.parts.plan.most.memory_bytes - boot_bytes;
        let above = above.next_multiple_of(BLOCK_BYTES).min(most_above);
        let below = boot_bytes.saturating_sub(wanted_bytes);
        let bytes = boot_bytes + above - below;
        if bytes == self.now.memory_bytes {
            return Ok(());
        }
        let machine = &self.parts.machine;
        let grows = bytes > self.now.memory_bytes;
        let limit = if grows { self.parts.limit } else { GIVE_BACK };
        let mut requests = vec![Request::SetBalloon(Bytes { bytes: below })];
        if most_above != 0 {
            let bytes = boot_bytes + above;
            requests.push(Request::ResizeMemory(Bytes { bytes }));
        }
        let reached = machine.resize_memory(requests, bytes, limit).await;
        match reached {
            Err(CallError::Deadline { .. }) if !grows => {
                // The container's own limit holds, and the guest goes on giving back.
                warn!(bytes, "the guest has not given all memory back yet");
            }
            other => other?,
        }
        info!(from = self.now.memory_bytes, to = bytes, "memory");
        self.now.memory_bytes = bytes;
        self.note();
        Ok(())
    }

    /// `pericarp list` shows the size.
    fn note(&self) {
        if let Err(error) = pod::note_size(&self.parts.state, self.now) {
            warn!(%error, "the VM's new size is not in its state file");
        }
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

    fn limits(memory_mib: Option<u64>, quota: Option<u64>) -> Limits {
        Limits {
            memory_bytes: memory_mib.map(|mib| mib * MIB),
            cpu_quota_us: quota,
            cpu_shares: None,
        }
    }

    fn pod(memory_mib: Option<u64>, quota: Option<u64>) -> Wanted {
        Wanted::new(Demand {
            cpu_quota_us: quota.map(|quota| quota / 2),
            cpu_period_us: Some(PERIOD_US / 2),
            memory_limit_bytes: memory_mib.map(|mib| mib * MIB),
            ..Demand::default()
        })
    }

    fn size(wanted: Wanted) -> (u32, u64) {
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
        assert_eq!(size(none.changed(Limits::default(), large)), (3, 1024));
        // One without a limit beside one with: it may use what a pod without may.
        let mixed = pod(Some(64), None).joined(limits(None, None));
        assert_eq!(size(mixed), (1, 64 + 512));
        assert_eq!(size(mixed.joined(limits(Some(8), None))), (1, 64 + 512));
    }

    #[test]
    fn limits_of_a_specification_and_of_updates() {
        let resources = |text: &str| serde_json::from_str::<LinuxResources>(text).unwrap();
        let first = Limits::default().updated(&resources(
            r#"{"memory": {"limit": 67108864}, "cpu": {"quota": 25000, "period": 50000,
                "shares": 512}}"#,
        ));
        assert_eq!(
            first,
            Limits {
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
