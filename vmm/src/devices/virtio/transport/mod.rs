//! virtio over PCI, modern only (virtio 1.2 §4.1): one function with one 64-bit BAR.
//!
//! ```text
//! BAR 0   0x0000  common configuration     §4.1.4.3
//!         0x1000  ISR status               §4.1.4.5
//!         0x2000  device configuration     §4.1.4.6
//!         0x3000  notifications            §4.1.4.4, 4 bytes a queue, ioeventfds while live
//!         0x4000  MSI-X table
//!         0x5000  MSI-X pending bits
//! ```
//!
//! The common configuration is read from memory that the guest may only read, so that reading a
//! register costs no exit. It is mapped where the BAR was last decoded, by the event loop; until
//! then, and for all else, accesses trap.
//!
//! Threads: registers and configuration are reached from the vCPU that traps; activation, reset and
//! all queue work happen on the event loop, which the vCPU rings. Locks, each held alone or in this
//! order: configuration space, registers, device.
//!
//! Hostile guest: BARs move or vanish at any time, registers take any value (see [`registers`]),
//! and a device that finds a violation is reset at once and shows NEEDS_RESET until the driver
//! resets it.

mod interrupt;
pub(crate) mod registers;
pub(crate) mod saved;

use std::{
    ops::Range,
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use pericarp_sys::{
    kvm::MemorySlots,
    mapping::{Backing, SharedWords},
};
use vmm_sys_util::eventfd::EventFd;

use self::{
    interrupt::Vectors,
    registers::{COMMON_BYTES, Effect, Registers},
};
use super::{
    device::{
        Activation, ActiveQueue, Broken, GuestMemory, Interrupt, Poller, Readiness, VirtioDevice,
    },
    saved::Position,
};
use crate::{
    event_loop::{Doorbell, TOKEN_BITS},
    pci::{
        PciFunction, Slot,
        bars::Bars,
        config::{Changed, ConfigSpace, Identity},
        msix::{self, Msix},
        root::Root,
        routes::Routes,
    },
};

/// Size of the BAR.
pub(crate) const BAR_BYTES: u64 = 0x8000;

/// Bytes of it that are shown as memory: the page of the common configuration.
const SHOWN_BYTES: usize = 0x1000;

/// Where its parts begin.
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const PART_BYTES: u32 = 0x1000;

/// Bytes between the notification addresses of two queues.
const NOTIFY_STRIDE: u64 = 4;

/// Structures of the vendor capability (§4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
/// The vendor-specific capability.
const CAPABILITY_VENDOR: u8 = 9;

/// PCI vendor of virtio, and what is added to the device type (§4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;

/// The parts of a machine that its devices use.
#[derive(Debug, Clone)]
pub(crate) struct Platform {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) memory_slots: Arc<MemorySlots>,
    pub(crate) memory: GuestMemory,
    pub(crate) root: Arc<Root>,
    pub(crate) bars: Arc<Bars>,
    pub(crate) routes: Arc<Routes>,
    pub(crate) doorbell: Arc<Doorbell>,
    pub(crate) interrupts: Arc<std::sync::atomic::AtomicU64>,
}

/// One queue's notifications while the device is live.
#[derive(Debug)]
struct Kick {
    queue: u16,
    eventfd: EventFd,
    /// The address that KVM watches for us.
    address: Option<u64>,
    polled: bool,
}

/// The notifications of a device.
#[derive(Debug, Default)]
struct Kicks {
    live: Vec<Kick>,
    /// Queues, one bit each, whose notification came before the event loop had made the device
    /// live: a driver may notify right after DRIVER_OK (§3.1.1).
    early: u64,
}

