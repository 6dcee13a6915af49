//! The devices of the machine.

pub(crate) mod virtio;
