//! A hostile driver of one device: a program of acts, from a fuzzer's bytes.
//!
//! The acts are what a guest's kernel can do to a device at all: any bytes anywhere in memory, any
//! descriptor, any index, any notification, any access to the configuration, a reset at any time;
//! and what the shim and peers may do meanwhile. A device that finds a violation is treated as the
//! transport does: reset, and activated again when the program says so.

use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestMemoryMmap};

use super::bytes::Choices;
use crate::devices::virtio::{
    device::{Command, GuestMemory, VirtioDevice},
    driver::{BUFFERS, Driver, EVENT_IDX, F_INDIRECT, F_NEXT, F_WRITE},
    rate_limiter::{Rate, Rates},
};

/// Guest memory of a program.
pub(super) const MEMORY_BYTES: u64 = 2 << 20;
/// Entries of each queue: few, so that indices wrap soon.
const QUEUE_SIZE: u16 = 16;
/// Buffers that chains and writes name, and the distance between them.
const SLOTS: u64 = 16;
const SLOT_BYTES: u64 = 0x4000;
/// Turns of the loop at one act: what is left then waits for the next.
const TURNS_MAX: usize = 4;
/// Acts of one program.
const ACTS_MAX: usize = 512;

/// Lengths at which devices decide: headers, sectors, pages, and impossible ones.
const LENGTHS: [u32; 16] = [
    0,
    1,
    2,
    4,
    8,
    10,
    12,
    16,
    24,
    44,
    64,
    512,
    1536,
    4096,
    0x4000,
    u32::MAX,
];
/// Addresses at which memory ends or wraps.
const ADDRESSES: [u64; 6] = [
    0,
    BUFFERS,
    MEMORY_BYTES - 8,
    MEMORY_BYTES,
    u64::MAX - 15,
    1 << 32,
];

/// Guest memory as the machine has it, on a file, so that parts of it can be given back.
pub(super) fn memory() -> GuestMemory {
    let file = memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("a file in memory");
    let file = std::fs::File::from(file);
    file.set_len(MEMORY_BYTES).expect("a small file");
    let bytes = usize::try_from(MEMORY_BYTES).expect("2 MiB");
    let ranges = [(GuestAddress(0), bytes, Some(FileOffset::new(file, 0)))];
    Arc::new(GuestMemoryMmap::from_ranges_with_files(&ranges).expect("a small mapping"))
}

/// What stands at the other end of a device, and what it does with a program's bytes.
pub(super) type Peer<'a> = &'a mut dyn FnMut(&[u8]);

/// A driver in the middle of its program.
struct Player<'a> {
    device: &'a mut dyn VirtioDevice,
    driver: Driver,
    active: bool,
    /// Next entry of each queue's descriptor table that a whole chain uses.
    next: Vec<u16>,
    peer: Peer<'a>,
}

/// Plays `data` against `device`, and leaves it reset.
pub(super) fn play(device: &mut dyn VirtioDevice, peer: Peer<'_>, data: &[u8]) {
    let sizes: Vec<u16> = device
        .queue_sizes()
        .iter()
        .map(|size| QUEUE_SIZE.min(*size))
        .collect();
    let mut player = Player {
        driver: Driver::with_memory(memory(), &sizes),
        next: vec![0; sizes.len()],
        active: false,
        device,
        peer,
    };
    let mut choices = Choices::new(data);
    player.activate(u64::MAX);
    for _ in 0..ACTS_MAX {
        if player.act(&mut choices).is_none() {
            break;
        }
    }
    player.turn();
    player.device.reset();
}

