//! vhost-net: the kernel moves the packets of one queue pair.
//!
//! The kernel takes the rings' addresses in this process, so a ring that reached over the end of a
//! memory region would let a guest write to the VMM's own memory: [`ring_config`] refuses it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::Arc,
};

use pericarp_sys::vhost_net;
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData, vhost_kern::VhostKernBackend,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::virtio::device::{ActiveQueue, GuestMemory, Interrupt};

/// Why vhost-net could not be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum VhostError {
    /// A request to the kernel failed.
    #[error("vhost-net: {step}: {source}")]
    Request {
        step: &'static str,
        source: vhost::Error,
    },
    /// The tap could not be connected.
    #[error("vhost-net: connecting the tap: {0}")]
    Backend(io::Error),
    /// No eventfd.
    #[error("vhost-net: eventfd: {0}")]
    EventFd(io::Error),
    /// A ring does not lie in one memory region.
    #[error("vhost-net: queue {0} does not lie in one region of guest memory")]
    Ring(u16),
}

/// One vhost-net descriptor: rings 0 (receive) and 1 (transmit).
#[derive(Debug)]
pub(super) struct Vhost {
    descriptor: OwnedFd,
    memory: GuestMemory,
    features: u64,
    /// Signalled when the kernel finds a ring malformed.
    pub(super) error: EventFd,
    running: bool,
}

impl AsRawFd for Vhost {
    fn as_raw_fd(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }
}

impl VhostKernBackend for Vhost {
    type AS = Arc<GuestMemoryMmap>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }
}

fn step<T>(step: &'static str, result: vhost::Result<T>) -> Result<T, VhostError> {
    result.map_err(|source| VhostError::Request { step, source })
}

impl Vhost {
    /// Takes ownership of a vhost-net descriptor.
    pub(super) fn new(descriptor: OwnedFd) -> Result<Self, VhostError> {
        let mut vhost = Self {
            descriptor,
            memory: Arc::new(GuestMemoryMmap::default()),
            features: 0,
            error: EventFd::new(EFD_NONBLOCK).map_err(VhostError::EventFd)?,
            running: false,
        };
        step("becoming its owner", vhost.set_owner())?;
        vhost.features = step("reading its features", vhost.get_features())?;
        Ok(vhost)
    }

    /// Features that the kernel supports.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Hands both rings to the kernel.
    pub(super) fn start(
        &mut self,
        memory: &GuestMemory,
        features: u64,
        tap: BorrowedFd<'_>,
        queues: &[Option<ActiveQueue>; 2],
        interrupt: &dyn Interrupt,
    ) -> Result<(), VhostError> {
        if self.running {
            return Ok(());
        }
        self.memory = memory.clone();
        let regions: Vec<_> = memory.iter().map(region).collect();
        step(
            "setting features",
            self.set_features(features & self.features),
        )?;
        step("setting the memory table", self.set_mem_table(&regions))?;
        for (ring, queue) in queues.iter().enumerate() {
            if let Some(queue) = queue {
                self.set_ring(ring, queue, interrupt)?;
            }
        }
        self.running = true;
        for (ring, queue) in (0..).zip(queues) {
            if queue.is_some() {
                vhost_net::set_backend(self.descriptor.as_fd(), ring, Some(tap))
                    .map_err(VhostError::Backend)?;
            }
        }
        Ok(())
    }

    fn set_ring(
        &self,
        ring: usize,
        active: &ActiveQueue,
        interrupt: &dyn Interrupt,
    ) -> Result<(), VhostError> {
        let queue = &active.queue;
        let config = ring_config(&self.memory, queue).ok_or(VhostError::Ring(active.index))?;
        let call = match interrupt.queue_eventfd(active.index) {
            Some(call) => call,
            // The driver polls this queue: the kernel wants an eventfd all the same.
            None => EventFd::new(EFD_NONBLOCK).map_err(VhostError::EventFd)?,
        };
        step(
            "setting a ring's size",
            self.set_vring_num(ring, queue.size()),
        )?;
        step(
            "setting a ring's position",
            self.set_vring_base(ring, queue.next_avail()),
        )?;
        step(
            "setting a ring's addresses",
            self.set_vring_addr(ring, &config),
        )?;
        step(
            "setting a ring's interrupt",
            self.set_vring_call(ring, &call),
        )?;
        step(
            "setting a ring's error signal",
            self.set_vring_err(ring, &self.error),
        )?;
        step(
            "setting a ring's kick",
            self.set_vring_kick(ring, &active.kick),
        )
    }

    /// Takes the rings back, with the position that the kernel reached: it touches guest memory no
    /// more.
    pub(super) fn stop(&mut self, queues: &mut [Option<ActiveQueue>; 2]) {
        if !std::mem::take(&mut self.running) {
            return;
        }
        for (ring, queue) in (0..).zip(queues) {
            let Some(queue) = queue else { continue };
            // Neither fails for a ring that was started; one that was not keeps its position.
            let _ = vhost_net::set_backend(self.descriptor.as_fd(), ring, None);
            if let Ok(base) = self.get_vring_base(ring as usize) {
                let base = u16::try_from(base & 0xffff).expect("masked");
                queue.queue.set_next_avail(base);
            }
        }
        // Non-blocking; what it had to say concerns the stopped rings.
        let _ = self.error.read();
        self.memory = Arc::new(GuestMemoryMmap::default());
    }
}

fn region(region: &impl GuestMemoryRegion) -> VhostUserMemoryRegionInfo {
    let address = region
        .get_host_address(MemoryRegionAddress(0))
        .expect("every region begins with a byte");
    VhostUserMemoryRegionInfo {
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: address as u64,
        mmap_offset: 0,
        mmap_handle: -1,
    }
}

/// A ring's addresses; `None` when one of its three parts crosses the end of a memory region.
fn ring_config(memory: &GuestMemoryMmap, queue: &Queue) -> Option<VringConfigData> {
    let size = usize::from(queue.size());
    // §2.7: 16 bytes a descriptor; 2 bytes an available entry, 8 a used one, and 6 around each of
    // them.
    let parts = [
        (queue.desc_table(), 16 * size),
        (queue.avail_ring(), 6 + 2 * size),
        (queue.used_ring(), 6 + 8 * size),
    ];
    for (address, len) in parts {
        memory.get_slice(GuestAddress(address), len).ok()?;
    }
    Some(VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: queue.desc_table(),
        used_ring_addr: queue.used_ring(),
        avail_ring_addr: queue.avail_ring(),
        log_addr: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_across_regions_are_refused() {
        let memory = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 0x10000),
            (GuestAddress(0x10000), 0x10000),
        ])
        .unwrap();
        let mut queue = Queue::new(256).unwrap();
        queue.set_ready(true);
        queue.set_desc_table_address(Some(0), None);
        queue.set_avail_ring_address(Some(0x2000), None);
        queue.set_used_ring_address(Some(0x3000), None);
        assert!(ring_config(&memory, &queue).is_some());
        for address in [0x10000 - 8 * 256, 0x20000 - 8, 0x40000] {
            queue.set_used_ring_address(Some(address), None);
            assert!(ring_config(&memory, &queue).is_none(), "{address:#x}");
        }
    }
}
