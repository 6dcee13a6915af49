//! A hostile guest of a whole machine: every device on its bus, no vCPU. What a vCPU's exits would
//! bring comes from a program instead, and the event loop's turns are taken by hand.
//!
//! Needs a `/dev/kvm`; without one nothing is played. The machine is made once per thread, because
//! making one costs far more than a program; each program ends with every device reset, every BAR
//! back in its place, memory empty and nothing added.

use std::{
    cell::RefCell,
    fs::OpenOptions,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
};

use pericarp_protocol::machine::{
    Balloon, Blk, CacheMode, Console, CpuMode, Descriptor, Device, DeviceKind, List,
    Machine as Description, Mem, PageKind, Pmem, RateLimit, Rng, Text, Vsock,
};
use vm_memory::{Bytes as _, GuestAddress};

use super::{
    bytes::Choices,
    devices::{file, fresh_address},
};
use crate::{
    arch::layout,
    devices::virtio::{device::Command, transport::BAR_BYTES},
    event_loop::{Source, Waiter},
    machine::{Machine, descriptors::Descriptors},
    pci::Slot,
};

/// Boot memory: the least there is.
const MEMORY_BYTES: u64 = 32 << 20;
/// Rings of the queues: 64 KiB a function, 8 KiB a queue of it.
const RINGS: u64 = 1 << 20;
const FUNCTION_BYTES: u64 = 0x1_0000;
const QUEUE_BYTES: u64 = 0x2000;
pub(super) const AVAILABLE: u64 = 0x400;
pub(super) const USED: u64 = 0x800;
const QUEUE_SIZE: u16 = 16;
/// Buffers of chains.
pub(super) const BUFFERS: u64 = 8 << 20;
/// Acts of one program, and turns of the loop at one act.
const ACTS_MAX: usize = 512;
const TURNS_MAX: usize = 4;

/// Registers of the transport (virtio 1.2 §4.1.4.3) and its notifications.
const STATUS: u64 = 0x14;
pub(super) const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;

/// A machine that is played with.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) machine: Machine,
    waiter: Arc<Waiter>,
    /// Slot and BAR of each function that stays.
    pub(super) functions: Vec<(Slot, u64)>,
    /// Other ends of what the devices hold.
    _peers: Vec<OwnedFd>,
}

/// Plays a program on the whole machine.
pub fn machine(data: &[u8]) {
    thread_local! {
        static GUEST: RefCell<Option<Guest>> = const { RefCell::new(None) };
    }
    GUEST.with_borrow_mut(|guest| {
        if guest.is_none() {
            *guest = Guest::new();
        }
        let Some(guest) = guest else { return };
        let mut choices = Choices::new(data);
        for _ in 0..ACTS_MAX {
            if guest.act(&mut choices).is_none() {
                break;
            }
        }
        guest.turn();
        guest.restore();
    });
}

fn at(position: u8) -> Descriptor {
    Descriptor { position }
}

fn disk() -> DeviceKind {
    DeviceKind::Blk(Blk {
        file: at(0),
        read_only: false,
        serial: Text::default(),
        queues: 2,
        cache: CacheMode::WriteBack,
        limit: RateLimit::default(),
    })
}

impl Guest {
    /// Every kind of device that needs no peer outside this process; `None` without KVM.
    pub(super) fn new() -> Option<Self> {
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        let kvm = kvm.ok()?;
        let memory_max_bytes = MEMORY_BYTES * 2;
        let description = Description {
            vcpus: 1,
            vcpus_max: 1,
            memory_bytes: MEMORY_BYTES,
            memory_max_bytes,
            pages: PageKind::Base,
            cpu: CpuMode::Host,
            cpu_features: Text::default(),
            kvm: at(0),
            memory: at(1),
            pluggable: List::new("pluggable", vec![at(3)]).expect("one fits"),
            saved: List::default(),
            kernel: at(2),
            initramfs: List::default(),
            command_line: Text::default(),
            uid: 65534,
            gid: 65534,
        };
        let mut descriptors = Descriptors::new(vec![
            kvm.into(),
            file(MEMORY_BYTES).into(),
            file(4096).into(),
            file(memory_max_bytes - MEMORY_BYTES).into(),
        ]);
        let waiter = Arc::new(Waiter::new().expect("an epoll"));
        let machine = Machine::new(description, &mut descriptors, Arc::clone(&waiter)).ok()?;
        let readable = libc::EPOLLIN.cast_unsigned();
        let doorbell = machine.doorbell().as_raw_fd();
        let added = waiter.add(doorbell, Source::Doorbell, readable);
        added.expect("the doorbell can be waited for");
        let mut guest = Self {
            machine,
            waiter,
            functions: Vec::new(),
            _peers: Vec::new(),
        };
        guest.add_devices();
        guest.functions = guest.scan();
        Some(guest)
    }

