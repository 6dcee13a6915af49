//! From the driver's transmit queue to the tap.

use std::{io, os::fd::BorrowedFd};

use pericarp_sys::guest_io;
use virtio_queue::QueueT;

use super::{
    device::{Counters, TapGone},
    request::{ETHERNET_HEADER_BYTES, HEADER_BYTES, PACKET_BYTES_MAX},
};
use crate::devices::virtio::{
    chain::ChainError,
    device::{ActiveQueue, GuestMemory, Interrupt},
    rate_limiter::RateLimiter,
    saved::Position,
    segments::SegmentChain,
};

/// Packets sent in one turn of the event loop; what is left waits for the next turn, behind all
/// other devices.
pub(super) const BATCH_MAX: usize = 256;

/// Why sending stopped for good.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransmitError {
    /// The driver's act.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The host's act.
    #[error(transparent)]
    TapGone(#[from] TapGone),
    /// The kick descriptor failed.
    #[error("the queue's own notification failed: {0}")]
    Kick(io::Error),
}

/// One transmit queue.
#[derive(Debug)]
pub(super) struct Sender {
    queue: ActiveQueue,
}

impl Sender {
    pub(super) fn new(queue: ActiveQueue) -> Self {
        Self { queue }
    }

    /// Where its queue stands.
    pub(super) fn position(&self) -> Position {
        Position::of(&self.queue)
    }

    /// Sends what is available, up to [`BATCH_MAX`] packets and what the limiter admits.
    pub(super) fn run(
        &mut self,
        tap: BorrowedFd<'_>,
        memory: &GuestMemory,
        interrupt: &dyn Interrupt,
        limiter: &mut RateLimiter,
        counters: &mut Counters,
    ) -> Result<(), TransmitError> {
        let queue = &mut self.queue.queue;
        queue
            .disable_notification(memory.as_ref())
            .map_err(ChainError::from)?;
        let mut taken = 0;
        let drained = loop {
            if taken == BATCH_MAX || !limiter.admits() {
                break false;
            }
            let Some(chain) = SegmentChain::take(queue, memory)? else {
                if queue
                    .enable_notification(memory.as_ref())
                    .map_err(ChainError::from)?
                {
                    continue;
                }
                break true;
            };
            taken += 1;
            limiter.spend(chain.readable_len().saturating_sub(HEADER_BYTES as u64));
            send(tap, memory, &chain, counters)?;
            queue
                .add_used(memory.as_ref(), chain.head, 0)
                .map_err(ChainError::from)?;
        };
        if taken > 0
            && queue
                .needs_notification(memory.as_ref())
                .map_err(ChainError::from)?
        {
            interrupt.signal_queue(self.queue.index);
        }
        if !drained && taken == BATCH_MAX {
            self.queue.kick.write(1).map_err(TransmitError::Kick)?;
        }
        Ok(())
    }
}

/// Sends one packet. What the tap does not take is lost, as on a wire.
fn send(
    tap: BorrowedFd<'_>,
    memory: &GuestMemory,
    chain: &SegmentChain,
    counters: &mut Counters,
) -> Result<(), TapGone> {
    let len = chain.readable_len();
    let lengths = (HEADER_BYTES + ETHERNET_HEADER_BYTES) as u64..=PACKET_BYTES_MAX as u64;
    if !lengths.contains(&len) {
        counters.transmit_refused += 1;
        return Ok(());
    }
    match guest_io::write(tap, memory, &chain.readable) {
        Ok(_) => {
            counters.transmit_packets += 1;
            counters.transmit_bytes += len - HEADER_BYTES as u64;
            Ok(())
        }
        Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Err(TapGone),
        Err(_) => {
            counters.transmit_refused += 1;
            Ok(())
        }
    }
}
