//! The used ring (virtio 1.2 §2.7.8) beyond what `virtio_queue` has: several chains that appear at
//! once, and whether the driver wants an interrupt for them.

use std::sync::{
    Arc,
    atomic::{Ordering, fence},
};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::chain::ChainError;

// Layout of the split queue's rings (§2.7.6, §2.7.8).
const USED_HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;
const AVAIL_HEADER_BYTES: u64 = 4;
const AVAIL_ELEMENT_BYTES: u64 = 2;
/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const AVAIL_NO_INTERRUPT: u16 = 1;

/// Puts several chains in the used ring and shows them to the driver all at once: a packet over
/// several buffers must not be seen in part (§5.1.6.4.1).
pub(crate) fn add_used_together(
    queue: &mut Queue,
    memory: &Arc<GuestMemoryMmap>,
    used: &[(u16, u32)],
) -> Result<(), ChainError> {
    let Some(((last_head, last_len), earlier)) = used.split_last() else {
        return Ok(());
    };
    for (head, len) in earlier {
        let slot = u64::from(queue.next_used() % queue.size());
        let address = GuestAddress(queue.used_ring())
            .checked_add(USED_HEADER_BYTES + slot * USED_ELEMENT_BYTES)
            .ok_or(virtio_queue::Error::AddressOverflow)?;
        let mut element = [0; 8];
        element[..4].copy_from_slice(&u32::from(*head).to_le_bytes());
        element[4..].copy_from_slice(&len.to_le_bytes());
        memory
            .write_slice(&element, address)
            .map_err(virtio_queue::Error::GuestMemory)?;
        queue.set_next_used(queue.next_used().wrapping_add(1));
    }
    Ok(queue.add_used(memory.as_ref(), *last_head, *last_len)?)
}

/// Whether the driver wants an interrupt for what was put in the used ring since the last one
/// (§2.7.7, §2.7.10). To be used with [`add_used_together`], of which `virtio_queue`'s own count
/// does not know.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    signalled_at: u16,
}

impl Signals {
    /// Counts from what the queue holds now.
    pub(crate) fn since(queue: &Queue) -> Self {
        Self {
            signalled_at: queue.next_used(),
        }
    }

    /// Returns whether an interrupt is due. The caller then sends it.
    pub(crate) fn due(
        &mut self,
        queue: &Queue,
        memory: &Arc<GuestMemoryMmap>,
    ) -> Result<bool, ChainError> {
        let now = queue.next_used();
        if now == self.signalled_at {
            return Ok(false);
        }
        // The used index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let ring = GuestAddress(queue.avail_ring());
        if !queue.event_idx_enabled() {
            self.signalled_at = now;
            let flags = load(memory, ring)?;
            return Ok(flags & AVAIL_NO_INTERRUPT == 0);
        }
        let offset = AVAIL_HEADER_BYTES + u64::from(queue.size()) * AVAIL_ELEMENT_BYTES;
        let address = ring
            .checked_add(offset)
            .ok_or(virtio_queue::Error::AddressOverflow)?;
        let wanted_at = load(memory, address)?;
        let before = std::mem::replace(&mut self.signalled_at, now);
        let since_wanted = now.wrapping_sub(wanted_at).wrapping_sub(1);
        Ok(since_wanted < now.wrapping_sub(before))
    }
}

fn load(memory: &GuestMemoryMmap, address: GuestAddress) -> Result<u16, ChainError> {
    let value: u16 = memory
        .load(address, Ordering::Relaxed)
        .map_err(virtio_queue::Error::GuestMemory)?;
    Ok(u16::from_le(value))
}
