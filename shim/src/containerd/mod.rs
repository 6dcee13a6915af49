//! What containerd sees of the shim: its commands, services and configuration.

pub(crate) mod args;
pub(crate) mod bootstrap;
pub(crate) mod cleanup;
pub(crate) mod daemon;
pub(crate) mod events;
pub(crate) mod info;
pub(crate) mod log;
pub(crate) mod options;
pub(crate) mod sandbox_service;
pub(crate) mod task_service;
