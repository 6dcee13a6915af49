//! The device: each chain is filled with random bytes.

use pericarp_sys::random;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::super::{
    buffers::Buffers,
    device::{Activation, Broken, VirtioDevice},
    queue_worker,
    saved::{DeviceState, Saved},
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

    fn serve(&mut self) -> Result<(), Broken> {
        let given = &mut self.bytes_given;
        let outcome =
            queue_worker::serve(&mut self.active, REQUESTS, REQUESTS_PER_TURN_MAX, |chain| {
                // §5.4.6.1: the driver may offer device-writable buffers only.
                if chain.readable.len() > 0 {
                    return Err("request buffer is device-readable".to_owned());
                }
                let count = fill(&mut chain.writable)?;
                *given += u64::from(count);
                Ok(count)
            });
        outcome.map_err(|reason| self.broken(reason))
    }
}

fn fill(room: &mut Buffers<'_>) -> Result<u32, String> {
    let mut bytes = [0; REQUEST_BYTES_MAX];
    let count = room.len().min(REQUEST_BYTES_MAX);
    random::fill(&mut bytes[..count])
        .map_err(|error| format!("the host has no random bytes: {error}"))?;
    let count = room.write(&bytes[..count]);
    Ok(u32::try_from(count).expect("bounded by REQUEST_BYTES_MAX"))
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
        if queue == REQUESTS {
            self.serve()?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn save(&mut self) -> Saved {
        Saved::stopped(self.active.take(), DeviceState::Nothing)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("bytes_given", self.bytes_given)]
    }
}
