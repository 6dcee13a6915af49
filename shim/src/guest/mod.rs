//! What runs in the VM: the agent and its protocol, the specification as it holds there.

pub(crate) mod agent_client;
pub(crate) mod panics;
pub(crate) mod paths;
pub(crate) mod port_forward;
pub(crate) mod spec;
pub(crate) mod vfio;
