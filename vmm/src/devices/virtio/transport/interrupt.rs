//! A device's interrupts: which vector each queue and the configuration use, and the ISR byte for
//! drivers that poll it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering::SeqCst},
};

use vmm_sys_util::eventfd::EventFd;

use super::registers::{NO_VECTOR, Registers};
use crate::{devices::virtio::device::Interrupt, pci::msix::Msix};

/// ISR status (virtio 1.2 §4.1.4.5): a queue, the configuration.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Interrupts of one device.
#[derive(Debug)]
pub(super) struct Vectors {
    msix: Arc<Msix>,
    queues: Vec<AtomicU16>,
    config: AtomicU16,
    isr: AtomicU8,
    config_changed: AtomicBool,
}

impl Vectors {
    /// No vector chosen.
    pub(super) fn new(msix: Arc<Msix>, queues: usize) -> Self {
        Self {
            msix,
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config: AtomicU16::new(NO_VECTOR),
            isr: AtomicU8::new(0),
            config_changed: AtomicBool::new(false),
        }
    }

    /// Takes over what the driver chose.
    pub(super) fn update(&self, registers: &Registers) {
        self.config.store(registers.config_vector(), SeqCst);
        for (index, queue) in (0..).zip(&self.queues) {
            queue.store(registers.queue_vector(index), SeqCst);
        }
    }

    /// The driver reads the ISR byte, which clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, SeqCst)
    }

    /// Whether the configuration changed since the last call.
    pub(super) fn take_config_changed(&self) -> bool {
        self.config_changed.swap(false, SeqCst)
    }

    /// No interrupt is pending any more.
    pub(super) fn reset(&self) {
        self.isr.store(0, SeqCst);
        self.msix.forget_routes();
    }
}

impl Interrupt for Vectors {
    fn signal_queue(&self, queue: u16) {
        let Some(vector) = self.queues.get(usize::from(queue)) else {
            return;
        };
        self.isr.fetch_or(ISR_QUEUE, SeqCst);
        self.msix.signal(vector.load(SeqCst));
    }

    fn signal_config(&self) {
        self.config_changed.store(true, SeqCst);
        self.isr.fetch_or(ISR_CONFIG, SeqCst);
        self.msix.signal(self.config.load(SeqCst));
    }

    fn queue_eventfd(&self, queue: u16) -> Option<EventFd> {
        let vector = self.queues.get(usize::from(queue))?.load(SeqCst);
        self.msix.eventfd(vector).ok().flatten()
    }
}
