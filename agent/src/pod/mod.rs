//! The pod: everything that requests share.
//!
//! ```text
//! Pod ─┬─ containers: name -> Contained ─┬─ container  (namespaces, cgroup)
//!      │                                 ├─ init       Process
//!      │                                 ├─ execs: name -> ExecProcess ── Process
//!      │                                 └─ storages
//!      ├─ storages of the sandbox, by mount point
//!      ├─ drivers: the driver image
//!      └─ sandbox: shared PID namespace
//! ```
//!
//! One thread runs all tasks. What blocks in the kernel runs on a thread of its own ([`blocking`])
//! and takes a container's lock only there; no lock is held across an await.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use pericarp_protocol::limits::{CONTAINERS_MAX, EXECS_MAX};
use tokio::{sync::Notify, time::timeout};

use crate::{
    container::{Container, Exec},
    drivers::{Additions, Drivers},
    ground::{errors::RpcError, files, log},
    machine::{
        init::{self, Options},
        limits::Limits,
    },
    pod::{events::Events, oom::OomWatch, pod_init::PodInit, table::Table},
    processes::{Process, reaper::Reaper, streams::Streams},
    storage,
};

pub(crate) mod events;
pub(crate) mod oom;
pub(crate) mod pod_init;
pub(crate) mod table;

/// Storages of the sandbox itself.
const SANDBOX_STORAGES_MAX: usize = 1024;

/// How long killed processes may take to end before the guest is powered off all the same.
const END_WAIT: Duration = Duration::from_secs(5);

/// The cgroup above those of the containers.
const POD_CGROUP: &str = "/sys/fs/cgroup/pod";

/// What requests share.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) options: Options,
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) streams: Arc<Streams>,
    pub(crate) events: Arc<Events>,
    pub(crate) oom: OomWatch,
    pub(crate) containers: Table<Arc<Contained>>,
    pub(crate) storages: Table<storage::Attached>,
    /// The driver image, where the host gave one. Locked on threads that may block only.
    pub(crate) drivers: Mutex<Option<Drivers>>,
    pub(crate) limits: Limits,
    /// Told when the host has asked for power-off and everything has ended.
    pub(crate) powering_off: Notify,
    sandbox: Mutex<SandboxState>,
}

/// Whether the sandbox was configured.
#[derive(Debug)]
pub(crate) enum SandboxState {
    /// Not yet.
    New,
    /// Just now.
    BeingConfigured,
    /// Yes.
    Configured {
        /// Keeps the PID namespace that containers share, if they do.
        pod_init: Option<PodInit>,
    },
}

/// A container and what belongs to it.
#[derive(Debug)]
pub(crate) struct Contained {
    /// `None` once it is deleted. Locked on threads that may block only.
    pub(crate) container: Arc<RwLock<Option<Container>>>,
    pub(crate) init: Process,
    pub(crate) execs: Table<Arc<ExecProcess>>,
    pub(crate) storages: Vec<storage::Attached>,
    pub(crate) cgroup: PathBuf,
    /// Of the driver image, for what is executed in it.
    pub(crate) additions: Additions,
}

/// A process executed beside a container's init.
#[derive(Debug)]
pub(crate) struct ExecProcess {
    /// `None` once it is started.
    pub(crate) waiting: Mutex<Option<Exec>>,
    pub(crate) process: Process,
}

impl Contained {
    /// A table for the execs of a new container.
    pub(crate) fn exec_table() -> Table<Arc<ExecProcess>> {
        Table::new("exec", EXECS_MAX)
    }
}

impl Pod {
    /// An empty pod.
    pub(crate) fn new(options: Options) -> io::Result<Self> {
        let events = Arc::new(Events::default());
        Ok(Self {
            limits: Limits::new(options.in_guest()),
            options,
            reaper: Arc::default(),
            streams: Arc::default(),
            oom: OomWatch::new(Arc::clone(&events))?,
            events,
            containers: Table::new("container", CONTAINERS_MAX),
            storages: Table::new("storage", SANDBOX_STORAGES_MAX),
            drivers: Mutex::default(),
            powering_off: Notify::new(),
            sandbox: Mutex::new(SandboxState::New),
        })
    }