    fn add_devices(&mut self) {
        let listener = UnixListener::bind_addr(&fresh_address()).expect("a fresh name");
        let (dialled, near) = UnixStream::pair().expect("a pair of sockets");
        let (output, reader) = UnixStream::pair().expect("a pair of sockets");
        self._peers = vec![near.into(), reader.into()];
        let vsock = Vsock {
            cid: 3,
            listener: at(0),
            ports: List::new(
                "ports",
                vec![pericarp_protocol::machine::VsockPort {
                    port: 1024,
                    socket: at(1),
                }],
            )
            .expect("one"),
        };
        let balloon = Balloon {
            deflate_on_oom: true,
            free_page_reporting: true,
        };
        let mem = Mem {
            block_bytes: 2 << 20,
            requested_bytes: 4 << 20,
        };
        let pmem = Pmem { file: at(0) };
        self.add(
            "console",
            DeviceKind::Console(Console { output: at(0) }),
            vec![output.into()],
        );
        self.add("rng", DeviceKind::Rng(Rng {}), Vec::new());
        let sockets = vec![listener.into(), dialled.into()];
        self.add("vsock", DeviceKind::Vsock(vsock), sockets);
        self.add("balloon", DeviceKind::Balloon(balloon), Vec::new());
        self.add("mem", DeviceKind::Mem(mem), Vec::new());
        self.add("image", DeviceKind::Pmem(pmem), vec![file(4096).into()]);
        self.add("disk", disk(), vec![file(1 << 20).into()]);
    }

    fn add(&mut self, name: &str, kind: DeviceKind, descriptors: Vec<OwnedFd>) {
        let name = Text::new("name", name).expect("a short name");
        let mut descriptors = Descriptors::new(descriptors);
        let added = self.machine.add(&Device { name, kind }, &mut descriptors);
        added.expect("the device is sound and the bus has room");
    }

    /// The functions on the bus, as a guest finds them.
    fn scan(&self) -> Vec<(Slot, u64)> {
        let mut found = Vec::new();
        for slot in 1..=Slot::MAX {
            let mut identity = [0; 4];
            self.machine
                .bus()
                .read_memory(config(slot, 0), &mut identity);
            let mut bar = [0; 8];
            self.machine.bus().read_memory(config(slot, 0x10), &mut bar);
            if identity[..2] == [0xf4, 0x1a] {
                found.push((slot, u64::from_le_bytes(bar) & !0xf));
            }
        }
        found
    }

    /// One act; `None` at the program's end.
    fn act(&mut self, choices: &mut Choices<'_>) -> Option<()> {
        let kind = choices.byte()? % 12;
        let (slot, bar) = choices.of(&self.functions)?;
        let bus = self.machine.bus();
        let mut back = [0; 8];
        match kind {
            0 => bus.write_memory(bar + u64::from(choices.half()?), choices.some(8)?),
            1 => {
                let count = usize::from(choices.byte()?) % 9;
                bus.read_memory(bar + u64::from(choices.half()?), &mut back[..count]);
            }
            2 => bus.write_memory(config(slot, choices.half()? % 0x120), choices.some(8)?),
            3 => {
                let at = choices
                    .of(&STRANGE)?
                    .wrapping_add(u64::from(choices.half()?));
                bus.read_memory(at, &mut back);
                bus.write_memory(at, choices.some(8)?);
            }
            4 => {
                let port = choices.half()?;
                bus.read_port(port, &mut back[..4]);
                bus.write_port(port, choices.some(4)?);
            }
            5 => self.bring_up((slot, bar), choices.long()?),
            6 => self.put(BUFFERS + u64::from(choices.half()?), choices.some(64)?),
            7 => self.offer(slot, choices)?,
            8 => {
                let queue = u64::from(choices.byte()? % 8);
                bus.write_memory(bar + NOTIFY + queue * 4, &[0, 0]);
                self.turn();
            }
            9 => self.turn(),
            10 => self.request(choices)?,
            _ => {
                let at = RINGS + u64::from(choices.word()? % 0x10_0000);
                self.put(at, choices.some(16)?);
            }
        }
        Some(())
    }

