//! The size of a pod's VM while it lives: it follows the limits of the pod's containers.
//!
//! ```text
//! Update of a container ──> change: the pod's demand ──> VM grows, if it must
//!                           agent: the container's own limits
//!                           shrink ──> VM shrinks, if it may
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
use pericarp_runtime_config::{Sizing, Vm};
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
    pod::{
        Pod,
        demand::{ContainerLimits, PodDemand},
        state_file,
    },
};

/// Changes that wait for their turn.
const QUEUE_MAX: usize = 64;

/// How long a guest may take to give memory back, before the rest is left with it: kubelet waits
/// for the answer.
const GIVE_BACK: Duration = Duration::from_secs(5);

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
    Join(ContainerLimits),
    /// A container's limits go from one to the other.
    Change(ContainerLimits, ContainerLimits),
    /// What is not wanted any more may go.
    Shrink,
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
                wanted: PodDemand::new(parts.plan.demand),
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
    pub(crate) async fn join(&self, limits: ContainerLimits) -> Result<(), CallError> {
        self.turn(Step::Join(limits)).await
    }

    /// Grows the VM, if it must, for a container whose limits change.
    pub(crate) async fn change(
        &self,
        old: ContainerLimits,
        new: ContainerLimits,
    ) -> Result<(), CallError> {
        self.turn(Step::Change(old, new)).await
    }

    /// Shrinks the VM to what its containers may use.
    pub(crate) async fn shrink(&self) -> Result<(), CallError> {
        self.turn(Step::Shrink).await
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
    let host_resources = container.host_resources().clone();
    container.host_resources().update(&parsed);
    if let Err(error) = pod.apply_placement() {
        *container.host_resources() = host_resources;
        pod.reapply_placement();
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
        *container.host_resources() = host_resources;
        pod.reapply_placement();
        pod.size.change(new, old).await?;
        pod.size.shrink().await?;
        return Err(error);
    }
    container.note_limits(new);
    pod.size.shrink().await
}

struct Owner {
    parts: Parts,
    wanted: PodDemand,
    now: Sizing,
}

impl Owner {
    async fn take(&mut self, step: Step) -> Result<(), CallError> {
        let wanted = match step {
            Step::Join(limits) => self.wanted.joined(limits),
            Step::Change(old, new) => self.wanted.changed(old, new),
            Step::Shrink => self.wanted,
        };
        let (vm, host) = (&self.parts.vm, self.parts.plan.host);
        self.check(wanted.limited().sizing(vm, host)?)?;
        // A container without a limit may use what can be had.
        let mut target = wanted.sizing(vm, host)?;
        target.memory_bytes = target.memory_bytes.min(self.parts.plan.most.memory_bytes);
        let (vcpus, memory_bytes) = match step {
            Step::Shrink => (target.vcpus, target.memory_bytes),
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
        if let Err(error) = state_file::note_size(&self.parts.state, self.now) {
            warn!(%error, "the VM's new size is not in its state file");
        }
    }
}
