//! A passthrough device on the guest's bus.
//!
//! BARs are mapped into the guest where the bus decodes them, but for the pages that hold the table
//! of MSI-X ([`windows`]); what is not mapped, and what the event loop has not mapped yet, traps
//! and is read and written for the guest. Interrupts go from the function to the guest through
//! eventfds of which the kernel knows both ends; a masked vector is disconnected at the guest's end
//! and what it signals waits in its eventfd.
//!
//! Threads: everything but mapping happens on the vCPU that traps, because the guest relies on its
//! being done. Locks, each held alone or in this order: configuration space, interrupts, function.
//!
//! Hostile guest: no value that it writes reaches the function but what [`mediate`] lets through
//! and what lies in BARs, and these are the function's own business behind the IOMMU.

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak},
};

use pericarp_sys::{
    mapping::{Backing, DeviceMapping},
    vfio::{self, Region},
};

use super::{
    interrupts::Interrupts,
    mediate::{
        self, Bar, COMMAND, COMMAND_PASSED, CONFIG_BYTES, DEVICE_CONTROL, FUNCTION_RESET,
        MediateError, Mediated, MsiPlace, MsixPlace,
    },
    windows,
};
use crate::{
    devices::virtio::transport::Platform,
    pci::{
        PciFunction, Slot,
        config::{Changed, ConfigSpace},
        routes::InterruptMessage,
    },
};

/// Command register: memory decoding, on as long as the function is ours; whether the guest sees
/// its BARs is the bus's business.
const COMMAND_MEMORY: u16 = 1 << 1;

/// Why a function cannot be passed through.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FunctionError {
    /// Its configuration space.
    #[error(transparent)]
    Mediate(#[from] MediateError),
    /// A BAR.
    #[error(
        "BAR {register} of {size:#x} bytes does not fit the {room:#x} bytes that the guest has for \
            such BARs: only a host whose processor has more address bits can pass this function on"
    )]
    Room {
        /// Which one.
        register: u8,
        /// Its size.
        size: u64,
        /// The window.
        room: u64,
    },
    /// Nothing resets it.
    #[error(
        "nothing resets the function, so that what one pod leaves in it the next one would find"
    )]
    NoReset,
    /// A system call.
    #[error("{step}: {source}")]
    Host {
        /// Which step.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn at(step: &'static str) -> impl Fn(io::Error) -> FunctionError {
    move |source| FunctionError::Host { step, source }
}

/// A BAR with the parts of it that the guest reaches without us.
#[derive(Debug)]
struct PassedBar {
    bar: Bar,
    region: Region,
    windows: Vec<(u64, Arc<DeviceMapping>)>,
}

/// A function on the bus.
#[derive(Debug)]
pub(crate) struct PassedFunction {
    this: Weak<Self>,
    slot: Slot,
    platform: Platform,
    bars: Vec<PassedBar>,
    msix: Option<(MsixPlace, Interrupts)>,
    msi: Option<(MsiPlace, Interrupts)>,
    express: Option<usize>,
    space: Region,
    config: Mutex<ConfigSpace>,
    /// None once it was given back.
    function: RwLock<Option<vfio::Function>>,
    /// Where BARs are mapped: address and KVM's slots, by BAR.
    shown: Mutex<BTreeMap<u8, (u64, Vec<u32>)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens what the shim passed, resets it, and reads what it is.
fn open(fd: OwnedFd) -> Result<(vfio::Function, Region, [u8; CONFIG_BYTES]), FunctionError> {
    let function = vfio::Function::new(fd).map_err(|error| match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => FunctionError::NoReset,
        _ => at("Function.function")(error),
    })?;
    function.reset().map_err(at("reset"))?;
    let space = function.region(vfio::CONFIG_REGION);
    let space = space.map_err(at("configuration space"))?;
    let mut bytes = [0; CONFIG_BYTES];
    let read = function.read(&space, 0, &mut bytes);
    read.map_err(at("configuration space"))?;
    Ok((function, space, bytes))
}

