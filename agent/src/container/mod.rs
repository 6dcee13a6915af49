//! Builds and holds containers: an OCI runtime specification in, a process that waits for its start out.
//!
//! ```text
//!  agent (PID 1, many threads)          helper (re-exec, one thread)          init of the container
//!  plan::of(spec)  ── pure ──┐
//!  cgroup made, limits set   │
//!  spawn container-init ─────┼────────> reads InitMessage
//!  helper's pid into cgroup  │          opens sources, joins namespaces
//!                            │          clone3(CLONE_PARENT) ───────────────> mounts, pivot, devices, identity
//!  <──── Report::Cloned ─────┤          maps ids, exits                       │
//!  <──── Report::Ready ──────┼────────────────────────────────────────────────┤ waits
//!  start: Order::Start ──────┼──────────────────────────────────────────────> │ execve
//!  <──── end of file (it runs) or Report::Failed ────────────────────────────-┘
//! ```
//!
//! Why the builder is ours: `docs/decisions/0001-own-container-builder.md`. Everything here is synchronous; callers on an
//! asynchronous runtime use a thread that may block. Exit statuses are collected by the agent's reaper: the container's
//! first process is a child of the agent itself (`CLONE_PARENT`), never of the helper.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxDevice, LinuxResources, Process, Spec};

mod error;

pub(crate) use error::ContainerError;

/// The ends of its streams that a process gets; what is `None` becomes `/dev/null`. With a terminal none are given.
#[derive(Debug, Default)]
pub(crate) struct Stdio {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

/// A process that is built and waits for its start.
#[derive(Debug)]
pub(crate) struct Created {
    /// In the agent's PID namespace.
    pub(crate) pid: i32,
    /// The terminal's master end when `process.terminal` is set.
    pub(crate) terminal: Option<OwnedFd>,
}

/// What the specification does not say about a container.
#[derive(Debug, Default)]
pub(crate) struct CreateOptions {
    /// Columns and rows; overrides `process.consoleSize`.
    pub(crate) console_size: Option<(u32, u32)>,
    /// Join this PID namespace although the specification asks for one of its own.
    pub(crate) sandbox_pid_namespace: Option<OwnedFd>,
    /// Directory of the cgroup v2 hierarchy beneath which the container's own is made, named by its id.
    pub(crate) cgroup_parent: PathBuf,
    /// Devices beyond those of the specification; their use is allowed.
    pub(crate) devices: Vec<LinuxDevice>,
}

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    cgroup: PathBuf,
}

impl Container {
    /// Builds a container up to, and not including, the execution of its user's program.
    pub(crate) fn create(
        _id: &str,
        _spec: Spec,
        _options: CreateOptions,
        _stdio: Stdio,
    ) -> Result<(Self, Created), ContainerError> {
        Err(ContainerError::state("implemented", "a skeleton"))
    }

    /// Lets the container's first process execute its program.
    pub(crate) fn start(&mut self) -> Result<(), ContainerError> {
        Err(ContainerError::state("implemented", "a skeleton"))
    }

    /// Prepares a further process; it waits for [`Exec::start`].
    pub(crate) fn exec(
        &self,
        _exec_id: &str,
        _process: Process,
        _console_size: Option<(u32, u32)>,
        _stdio: Stdio,
    ) -> Result<(Exec, Created), ContainerError> {
        Err(ContainerError::state("implemented", "a skeleton"))
    }

    /// Sends a signal to every process of the container; SIGKILL by `cgroup.kill`.
    pub(crate) fn signal_all(&self, _signal: i32) -> Result<(), ContainerError> {
        Ok(())
    }

    /// Freezes every process; answers when they are frozen.
    pub(crate) fn pause(&self) -> Result<(), ContainerError> {
        Ok(())
    }

    /// Thaws what [`Self::pause`] froze.
    pub(crate) fn resume(&self) -> Result<(), ContainerError> {
        Ok(())
    }

    /// Changes the limits that `resources` names and leaves the others.
    pub(crate) fn update(&self, _resources: LinuxResources) -> Result<(), ContainerError> {
        Ok(())
    }

    /// Every process of the container, in the agent's PID namespace.
    pub(crate) fn pids(&self) -> Vec<i32> {
        Vec::new()
    }

    /// Its cgroup's directory.
    pub(crate) fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// How often the kernel's OOM killer ended a process of this container.
    pub(crate) fn oom_kills(&self) -> u64 {
        0
    }

    /// Whether SIGKILL to the first process ends all others, because it is PID 1 of a namespace of their own. When not,
    /// whoever sees it end must call [`Self::signal_all`].
    pub(crate) fn has_own_pid_namespace(&self) -> bool {
        true
    }

    /// Ends what is left of the container, removes its cgroup, and runs its `poststop` hooks.
    ///
    /// A container that runs is `WrongState`; one that was never started is ended.
    pub(crate) fn delete(self) -> Result<(), ContainerError> {
        Ok(())
    }
}

/// A process inside a container beside its first.
#[derive(Debug)]
pub(crate) struct Exec;

impl Exec {
    /// Lets the process execute its program.
    pub(crate) fn start(&mut self) -> Result<(), ContainerError> {
        Ok(())
    }
}

/// What `pericarp-agent container-init` does: builds one process from the message on its standard input. Never returns.
pub(crate) fn init_main() -> ! {
    std::process::exit(1)
}
