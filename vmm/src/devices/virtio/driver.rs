//! The driver's side of the queues, for tests: what a guest kernel does to memory, done by the
//! test, against the real queue code of the devices. It can also do what no sane kernel does.

#![cfg_attr(
    not(test),
    expect(
        dead_code,
        reason = "the fuzz targets use what all devices have in common"
    )
)]
#![expect(
    clippy::unwrap_used,
    reason = "a double in tests: a failure is the test's"
)]

use std::{
    collections::HashMap,
    os::fd::RawFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{
    device::{Activation, ActiveQueue, GuestMemory, Interrupt, Poller, Readiness, VirtioDevice},
    saved::Position,
};

/// Bytes of guest memory of a [`Driver`].
pub(crate) const MEMORY_BYTES: u64 = 64 << 20;
/// Rings of all queues lie below; tests place buffers from here on.
pub(crate) const BUFFERS: u64 = 1 << 20;

const DESCRIPTOR_BYTES: u64 = 16;
/// `VIRTIO_F_EVENT_IDX`
pub(crate) const EVENT_IDX: u64 = 1 << 29;
/// `VIRTQ_DESC_F_NEXT`
pub(crate) const F_NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`
pub(crate) const F_WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`
pub(crate) const F_INDIRECT: u16 = 4;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    /// Device-readable: address and length.
    Read(u64, u32),
    /// Device-writable: address and length.
    Write(u64, u32),
}

/// One queue as the driver sees it.
#[derive(Debug)]
pub(crate) struct DriverQueue {
    memory: GuestMemory,
    base: u64,
    /// Entries.
    pub(crate) size: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    next_available: u16,
    next_used: u16,
}

impl DriverQueue {
    fn new(memory: &GuestMemory, base: u64, size: u16) -> Self {
        Self {
            memory: memory.clone(),
            base,
            size,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            next_available: 0,
            next_used: 0,
        }
    }

    fn available(&self) -> u64 {
        self.base + DESCRIPTOR_BYTES * u64::from(self.size)
    }

    fn used(&self) -> u64 {
        self.available() + 0x1_0000
    }

    fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        let low = |address: u64| Some(u32::try_from(address).unwrap());
        queue.set_desc_table_address(low(self.base), None);
        queue.set_avail_ring_address(low(self.available()), None);
        queue.set_used_ring_address(low(self.used()), None);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        queue
    }

    /// Writes one descriptor as it is.
    pub(crate) fn write_descriptor(
        &self,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        self.write_descriptor_at(self.base, index, address, len, flags, next);
    }

    /// Writes one descriptor of the table at `table` (an indirect one).
    pub(crate) fn write_descriptor_at(
        &self,
        table: u64,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = GuestAddress(table + DESCRIPTOR_BYTES * u64::from(index));
        self.memory.write_slice(&bytes, at).unwrap();
    }

    /// Makes a descriptor available, whatever it is.
    pub(crate) fn publish(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        let at = GuestAddress(self.available() + 4 + 2 * slot);
        self.memory.write_obj(head, at).unwrap();
        self.set_available_index(self.next_available.wrapping_add(1));
    }

    /// Sets the available index, whatever it means.
    pub(crate) fn set_available_index(&mut self, index: u16) {
        self.next_available = index;
        let at = GuestAddress(self.available() + 2);
        self.memory.write_obj(index, at).unwrap();
    }

    /// Makes a chain of `parts` available; `None` when the table has no room for it.
    pub(crate) fn offer(&mut self, parts: &[Part]) -> Option<u16> {
        if self.free.len() < parts.len() {
            return None;
        }
        let indices = self.free.split_off(self.free.len() - parts.len());
        for (position, part) in parts.iter().enumerate() {
            let (address, len, mut flags) = match *part {
                Part::Read(address, len) => (address, len, 0),
                Part::Write(address, len) => (address, len, F_WRITE),
            };
            let next = indices.get(position + 1).copied();
            if next.is_some() {
                flags |= F_NEXT;
            }
            self.write_descriptor(indices[position], address, len, flags, next.unwrap_or(0));
        }
        let head = indices[0];
        self.chains.insert(head, indices);
        self.publish(head);
        Some(head)
    }

    /// Whether the device asked to be notified of the next chain, with `VIRTIO_F_EVENT_IDX`.
    pub(crate) fn wants_notification(&self) -> bool {
        let at = self.used() + 4 + 8 * u64::from(self.size);
        let event: u16 = self.memory.read_obj(GuestAddress(at)).unwrap();
        event == self.next_available
    }

    /// Takes one chain that the device has used: its head and the count of bytes written.
    pub(crate) fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.used() + 2)).unwrap();
        if index == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % self.size);
        let element = self.used() + 4 + 8 * slot;
        let head: u32 = self.memory.read_obj(GuestAddress(element)).unwrap();
        let len = self.memory.read_obj(GuestAddress(element + 4)).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        if let Some(indices) = self.chains.remove(&head) {
            self.free.extend(indices);
        }
        Some((head, len))
    }
}