    /// What the driver of Linux does until DRIVER_OK, and the device's part.
    pub(super) fn bring_up(&mut self, function: (Slot, u64), features: u64) {
        self.machine.bus().write_memory(function.1 + STATUS, &[0]);
        self.turn();
        self.drive(function, features, usize::MAX);
        self.turn();
    }

    /// The driver's part, or its first `steps`; the event loop has not seen DRIVER_OK yet. False
    /// when there were no more.
    pub(super) fn drive(&self, (slot, bar): (Slot, u64), features: u64, steps: usize) -> bool {
        let bus = self.machine.bus();
        let mut left = steps;
        let mut write = |offset: u64, data: &[u8]| {
            if left > 0 {
                left -= 1;
                bus.write_memory(bar + offset, data);
            }
        };
        write(STATUS, &[3]);
        for select in 0..2_u8 {
            let mut offered = [0; 4];
            write(0, &[select, 0, 0, 0]);
            bus.read_memory(bar + 4, &mut offered);
            let half = u64::from(u32::from_le_bytes(offered)) & (features >> (select * 32));
            let version = u64::from(select == 1);
            write(8, &[select, 0, 0, 0]);
            write(12, &(half | version).to_le_bytes()[..4]);
        }
        write(STATUS, &[11]);
        for vector in 0..2_u64 {
            let message = [0, 0, 0xe0, 0xfe, 0, 0, 0, 0];
            write(MSIX_TABLE + vector * 16, &message);
            write(MSIX_TABLE + vector * 16 + 8, &[0x20, 0, 0, 0, 0, 0, 0, 0]);
        }
        write(0x10, &[0, 0]);
        for queue in 0..8_u16 {
            write(0x16, &queue.to_le_bytes());
            write(0x18, &QUEUE_SIZE.to_le_bytes());
            write(0x1a, &[1, 0]);
            let rings = rings(slot, u64::from(queue));
            write(0x20, &rings.to_le_bytes());
            write(0x28, &(rings + AVAILABLE).to_le_bytes());
            write(0x30, &(rings + USED).to_le_bytes());
            write(0x1c, &[1, 0]);
        }
        write(STATUS, &[15]);
        left > 0
    }

    pub(super) fn put(&self, address: u64, bytes: &[u8]) {
        // What reaches past the end of memory is not written.
        let _ = self
            .machine
            .memory()
            .guest
            .write(bytes, GuestAddress(address));
    }

    /// A chain of up to four buffers, made available.
    fn offer(&self, slot: Slot, choices: &mut Choices<'_>) -> Option<()> {
        let rings = rings(slot, u64::from(choices.byte()? % 8));
        let count = u16::from(choices.byte()? % 4) + 1;
        for index in 0..count {
            let shape = choices.byte()?;
            let len = choices.of(&[0, 1, 4, 16, 20, 24, 44, 64, 512, 4096, u32::MAX])?;
            let next = u16::from(index + 1 < count);
            let flags = next | u16::from(shape & 1) << 1 | u16::from(shape & 14 == 14) << 2;
            let mut descriptor = [0; 16];
            let address = BUFFERS + u64::from(shape >> 4) * 0x1000;
            descriptor[..8].copy_from_slice(&address.to_le_bytes());
            descriptor[8..12].copy_from_slice(&len.to_le_bytes());
            descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
            descriptor[14..].copy_from_slice(&(index + 1).to_le_bytes());
            self.put(rings + u64::from(index) * 16, &descriptor);
        }
        let ring = rings + AVAILABLE;
        let memory = &self.machine.memory().guest;
        let available: u16 = memory.read_obj(GuestAddress(ring + 2)).unwrap_or(0);
        self.put(ring + 4 + u64::from(available % QUEUE_SIZE) * 2, &[0, 0]);
        self.put(ring + 2, &available.wrapping_add(1).to_le_bytes());
        Some(())
    }

