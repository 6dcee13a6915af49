//! Builds and holds containers: an OCI runtime specification in, a process that waits for its start
//! out.
//!
//! ```text
//!  agent (PID 1, many threads)          helper (re-exec, one thread)          container's init
//!  plan::of(spec)  ── pure ──┐
//!  cgroup made, limits set   │
//!  spawn container-init ─────┼────────> reads InitMessage
//!  helper's pid into cgroup  │          opens sources, joins namespaces
//!                            │          clone3(CLONE_PARENT) ───────────────> mounts, pivot,
//!                            │                                                │ devices, identity
//!  <──── Report::Cloned ─────┤          maps ids, exits                       │
//!  <──── Report::Ready ──────┼────────────────────────────────────────────────┤ waits
//!  start: Order::Start ──────┼──────────────────────────────────────────────> │ execve
//!  <──── end of file (it runs) or Report::Failed ─────────────────────────────┘
//! ```
//!
//! Why the builder is ours: `docs/decisions/0016-own-container-builder.md`. Everything here is
//! synchronous; callers on an asynchronous runtime use a thread that may block. Exit statuses are
//! collected by the agent's reaper: the container's init is a child of the agent itself
//! (`CLONE_PARENT`), never of the helper.

use std::{
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::MetadataExt, net::UnixStream},
    },
    path::Path,
};

use oci_spec::runtime::{Linux, LinuxNamespaceType, LinuxResources, Process, Spec};
use pericarp_sys::{children, pidfd};

use crate::ground::ids;

mod cgroup;
mod error;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod helper;
mod launch;
mod message;
mod options;
mod plan;
mod seccomp;

use cgroup::Cgroup;
pub(crate) use error::ContainerError;
use launch::{PassedFds, Waiting};
use message::{Job, Role};
pub(crate) use options::{CreateOptions, ResourceLimit, Stdio};
use plan::{
    Afterwards, ExecPlan,
    namespaces::{Namespaces, clone_flag},
};

/// A process that is built and waits for its start.
#[derive(Debug)]
pub(crate) struct Created {
    /// In the agent's PID namespace.
    pub(crate) pid: i32,
    /// The terminal's master end when `process.terminal` is set.
    pub(crate) terminal: Option<OwnedFd>,
}

/// One container. Dropping it ends nothing: [`Container::delete`] does.
#[derive(Debug)]
pub(crate) struct Container {
    pid: i32,
    pidfd: OwnedFd,
    /// The way to init until it is started.
    waiting: Option<UnixStream>,
    cgroup: Cgroup,
    namespaces: Namespaces,
    /// Of the specification; further processes take their filter and domain from it.
    linux: Linux,
    oom_score_adj: Option<i32>,
    default_limits: Vec<ResourceLimit>,
    afterwards: Afterwards,
}

impl Container {
    /// Builds a container up to, and not including, the execution of its user's program.
    pub(crate) fn create(
        id: &str,
        spec: Spec,
        mut options: CreateOptions,
        stdio: Stdio,
    ) -> Result<(Self, Created), ContainerError> {
        check_id(id)?;
        let (plan, afterwards) = plan::of(id, &spec, &options)?;
        let linux = spec.linux().clone().unwrap_or_default();
        let cgroup = Cgroup::create(
            &options.cgroup_parent,
            id,
            linux.resources().as_ref(),
            &options.devices,
        )?;
        let mut fds = PassedFds::of(stdio);
        if let Some(namespace) = options.pid_namespace.take() {
            fds.add(Role::PidNamespace, namespace);
        }
        let limits = plan.process.limits.clone();
        let namespaces = plan.namespaces.clone();
        let job = Job::Container(Box::new(plan));
        let place = launch::Place {
            cgroup: Some((&cgroup, None)),
            default_limits: &options.default_limits,
        };
        let waiting = match launch::build(job, fds, &place, &limits) {
            Ok(waiting) => waiting,
            Err(error) => {
                // The first error is the one to be told; a cgroup that stays is found by the next
                // create of this id.
                let _ = cgroup.remove();
                return Err(error);
            }
        };
        let Waiting {
            pid,
            pidfd,
            socket,
            terminal,
        } = waiting;
        let container = Self {
            pid,
            pidfd,
            waiting: Some(socket),
            cgroup,
            namespaces,
            linux,
            oom_score_adj: spec.process().as_ref().and_then(Process::oom_score_adj),
            default_limits: options.default_limits,
            afterwards,
        };
        Ok((container, Created { pid, terminal }))
    }

