//! virtio-fs (virtio 1.2 §5.11) by vhost-user: a daemon of the shim (virtiofsd) serves the queues,
//! and this device only joins the guest's queues to it.
//!
//! - Thread: the event loop, for set-up and for noticing the daemon's end; no request passes
//!   through the VMM. The daemon's answers are waited for, a handful per queue at activation and
//!   reset: it is a process of the node, not of the guest, and a shim that sees the VMM not
//!   answering ends both.
//! - Descriptors held: the vhost-user socket (twice: one to talk, one to wait for its end).
//! - Given to the daemon: the memfds of guest memory, and the kick and call eventfds of each queue.
//!   Addresses in its messages are guest-physical ones, so that it learns nothing of the VMM's
//!   address space.
//! - Limits: [`device::REGIONS_MAX`] memory regions, [`device::REQUEST_QUEUES_MAX`] request queues.
//! - Hostile guest: its chains are parsed by the daemon, which has its own jail. It can reset the
//!   device at any time, which stops the daemon's queues.
//! - Daemon's end: the device breaks, once, with a message; there is no reconnect, for a file
//!   system whose open files are forgotten is worse than none.

mod config;
mod device;
#[cfg(test)]
mod tests;

pub(crate) use device::{Fs, Parameters};