impl PassedFunction {
    /// Puts a function on the bus at `slot`. `rooms` are the bytes that the guest has for BARs of
    /// 32 and of 64 bits.
    pub(crate) fn attach(
        fd: OwnedFd,
        (slot, multifunction): (Slot, bool),
        rooms: [u64; 2],
        platform: Platform,
    ) -> Result<Arc<Self>, FunctionError> {
        let (function, space, bytes) = open(fd)?;
        let mut regions = Vec::new();
        for index in 0..6 {
            regions.push(function.region(index).map_err(at("BARs"))?);
        }
        let sizes = std::array::from_fn(|index| regions[index].size);
        let seen = mediate::mediate(&bytes, &sizes, multifunction)?;
        check_rooms(&seen.bars, rooms)?;
        let bars = map_bars(&function, &seen, &regions)?;
        let interrupts = |kind, count| {
            let made = Interrupts::new(&function, kind, count, &platform);
            made.map_err(at("interrupts"))
        };
        let msix = seen.msix.map(|place| {
            let made = interrupts(vfio::MSIX, place.count)?;
            Ok::<_, FunctionError>((place, made))
        });
        let msi = seen.msi.map(|place| {
            let made = interrupts(vfio::MSI, 1)?;
            Ok::<_, FunctionError>((place, made))
        });
        let (msix, msi) = (msix.transpose()?, msi.transpose()?);
        let words = Arc::clone(platform.root.words());
        let command = COMMAND_MEMORY.to_le_bytes();
        let started = function.write(&space, COMMAND as u64, &command);
        started.map_err(at("command register"))?;
        let config = ConfigSpace::show(words, slot, &seen.words, seen.writable);
        let passed = Arc::new_cyclic(|this| Self {
            this: this.clone(),
            slot,
            bars,
            msix,
            msi,
            express: seen.express,
            space,
            config: Mutex::new(config),
            function: RwLock::new(Some(function)),
            shown: Mutex::default(),
            platform,
        });
        let root = Arc::clone(&passed.platform.root);
        root.attach(slot, Arc::clone(&passed) as Arc<dyn PciFunction>);
        Ok(passed)
    }

    fn function(&self) -> RwLockReadGuard<'_, Option<vfio::Function>> {
        self.function.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the function off the bus and gives it back, reset. After this it reaches no memory.
    pub(crate) fn detach(&self) {
        self.platform.root.detach(self.slot);
        lock(&self.config).clear();
        self.platform.bars.remove(self.slot);
        for (_, (_, slots)) in std::mem::take(&mut *lock(&self.shown)) {
            self.hide(&slots);
        }
        let mut function = self
            .function
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = function.take() {
            // No memory access any more, then no state; the kernel does both again at the close.
            let _ = function.write(&self.space, COMMAND as u64, &[0, 0]);
            self.interrupts().for_each(|kind| kind.silence(&function));
            let _ = function.reset();
        }
        drop(function);
        self.interrupts().for_each(Interrupts::forget);
    }

    fn hide(&self, slots: &[u32]) {
        for slot in slots {
            // What KVM does not let go stays mapped until the machine ends.
            let _ = self.platform.memory_slots.remove(*slot);
        }
    }

    /// A BAR or its decoding may have changed: tells the bus; the event loop maps it later.
    fn decode(&self) {
        let Some(this) = self.this.upgrade() else {
            return;
        };
        let function: Arc<dyn PciFunction> = this;
        for passed in &self.bars {
            let range = passed.bar.range(&lock(&self.config));
            let bars = &self.platform.bars;
            bars.place(self.slot, passed.bar.register, range, &function);
        }
    }

    /// On the event loop: maps BARs where the bus decodes them. One that is not decoded at all, as
    /// while a guest sizes BARs, stays where it was, because moving it costs all vCPUs their page
    /// tables.
    pub(crate) fn map(&self) {
        for passed in &self.bars {
            let Bar { register, size, .. } = passed.bar;
            let Some(range) = passed.bar.range(&lock(&self.config)) else {
                continue;
            };
            let mut shown = lock(&self.shown);
            let there = shown.get(&register);
            if there.is_some_and(|(address, _)| *address == range.start) {
                continue;
            }
            if let Some((_, slots)) = shown.remove(&register) {
                self.hide(&slots);
            }
            // Only where the bus decodes it too, so that no guest puts it over something else.
            if self.is_placed(register, range.start, size) {
                let slots = passed.windows.iter().filter_map(|(offset, mapping)| {
                    let backing = Backing::Device(Arc::clone(mapping));
                    // Without it accesses trap, which only is slower.
                    self.platform
                        .memory_slots
                        .add(range.start + offset, backing)
                        .ok()
                });
                shown.insert(register, (range.start, slots.collect()));
            }
        }
    }