    /// What the shim may ask meanwhile.
    fn request(&mut self, choices: &mut Choices<'_>) -> Option<()> {
        let (kind, value) = (choices.byte()? % 6, u64::from(choices.word()?));
        // Refusals are answers too.
        match kind {
            0 => drop(self.machine.resize_memory(value << 12)),
            1 => drop(self.machine.set_balloon(value << 12)),
            2 => drop(self.machine.statistics()),
            3 => drop(self.machine.device_statistics("balloon")),
            4 => drop(self.machine.command("disk", Command::FileResized)),
            _ => {
                if self.machine.remove("later").is_err() {
                    self.add("later", disk(), vec![file(1 << 16).into()]);
                }
            }
        }
        Some(())
    }

    /// Some turns of the event loop; it never waits, because the doorbell rings each time.
    pub(super) fn turn(&mut self) {
        let mut ready = Vec::new();
        for _ in 0..TURNS_MAX {
            self.machine.doorbell().ring(0);
            self.waiter.wait(&mut ready).expect("epoll waits");
            for (source, readiness) in ready.drain(..) {
                match source {
                    Source::Doorbell => {
                        self.machine.doorbell().answer();
                        for (name, broken) in self.machine.work() {
                            assert!(!name.is_empty() && !broken.reason.is_empty());
                        }
                    }
                    Source::Function(slot, token) => {
                        drop(self.machine.ready(slot, token, readiness));
                    }
                    Source::Control => {}
                }
            }
        }
    }

    /// As at the start, which shows at the same time that a guest can always come back.
    fn restore(&mut self) {
        let _ = self.machine.remove("later");
        for (slot, _) in &self.functions {
            self.machine.bus().write_memory(config(*slot, 4), &[0, 0]);
        }
        for (slot, bar) in &self.functions {
            let [low, high] = [*bar & 0xffff_ffff, *bar >> 32];
            let bus = self.machine.bus();
            bus.write_memory(config(*slot, 0x10), &low.to_le_bytes()[..4]);
            bus.write_memory(config(*slot, 0x14), &high.to_le_bytes()[..4]);
            bus.write_memory(config(*slot, 4), &[2, 0]);
            bus.write_memory(bar + STATUS, &[0]);
        }
        self.turn();
        for (slot, bar) in &self.functions {
            let mut status = [0xff];
            self.machine.bus().read_memory(bar + STATUS, &mut status);
            assert_eq!(status, [0], "function {slot:#x} is as new");
        }
        assert_eq!(self.scan(), self.functions, "nothing is left on the bus");
        let memory = self.machine.memory();
        let all = memory.discard.discard(&memory.guest, 0, MEMORY_BYTES);
        all.expect("memory goes back to the host");
        let _ = self.machine.doorbell().take_panicked();
    }
}

/// Addresses near which something begins or ends.
const STRANGE: [u64; 8] = [
    layout::ECAM.start,
    layout::ECAM.end - 0x8000,
    layout::WINDOW_32.start,
    MEMORY_BYTES - 8,
    0xfee0_0000,
    1 << 32,
    u64::MAX - 0xffff,
    BAR_BYTES,
];

/// Address of a register of configuration space.
pub(super) fn config(slot: Slot, offset: u16) -> u64 {
    layout::ECAM.start + u64::from(slot) * 4096 + u64::from(offset)
}

/// Where the rings of a function's queue are.
pub(super) fn rings(slot: Slot, queue: u64) -> u64 {
    RINGS + u64::from(slot / 8) * FUNCTION_BYTES + queue * QUEUE_BYTES
}
