//! The common configuration structure (virtio 1.2 §4.1.4.3) and the device status (§2.1), as a pure
//! state machine.
//!
//! ```text
//!            ACKNOWLEDGE, DRIVER, FEATURES_OK          DRIVER_OK
//!  reset  -------------------------------->  set up  ------------>  live  --+
//!    ^                 (queues)                 |                    |      | a violation
//!    |  status := 0, done at once               |                    |      v
//!    +------------------------------------------+                    |   NEEDS_RESET
//!    |  status := 0, reads as before until the event loop            |      |
//!    +-------------------------- has reset the device ---------------+------+
//! ```
//!
//! Hostile guest: every register takes every value at every time; what §4.1.4.3.2 forbids has no
//! effect. Queue addresses and sizes are only judged when the device is activated.

use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// §2.1: status bits that we look at.
const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
const NEEDS_RESET: u8 = 0x40;

/// No interrupt vector chosen (§4.1.5.1.2).
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// VIRTIO_F_VERSION_1: without it a driver is of the legacy kind, which we do not serve.
const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_INDIRECT_DESC and VIRTIO_F_EVENT_IDX: the queue code knows both.
const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;

/// Length of the structure without queue_notify_data and queue_reset, whose features are not
/// offered.
pub(crate) const COMMON_BYTES: u32 = 0x38;

/// What a write asks of the event loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing.
    None,
    /// DRIVER_OK was set: activate the device.
    Activate,
    /// Reset the device, then call [`Registers::finish_reset`].
    Reset,
}

/// One queue as the driver set it up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct QueueRegisters {
    max: u16,
    size: u16,
    vector: u16,
    enabled: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl QueueRegisters {
    fn new(max: u16) -> Self {
        Self {
            max,
            size: max,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }

    /// All but the vector, which may change at any time.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn without_vector(&self) -> Self {
        Self {
            vector: NO_VECTOR,
            ..self.clone()
        }
    }

    /// Whether the driver enabled it.
    pub(crate) fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The queue, if what the driver set up is one.
    pub(crate) fn build(&self, memory: &GuestMemoryMmap, features: u64) -> Result<Queue, String> {
        let mut queue = Queue::new(self.max).map_err(|error| error.to_string())?;
        let text = |error: virtio_queue::Error| error.to_string();
        queue.try_set_size(self.size).map_err(text)?;
        // Those that cannot fail leave the old address in place where they should.
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .map_err(text)?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.available))
            .map_err(text)?;
        queue
            .try_set_used_ring_address(GuestAddress(self.used))
            .map_err(text)?;
        queue.set_event_idx(features & EVENT_IDX != 0);
        queue.set_ready(true);
        if queue.is_valid(memory) {
            Ok(queue)
        } else {
            Err("its rings are not in guest memory or not aligned".to_owned())
        }
    }
}

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

fn set_half(value: &mut u64, high: bool, half: u32) {
    let shift = if high { 32 } else { 0 };
    *value = *value & !(0xffff_ffff << shift) | u64::from(half) << shift;
}

/// The registers of one device: plain data, which is what is saved of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registers {
    offered: u64,
    accepted: u64,
    offered_select: u32,
    accepted_select: u32,
    config_vector: u16,
    status: u8,
    generation: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    active: bool,
    resetting: bool,
}

impl Registers {
    /// After reset.
    pub(crate) fn new(device_features: u64, queue_sizes: &[u16]) -> Self {
        Self {
            offered: device_features | VERSION_1 | INDIRECT_DESC | EVENT_IDX,
            accepted: 0,
            offered_select: 0,
            accepted_select: 0,
            config_vector: NO_VECTOR,
            status: 0,
            generation: 0,
            queue_select: 0,
            queues: queue_sizes
                .iter()
                .map(|size| QueueRegisters::new(*size))
                .collect(),
            active: false,
            resetting: false,
        }
    }

    /// Whether these may stand for `other`, the registers of the same kind of device as made: what
    /// is offered and the sizes of queues must not have changed.
    pub(crate) fn fit(&self, other: &Self) -> bool {
        let sizes = |registers: &Self| -> Vec<u16> {
            registers.queues.iter().map(|queue| queue.max).collect()
        };
        self.offered == other.offered && sizes(self) == sizes(other) && !self.resetting
    }

    /// Whether the driver has set DRIVER_OK and the device has not found a violation since.
    pub(crate) fn is_live(&self) -> bool {
        self.active && self.status & NEEDS_RESET == 0
    }

    /// Features that both sides agreed on.
    pub(crate) fn features(&self) -> u64 {
        self.accepted
    }

    /// The queues.
    pub(crate) fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    /// Vector for changes of the configuration.
    pub(crate) fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// Vector of a queue.
    pub(crate) fn queue_vector(&self, queue: u16) -> u16 {
        self.queues
            .get(usize::from(queue))
            .map_or(NO_VECTOR, |queue| queue.vector)
    }

