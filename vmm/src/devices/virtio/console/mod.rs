//! virtio-console (virtio 1.2 §5.3): one port, from the guest to the host only. It carries the
//! guest's kernel log (`console=hvc0`) to a descriptor that the shim reads.
//!
//! - Thread: the event loop.
//! - Descriptors held: the output, a pipe's or socket's writing end, set to non-blocking.
//! - Limits: nothing is kept. What the output does not take at once is dropped and counted, so that
//!   neither a slow reader nor a talkative guest costs memory; [`device::CHAINS_PER_TURN_MAX`]
//!   chains are served before other devices have their turn.
//! - Hostile guest: it can fill its own log. Malformed chains break the device.
//!
//! Features: none (no size, no second port, no emergency write), so the driver reads nothing of the
//! configuration space.

mod device;
#[cfg(test)]
mod tests;

pub(crate) use device::Console;