/// Counts what a device signals.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    /// Used buffer notifications of all queues.
    pub(crate) queue: AtomicU64,
    /// Configuration change notifications.
    pub(crate) config: AtomicU64,
}

impl Interrupt for Signals {
    fn signal_queue(&self, _queue: u16) {
        self.queue.fetch_add(1, Ordering::SeqCst);
    }

    fn signal_config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }

    fn queue_eventfd(&self, _queue: u16) -> Option<EventFd> {
        EventFd::new(EFD_NONBLOCK).ok()
    }
}

/// A poller on a real epoll, which the test turns.
pub(crate) struct TestPoller {
    epoll: Epoll,
}

impl std::fmt::Debug for TestPoller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TestPoller")
    }
}

impl TestPoller {
    fn event(token: u32, readiness: Readiness) -> EpollEvent {
        EpollEvent::new(EventSet::from_bits_truncate(readiness), u64::from(token))
    }

    /// What is ready within `timeout_ms`: token and readiness.
    pub(crate) fn wait(&self, timeout_ms: i32) -> Vec<(u32, Readiness)> {
        let mut events = vec![EpollEvent::default(); 512];
        let count = loop {
            // io_uring interrupts a wait to finish its work in this thread.
            match self.epoll.wait(timeout_ms, &mut events) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                result => break result.unwrap(),
            }
        };
        events[..count]
            .iter()
            .map(|event| (u32::try_from(event.data()).unwrap(), event.events()))
            .collect()
    }
}

impl Poller for TestPoller {
    fn add(&self, descriptor: RawFd, token: u32, readiness: Readiness) -> std::io::Result<()> {
        self.epoll.ctl(
            ControlOperation::Add,
            descriptor,
            Self::event(token, readiness),
        )
    }

    fn modify(&self, descriptor: RawFd, token: u32, readiness: Readiness) -> std::io::Result<()> {
        self.epoll.ctl(
            ControlOperation::Modify,
            descriptor,
            Self::event(token, readiness),
        )
    }

    fn remove(&self, descriptor: RawFd) -> std::io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Delete, descriptor, EpollEvent::default())
    }
}

/// A guest's memory and its queues, and the loop that a device under test runs on.
#[derive(Debug)]
pub(crate) struct Driver {
    /// The guest's memory.
    pub(crate) memory: GuestMemory,
    /// The queues.
    pub(crate) queues: Vec<DriverQueue>,
    /// What the device signalled.
    pub(crate) signals: Arc<Signals>,
    /// The loop.
    pub(crate) poller: Arc<TestPoller>,
    kicks: Vec<EventFd>,
}

impl Driver {
    /// A driver with queues of the given sizes.
    pub(crate) fn new(queue_sizes: &[u16]) -> Self {
        let ranges = [(GuestAddress(0), usize::try_from(MEMORY_BYTES).unwrap())];
        let memory: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        Self::with_memory(memory, queue_sizes)
    }

    /// A driver on memory that the test made (memfd), at least [`BUFFERS`] long.
    pub(crate) fn with_memory(memory: GuestMemory, queue_sizes: &[u16]) -> Self {
        let queues: Vec<_> = queue_sizes
            .iter()
            .enumerate()
            .map(|(index, size)| {
                DriverQueue::new(&memory, 0x2_0000 * u64::try_from(index).unwrap(), *size)
            })
            .collect();
        let kicks = queues
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
            .collect();
        Self {
            memory,
            queues,
            signals: Arc::default(),
            poller: Arc::new(TestPoller {
                epoll: Epoll::new().unwrap(),
            }),
            kicks,
        }
    }

    /// What the transport hands to the device.
    pub(crate) fn activation(&self, features: u64) -> Activation {
        let queues = self.queues.iter().zip(&self.kicks).enumerate();
        let active = |(index, (driver_queue, kick)): (usize, (&DriverQueue, &EventFd))| {
            let mut queue = driver_queue.queue();
            queue.set_event_idx(features & EVENT_IDX != 0);
            ActiveQueue {
                index: u16::try_from(index).unwrap(),
                queue,
                kick: kick.try_clone().unwrap(),
            }
        };
        Activation {
            memory: self.memory.clone(),
            features,
            queues: queues.map(active).collect(),
            interrupt: self.signals.clone(),
            poller: self.poller.clone(),
        }
    }

    /// The same, with the queues where another device left them.
    pub(crate) fn activation_at(&self, features: u64, positions: &[Position]) -> Activation {
        let mut activation = self.activation(features);
        for active in &mut activation.queues {
            let mut found = positions.iter();
            if let Some(position) = found.find(|position| position.index == active.index) {
                position.apply(&mut active.queue);
            }
        }
        activation
    }

    /// The eventfd behind a queue's notifications.
    pub(crate) fn kick(&self, queue: usize) -> &EventFd {
        &self.kicks[queue]
    }

