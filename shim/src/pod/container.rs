//! A container of the pod: what the shim keeps of it.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    time::SystemTime,
};

use pericarp_protocol::guest::ProcessRequest;
use protobuf::well_known_types::timestamp::Timestamp;

#[cfg(test)]
use crate::pod::{create::reserve, ending::watch, stdio::Paths};
use crate::{
    errors::CallError,
    host::placement::HostResources,
    passthrough::Plugged,
    pod::{
        Pod,
        demand::ContainerLimits,
        ending::ended,
        placeholder::Placeholder,
        process::{Exit, LOST_STATUS, Process},
        stats::Sample,
    },
    storage::disk::Disk,
};

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    /// Its id.
    pub(crate) id: String,
    /// Its bundle.
    pub(crate) bundle: PathBuf,
    /// Its first process.
    pub(crate) init: Arc<Process>,
    /// It stands for the sandbox and has no process in the guest.
    pub(crate) pause: bool,
    /// Frozen.
    pub(crate) paused: AtomicBool,
    /// Somebody waits for its end after SIGKILL.
    pub(crate) doomed: AtomicBool,
    /// What it may use.
    pub(super) limits: Mutex<ContainerLimits>,
    /// What it asks of its place on the host.
    pub(super) host_resources: Mutex<HostResources>,
    /// What stands for it on the host; the pod's own stands for the pause container.
    pub(super) placeholder: Option<Placeholder>,
    pub(super) sample: Mutex<Option<Sample>>,
    /// The disk that its root file system is on.
    pub(super) disk: Mutex<Option<Disk>>,
    /// Its volumes that are block devices.
    pub(super) volumes: Mutex<Vec<Disk>>,
    /// Functions of the host that it has.
    pub(super) functions: Mutex<Vec<Plugged>>,
    pub(super) execs: Mutex<HashMap<String, Arc<Process>>>,
}

/// Seconds and nanoseconds since the epoch.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}

impl Container {
    pub(super) fn sample(&self) -> MutexGuard<'_, Option<Sample>> {
        self.sample.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it asks of its place on the host.
    pub(crate) fn host_resources(&self) -> MutexGuard<'_, HostResources> {
        self.host_resources
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// What it may use.
    pub(crate) fn limits(&self) -> ContainerLimits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It may use something else from now on; its limits are among its counters.
    pub(crate) fn note_limits(&self, limits: ContainerLimits) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
        *self.sample() = None;
    }

    pub(super) fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its volumes that are block devices.
    pub(crate) fn volumes(&self) -> MutexGuard<'_, Vec<Disk>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn functions(&self) -> MutexGuard<'_, Vec<Plugged>> {
        self.functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn disk(&self) -> MutexGuard<'_, Option<Disk>> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process called `exec_id`; the init when it is empty.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, CallError> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.execs()
            .get(exec_id)
            .cloned()
            .ok_or_else(|| CallError::NotFound(format!("exec {exec_id} of container {}", self.id)))
    }

    /// The VM is gone: every process has ended. True when one had not before.
    pub(crate) async fn lost(&self, pod: &Pod) -> bool {
        let execs: Vec<_> = self.execs().values().cloned().collect();
        let mut news = false;
        for process in execs.into_iter().chain([Arc::clone(&self.init)]) {
            news |= ended(pod, &self.id, &process, Exit::now(LOST_STATUS)).await;
        }
        news
    }
}

/// A request about one process of a container.
pub(crate) fn request_of(id: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        ..Default::default()
    }
}

#[cfg(test)]
impl Container {
    /// A created container without anything on the host.
    pub(crate) fn made(pod: &Arc<Pod>, id: &str) -> Arc<Self> {
        let container = Arc::new(Self {
            id: id.to_owned(),
            bundle: PathBuf::new(),
            init: Arc::new(Process::reserve(id, "", 1, Paths::default())),
            pause: false,
            paused: AtomicBool::new(false),
            doomed: AtomicBool::new(false),
            limits: Mutex::default(),
            host_resources: Mutex::default(),
            placeholder: None,
            sample: Mutex::default(),
            disk: Mutex::default(),
            volumes: Mutex::default(),
            functions: Mutex::default(),
            execs: Mutex::default(),
        });
        container.init.created(None);
        reserve(pod, &container).unwrap();
        let init = Arc::clone(&container.init);
        tokio::spawn(watch(Arc::clone(pod), id.to_owned(), init));
        container
    }

    /// A created exec.
    pub(crate) fn exec_made(&self, pod: &Arc<Pod>, exec_id: &str) -> Arc<Process> {
        let exec = Arc::new(Process::reserve(&self.id, exec_id, 1, Paths::default()));
        exec.created(None);
        self.execs().insert(exec_id.to_owned(), Arc::clone(&exec));
        tokio::spawn(watch(Arc::clone(pod), self.id.clone(), Arc::clone(&exec)));
        exec
    }
}
