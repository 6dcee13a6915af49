//! Interrupts of one kind, MSI-X or MSI, from the function to the guest through the kernel alone.
//!
//! ```text
//! function --vfio--> eventfd of a vector --irqfd--> the guest's message
//! ```
//!
//! Vectors come into use when the guest opens them; a masked one is disconnected at the guest's end
//! and what it signals waits in its eventfd. The kernel knows one kind at a time: a guest that
//! switches both on, which no function allows (PCI 3.0 §6.8.1), has the first.
//!
//! The pin (INTx) is not among them: [`super::mediate`].

use std::{
    collections::BTreeMap,
    io,
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pericarp_sys::vfio;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    devices::virtio::transport::Platform,
    pci::{msix::Msix, routes::InterruptMessage},
};

/// The vectors of one kind.
#[derive(Debug)]
pub(super) struct Interrupts {
    /// [`vfio::MSIX`] or [`vfio::MSI`].
    kind: u32,
    count: u16,
    /// Vectors can be added one by one.
    grows: bool,
    table: Msix,
    live: Mutex<Live>,
}

/// What the function signals now.
#[derive(Debug, Default)]
struct Live {
    on: bool,
    /// Vectors that the host has for it, when it cannot have more without starting again.
    allocated: usize,
    connected: BTreeMap<u16, EventFd>,
}

impl Interrupts {
    /// `count` vectors, or as many as the kernel knows; all of them closed.
    pub(super) fn new(
        function: &vfio::Function,
        kind: u32,
        count: u16,
        platform: &Platform,
    ) -> io::Result<Self> {
        let there = function.interrupts(kind)?;
        // Both come from the same register; of a kernel that thinks otherwise the lower holds.
        let count = count.min(u16::try_from(there.count).unwrap_or(u16::MAX));
        Ok(Self {
            kind,
            count,
            grows: there.grows,
            table: Msix::new(
                Arc::clone(&platform.vm),
                Arc::clone(&platform.routes),
                Arc::clone(&platform.interrupts),
                count,
            ),
            live: Mutex::default(),
        })
    }

    /// Vectors.
    pub(super) fn table(&self) -> &Msix {
        &self.table
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest wrote the one message of MSI, or switched it.
    pub(super) fn set_message(&self, message: InterruptMessage, enabled: bool) {
        self.table.set_message(message, enabled);
    }

    /// Connects the vectors that are open now; `only` names the one that may have changed.
    pub(super) fn connect(&self, function: &vfio::Function, only: Option<u16>) {
        let mut live = self.live();
        if !self.table.is_enabled() {
            if std::mem::take(&mut *live).on {
                let _ = function.silence(self.kind);
                self.table.forget_routes();
            }
            return;
        }
        if !live.on {
            // The function's own enable bit follows; no vector signals anything yet.
            live.on = function.signal(self.kind, 0, &[None]).is_ok();
            live.allocated = 1;
        }
        let vectors = match only {
            Some(vector) => vector..vector + 1,
            None => 0..self.count,
        };
        for vector in vectors {
            if live.connected.contains_key(&vector) || !self.table.is_open(vector) {
                continue;
            }
            // A vector that cannot be had is silent: only the guest's own device suffers.
            if let Ok(Some(eventfd)) = self.table.eventfd(vector) {
                live.connected.insert(vector, eventfd);
                let _ = live.signal(function, self.kind, vector, self.grows);
            }
        }
    }

    /// Has the function signal nothing more.
    pub(super) fn silence(&self, function: &vfio::Function) {
        let _ = function.silence(self.kind);
    }

    /// Gives everything back, when the function is gone.
    pub(super) fn forget(&self) {
        *self.live() = Live::default();
        self.table.forget_routes();
    }
}

impl Live {
    fn signal(
        &mut self,
        function: &vfio::Function,
        kind: u32,
        vector: u16,
        grows: bool,
    ) -> io::Result<()> {
        let index = usize::from(vector);
        if grows || index < self.allocated {
            let eventfd = self.connected.get(&vector).map(AsRawFd::as_raw_fd);
            return function.signal(kind, vector, &[eventfd]);
        }
        // Before Linux 6.5 more vectors mean all of them anew; what came in between is lost, so
        // each one in use is signalled once more: drivers look and find nothing.
        function.silence(kind)?;
        let eventfd = |vector: u16| self.connected.get(&vector).map(AsRawFd::as_raw_fd);
        let all: Vec<_> = (0..=vector).map(eventfd).collect();
        function.signal(kind, 0, &all)?;
        self.allocated = index + 1;
        for eventfd in self.connected.values() {
            let _ = eventfd.write(1);
        }
        Ok(())
    }
}
