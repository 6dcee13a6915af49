//! The device: where the region is, and the answers to flush requests.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;

use super::{
    super::{
        device::{Activation, Broken, VirtioDevice, read_config},
        queue_worker,
        saved::{DeviceState, RestoreError, Saved},
    },
    request::{RESPONSE_BYTES, Request},
};

/// Entries of the queue. The driver of Linux sends one flush at a time per thread.
const QUEUE_SIZES: &[u16] = &[64];
const REQUESTS: u16 = 0;

/// Requests served by one notification before the event loop turns to other devices.
pub(crate) const REQUESTS_PER_TURN_MAX: usize = 64;
/// Linux refuses a persistent-memory namespace that is not made of whole 2 MiB pieces (its memory
/// hotplug sub-section), and with whole pieces the guest can map huge pages.
pub(crate) const REGION_ALIGNMENT_BYTES: u64 = 2 << 20;
/// The largest image: far above any guest image, far below what would crowd the guest's address
/// space.
pub(crate) const IMAGE_BYTES_MAX: u64 = 1 << 40;

const CONFIG_BYTES: usize = 16;

const _: () = assert!(REGION_ALIGNMENT_BYTES.is_power_of_two());
const _: () = assert!(IMAGE_BYTES_MAX.is_multiple_of(REGION_ALIGNMENT_BYTES));

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Its size cannot be read.
    #[error("size of the image of pmem device {name} cannot be read")]
    Size {
        /// The device.
        name: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// Not a regular file.
    #[error("image of pmem device {name} is not a regular file; give a file that can be mapped")]
    Kind {
        /// The device.
        name: String,
    },
    /// Empty or too large.
    #[error(
        "image of pmem device {name} has {size_bytes} bytes; it must have 1 to {IMAGE_BYTES_MAX}"
    )]
    Range {
        /// The device.
        name: String,
        /// Its size.
        size_bytes: u64,
    },
}

/// A read-only file as persistent memory.
#[derive(Debug)]
pub(crate) struct Pmem {
    name: String,
    image: File,
    image_bytes: u64,
    region_address: u64,
    active: Option<Activation>,
    flushes: u64,
}

impl Pmem {
    /// A device that shows `image`.
    ///
    /// # Errors
    /// `image` is no regular file, or is empty or too large.
    pub(crate) fn new(name: String, image: File) -> Result<Self, Error> {
        let metadata = match image.metadata() {
            Ok(metadata) => metadata,
            Err(source) => return Err(Error::Size { name, source }),
        };
        if !metadata.is_file() {
            return Err(Error::Kind { name });
        }
        let image_bytes = metadata.len();
        if image_bytes == 0 || image_bytes > IMAGE_BYTES_MAX {
            return Err(Error::Range {
                name,
                size_bytes: image_bytes,
            });
        }
        Ok(Self {
            name,
            image,
            image_bytes,
            region_address: 0,
            active: None,
            flushes: 0,
        })
    }

    fn region_bytes(&self) -> u64 {
        self.image_bytes.next_multiple_of(REGION_ALIGNMENT_BYTES)
    }

    fn broken(&self, reason: impl ToString) -> Broken {
        Broken {
            device: self.name(),
            reason: reason.to_string(),
        }
    }

    fn serve(&mut self) -> Result<(), Broken> {
        let flushes = &mut self.flushes;
        let outcome =
            queue_worker::serve(&mut self.active, REQUESTS, REQUESTS_PER_TURN_MAX, |chain| {
                let request = chain.readable.read_array().map(Request::parse);
                let request = request.filter(|_| chain.writable.len() >= RESPONSE_BYTES);
                let request = request.ok_or("request or response is shorter than its 4 bytes")?;
                *flushes += u64::from(request == Request::Flush);
                let count = chain.writable.write(&request.response());
                Ok(u32::try_from(count).expect("a response has 4 bytes"))
            });
        outcome.map_err(|reason| self.broken(reason))
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u16 {
        u16::try_from(VIRTIO_ID_PMEM).expect("device ids are small")
    }

    fn name(&self) -> String {
        format!("virtio-pmem {}", self.name)
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_pmem_config (§5.19.4): start, size.
        let mut config = [0; CONFIG_BYTES];
        config[..8].copy_from_slice(&self.region_address.to_le_bytes());
        config[8..].copy_from_slice(&self.region_bytes().to_le_bytes());
        read_config(&config, offset, data);
    }

    fn region_size(&self) -> Option<u64> {
        Some(self.region_bytes())
    }

    fn region_file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.image.as_fd())
    }

    fn set_region(&mut self, guest_address: u64) {
        self.region_address = guest_address;
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
        let address = self.region_address;
        Saved::stopped(self.active.take(), DeviceState::Pmem { address })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match *state {
            // The driver has mapped it there: the machine lays regions out as it did before.
            DeviceState::Pmem { address } if address == self.region_address => Ok(()),
            _ => Err(self.cannot_restore(state)),
        }
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("flushes", self.flushes)]
    }
}
