//! What a caller says about a container or a process beside its specification.

use std::{os::fd::OwnedFd, path::PathBuf};

use oci_spec::runtime::LinuxDevice;

/// The ends of its streams that a process gets; what is `None` becomes `/dev/null`. With a terminal
/// none are given.
#[derive(Debug, Default)]
pub(crate) struct Stdio {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

/// A limit of a process: `RLIMIT_*`, soft, hard.
pub(crate) type ResourceLimit = (u32, u64, u64);

/// What the specification does not say about a container.
#[derive(Debug, Default)]
pub(crate) struct CreateOptions {
    /// Columns and rows; overrides `process.consoleSize`.
    pub(crate) console_size: Option<(u32, u32)>,
    /// Join this PID namespace although the specification asks for one of its own.
    pub(crate) pid_namespace: Option<OwnedFd>,
    /// Directory of the cgroup v2 hierarchy beneath which the container's own is made, named by its
    /// id.
    pub(crate) cgroup_parent: PathBuf,
    /// Devices beyond those of the specification; their use is allowed.
    pub(crate) devices: Vec<LinuxDevice>,
    /// Limits of processes where the specification sets none.
    pub(crate) default_limits: Vec<ResourceLimit>,
    /// Directory beneath which the pod's own files lie: layers, volumes, what the host shares. The
    /// paths of sources beneath it are free of symbolic links, or refused.
    pub(crate) pod_files: Option<PathBuf>,
}
