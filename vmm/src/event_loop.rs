//! One epoll loop serves everything but the vCPUs; this module names what it waits for and how
//! others wake it.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use crate::{
    devices::virtio::{
        device::{Poller, Readiness},
        transport::TOKEN_BITS,
    },
    pci::Slot,
};

/// What an epoll event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The control socket.
    Control,
    /// The doorbell.
    Doorbell,
    /// A descriptor of the function at a slot, with the function's token for it.
    Function(Slot, u32),
}

impl Source {
    const CONTROL: u64 = 0;
    const DOORBELL: u64 = 1;
    const FUNCTION: u64 = 2;

    fn encode(self) -> u64 {
        match self {
            Self::Control => Self::CONTROL << 32,
            Self::Doorbell => Self::DOORBELL << 32,
            Self::Function(slot, token) => {
                Self::FUNCTION << 32 | u64::from(slot) << TOKEN_BITS | u64::from(token)
            }
        }
    }

    fn decode(data: u64) -> Self {
        let [a, b, c, slot, kind, ..] = data.to_le_bytes();
        match u64::from(kind) {
            Self::CONTROL => Self::Control,
            Self::DOORBELL => Self::Doorbell,
            _ => Self::Function(slot, u32::from_le_bytes([a, b, c, 0])),
        }
    }
}

const _: () = assert!(TOKEN_BITS == 24, "three bytes of token, one of slot");

/// Events taken at one wait.
const EVENTS_MAX: usize = 32;

/// The set of descriptors that the loop waits for.
#[derive(Debug)]
pub(crate) struct Waiter {
    epoll: Epoll,
}

impl Waiter {
    /// An empty set.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
        })
    }

    /// Waits for a descriptor of the machine itself; level-triggered.
    pub(crate) fn add(&self, fd: RawFd, source: Source, readiness: Readiness) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, source, readiness)
    }

    /// Changes what is waited for.
    pub(crate) fn modify(&self, fd: RawFd, source: Source, readiness: Readiness) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd, source, readiness)
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        source: Source,
        readiness: Readiness,
    ) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::from_bits_truncate(readiness), source.encode());
        self.epoll.ctl(operation, fd, event)
    }

    /// Waits until something is ready.
    pub(crate) fn wait(&self, ready: &mut Vec<(Source, Readiness)>) -> io::Result<()> {
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        ready.clear();
        let count = match self.epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let events = events[..count].iter();
        ready.extend(events.map(|event| (Source::decode(event.data()), event.events())));
        Ok(())
    }
}

/// A function's view of the loop.
#[derive(Debug)]
pub(crate) struct FunctionPoller {
    waiter: Arc<Waiter>,
    slot: Slot,
}

impl FunctionPoller {
    /// For the function at `slot`.
    pub(crate) fn new(waiter: Arc<Waiter>, slot: Slot) -> Self {
        Self { waiter, slot }
    }

    fn source(&self, token: u32) -> io::Result<Source> {
        if token >> TOKEN_BITS != 0 {
            return Err(io::Error::from_raw_os_error(libc::ERANGE));
        }
        Ok(Source::Function(self.slot, token))
    }
}

impl Poller for FunctionPoller {
    fn add(&self, descriptor: RawFd, token: u32, readiness: Readiness) -> io::Result<()> {
        self.waiter.add(descriptor, self.source(token)?, readiness)
    }

    fn modify(&self, descriptor: RawFd, token: u32, readiness: Readiness) -> io::Result<()> {
        self.waiter
            .modify(descriptor, self.source(token)?, readiness)
    }

    fn remove(&self, descriptor: RawFd) -> io::Result<()> {
        let event = EpollEvent::default();
        self.waiter
            .epoll
            .ctl(ControlOperation::Delete, descriptor, event)
    }
}

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
    fn sources_round_trip() {
        for source in [
            Source::Control,
            Source::Doorbell,
            Source::Function(0, 0),
            Source::Function(255, (1 << TOKEN_BITS) - 1),
        ] {
            assert_eq!(Source::decode(source.encode()), source);
        }
    }

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
