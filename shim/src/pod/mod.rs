//! The pod: one VM, its containers, and everything on the host that is theirs.
//!
//! ```text
//! daemon starts ──> boot: settings, state, cgroup, shared directory, network, VMM ──> configured
//!                     │ fails: everything undone, every call answers why
//!                     v
//!            containers come and go (container.rs) ──> Shutdown, none left ──> tear_down ──> end
//!                     │
//!                     └─ VMM or guest ends: every process ends with 137, calls answer why
//! ```
//!
//! What must be undone is in the journal before it is done, so that `delete` can do the same after
//! `kill -9`.

pub(crate) mod agent_events;
pub(crate) mod boot;
pub(crate) mod bundle;
mod clock;
pub(crate) mod container;
pub(crate) mod create;
pub(crate) mod demand;
pub(crate) mod devices;
pub(crate) mod ending;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod files;
pub(crate) mod guest_log;
pub(crate) mod lifecycle;
pub(crate) mod logger;
pub(crate) mod placeholder;
pub(crate) mod process;
pub(crate) mod resize;
pub(crate) mod state_file;
pub(crate) mod stats;
pub(crate) mod stdio;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use pericarp_runtime_config::RuntimeOptions;
use tokio::sync::watch;
use tracing::warn;

use self::{
    bundle::Bundle,
    container::Container,
    events::Publisher,
    files::PodFiles,
    placeholder::Placeholder,
    process::{Exit, LOST_STATUS},
    resize::Size,
};
use crate::{
    errors::CallError,
    guest::agent_client::Agent,
    host::{cgroup::Meter, child::Watched, journal, placement::Placement},
    machine::client::Machine,
    network,
    passthrough::Passthrough,
    storage::{disk::Disks, memory_volumes::MemoryVolumes, share::SharedDirectory},
};

/// What a pod is made from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Request {
    /// The sandbox's id.
    pub(crate) id: String,
    /// Its bundle.
    pub(crate) bundle: Option<Bundle>,
    /// Files of its containers, when it came by the sandbox service.
    pub(crate) files: Option<PodFiles>,
    /// Its network namespace.
    pub(crate) network_namespace: Option<PathBuf>,
    /// Its annotations.
    pub(crate) annotations: HashMap<String, String>,
    /// What the handler's options chose.
    pub(crate) options: RuntimeOptions,
    /// containerd's namespace.
    pub(crate) namespace: String,
}

/// A pod whose VM runs.
#[derive(Debug)]
pub(crate) struct Pod {
    /// The sandbox's id.
    pub(crate) id: String,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// Its state directory.
    pub(crate) state: PathBuf,
    /// The VMM.
    pub(crate) machine: Machine,
    /// The agent.
    pub(crate) agent: Agent,
    /// The VMM's process.
    pub(crate) vmm: Watched,
    /// What the VM and its daemon use, where the pod has a cgroup.
    pub(crate) meter: Option<Meter>,
    /// Where its processes stand on the host.
    pub(crate) placement: Placement,
    /// The VM's size.
    pub(crate) size: Size,
    /// The directory shared with the guest.
    pub(crate) shared: SharedDirectory,
    /// Events to containerd.
    pub(crate) publisher: Publisher,
    /// Containers by id.
    pub(crate) containers: Mutex<HashMap<String, Arc<Container>>>,
    /// When it was ready.
    pub(crate) ready_at: SystemTime,
    /// It came without a pause container.
    pub(crate) by_sandbox_service: bool,
    /// Containers' seccomp profiles are applied.
    pub(crate) guest_seccomp: bool,
    /// What was decided about its volumes in memory.
    pub(crate) memory: MemoryVolumes,
    /// Its disks.
    pub(crate) disks: Disks,
    placeholder: Placeholder,
    network_namespace: Option<PathBuf>,
    /// What gives it functions of the host.
    pub(crate) passthrough: Arc<Passthrough>,
    /// How long a container may take to end after SIGKILL.
    pub(crate) kill_limit: Duration,
    exit: watch::Sender<Option<Exit>>,
    next_stream: AtomicU64,
}

impl Pod {
    /// A number for a stream that no other stream of this sandbox has.
    pub(crate) fn stream_number(&self) -> u64 {
        self.next_stream.fetch_add(1, Ordering::Relaxed)
    }

    /// The PID that containerd is told for the pod.
    pub(crate) fn pid(&self) -> u32 {
        self.placeholder.number()
    }

    /// The PID that containerd is told for a container or, by the sandbox's own id, for the pod; 0
    /// for what is not here.
    pub(crate) fn pid_of(&self, id: &str) -> u32 {
        match self.container(id) {
            Ok(container) => container.init.pid,
            Err(_) if id == self.id => self.pid(),
            Err(_) => 0,
        }
    }

    /// Something that stands for one more container.
    pub(crate) fn placeholder(&self) -> Result<Placeholder, CallError> {
        Placeholder::for_guest(self.network_namespace.as_deref())
    }

    /// Containers at this moment.
    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    /// Gives the VM's processes what its containers ask of the host.
    pub(crate) fn apply_placement(&self) -> Result<(), CallError> {
        let containers = self.containers().into_iter();
        let containers = containers.filter(|container| !container.pause);
        self.placement
            .apply_all(containers.map(|container| container.host_resources().clone()))
    }

    /// The same after a container is gone or an update failed, when nobody waits for an answer.
    pub(crate) fn reapply_placement(&self) {
        if let Err(error) = self.apply_placement() {
            warn!(%error, "the pod keeps host limits that none of its containers has");
        }
    }

    /// The container called `id`.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, CallError> {
        let containers = self
            .containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        containers
            .get(id)
            .cloned()
            .ok_or_else(|| CallError::NotFound(format!("container {id}")))
    }

    /// How the sandbox ended, if it has.
    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for the end of the sandbox.
    pub(crate) async fn ended(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        let known = exit
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exit| *exit);
        known.unwrap_or_else(|| Exit::now(LOST_STATUS))
    }
}

/// Undoes the journal of a sandbox; what is left over is reported by the journal itself.
async fn undo(state: PathBuf) {
    let undone =
        tokio::task::spawn_blocking(move || journal::undo(&state, network::remove_tap)).await;
    if let Ok(Err(error)) = undone {
        warn!(%error, "something of the sandbox is left");
    }
}

#[cfg(test)]
mod contract_tests;