    /// Parts of its BARs that the guest reaches without us, where the bus decodes them now.
    pub(crate) fn decoded(&self) -> Vec<(u64, Arc<DeviceMapping>)> {
        let mut parts = Vec::new();
        for passed in &self.bars {
            let Bar { register, size, .. } = passed.bar;
            let range = passed.bar.range(&lock(&self.config));
            let place = range.filter(|range| self.is_placed(register, range.start, size));
            if let Some(Range { start, .. }) = place {
                let windows = passed.windows.iter();
                parts.extend(windows.map(|(offset, part)| (start + offset, Arc::clone(part))));
            }
        }
        parts
    }

    /// Whether the bus decodes a BAR at an address, which it does for nobody else then.
    fn is_placed(&self, register: u8, address: u64, size: u64) -> bool {
        let found = self.platform.bars.find(address, size);
        found.is_some_and(|(function, bar, offset)| {
            std::ptr::addr_eq(Arc::as_ptr(&function), self) && bar == register && offset == 0
        })
    }

    /// Writes a register of two bytes of the function's own configuration space.
    fn write_own_config(&self, offset: usize, value: u16) {
        if let Some(function) = self.function().as_ref() {
            // A function that does not take it is the guest's loss.
            let _ = function.write(&self.space, offset as u64, &value.to_le_bytes());
        }
    }

    /// Interrupts of both kinds.
    fn interrupts(&self) -> impl Iterator<Item = &Interrupts> {
        let msix = self.msix.iter().map(|(_, interrupts)| interrupts);
        msix.chain(self.msi.iter().map(|(_, interrupts)| interrupts))
    }

    /// Connects vectors after a change; `only` names the one that may have changed.
    fn connect(&self, interrupts: &Interrupts, only: Option<u16>) {
        if let Some(function) = self.function().as_ref() {
            interrupts.connect(function, only);
        }
    }

    /// The guest wrote a word of its capabilities.
    fn capability(&self, config: &ConfigSpace, at: usize, offset: u16, data: &[u8]) {
        if self.express.map(|express| express + DEVICE_CONTROL) == Some(at) {
            let [control, _] = halves(config.word(at));
            let wanted = written(offset, data, at + 1) & FUNCTION_RESET.to_le_bytes()[1];
            self.write_own_config(at, control | u16::from_le_bytes([0, wanted]));
        }
        if let Some((place, interrupts)) = &self.msix
            && place.capability == at
        {
            let [_, control] = halves(config.word(at));
            interrupts.table().set_control(control);
            self.connect(interrupts, None);
        }
        if let Some((place, interrupts)) = &self.msi
            && place.range().contains(&at)
        {
            let (message, enabled) = place.message(config);
            interrupts.set_message(message, enabled);
            self.connect(interrupts, None);
        }
    }
}

impl MsiPlace {
    /// What the guest has written: its message, and whether it is on.
    pub(crate) fn message(&self, config: &ConfigSpace) -> (InterruptMessage, bool) {
        let [_, control] = halves(config.word(self.capability));
        let low = u64::from(config.word(self.capability + 4));
        let high = match self.wide {
            true => u64::from(config.word(self.capability + 8)),
            false => 0,
        };
        let [data, _] = halves(config.word(self.data()));
        let message = InterruptMessage {
            address: low | high << 32,
            data: u32::from(data),
        };
        (message, control & mediate::MSI_ENABLED != 0)
    }
}

fn halves(word: u32) -> [u16; 2] {
    let [a, b, c, d] = word.to_le_bytes();
    [u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])]
}

impl Bar {
    /// Where it is decoded now, if it is.
    pub(crate) fn range(&self, config: &ConfigSpace) -> Option<Range<u64>> {
        if self.wide {
            config.bar(self.register, self.size)
        } else {
            config.narrow_bar(self.register, self.size)
        }
    }
}