/// A virtio device on the bus.
#[derive(Debug)]
pub(crate) struct VirtioFunction {
    this: Weak<Self>,
    slot: Slot,
    name: String,
    platform: Platform,
    poller: Arc<dyn Poller>,
    msix: Arc<Msix>,
    msix_capability: usize,
    vectors: Arc<Vectors>,
    config: Mutex<ConfigSpace>,
    registers: Mutex<Registers>,
    /// The common configuration as the guest reads it.
    common: Arc<SharedWords>,
    /// KVM's slot of it, and its address.
    shown: Mutex<Option<(u32, u64)>>,
    asked: Mutex<Effect>,
    kicks: Mutex<Kicks>,
    device: Mutex<Box<dyn VirtioDevice>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VirtioFunction {
    /// Puts a device on the bus at `slot`; `bar` 0 leaves the address to the guest.
    pub(crate) fn attach(
        device: Box<dyn VirtioDevice>,
        (slot, multifunction): (Slot, bool),
        bar: u64,
        platform: Platform,
        poller: Arc<dyn Poller>,
    ) -> std::io::Result<Arc<Self>> {
        let common = Arc::new(SharedWords::new(SHOWN_BYTES)?);
        let queues = device.queue_sizes().len();
        let count = vectors(device.device_type(), queues);
        let (vm, routes) = (Arc::clone(&platform.vm), Arc::clone(&platform.routes));
        let msix = Arc::new(Msix::new(
            vm,
            routes,
            Arc::clone(&platform.interrupts),
            count,
        ));
        let words = Arc::clone(platform.root.words());
        let identity = identity(device.as_ref(), multifunction);
        let mut config = ConfigSpace::new(words, slot, &identity);
        add_structures(&mut config, queues);
        let [table, pending] = [TABLE, PENDING].map(|part| u32::try_from(part).expect("small"));
        let (bytes, writable) = msix.capability(0, table, pending);
        let msix_capability = config.add_capability(msix::CAPABILITY, &bytes, &writable);
        config.add_bar(0, BAR_BYTES, bar);
        let function = Arc::new_cyclic(|this| Self {
            this: this.clone(),
            slot,
            name: device.name(),
            poller,
            msix_capability,
            vectors: Arc::new(Vectors::new(Arc::clone(&msix), queues)),
            msix,
            config: Mutex::new(config),
            registers: Mutex::new(Registers::new(device.features(), device.queue_sizes())),
            common,
            shown: Mutex::new(None),
            asked: Mutex::new(Effect::None),
            kicks: Mutex::default(),
            device: Mutex::new(device),
            platform,
        });
        lock(&function.registers).show(&function.common);
        function.decode();
        function.show_common();
        let root = Arc::clone(&function.platform.root);
        root.attach(slot, Arc::clone(&function) as Arc<dyn PciFunction>);
        Ok(function)
    }

    /// Takes the device off the bus, after resetting it.
    pub(crate) fn detach(&self) {
        self.platform.root.detach(self.slot);
        lock(&self.config).clear();
        self.platform.bars.remove(self.slot);
        if let Some((slot, _)) = lock(&self.shown).take() {
            // What KVM does not let go stays mapped, and is only read.
            let _ = self.platform.memory_slots.remove(slot);
        }
        self.reset();
    }

    /// The device, for commands and counters.
    pub(crate) fn device(&self) -> MutexGuard<'_, Box<dyn VirtioDevice>> {
        lock(&self.device)
    }

    /// A BAR or its decoding may have changed: tells the bus, and KVM where notifications go.
    fn decode(&self) {
        let Some(this) = self.this.upgrade() else {
            return;
        };
        let function: Arc<dyn PciFunction> = this;
        let range = lock(&self.config).bar(0, BAR_BYTES);
        let placed = self
            .platform
            .bars
            .place(self.slot, 0, range.clone(), &function);
        let notify = range
            .filter(|_| placed)
            .map(|range: Range<u64>| range.start + NOTIFY);
        for kick in &mut lock(&self.kicks).live {
            self.watch(kick, notify);
        }
    }