    /// Lets the container's init execute its program, then runs the `poststart` hooks.
    pub(crate) fn start(&mut self) -> Result<(), ContainerError> {
        let socket = self.waiting.take().ok_or_else(|| {
            let found = if self.has_ended() {
                "stopped"
            } else {
                "running"
            };
            ContainerError::state("created", found)
        })?;
        launch::start(socket)?;
        let mut hooks = self.afterwards.poststart.clone();
        hooks.pid = self.pid;
        launch::hooks(hooks, &self.default_limits).inspect_err(|_| {
            // runtime.md, "Lifecycle": a poststart hook that fails ends the container, which then
            // is deleted.
            let _ = self.cgroup.kill();
        })
    }

    /// Prepares a further process; it waits for [`Exec::start`].
    pub(crate) fn exec(
        &self,
        exec_id: &str,
        process: Process,
        console_size: Option<(u32, u32)>,
        stdio: Stdio,
    ) -> Result<(Exec, Created), ContainerError> {
        check_id(exec_id)?;
        if self.has_ended() {
            return Err(ContainerError::state("running", "stopped"));
        }
        if self.cgroup.is_frozen() {
            return Err(ContainerError::state("running", "paused"));
        }
        let mut process_plan = plan::process::of(&process, "process", &self.linux, console_size)?;
        process_plan.stdio_owner = self.namespaces.outside_uid(process_plan.uid);
        if process.oom_score_adj().is_none() {
            process_plan.oom_score_adj = self.oom_score_adj.unwrap_or(0);
        }
        let limits = process_plan.limits.clone();
        let mut fds = PassedFds::of(stdio);
        let first = self
            .pidfd
            .try_clone()
            .map_err(|error| ContainerError::kernel("keep", "the container's pidfd", &error))?;
        fds.add(Role::Init, first);
        let plan = ExecPlan {
            join: self.differing_namespaces()?,
            process: process_plan,
        };
        let job = Job::Exec(Box::new(plan));
        let place = launch::Place {
            cgroup: Some((&self.cgroup, Some(self.pid))),
            default_limits: &self.default_limits,
        };
        let waiting = launch::build(job, fds, &place, &limits)?;
        let created = Created {
            pid: waiting.pid,
            terminal: waiting.terminal,
        };
        Ok((
            Exec {
                waiting: Some(waiting.socket),
                pidfd: waiting.pidfd,
            },
            created,
        ))
    }

    /// `CLONE_NEW*` of the namespaces in which the container is not the agent's: joining one's own
    /// is an error for some.
    fn differing_namespaces(&self) -> Result<i32, ContainerError> {
        const FILES: [(&str, LinuxNamespaceType); 8] = [
            ("user", LinuxNamespaceType::User),
            ("mnt", LinuxNamespaceType::Mount),
            ("pid", LinuxNamespaceType::Pid),
            ("net", LinuxNamespaceType::Network),
            ("ipc", LinuxNamespaceType::Ipc),
            ("uts", LinuxNamespaceType::Uts),
            ("cgroup", LinuxNamespaceType::Cgroup),
            ("time", LinuxNamespaceType::Time),
        ];
        let mut flags = 0;
        for (file, kind) in FILES {
            let identity = |process: &str| {
                let path = format!("/proc/{process}/ns/{file}");
                match fs::metadata(&path) {
                    Ok(metadata) => Ok(Some((metadata.dev(), metadata.ino()))),
                    // A kernel without this type of namespace.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(ContainerError::kernel("read", path, &error)),
                }
            };
            if identity("self")? != identity(&self.pid.to_string())? {
                flags |= clone_flag(kind);
            }
        }
        // The number meant this container's process all the while only if it is still there.
        if self.has_ended() {
            return Err(ContainerError::state("running", "stopped"));
        }
        Ok(flags)
    }

