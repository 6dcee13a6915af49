//! The VMM of a pod: how it is started, described and controlled.

pub(crate) mod client;
pub(crate) mod launch;
pub(crate) mod size;
