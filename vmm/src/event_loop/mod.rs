//! One epoll loop serves everything but the vCPUs. This folder has what it waits for, how a device
//! adds descriptors ([`Poller`]) and how other threads wake it ([`Doorbell`]).

mod doorbell;

use std::{fmt::Debug, io, os::fd::RawFd, sync::Arc};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub(crate) use self::doorbell::{Doorbell, End};
use crate::pci::Slot;

/// Readiness of a descriptor, as epoll bits (`libc::EPOLLIN`, ...).
pub(crate) type Readiness = u32;

/// Bits of a function's token; the loop uses the rest of the number.
pub(crate) const TOKEN_BITS: u32 = 24;

/// Adds and removes a device's own descriptors on the event loop. `token` is the device's own
/// number for the descriptor and comes back with its readiness.
pub(crate) trait Poller: Debug + Send + Sync {
    /// Starts waiting; level-triggered.
    fn add(&self, descriptor: RawFd, token: u32, readiness: Readiness) -> io::Result<()>;
    /// Changes what is waited for; 0 waits for hang-up only.
    fn modify(&self, descriptor: RawFd, token: u32, readiness: Readiness) -> io::Result<()>;
    /// Stops waiting. Call it before the descriptor is closed.
    fn remove(&self, descriptor: RawFd) -> io::Result<()>;
}

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
}