    /// Bounds the threads of all containers together, as far as there are containers.
    pub(crate) fn bound_threads(&self) {
        let file = Path::new(POD_CGROUP).join("pids.max");
        let Some(threads) = self
            .limits
            .threads_of_containers()
            .filter(|_| file.exists())
        else {
            return;
        };
        if let Err(error) = files::write(&file, &threads.to_string()) {
            log::warn(format_args!("cannot bound threads of containers: {error}"));
        }
    }

    /// The cgroup of all containers, made when it is not there.
    pub(crate) fn cgroup() -> io::Result<&'static Path> {
        let cgroup = Path::new(POD_CGROUP);
        if !cgroup.exists() {
            std::fs::create_dir(cgroup)?;
            let controllers = files::read(cgroup.join("cgroup.controllers"))?;
            for controller in controllers.split_whitespace() {
                files::write(
                    cgroup.join("cgroup.subtree_control"),
                    &format!("+{controller}"),
                )?;
            }
        }
        Ok(cgroup)
    }

    /// The state of the sandbox.
    pub(crate) fn sandbox(&self) -> MutexGuard<'_, SandboxState> {
        self.sandbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The PID namespace that containers of this pod share. Made when the first container asks, if
    /// the sandbox's configuration did not; blocks, and the caller holds the reaper.
    pub(crate) fn shared_pid_namespace(&self) -> Result<OwnedFd, RpcError> {
        let mut state = self.sandbox();
        let SandboxState::Configured { pod_init } = &mut *state else {
            return Err(RpcError::State {
                object: "sandbox_pid_namespace".to_owned(),
                reason: "the sandbox is not configured",
            });
        };
        let made = match pod_init {
            Some(made) => made,
            None => pod_init.insert(self.start_pod_init()?),
        };
        made.namespace
            .try_clone()
            .map_err(RpcError::kernel("use the pod's PID namespace"))
    }

    /// Makes that namespace; blocks, and the caller holds the reaper.
    pub(crate) fn start_pod_init(&self) -> Result<PodInit, RpcError> {
        let made = pod_init::spawn().map_err(RpcError::kernel("make the pod's PID namespace"))?;
        // Nobody waits for its end, but it must be collected.
        drop(self.reaper.register(made.pid));
        Ok(made)
    }

    /// Kills every process of the pod, waits for their ends, and takes the mounts of the sandbox
    /// away.
    pub(crate) async fn end_everything(&self) {
        let containers = self.containers.all();
        let handles: Vec<_> = containers
            .iter()
            .map(|(_, one)| Arc::clone(&one.container))
            .collect();
        let killed = blocking(move || {
            for handle in handles {
                let guard = handle.read().unwrap_or_else(PoisonError::into_inner);
                if let Some(container) = guard.as_ref()
                    && let Err(error) = container.signal_all(libc::SIGKILL)
                {
                    log::warn(format_args!(
                        "cannot end a container: {}",
                        log::chain(&error)
                    ));
                }
            }
        });
        if killed.await.is_err() {
            log::warn(format_args!("cannot end the containers"));
        }
        let ends = async {
            for (_, one) in &containers {
                one.init.ended().await;
            }
        };
        if timeout(END_WAIT, ends).await.is_err() {
            log::warn(format_args!(
                "processes did not end within {} s",
                END_WAIT.as_secs()
            ));
        }
        let mut mounts: Vec<_> = self
            .storages
            .all()
            .into_iter()
            .map(|(_, one)| one)
            .collect();
        mounts.sort_by_key(|one| one.mount_point.components().count());
        let unmounted = blocking(move || {
            for (_, one) in containers {
                storage::detach_all(&one.storages);
            }
            storage::detach_all(&mounts);
            nix::unistd::sync();
        });
        // Written back is what could be; a host that asks for power-off gets it.
        if timeout(END_WAIT, unmounted).await.is_err() {
            log::warn(format_args!("mounts could not be taken away in time"));
        }
    }

    /// Ends the guest once the host has read its answer.
    pub(crate) fn power_off(&self) {
        init::power_off(&self.options);
    }
}

/// Runs what blocks in the kernel on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, RpcError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| RpcError::Crashed)
}