impl Player<'_> {
    /// One act; `None` at the program's end.
    fn act(&mut self, choices: &mut Choices<'_>) -> Option<()> {
        match choices.byte()? % 14 {
            0 | 1 => self.offer(choices),
            2 => self.write_descriptor(choices),
            3 => {
                let queue = self.queue(choices)?;
                self.driver.queues[queue].publish(choices.half()?);
                Some(())
            }
            4 => {
                let queue = self.queue(choices)?;
                self.driver.queues[queue].set_available_index(choices.half()?);
                Some(())
            }
            5 | 6 => self.put(choices),
            7 => {
                let queue = self.queue(choices)?;
                self.kick(queue);
                Some(())
            }
            8 => {
                self.turn();
                Some(())
            }
            9 => {
                let features = choices.long()?;
                self.device.reset();
                self.active = false;
                self.activate(features);
                Some(())
            }
            10 => {
                let offset = u64::from(choices.half()?);
                let mut data = [0xee; 16];
                let count = usize::from(choices.byte()?) % 17;
                self.device.read_config(offset, &mut data[..count]);
                self.device.write_config(offset, choices.some(16)?);
                Some(())
            }
            11 => self.command(choices),
            12 => {
                (self.peer)(choices.some(64)?);
                Some(())
            }
            _ => self.scribble(choices),
        }
    }

    fn queue(&self, choices: &mut Choices<'_>) -> Option<usize> {
        Some(usize::from(choices.byte()?) % self.driver.queues.len())
    }

    fn activate(&mut self, features: u64) {
        let sizes: Vec<u16> = self.driver.queues.iter().map(|queue| queue.size).collect();
        // The same memory: what a driver left in the rings is what the next one finds.
        self.driver = Driver::with_memory(self.driver.memory.clone(), &sizes);
        // The transport offers event indices for every device.
        let offered = self.device.features() | EVENT_IDX;
        let mut activation = self.driver.activation(features & offered);
        // A driver may leave queues out.
        let absent = features >> 60;
        activation
            .queues
            .retain(|queue| absent == 15 || absent >> (queue.index % 4) & 1 == 0);
        let outcome = self.device.activate(activation);
        self.active = outcome.is_ok();
        if outcome.is_err() {
            self.device.reset();
        }
    }

    fn judge(&mut self, outcome: Result<(), crate::devices::virtio::device::Broken>) {
        if let Err(broken) = outcome {
            assert!(!broken.reason.is_empty());
            self.device.reset();
            self.active = false;
        }
    }

    fn kick(&mut self, queue: usize) {
        if self.active {
            let queue = u16::try_from(queue).expect("few queues");
            let outcome = self.device.queue_kicked(queue);
            self.judge(outcome);
        }
    }

    fn turn(&mut self) {
        for _ in 0..TURNS_MAX {
            if !self.active {
                return;
            }
            match self.driver.turn(self.device, 0) {
                Ok(true) => {}
                Ok(false) => return,
                Err(broken) => self.judge(Err(broken)),
            }
        }
    }

    /// A whole chain of up to four buffers, made available.
    fn offer(&mut self, choices: &mut Choices<'_>) -> Option<()> {
        let queue = self.queue(choices)?;
        let count = u16::from(choices.byte()? % 4) + 1;
        let size = self.driver.queues[queue].size;
        let head = self.next[queue];
        for position in 0..count {
            let shape = choices.byte()?;
            let address = BUFFERS + u64::from(shape >> 4) * SLOT_BYTES;
            let mut flags = if shape & 1 == 1 { F_WRITE } else { 0 };
            if position + 1 < count {
                flags |= F_NEXT;
            }
            let len = choices.of(&LENGTHS)?;
            let index = (head + position) % size;
            let next = (index + 1) % size;
            self.driver.queues[queue].write_descriptor(index, address, len, flags, next);
        }
        self.next[queue] = (head + count) % size;
        self.driver.queues[queue].publish(head);
        Some(())
    }

    /// One descriptor, of the table or of an indirect one.
    fn write_descriptor(&mut self, choices: &mut Choices<'_>) -> Option<()> {
        let queue = self.queue(choices)?;
        let index = u16::from(choices.byte()?) % self.driver.queues[queue].size;
        let address = match choices.byte()? {
            choice @ 0..=127 => ADDRESSES[usize::from(choice) % ADDRESSES.len()],
            choice => BUFFERS + u64::from(choice) * 64,
        };
        let len = choices.of(&LENGTHS)?;
        let flags = choices.of(&[0, F_NEXT, F_WRITE, F_NEXT | F_WRITE, F_INDIRECT, 7, 0xffff])?;
        let next = u16::from(choices.byte()?);
        let queue = &self.driver.queues[queue];
        if choices.byte()? & 1 == 0 {
            queue.write_descriptor(index, address, len, flags, next);
        } else {
            queue.write_descriptor_at(BUFFERS, index, address, len, flags, next);
        }
        Some(())
    }

    /// Bytes of a request.
    fn put(&mut self, choices: &mut Choices<'_>) -> Option<()> {
        let place = choices.byte()?;
        let at = BUFFERS + u64::from(place) % SLOTS * SLOT_BYTES + u64::from(place >> 4) * 4;
        self.driver.put(at, choices.some(64)?);
        Some(())
    }

    /// Bytes anywhere, rings included.
    fn scribble(&mut self, choices: &mut Choices<'_>) -> Option<()> {
        let at = u64::from(choices.word()?) % MEMORY_BYTES;
        let bytes = choices.some(16)?;
        let _ = self.driver.memory.write(bytes, GuestAddress(at));
        Some(())
    }

    fn command(&mut self, choices: &mut Choices<'_>) -> Option<()> {
        let value = choices.long()?;
        let rates = Rates {
            bytes: Rate {
                per_second: value >> 32,
                burst: value & 0xffff,
            },
            operations: Rate::default(),
        };
        let command = choices.of(&[
            Command::Limit(rates),
            Command::ReceiveLimit(rates),
            Command::TransmitLimit(rates),
            Command::Resize(value),
            Command::FileResized,
        ])?;
        // Refusals are answers too.
        let _ = self.device.command(command);
        assert!(self.device.counters().len() < 64);
        Some(())
    }
}
