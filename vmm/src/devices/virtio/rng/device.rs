//! The device: each chain is filled with random bytes.

use pericarp_sys::random;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::QueueT;

use super::super::{
    chain::{self, Buffers},
    device::{Activation, Broken, VirtioDevice},
    saved::{Kept, Saved},
};

/// Entries of the queue. The driver of Linux keeps one buffer in flight.
const QUEUE_SIZES: &[u16] = &[64];
const REQUESTS: u16 = 0;

/// Bytes written to one request. The driver of Linux asks for 64 (its generator takes 32 at a
/// time); a program that reads `/dev/hwrng` asks for a page.
pub(crate) const REQUEST_BYTES_MAX: usize = 4096;
/// Requests served by one notification before the event loop turns to other devices.
pub(crate) const REQUESTS_PER_TURN_MAX: usize = 64;

/// The entropy device.
#[derive(Debug)]
pub(crate) struct Rng {
    name: String,
    active: Option<Activation>,
    bytes_given: u64,
}

impl Rng {
    /// An entropy device.
    pub(crate) fn new(name: String) -> Self {
        Self {
            name,
            active: None,
            bytes_given: 0,
        }
    }

    fn broken(&self, reason: impl ToString) -> Broken {
        Broken {
            device: self.name(),
            reason: reason.to_string(),
        }
    }

    fn fill(&mut self, room: &mut Buffers<'_>) -> Result<u32, Broken> {
        let mut bytes = [0; REQUEST_BYTES_MAX];
        let count = room.len().min(REQUEST_BYTES_MAX);
        random::fill(&mut bytes[..count])
            .map_err(|error| self.broken(format!("the host has no random bytes: {error}")))?;
        let count = room.write(&bytes[..count]);
        self.bytes_given += count as u64;
        Ok(u32::try_from(count).expect("bounded by REQUEST_BYTES_MAX"))
    }

    /// Serves the queue; true when more than a turn's share is waiting.
    fn serve(&mut self, active: &mut Activation) -> Result<bool, Broken> {
        let memory = active.memory.clone();
        let Some(active_queue) = active.queues.iter_mut().find(|q| q.index == REQUESTS) else {
            return Ok(false);
        };
        let queue = &mut active_queue.queue;
        let mut used_any = false;
        for _ in 0..REQUESTS_PER_TURN_MAX {
            let Some(mut chain) = chain::pop(queue, &memory).map_err(|e| self.broken(e))? else {
                if queue
                    .enable_notification(&*memory)
                    .map_err(|e| self.broken(e))?
                {
                    continue;
                }
                break;
            };
            // §5.4.6.1: the driver may offer device-writable buffers only.
            if chain.readable.len() > 0 {
                return Err(self.broken("request buffer is device-readable"));
            }
            let count = self.fill(&mut chain.writable)?;
            queue
                .add_used(&*memory, chain.head, count)
                .map_err(|e| self.broken(e))?;
            used_any = true;
        }
        if used_any
            && queue
                .needs_notification(&*memory)
                .map_err(|e| self.broken(e))?
        {
            active.interrupt.signal_queue(REQUESTS);
        }
        chain::is_waiting(queue, &memory).map_err(|e| self.broken(e))
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        u16::try_from(VIRTIO_ID_RNG).expect("device ids are small")
    }

    fn name(&self) -> String {
        format!("virtio-rng {}", self.name)
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        self.active = Some(activation);
        self.queue_kicked(REQUESTS)
    }

    fn queue_kicked(&mut self, queue: u16) -> Result<(), Broken> {
        let Some(mut active) = (queue == REQUESTS).then(|| self.active.take()).flatten() else {
            return Ok(());
        };
        let more = self.serve(&mut active);
        if more.as_ref().is_ok_and(|more| *more) {
            active.kick_again(REQUESTS);
        }
        self.active = Some(active);
        more.map(drop)
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn save(&mut self) -> Saved {
        Saved::stopped(self.active.take(), Kept::Nothing)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("bytes_given", self.bytes_given)]
    }
}
