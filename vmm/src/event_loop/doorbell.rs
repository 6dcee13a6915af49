//! How vCPU threads wake the event loop.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use vmm_sys_util::eventfd::EventFd;

use crate::pci::Slot;

/// How the machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU could not go on.
    Vcpu(u16, String),
}

/// How vCPU threads wake the loop. Whatever a guest does, it is a handful of flags: nothing queues
/// up.
#[derive(Debug)]
pub(crate) struct Doorbell {
    eventfd: EventFd,
    slots: [AtomicU64; 4],
    panicked: AtomicBool,
    end: Mutex<Option<End>>,
}

impl Doorbell {
    /// Silent.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            eventfd: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            slots: Default::default(),
            panicked: AtomicBool::new(false),
            end: Mutex::new(None),
        })
    }

    fn wake(&self) {
        // It fails only when the counter is full, and then the loop is awake already.
        let _ = self.eventfd.write(1);
    }

    /// The function at `slot` has work for the loop.
    pub(crate) fn ring(&self, slot: Slot) {
        self.slots[usize::from(slot / 64)].fetch_or(1 << (slot % 64), SeqCst);
        self.wake();
    }

    /// The guest's kernel says that it panicked.
    pub(crate) fn panicked(&self) {
        self.panicked.store(true, SeqCst);
        self.wake();
    }

    /// The machine ended; the first reason stays.
    pub(crate) fn end(&self, end: End) {
        self.end
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(end);
        self.wake();
    }

    /// On the loop: quiet until the next ring.
    pub(crate) fn answer(&self) {
        // Nothing to read: another event of the same ring was quicker.
        let _ = self.eventfd.read();
    }

    /// Slots that rang.
    pub(crate) fn take_slots(&self) -> Vec<Slot> {
        let mut rang = Vec::new();
        for (base, word) in [0_u8, 64, 128, 192].into_iter().zip(&self.slots) {
            let bits = word.swap(0, SeqCst);
            rang.extend(
                (0..64)
                    .filter(|bit| bits >> bit & 1 == 1)
                    .map(|bit| base + bit),
            );
        }
        rang
    }

    /// Whether the guest panicked since the last call.
    pub(crate) fn take_panicked(&self) -> bool {
        self.panicked.swap(false, SeqCst)
    }

    /// How the machine ended, if it did.
    pub(crate) fn ended(&self) -> Option<End> {
        self.end
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl AsRawFd for Doorbell {
    fn as_raw_fd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_are_flags() {
        let doorbell = Doorbell::new().unwrap();
        for slot in [0, 63, 64, 255, 255] {
            doorbell.ring(slot);
        }
        doorbell.end(End::PowerOff);
        doorbell.end(End::Reset);
        doorbell.answer();
        assert_eq!(doorbell.take_slots(), [0, 63, 64, 255]);
        assert!(doorbell.take_slots().is_empty());
        assert_eq!(doorbell.ended(), Some(End::PowerOff));
    }
}
