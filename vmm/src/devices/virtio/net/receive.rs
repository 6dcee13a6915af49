//! From the tap to the driver's receive queue.
//!
//! A packet is read straight into the driver's buffers when these hold the longest packet there can
//! be. Otherwise it is read into memory of our own first, so that a packet longer than the buffers
//! is not cut: it waits there until the driver brings more of them.

use std::{collections::VecDeque, io, os::fd::BorrowedFd};

use pericarp_sys::guest_io::{self, Segment};
use virtio_queue::QueueT;

use super::{
    device::{Counters, TapGone},
    request::{HEADER_BYTES, HEADER_NUM_BUFFERS, PACKET_BYTES_MAX},
};
use crate::devices::virtio::{
    chain::{ChainError, SEGMENTS_MAX},
    device::{ActiveQueue, GuestMemory, Interrupt},
    rate_limiter::RateLimiter,
    saved::Position,
    segments::{self, SegmentChain, write_segments},
    used_ring::{Signals, add_used_together},
};

/// Packets received in one turn of the event loop; the tap stays readable for the next one.
pub(super) const BATCH_MAX: usize = 128;

/// The most descriptors that a packet is read into directly. Half of what `readv` takes, as one
/// that crosses from a memory region into the next counts twice.
const IN_PLACE_SEGMENTS_MAX: usize = SEGMENTS_MAX / 2;

/// Why receiving stopped for good.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
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

/// What one step came to.
enum Step {
    /// A packet was delivered or dropped.
    Done,
    /// The tap has no packet.
    TapEmpty,
    /// The driver has given too few buffers.
    NoRoom,
}

/// What a receive queue waits for after a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// The tap's next packet.
    Packet,
    /// The driver's next buffers.
    Buffers,
    /// The limiter.
    Limiter,
}

/// One receive queue.
#[derive(Debug)]
pub(super) struct Receiver {
    queue: ActiveQueue,
    signals: Signals,
    mergeable: bool,
    /// Buffers taken from the driver and not filled yet, their bytes and their descriptors.
    buffers: VecDeque<SegmentChain>,
    buffers_bytes: u64,
    buffers_segments: usize,
    /// A packet that was read before there was room for it.
    held: Option<Vec<u8>>,
}

/// What one receive turn works with.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    pub(super) tap: BorrowedFd<'a>,
    pub(super) memory: &'a GuestMemory,
    pub(super) interrupt: &'a dyn Interrupt,
    pub(super) limiter: &'a mut RateLimiter,
    pub(super) counters: &'a mut Counters,
}

impl Receiver {
    pub(super) fn new(queue: ActiveQueue, mergeable: bool) -> Self {
        Self {
            signals: Signals::since(&queue.queue),
            queue,
            mergeable,
            buffers: VecDeque::new(),
            buffers_bytes: 0,
            buffers_segments: 0,
            held: None,
        }
    }

    /// Where its queue stands, with the buffers that are not filled given back.
    pub(super) fn position(&self) -> Position {
        Position::of(&self.queue).without(self.buffers.len())
    }

    /// Receives what is there, up to [`BATCH_MAX`] packets.
    pub(super) fn run(&mut self, turn: &mut Turn<'_>) -> Result<Next, ReceiveError> {
        let next = self.receive(turn);
        // Packets delivered before an error are the driver's all the same.
        if self.signals.due(&self.queue.queue, turn.memory)? {
            turn.interrupt.signal_queue(self.queue.index);
        }
        next
    }

    fn receive(&mut self, turn: &mut Turn<'_>) -> Result<Next, ReceiveError> {
        self.queue
            .queue
            .disable_notification(turn.memory.as_ref())
            .map_err(ChainError::from)?;
        for _ in 0..BATCH_MAX {
            if !turn.limiter.admits() {
                return Ok(Next::Limiter);
            }
            match self.step(turn)? {
                Step::Done => {}
                Step::TapEmpty => return Ok(Next::Packet),
                Step::NoRoom => {
                    let more = self
                        .queue
                        .queue
                        .enable_notification(turn.memory.as_ref())
                        .map_err(ChainError::from)?;
                    if !more {
                        return Ok(Next::Buffers);
                    }
                }
            }
        }
        if self.held.is_some() {
            // The tap may stay silent: come back for the held packet by the queue's own
            // notification.
            self.queue.kick.write(1).map_err(ReceiveError::Kick)?;
        }
        Ok(Next::Packet)
    }

    fn step(&mut self, turn: &mut Turn<'_>) -> Result<Step, ReceiveError> {
        self.take_buffers(turn.memory)?;
        if self.held.is_none() {
            if self.buffers.is_empty() {
                return Ok(Step::NoRoom);
            }
            let target = self.front(PACKET_BYTES_MAX);
            let room = segments::total(&target);
            if room >= PACKET_BYTES_MAX as u64 && target.len() <= IN_PLACE_SEGMENTS_MAX {
                return self.read_in_place(turn, &target);
            }
            self.held = read_aside(turn)?;
            if self.held.is_none() {
                return Ok(Step::TapEmpty);
            }
        }
        self.deliver_held(turn)
    }