    /// On the event loop: shows the common configuration where the BAR is decoded. While it is not
    /// decoded at all, as during a guest's sizing of BARs, it stays where it was, because moving it
    /// costs all vCPUs their page tables.
    fn show_common(&self) {
        let Some(range) = lock(&self.config).bar(0, BAR_BYTES) else {
            return;
        };
        let mut shown = lock(&self.shown);
        if shown.is_some_and(|(_, address)| address == range.start) {
            return;
        }
        let slots = &self.platform.memory_slots;
        if let Some((slot, _)) = shown.take() {
            let _ = slots.remove(slot);
        }
        // Only where the bus decodes it too, so that no guest puts it over something else. Without
        // it reads trap.
        let ours = self.platform.bars.find(range.start, BAR_BYTES);
        if ours.is_some_and(|(function, ..)| self.is(&function)) {
            let words = Backing::Words(Arc::clone(&self.common));
            *shown = slots
                .add(range.start, words)
                .ok()
                .map(|slot| (slot, range.start));
        }
    }

    fn is(&self, function: &Arc<dyn PciFunction>) -> bool {
        std::ptr::addr_eq(Arc::as_ptr(function), self)
    }

    /// Points KVM at a queue's notification address, or away from it.
    fn watch(&self, kick: &mut Kick, notify: Option<u64>) {
        let wanted = notify.map(|start| start + NOTIFY_STRIDE * u64::from(kick.queue));
        if kick.address == wanted {
            return;
        }
        let vm = &self.platform.vm;
        if let Some(old) = kick.address.take() {
            let address = IoEventAddress::Mmio(old);
            // It was registered so; if KVM forgot it, all the better.
            let _ = vm.unregister_ioevent(&kick.eventfd, &address, NoDatamatch);
        }
        if let Some(new) = wanted {
            let address = IoEventAddress::Mmio(new);
            // Without it the write traps to us, which only is slower.
            let registered = vm.register_ioevent(&kick.eventfd, &address, NoDatamatch);
            kick.address = registered.is_ok().then_some(new);
        }
    }

    /// On the event loop: does what the driver's status writes asked for.
    pub(crate) fn work(&self) -> Result<(), Broken> {
        self.show_common();
        let asked = std::mem::replace(&mut *lock(&self.asked), Effect::None);
        match asked {
            Effect::None => Ok(()),
            Effect::Activate => self.activate(&[]),
            Effect::Reset => {
                self.reset();
                self.change(Registers::finish_reset);
                Ok(())
            }
        }
    }

    /// `positions`: where the queues of a device stand that goes on.
    fn activate(&self, positions: &[Position]) -> Result<(), Broken> {
        let (features, queues) = self.build_queues()?;
        let (mut active, mut kicks) = (Vec::new(), Vec::new());
        for (index, mut queue) in queues {
            if let Some(position) = positions.iter().find(|position| position.index == index) {
                position.apply(&mut queue);
            }
            let eventfd = self.make_eventfd()?;
            let kick = self.broken_by(eventfd.try_clone())?;
            active.push(ActiveQueue { index, queue, kick });
            kicks.push(Kick {
                queue: index,
                eventfd,
                address: None,
                polled: false,
            });
        }
        lock(&self.kicks).live = kicks;
        let mut device = lock(&self.device);
        device.activate(Activation {
            memory: Arc::clone(&self.platform.memory),
            features,
            queues: active,
            interrupt: Arc::clone(&self.vectors) as Arc<dyn Interrupt>,
            poller: Arc::clone(&self.poller),
        })?;
        let owns_kicks = device.owns_kicks();
        drop(device);
        if !owns_kicks {
            for kick in &mut lock(&self.kicks).live {
                let token = KICK_TOKEN | u32::from(kick.queue);
                let readable = libc::EPOLLIN.cast_unsigned();
                self.broken_by(self.poller.add(kick.eventfd.as_raw_fd(), token, readable))?;
                kick.polled = true;
            }
        }
        self.decode();
        self.kick_early();
        Ok(())
    }

    /// Passes on what was notified too early.
    fn kick_early(&self) {
        let mut kicks = lock(&self.kicks);
        let early = std::mem::take(&mut kicks.early);
        let was_early = |kick: &&Kick| kick.queue < 64 && early >> kick.queue & 1 == 1;
        for kick in kicks.live.iter().filter(was_early) {
            // A new counter is not full.
            let _ = kick.eventfd.write(1);
        }
    }

