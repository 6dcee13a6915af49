//! virtio-fs (virtio 1.2 §5.11) by a daemon of the shim (virtiofsd), which speaks vhost-user. The
//! device ends the guest's queues and relays what is in them: the daemon sees requests and nothing
//! else of the guest's memory, which may therefore be private to this process.
//!
//! ```text
//! guest's queues ── relay thread ── queues in the bounce memory ── virtiofsd
//!   (chains)          copies          (rings and room, shared)
//! ```
//!
//! - Threads: the relay's own, with a filter of its own, for all requests; the event loop for
//!   set-up and for noticing the daemon's end. The daemon is waited for when the device is made: it
//!   is a process of the node, not of the guest, and a shim that sees the VMM not answering ends
//!   both.
//! - Descriptors held: the vhost-user socket (twice: one to talk, one to wait for its end), the
//!   bounce memory, two eventfds a queue.
//! - Given to the daemon: the bounce memory, and the kick and call eventfds of each queue.
//! - Limits: [`device::REQUEST_QUEUES_MAX`] request queues; requests in flight as many as the
//!   bounce memory holds ([`shadow`]), the others wait in the guest's queue.
//! - Hostile guest: its chains are checked here, and a violation breaks the device until it is
//!   reset. Hostile daemon: what it answers is checked against what it was given; a lie ends it.
//! - Reset: requests in flight are forgotten, and what the daemon answers later is dropped.
//! - Daemon's end: the device breaks, once, with a message; there is no reconnect, for a file
//!   system whose open files are forgotten is worse than none.
//! - No daemon: the device of a machine that will be saved. Its driver finds it, and requests wait.

mod config;
mod device;
mod relay;
pub(crate) mod shadow;
#[cfg(test)]
mod tests;

pub(crate) use device::{Fs, Parameters};