    /// Takes buffers until they hold the longest packet.
    fn take_buffers(&mut self, memory: &GuestMemory) -> Result<(), ChainError> {
        while !self.is_full() && self.buffers_bytes < PACKET_BYTES_MAX as u64 {
            let Some(chain) = SegmentChain::take(&mut self.queue.queue, memory)? else {
                break;
            };
            if chain.writable_len() == 0 {
                return Err(ChainError::Malformed(chain.head));
            }
            self.buffers_bytes += chain.writable_len();
            self.buffers_segments += chain.writable.len();
            self.buffers.push_back(chain);
        }
        Ok(())
    }

    /// No more buffers may be taken: without mergeable buffers a packet gets one, and a driver that
    /// offers the same buffer again and again must not make this grow.
    fn is_full(&self) -> bool {
        let most = if self.mergeable {
            usize::from(self.queue.queue.size())
        } else {
            1
        };
        self.buffers.len() >= most || self.buffers_segments >= SEGMENTS_MAX
    }

    /// Where the next packet of up to `len` bytes goes.
    fn front(&self, len: usize) -> Vec<Segment> {
        let all: Vec<Segment> = self
            .buffers
            .iter()
            .flat_map(|chain| chain.writable.iter().copied())
            .collect();
        segments::part(&all, 0, len)
    }

    fn read_in_place(
        &mut self,
        turn: &mut Turn<'_>,
        target: &[Segment],
    ) -> Result<Step, ReceiveError> {
        match guest_io::read(turn.tap, turn.memory, target) {
            Ok(len) if len > HEADER_BYTES => {
                self.complete(turn, target, len)?;
                Ok(Step::Done)
            }
            Ok(_) => Ok(Step::TapEmpty),
            Err(error) => read_failed(&error).map(|()| Step::TapEmpty),
        }
    }

    /// Copies the held packet to the buffers, or drops it when no further buffer could make it fit.
    fn deliver_held(&mut self, turn: &mut Turn<'_>) -> Result<Step, ReceiveError> {
        let Some(packet) = self.held.take() else {
            return Ok(Step::Done);
        };
        let target = self.front(packet.len());
        if write_segments(turn.memory, &target, 0, &packet) {
            self.complete(turn, &target, packet.len())?;
            Ok(Step::Done)
        } else if self.is_full() {
            turn.counters.receive_refused += 1;
            Ok(Step::Done)
        } else {
            self.held = Some(packet);
            Ok(Step::NoRoom)
        }
    }

    /// Gives the driver the buffers that now hold a packet of `len` bytes, its header included.
    fn complete(
        &mut self,
        turn: &mut Turn<'_>,
        target: &[Segment],
        len: usize,
    ) -> Result<(), ChainError> {
        let mut used = Vec::new();
        let mut left = len as u64;
        while left > 0
            && let Some(chain) = self.buffers.pop_front()
        {
            let room = chain.writable_len();
            let filled = room.min(left);
            left -= filled;
            self.buffers_bytes -= room;
            self.buffers_segments -= chain.writable.len();
            used.push((
                chain.head,
                u32::try_from(filled).expect("bounded by PACKET_BYTES_MAX"),
            ));
        }
        let count = u16::try_from(used.len()).expect("bounded by the queue's size");
        if !write_segments(
            turn.memory,
            target,
            HEADER_NUM_BUFFERS,
            &count.to_le_bytes(),
        ) {
            return Err(ChainError::OutsideMemory(used[0].0));
        }
        let payload = (len - HEADER_BYTES) as u64;
        turn.limiter.spend(payload);
        turn.counters.receive_packets += 1;
        turn.counters.receive_bytes += payload;
        add_used_together(&mut self.queue.queue, turn.memory, &used)
    }
}

/// Reads a packet into memory of our own; `None` when the tap has none.
fn read_aside(turn: &Turn<'_>) -> Result<Option<Vec<u8>>, ReceiveError> {
    let mut packet = vec![0; PACKET_BYTES_MAX];
    match nix::unistd::read(turn.tap, &mut packet) {
        Ok(len) if len > HEADER_BYTES => {
            packet.truncate(len);
            Ok(Some(packet))
        }
        Ok(_) => Ok(None),
        Err(error) => read_failed(&error.into()).map(|()| None),
    }
}

/// Tells "nothing to read" from "the interface is gone". EFAULT is what a tap answers whose
/// interface was set down (Linux `tun_ring_recv`); the segments themselves were found in memory.
fn read_failed(error: &io::Error) -> Result<(), ReceiveError> {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR | libc::EFAULT) => Ok(()),
        _ => Err(TapGone.into()),
    }
}