    /// Notifies every queue.
    fn kick_all(&self) {
        for kick in &lock(&self.kicks).live {
            // A new counter is not full.
            let _ = kick.eventfd.write(1);
        }
    }

    /// A notification that trapped.
    fn notified(&self, queue: u16) {
        let mut kicks = lock(&self.kicks);
        match kicks.live.iter().find(|kick| kick.queue == queue) {
            // Full only when nobody reads, and then one more says nothing new.
            Some(kick) => drop(kick.eventfd.write(1)),
            None if queue < 64 => kicks.early |= 1 << queue,
            None => {}
        }
    }

    fn build_queues(&self) -> Result<(u64, Vec<(u16, virtio_queue::Queue)>), Broken> {
        let registers = lock(&self.registers);
        let features = registers.features();
        let mut queues = Vec::new();
        for (index, queue) in (0_u16..).zip(registers.queues()) {
            if queue.is_enabled() {
                let built = queue.build(&self.platform.memory, features);
                let queue = built.map_err(|why| self.broken(format!("queue {index}: {why}")))?;
                queues.push((index, queue));
            }
        }
        Ok((features, queues))
    }

    fn make_eventfd(&self) -> Result<EventFd, Broken> {
        self.broken_by(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
    }

    fn broken(&self, reason: String) -> Broken {
        Broken {
            device: self.name.clone(),
            reason,
        }
    }

    fn broken_by<T>(&self, result: std::io::Result<T>) -> Result<T, Broken> {
        result.map_err(|error| self.broken(error.to_string()))
    }

    /// On the event loop: a descriptor of this function is ready; `token` is as given to the
    /// poller.
    pub(crate) fn ready(&self, token: u32, readiness: Readiness) -> Result<(), Broken> {
        if token & KICK_TOKEN == 0 {
            lock(&self.device).descriptor_ready(token, readiness)?;
        } else {
            let queue = u16::try_from(token & !KICK_TOKEN).expect("as given to the poller");
            let known = lock(&self.kicks)
                .live
                .iter()
                .find(|kick| kick.queue == queue)
                // Two waits may tell of one notification: then the second read finds nothing.
                .is_some_and(|kick| kick.eventfd.read().is_ok());
            if known {
                lock(&self.device).queue_kicked(queue)?;
            }
        }
        self.note_config_change();
        Ok(())
    }

    /// A device that changed its configuration raised the interrupt; the generation must follow
    /// (§2.5.1).
    pub(crate) fn note_config_change(&self) {
        if self.vectors.take_config_changed() {
            self.change(Registers::next_generation);
        }
    }

    /// On the event loop: the device or its peer is beyond use until the driver resets it.
    pub(crate) fn set_broken(&self) {
        self.reset();
        self.change(Registers::set_needs_reset);
        self.vectors.signal_config();
        self.note_config_change();
    }

    fn change(&self, change: fn(&mut Registers)) {
        let mut registers = lock(&self.registers);
        change(&mut registers);
        registers.show(&self.common);
    }

    /// Stops the device. The registers are the caller's.
    fn reset(&self) {
        for mut kick in std::mem::take(&mut *lock(&self.kicks)).live {
            self.watch(&mut kick, None);
            if kick.polled {
                // It is closed next, which removes it too.
                let _ = self.poller.remove(kick.eventfd.as_raw_fd());
            }
        }
        lock(&self.device).reset();
        self.vectors.reset();
    }
}

/// Marks the tokens of queue notifications; devices number their own descriptors below it.
const KICK_TOKEN: u32 = 1 << 23;

const _: () = assert!(KICK_TOKEN < 1 << TOKEN_BITS);
// One bit a queue: pairs and the control queue of the largest network device.
const _: () = assert!(pericarp_protocol::machine::QUEUES_MAX * 2 < 64);

fn identity(device: &dyn VirtioDevice, multifunction: bool) -> Identity {
    /// Class codes (PCI code and ID assignment 1.11): mass storage and network by their kind, all
    /// others "other".
    const fn class(device_type: u16) -> u32 {
        match device_type {
            1 => 0x02_0000,
            2 => 0x01_8000,
            _ => 0xff_0000,
        }
    }
    Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + device.device_type(),
        revision: 1,
        class: class(device.device_type()),
        subsystem_vendor: VENDOR,
        subsystem: DEVICE_BASE + device.device_type(),
        multifunction,
    }
}

