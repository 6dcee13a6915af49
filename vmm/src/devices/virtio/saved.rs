//! What a device leaves behind for another one to go on: plain data, so that a machine can be
//! written down, kept as a template, or moved (D8). Nothing of it is a descriptor or an address of
//! this process; what a device was made from is made anew by whoever restores it.
//!
//! ```text
//!  live --save--> stopped, Saved      Saved.state --restore--> made --activate (queues where they
//!                                                                    stood)--> live
//! ```
//!
//! The vCPUs stand still meanwhile. Saving finishes or takes back what was in flight, so that each
//! request of the driver is answered once: before, or by the device that goes on.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::device::{Activation, ActiveQueue};

/// Where one queue stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Position {
    /// Its number in the device.
    pub(crate) index: u16,
    /// The next entry of the available ring that the device takes.
    pub(crate) next_available: u16,
    /// The next entry of the used ring that it fills.
    pub(crate) next_used: u16,
}

impl Position {
    /// Where a queue of this process stands.
    pub(crate) fn of(active: &ActiveQueue) -> Self {
        Self {
            index: active.index,
            next_available: active.queue.next_avail(),
            next_used: active.queue.next_used(),
        }
    }

    /// The same with the last `count` chains not taken.
    pub(crate) fn without(self, count: usize) -> Self {
        let count = u16::try_from(count).expect("no more chains are taken than a queue has");
        Self {
            next_available: self.next_available.wrapping_sub(count),
            ..self
        }
    }

    /// Puts a queue there.
    pub(crate) fn apply(&self, queue: &mut Queue) {
        queue.set_next_avail(self.next_available);
        queue.set_next_used(self.next_used);
    }
}

impl ActiveQueue {
    /// Where a queue stands that another process or the kernel has served and has stopped serving
    /// at `next_avail`: what it has used, the ring says.
    pub(crate) fn kernel_position(&self, memory: &GuestMemoryMmap) -> Position {
        let used = self.queue.used_idx(memory, Ordering::Acquire);
        Position {
            next_used: used.map_or(self.queue.next_used(), |used| used.0),
            ..Position::of(self)
        }
    }
}

/// State of a device beyond its queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DeviceState {
    /// Nothing.
    Nothing,
    /// A file system: requests that its daemon had not answered.
    Fs { unanswered: u32 },
    /// A network device: how many queue pairs are in use.
    Net { pairs: u16 },
    /// Sockets: whether the driver must learn that its connections are gone.
    Vsock { connections: bool },
    /// Persistent memory: where the driver was told that it is.
    Pmem { address: u64 },
    /// A balloon: what it shall have and what it has.
    Balloon { goal_pages: u32, actual_pages: u32 },
    /// Pluggable memory: what shall be plugged, and what is, one bit a block.
    Mem {
        requested_bytes: u64,
        plugged: Vec<u64>,
    },
}

/// A stopped device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Saved {
    /// Where its queues stood; none when it was not live.
    pub(crate) queues: Vec<Position>,
    /// The state of its kind.
    pub(crate) state: DeviceState,
}

impl Saved {
    /// Of a device that takes no chain that it does not give back at once.
    pub(crate) fn stopped(active: Option<Activation>, state: DeviceState) -> Self {
        let queues = active.map_or_else(Vec::new, |active| active.queues);
        Self {
            queues: queues.iter().map(Position::of).collect(),
            state,
        }
    }
}

/// The state does not fit the device.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {reason}")]
pub(crate) struct RestoreError {
    /// Which device, such as "virtio-mem mem0".
    pub(crate) device: String,
    /// What does not fit.
    pub(crate) reason: String,
}