fn check_rooms(bars: &[Bar], [narrow, wide]: [u64; 2]) -> Result<(), FunctionError> {
    for bar in bars {
        // Alignment may cost as much again.
        let room = if bar.wide { wide } else { narrow };
        if bar.size > room / 2 {
            return Err(FunctionError::Room {
                register: bar.register,
                size: bar.size,
                room,
            });
        }
    }
    Ok(())
}

fn map_bars(
    function: &vfio::Function,
    seen: &Mediated,
    regions: &[Region],
) -> Result<Vec<PassedBar>, FunctionError> {
    let mut bars = Vec::new();
    for bar in &seen.bars {
        let region = regions[usize::from(bar.register)].clone();
        let places = seen.msix.iter();
        let trapped: Vec<_> = places
            .flat_map(|place| [&place.table, &place.pending])
            .filter(|(register, _)| *register == bar.register)
            .map(|(_, range)| range.clone())
            .collect();
        let mut mapped = Vec::new();
        for part in windows::windows(bar.size, &region.mappable, &trapped) {
            let mapping = function.map(&region, part.start, part.end - part.start);
            mapped.push((part.start, Arc::new(mapping.map_err(at("mapping a BAR"))?)));
        }
        bars.push(PassedBar {
            bar: *bar,
            region,
            windows: mapped,
        });
    }
    Ok(bars)
}

/// What an access to a BAR is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AccessTarget {
    /// The table, at this offset of it.
    Table(u64),
    /// The pending bits, at this offset.
    Pending(u64),
    /// Both sides of a border of them: no driver does this.
    Border,
    /// The function's registers.
    Registers,
}

/// Returns what `length` bytes at `offset` of BAR `bar` belong to.
pub(crate) fn access_target(
    place: &MsixPlace,
    bar: u8,
    offset: u64,
    length: usize,
) -> AccessTarget {
    let end = offset.saturating_add(length as u64);
    let touches = |(register, range): &(u8, Range<u64>)| {
        *register == bar && offset < range.end && end > range.start
    };
    let inside = |range: &Range<u64>| range.start <= offset && end <= range.end;
    if touches(&place.table) {
        let range = &place.table.1;
        return if inside(range) {
            AccessTarget::Table(offset - range.start)
        } else {
            AccessTarget::Border
        };
    }
    if touches(&place.pending) {
        let range = &place.pending.1;
        return if inside(range) {
            AccessTarget::Pending(offset - range.start)
        } else {
            AccessTarget::Border
        };
    }
    AccessTarget::Registers
}

impl PassedFunction {
    fn access_target(
        &self,
        bar: u8,
        offset: u64,
        length: usize,
    ) -> (AccessTarget, Option<&Interrupts>) {
        match &self.msix {
            Some((place, interrupts)) => {
                (access_target(place, bar, offset, length), Some(interrupts))
            }
            None => (AccessTarget::Registers, None),
        }
    }

    fn region(&self, bar: u8) -> Option<&Region> {
        let passed = self.bars.iter().find(|passed| passed.bar.register == bar);
        passed.map(|passed| &passed.region)
    }
}

impl PciFunction for PassedFunction {
    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut config = lock(&self.config);
        let changed = config.write(offset, data);
        match changed {
            Changed::Decoding => {
                let [low, high, ..] = config.word(COMMAND).to_le_bytes();
                let command = u16::from_le_bytes([low, high]) & COMMAND_PASSED;
                if usize::from(offset) / 4 == COMMAND / 4 {
                    self.write_own_config(COMMAND, command | COMMAND_MEMORY);
                }
                drop(config);
                self.decode();
                self.platform.doorbell.ring(self.slot);
            }
            Changed::Capability(at) => self.capability(&config, at, offset, data),
            Changed::Nothing => {}
        }
    }

    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match self.access_target(bar, offset, data.len()) {
            (AccessTarget::Table(at), Some(interrupts)) => interrupts.table().read_table(at, data),
            (AccessTarget::Pending(at), Some(interrupts)) => {
                interrupts.table().read_pending(at, data)
            }
            (AccessTarget::Registers, _) => {
                if let (Some(function), Some(region)) = (self.function().as_ref(), self.region(bar))
                    && function.read(region, offset, data).is_err()
                {
                    data.fill(0xff);
                }
            }
            _ => {}
        }
    }

    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        match self.access_target(bar, offset, data.len()) {
            (AccessTarget::Table(at), Some(interrupts)) => {
                interrupts.table().write_table(at, data);
                self.connect(interrupts, u16::try_from(at / 16).ok());
            }
            (AccessTarget::Registers, _) => {
                if let (Some(function), Some(region)) = (self.function().as_ref(), self.region(bar))
                {
                    // Nobody is told of writes that a device does not take.
                    let _ = function.write(region, offset, data);
                }
            }
            _ => {}
        }
    }
}