/// Vectors of a device. Those that move data have one a queue; for the others a second one for all
/// queues does, and each vector spared is nine writes less at boot. Drivers fall back to sharing by
/// themselves (§4.1.5.1.2 allows it).
fn vectors(device_type: u16, queues: usize) -> u16 {
    const NET: u16 = 1;
    const BLK: u16 = 2;
    const FS: u16 = 26;
    match device_type {
        NET | BLK | FS => u16::try_from(queues + 1).expect("a device of ours has few queues"),
        _ => 2,
    }
}

fn add_structures(config: &mut ConfigSpace, queues: usize) {
    let queues = u32::try_from(queues).expect("a device of ours has few queues");
    let stride = u32::try_from(NOTIFY_STRIDE).expect("small");
    let mut add = |kind: u8, offset: u64, length: u32, multiplier: Option<u32>| {
        // §4.1.4: length of the capability, kind, BAR, id and padding, offset, length, and for
        // notifications a multiplier.
        let size: u8 = if multiplier.is_some() { 20 } else { 16 };
        let offset = u32::try_from(offset).expect("within the BAR");
        let mut bytes = vec![size, kind, 0, 0, 0, 0];
        bytes.extend_from_slice(&offset.to_le_bytes());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend(multiplier.map(u32::to_le_bytes).into_iter().flatten());
        config.add_capability(CAPABILITY_VENDOR, &bytes, &[]);
    };
    add(CFG_COMMON, 0, COMMON_BYTES, None);
    add(CFG_ISR, ISR, 1, None);
    add(CFG_DEVICE, DEVICE, PART_BYTES, None);
    add(CFG_NOTIFY, NOTIFY, queues * stride, Some(stride));
}

impl PciFunction for VirtioFunction {
    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut config = lock(&self.config);
        match config.write(offset, data) {
            Changed::Decoding => {
                drop(config);
                self.decode();
                self.platform.doorbell.ring(self.slot);
            }
            Changed::Capability(at) if at == self.msix_capability => {
                let [_, _, low, high] = config.word(at).to_le_bytes();
                drop(config);
                self.msix.set_control(u16::from_le_bytes([low, high]));
            }
            Changed::Capability(_) | Changed::Nothing => {}
        }
    }

    fn read_bar(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            0..ISR => lock(&self.registers).read(offset, data),
            ISR => {
                if let Some(first) = data.first_mut() {
                    *first = self.vectors.take_isr();
                }
            }
            DEVICE..NOTIFY => lock(&self.device).read_config(offset - DEVICE, data),
            TABLE..PENDING => self.msix.read_table(offset - TABLE, data),
            PENDING..BAR_BYTES => self.msix.read_pending(offset - PENDING, data),
            _ => {}
        }
    }

    fn write_bar(&self, _bar: u8, offset: u64, data: &[u8]) {
        match offset {
            0..ISR => {
                let mut registers = lock(&self.registers);
                let effect = registers.write(offset, data);
                registers.show(&self.common);
                self.vectors.update(&registers);
                drop(registers);
                if effect != Effect::None {
                    *lock(&self.asked) = effect;
                    self.platform.doorbell.ring(self.slot);
                }
            }
            DEVICE..NOTIFY => lock(&self.device).write_config(offset - DEVICE, data),
            NOTIFY..TABLE => {
                let queue = (offset - NOTIFY) / NOTIFY_STRIDE;
                self.notified(u16::try_from(queue).expect("within a page"));
            }
            TABLE..PENDING => self.msix.write_table(offset - TABLE, data),
            _ => {}
        }
    }
}
