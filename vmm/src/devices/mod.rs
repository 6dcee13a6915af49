//! The devices of the machine.

pub(crate) mod passthrough;
pub(crate) mod virtio;