    fn has_ended(&self) -> bool {
        pidfd::wait_ended(self.pidfd.as_fd(), 0).unwrap_or(true)
    }

    /// Sends a signal to every process of the container; SIGKILL by `cgroup.kill`.
    pub(crate) fn signal_all(&self, signal: i32) -> Result<(), ContainerError> {
        if signal == libc::SIGKILL {
            return self.cgroup.kill();
        }
        // Frozen, none of them forks away from under the list.
        let was_frozen = self.cgroup.is_frozen();
        if !was_frozen {
            self.cgroup.freeze(true)?;
        }
        let mut outcome = Ok(());
        for pid in self.cgroup.pids() {
            match children::send_signal(pid, signal) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                    let action = format!("send signal {signal} to");
                    outcome = Err(ContainerError::kernel(
                        &action,
                        format!("process {pid}"),
                        &error,
                    ));
                }
                _ => {}
            }
        }
        if !was_frozen {
            self.cgroup.freeze(false)?;
        }
        outcome
    }

    /// Freezes every process; answers when they are frozen.
    pub(crate) fn pause(&self) -> Result<(), ContainerError> {
        self.cgroup.freeze(true)
    }

    /// Thaws what [`Self::pause`] froze.
    pub(crate) fn resume(&self) -> Result<(), ContainerError> {
        self.cgroup.freeze(false)
    }

    /// Changes the limits that `resources` names and leaves the others.
    pub(crate) fn update(&self, resources: LinuxResources) -> Result<(), ContainerError> {
        self.cgroup.update(&resources)?;
        if resources
            .devices()
            .as_ref()
            .is_some_and(|devices| !devices.is_empty())
        {
            self.cgroup.set_devices(&resources)?;
        }
        Ok(())
    }

    /// Every process of the container, in the agent's PID namespace.
    pub(crate) fn pids(&self) -> Vec<i32> {
        self.cgroup.pids()
    }

    /// The directory of its cgroup.
    pub(crate) fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// Whether SIGKILL to init ends all others, because it is PID 1 of a namespace of
    /// their own. When not, whoever sees it end must call [`Self::signal_all`].
    pub(crate) fn has_own_pid_namespace(&self) -> bool {
        self.namespaces.is_new(LinuxNamespaceType::Pid)
    }

    /// Ends what is left of the container, removes its cgroup, and runs its `poststop` hooks.
    ///
    /// A container that runs is `WrongState`; one that was never started is ended.
    pub(crate) fn delete(self) -> Result<(), ContainerError> {
        if self.waiting.is_none() && !self.has_ended() {
            return Err(ContainerError::state("stopped", "running"));
        }
        self.cgroup.remove()?;
        launch::hooks(self.afterwards.poststop, &self.default_limits)
    }
}

/// A process inside a container beside its init.
#[derive(Debug)]
pub(crate) struct Exec {
    waiting: Option<UnixStream>,
    pidfd: OwnedFd,
}

impl Exec {
    /// Lets the process execute its program.
    pub(crate) fn start(&mut self) -> Result<(), ContainerError> {
        match self.waiting.take() {
            Some(socket) => launch::start(socket),
            None if pidfd::wait_ended(self.pidfd.as_fd(), 0).unwrap_or(true) => {
                Err(ContainerError::state("created", "stopped"))
            }
            None => Err(ContainerError::state("created", "running")),
        }
    }
}

/// What `pericarp-agent container-init` does: builds one process from the message on its standard
/// input. Never returns.
pub(crate) fn init_main() -> ! {
    helper::main()
}

/// Checks an id of a container or an exec.
fn check_id(id: &str) -> Result<(), ContainerError> {
    ids::check(id).map_err(|reason| ContainerError::invalid("container id", reason))
}
