//! virtio-rng, the entropy device (virtio 1.2 §5.4): random bytes from the host's generator.
//!
//! - Thread: the event loop.
//! - Descriptors held: none (`getrandom`).
//! - Limits: [`device::REQUEST_BYTES_MAX`] bytes per request (a device may write fewer than asked)
//!   and [`device::REQUESTS_PER_TURN_MAX`] requests before other devices have their turn.
//! - Hostile guest: it can spend its own share of the event loop. Malformed chains break the
//!   device.

mod device;
#[cfg(test)]
mod tests;

pub(crate) use device::Rng;
