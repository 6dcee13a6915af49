//! virtio-balloon (virtio 1.2 §5.5): memory that the guest lends back to the host.
//!
//! - Thread: the event loop.
//! - Descriptors held: one eventfd; guest memory's memfd through its mapping.
//! - Limits: [`request::PFNS_MAX`] pages a buffer, [`device::BATCH_MAX`] buffers a turn,
//!   [`request::STATISTICS_MAX`] figures.
//! - State that a snapshot needs: the goal, what the driver says it holds, the negotiated features,
//!   the queues' indices.
//!
//! Three ways lead from the guest to the host: the goal set by the control socket (inflate,
//! deflate), pages reported free without being asked (D6), and nothing else. The discarded page
//! comes back as zeroes when the guest touches it, so a page in the balloon costs the host nothing
//! and deflating needs no work.
//!
//! What a hostile guest can do: name any page of its own memory, and lose that page's content; ask
//! for a discard again and again, which costs the time of one system call per run of pages, bounded
//! a turn. Its figures are its own claims: they are shown, never acted upon.

mod device;
pub(crate) mod request;

#[cfg(test)]
mod tests;

pub(crate) use device::{Balloon, Parameters};