    /// The device's configuration changed.
    pub(crate) fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// The device found a violation.
    pub(crate) fn set_needs_reset(&mut self) {
        self.status |= NEEDS_RESET;
    }

    /// The device is as new: after a reset that the event loop carried out.
    pub(crate) fn finish_reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max).collect();
        let generation = self.generation;
        *self = Self::new(self.offered, &sizes);
        self.generation = generation;
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    fn selected(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    /// A queue that may be set up now: the selected one, not enabled, before DRIVER_OK.
    fn open_queue(&mut self) -> Option<&mut QueueRegisters> {
        if self.active {
            return None;
        }
        self.selected().filter(|queue| !queue.enabled)
    }

    /// The driver reads. Bytes past the end read as zero.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0; COMMON_BYTES as usize];
        self.write_image(&mut image);
        for (at, byte) in (offset..).zip(data) {
            let index = usize::try_from(at).ok();
            *byte = index
                .and_then(|index| image.get(index))
                .copied()
                .unwrap_or(0);
        }
    }

    /// Writes the registers to where the guest reads them.
    pub(crate) fn show(&self, words: &[AtomicU32]) {
        let mut image = [0; COMMON_BYTES as usize];
        self.write_image(&mut image);
        let (values, _) = image.as_chunks::<4>();
        for (word, value) in words.iter().zip(values) {
            word.store(u32::from_le_bytes(*value), Ordering::Release);
        }
    }

    fn write_image(&self, image: &mut [u8; COMMON_BYTES as usize]) {
        let word = |value: u64, select: u32| match select {
            0 => halves(value)[0],
            1 => halves(value)[1],
            _ => 0,
        };
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.offered_select.to_le_bytes());
        put(0x04, &word(self.offered, self.offered_select).to_le_bytes());
        put(0x08, &self.accepted_select.to_le_bytes());
        put(
            0x0c,
            &word(self.accepted, self.accepted_select).to_le_bytes(),
        );
        put(0x10, &self.config_vector.to_le_bytes());
        let count = u16::try_from(self.queues.len()).expect("a device of ours has few queues");
        put(0x12, &count.to_le_bytes());
        put(0x14, &[self.status, self.generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        let Some(queue) = self.queue() else {
            put(0x1a, &NO_VECTOR.to_le_bytes());
            return;
        };
        put(0x18, &queue.size.to_le_bytes());
        put(0x1a, &queue.vector.to_le_bytes());
        put(0x1c, &u16::from(queue.enabled).to_le_bytes());
        put(0x1e, &self.queue_select.to_le_bytes()); // queue_notify_off: one address a queue
        put(0x20, &queue.descriptors.to_le_bytes());
        put(0x28, &queue.available.to_le_bytes());
        put(0x30, &queue.used.to_le_bytes());
    }

    /// The driver writes a register as a whole (§4.1.3.1); 64-bit ones also by halves. Others are
    /// dropped.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match *data {
            [byte] if offset == 0x14 => return self.write_status(byte),
            [a, b] => self.write_16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if matches!(offset, 0x20 | 0x28 | 0x30) => {
                self.write_32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Effect::None
    }

    fn write_16(&mut self, offset: u64, value: u16) {
        match offset {
            0x10 => self.config_vector = value,
            0x16 => self.queue_select = value,
            0x18 => {
                if let Some(queue) = self.open_queue() {
                    queue.size = value;
                }
            }
            0x1a => {
                if let Some(queue) = self.selected() {
                    queue.vector = value;
                }
            }
            0x1c if value == 1 => {
                if let Some(queue) = self.open_queue() {
                    queue.enabled = true;
                }
            }
            _ => {}
        }
    }

    fn write_32(&mut self, offset: u64, value: u32) {
        match offset {
            0x00 => self.offered_select = value,
            0x08 => self.accepted_select = value,
            0x0c if self.status & FEATURES_OK == 0 && self.accepted_select < 2 => {
                set_half(&mut self.accepted, self.accepted_select == 1, value);
            }
            0x20..0x38 => {
                let Some(queue) = self.open_queue() else {
                    return;
                };
                let register = match offset & !7 {
                    0x20 => &mut queue.descriptors,
                    0x28 => &mut queue.available,
                    _ => &mut queue.used,
                };
                set_half(register, offset & 4 != 0, value);
            }
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return self.reset();
        }
        if self.resetting {
            return Effect::None;
        }
        let agreed = self.accepted & !self.offered == 0 && self.accepted & VERSION_1 != 0;
        // Bits are only ever added (§2.1.1), NEEDS_RESET is ours, and FEATURES_OK has to be agreed
        // to (§3.1.1).
        let mut added = value & !NEEDS_RESET & !self.status;
        if !agreed {
            added &= !FEATURES_OK;
        }
        self.status |= added;
        if added & DRIVER_OK != 0 && self.status & FEATURES_OK != 0 && !self.active {
            self.active = true;
            return Effect::Activate;
        }
        Effect::None
    }

    fn reset(&mut self) -> Effect {
        if !self.active {
            self.finish_reset();
            return Effect::None;
        }
        self.resetting = true;
        Effect::Reset
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn registers() -> Registers {
        Registers::new(1 << 5, &[256, 64])
    }

    fn read_16(registers: &Registers, offset: u64) -> u16 {
        let mut data = [0; 2];
        registers.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    fn agree(registers: &mut Registers, features: u64) {
        registers.write(0x14, &[1]);
        registers.write(0x14, &[3]);
        for (select, half) in [0_u32, 1].into_iter().zip(halves(features)) {
            registers.write(8, &select.to_le_bytes());
            registers.write(0xc, &half.to_le_bytes());
        }
        registers.write(0x14, &[0xb]);
    }

    #[test]
    fn a_driver_gets_to_driver_ok_and_back() {
        let mut registers = registers();
        agree(&mut registers, VERSION_1 | 1 << 5);
        assert_eq!(read_16(&registers, 0x14) & 0xff, 0xb);
        registers.write(0x16, &1_u16.to_le_bytes());
        assert_eq!(read_16(&registers, 0x18), 64);
        registers.write(0x18, &16_u16.to_le_bytes());
        registers.write(0x20, &0x1_0000_1000_u64.to_le_bytes());
        registers.write(0x1c, &[1, 0]);
        assert_eq!(registers.write(0x14, &[0xf]), Effect::Activate);
        assert_eq!(registers.write(0x14, &[0xf]), Effect::None);
        assert_eq!(registers.queues[1].descriptors, 0x1_0000_1000);
        assert_eq!(registers.write(0x14, &[0]), Effect::Reset);
        assert_eq!(read_16(&registers, 0x14) & 0xff, 0xf, "until it is done");
        assert_eq!(registers.write(0x14, &[0xf]), Effect::None);
        registers.finish_reset();
        assert_eq!(read_16(&registers, 0x14) & 0xff, 0);
        assert!(!registers.queues[1].enabled);
    }

    #[test]
    fn features_not_offered_or_a_legacy_driver_are_refused() {
        for features in [VERSION_1 | 1 << 6, 1 << 5] {
            let mut registers = registers();
            agree(&mut registers, features);
            assert_eq!(read_16(&registers, 0x14) & 0xff, 3);
            assert_eq!(registers.write(0x14, &[0xf]), Effect::None);
        }
    }

    #[test]
    fn a_live_queue_does_not_change() {
        let mut registers = registers();
        agree(&mut registers, VERSION_1);
        registers.write(0x1c, &[1, 0]);
        registers.write(0x18, &2_u16.to_le_bytes());
        registers.write(0x20, &4096_u64.to_le_bytes());
        assert_eq!(
            (registers.queues[0].size, registers.queues[0].descriptors),
            (256, 0)
        );
        registers.write(0x14, &[0xf]);
        registers.write(0x16, &1_u16.to_le_bytes());
        registers.write(0x1c, &[1, 0]);
        assert!(!registers.queues[1].enabled);
    }

    #[test]
    fn only_sound_queues_are_built() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let sound = QueueRegisters {
            descriptors: 0x1000,
            available: 0x2000,
            used: 0x3000,
            ..QueueRegisters::new(256)
        };
        assert!(sound.build(&memory, VERSION_1).is_ok());
        for unsound in [
            QueueRegisters {
                size: 3,
                ..sound.clone()
            },
            QueueRegisters {
                size: 512,
                ..sound.clone()
            },
            QueueRegisters {
                size: 0,
                ..sound.clone()
            },
            QueueRegisters {
                descriptors: 0x1001,
                ..sound.clone()
            },
            QueueRegisters {
                used: 1 << 20,
                ..sound.clone()
            },
            QueueRegisters {
                available: u64::MAX - 1,
                ..sound.clone()
            },
        ] {
            assert!(unsound.build(&memory, VERSION_1).is_err(), "{unsound:?}");
        }
    }

    proptest! {
        #[test]
        fn any_accesses_keep_the_invariants(
            accesses in prop::collection::vec(
                (0_u64..0x48, prop::collection::vec(any::<u8>(), 0..9)), 0..200)
        ) {
            let mut registers = registers();
            for (offset, data) in accesses {
                let was_active = registers.active;
                let effect = registers.write(offset, &data);
                prop_assert!(effect != Effect::Activate || !was_active);
                prop_assert!(effect != Effect::Reset || was_active);
                prop_assert!(!registers.active || registers.accepted & !registers.offered == 0);
                let mut back = [0; 8];
                registers.read(offset, &mut back);
            }
        }
    }
}