/// The byte that a write to configuration space put at `at`; 0 when it put none.
fn written(offset: u16, data: &[u8], at: usize) -> u8 {
    let index = at.checked_sub(usize::from(offset));
    index
        .and_then(|index| data.get(index))
        .copied()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use pericarp_sys::mapping::SharedWords;

    use super::*;

    #[test]
    fn accesses_meet_the_table_whole_or_not_at_all() {
        let place = MsixPlace {
            capability: 0x40,
            count: 2,
            table: (0, 0x2000..0x2020),
            pending: (1, 0x10..0x18),
        };
        assert_eq!(access_target(&place, 0, 0x2000, 4), AccessTarget::Table(0));
        assert_eq!(
            access_target(&place, 0, 0x201c, 4),
            AccessTarget::Table(0x1c)
        );
        assert_eq!(access_target(&place, 0, 0x201c, 8), AccessTarget::Border);
        assert_eq!(access_target(&place, 0, 0x1ffc, 8), AccessTarget::Border);
        assert_eq!(access_target(&place, 0, 0x2020, 4), AccessTarget::Registers);
        assert_eq!(access_target(&place, 1, 0x2000, 4), AccessTarget::Registers);
        assert_eq!(access_target(&place, 1, 0x10, 8), AccessTarget::Pending(0));
        assert_eq!(
            access_target(&place, 1, u64::MAX, 8),
            AccessTarget::Registers
        );
    }

    #[test]
    fn a_message_is_put_together_from_what_the_guest_wrote() {
        let words = |control: u32, rest: [u32; 3]| {
            let mut words = [0; mediate::WORDS];
            words[0x10] = control << 16 | 5;
            words[0x11..0x14].copy_from_slice(&rest);
            let bus = SharedWords::new(crate::pci::config::FUNCTION_BYTES).unwrap();
            ConfigSpace::show(Arc::new(bus), 0, &words, [0; mediate::WORDS])
        };
        let place = |wide| MsiPlace {
            capability: 0x40,
            wide,
        };
        let wide = words(0x81, [0xfee0_0000, 1, 0xffff_4123]);
        let message = InterruptMessage {
            address: 0x1_fee0_0000,
            data: 0x4123,
        };
        assert_eq!(place(true).message(&wide), (message, true));
        let narrow = words(0, [0xfee0_1000, 0x31, 7]);
        let message = InterruptMessage {
            address: 0xfee0_1000,
            data: 0x31,
        };
        assert_eq!(place(false).message(&narrow), (message, false));
    }

    #[test]
    fn a_byte_of_a_write_is_found() {
        assert_eq!(written(0x88, &[1, 0x80], 0x89), 0x80);
        assert_eq!(written(0x89, &[0x80], 0x89), 0x80);
        assert_eq!(written(0x88, &[1], 0x89), 0);
        assert_eq!(written(0x8a, &[0x80], 0x89), 0);
    }

    #[test]
    fn bars_that_do_not_fit_are_refused_with_their_sizes() {
        let bar = |size, wide| Bar {
            register: 2,
            size,
            wide,
        };
        let rooms = [512 << 20, 512 << 30];
        check_rooms(&[bar(256 << 20, false), bar(256 << 30, true)], rooms).unwrap();
        for bar in [bar(512 << 20, false), bar(512 << 30, true)] {
            let error = check_rooms(&[bar], rooms).unwrap_err().to_string();
            assert!(error.contains("BAR 2"), "{error}");
        }
    }
}