    /// Turns the loop once: kicks that the device raised itself, then what is ready within
    /// `timeout_ms`. True when something was.
    pub(crate) fn turn(
        &self,
        device: &mut dyn VirtioDevice,
        timeout_ms: i32,
    ) -> Result<bool, super::device::Broken> {
        let mut busy = false;
        for (index, kick) in self.kicks.iter().enumerate() {
            if kick.read().is_ok() {
                busy = true;
                device.queue_kicked(u16::try_from(index).unwrap())?;
            }
        }
        for (token, readiness) in self.poller.wait(if busy { 0 } else { timeout_ms }) {
            busy = true;
            device.descriptor_ready(token, readiness)?;
        }
        Ok(busy)
    }

    /// Puts bytes into guest memory.
    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    /// Takes bytes out of guest memory.
    pub(crate) fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}

/// Does one hostile thing to a queue.
pub(crate) type Hostility = fn(&mut DriverQueue);

/// Queue states and chains that a hostile driver may offer: each breaks one rule of virtio 1.2
/// §2.7.
pub(crate) const HOSTILE_CHAINS: &[(&str, Hostility)] = &[
    ("loop of two", |queue| {
        queue.write_descriptor(0, BUFFERS, 64, F_NEXT, 1);
        queue.write_descriptor(1, BUFFERS, 64, F_NEXT, 0);
        queue.publish(0);
    }),
    ("loop to itself, writable", |queue| {
        queue.write_descriptor(0, BUFFERS, 64, F_NEXT | F_WRITE, 0);
        queue.publish(0);
    }),
    ("head past the table", |queue| queue.publish(u16::MAX)),
    ("next past the table", |queue| {
        queue.write_descriptor(0, BUFFERS, 64, F_NEXT, u16::MAX);
        queue.publish(0);
    }),
    ("readable buffer past memory", |queue| {
        queue.write_descriptor(0, MEMORY_BYTES - 8, 64, 0, 0);
        queue.publish(0);
    }),
    ("writable buffer past memory", |queue| {
        queue.write_descriptor(0, MEMORY_BYTES - 8, 64, F_WRITE, 0);
        queue.publish(0);
    }),
    ("address that wraps", |queue| {
        queue.write_descriptor(0, u64::MAX - 3, 64, F_WRITE, 0);
        queue.publish(0);
    }),
    ("length of 4 GiB", |queue| {
        queue.write_descriptor(0, BUFFERS, u32::MAX, 0, 0);
        queue.publish(0);
    }),
    ("readable behind writable", |queue| {
        queue.write_descriptor(0, BUFFERS, 64, F_NEXT | F_WRITE, 1);
        queue.write_descriptor(1, BUFFERS, 64, 0, 0);
        queue.publish(0);
    }),
    ("readable behind a writable one of no bytes", |queue| {
        queue.write_descriptor(0, BUFFERS, 0, F_NEXT | F_WRITE, 1);
        queue.write_descriptor(1, BUFFERS, 64, 0, 0);
        queue.publish(0);
    }),
    ("available index far ahead", |queue| {
        queue.set_available_index(0x7fff)
    }),
    ("nested indirect table", |queue| {
        let table = BUFFERS + 0x1000;
        queue.write_descriptor(0, table, 32, F_INDIRECT, 0);
        queue.write_descriptor_at(table, 0, table, 32, F_INDIRECT, 0);
        queue.publish(0);
    }),
    ("indirect table of odd length", |queue| {
        queue.write_descriptor(0, BUFFERS, 17, F_INDIRECT, 0);
        queue.publish(0);
    }),
    ("empty indirect table", |queue| {
        queue.write_descriptor(0, BUFFERS, 0, F_INDIRECT, 0);
        queue.publish(0);
    }),
    ("indirect table past memory", |queue| {
        queue.write_descriptor(0, MEMORY_BYTES, 32, F_INDIRECT, 0);
        queue.publish(0);
    }),
    ("indirect chain longer than the queue", |queue| {
        let table = BUFFERS + 0x1000;
        let count = queue.size + 1;
        queue.write_descriptor(0, table, u32::from(count) * 16, F_INDIRECT, 0);
        for index in 0..count {
            let flags = if index + 1 == count { 0 } else { F_NEXT };
            queue.write_descriptor_at(table, index, BUFFERS, 1, flags, index + 1);
        }
        queue.publish(0);
    }),
];

/// Every hostile chain on every listed queue of a fresh device gives `Broken`; afterwards a reset
/// and a sane activation work.
pub(crate) fn assert_hostile_chains_break<D: VirtioDevice>(
    make: impl Fn() -> D,
    queue_sizes: &[u16],
    queues: &[u16],
) {
    for (what, break_queue) in HOSTILE_CHAINS {
        for index in queues {
            let mut device = make();
            let mut driver = Driver::new(queue_sizes);
            device.activate(driver.activation(0)).unwrap();
            break_queue(&mut driver.queues[usize::from(*index)]);
            let outcome = device.queue_kicked(*index);
            assert!(
                outcome.is_err(),
                "{what} on queue {index} of {}",
                device.name()
            );
            device.reset();
            let driver = Driver::new(queue_sizes);
            device.activate(driver.activation(0)).unwrap();
            device.queue_kicked(*index).unwrap();
        }
    }
}
