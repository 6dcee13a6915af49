//! Paths of the guest that several parts of the agent use.

/// Where everything that is mounted for the pod lies.
pub(crate) const RUN: &str = "/run/pericarp";

/// The root of the cgroup hierarchy.
pub(crate) const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// The agent's own program, whatever its path was.
pub(crate) const AGENT: &str = "/proc/self/exe";
