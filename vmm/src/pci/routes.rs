//! Messages behind eventfds: KVM's table of interrupt routes.
//!
//! Only back ends outside this process (vhost, vhost-user) need one; the VMM's own devices send
//! their messages directly.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

/// An interrupt message (PCI 3.0 §6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct InterruptMessage {
    pub(crate) address: u64,
    pub(crate) data: u32,
}

impl InterruptMessage {
    /// The two halves of its address, low first.
    pub(crate) fn address_halves(self) -> [u32; 2] {
        let [a, b, c, d, e, f, g, h] = self.address.to_le_bytes();
        [
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]),
        ]
    }
}

/// The routes of a machine.
#[derive(Debug)]
pub(crate) struct Routes {
    vm: Arc<VmFd>,
    used: Mutex<BTreeMap<u32, InterruptMessage>>,
}

/// An eventfd that sends a message when it is signalled.
#[derive(Debug)]
pub(crate) struct Route {
    number: u32,
    eventfd: EventFd,
    connected: bool,
}

impl Route {
    /// Its eventfd.
    pub(crate) fn eventfd(&self) -> io::Result<EventFd> {
        self.eventfd.try_clone()
    }
}

impl Routes {
    /// No routes.
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            used: Mutex::default(),
        }
    }

    /// Makes an eventfd for a message, not connected yet: what is signalled meanwhile is kept.
    pub(crate) fn make(&self) -> io::Result<Route> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let number = (0..kvm_bindings::KVM_MAX_IRQ_ROUTES
            .try_into()
            .unwrap_or(u32::MAX))
            .find(|number| !used.contains_key(number))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        used.insert(number, InterruptMessage::default());
        Ok(Route {
            number,
            eventfd: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            connected: false,
        })
    }

    /// Points a route at `message`, or disconnects it (a masked vector): signals then wait in the
    /// eventfd.
    pub(crate) fn point(
        &self,
        route: &mut Route,
        message: Option<InterruptMessage>,
    ) -> io::Result<()> {
        let Some(message) = message else {
            if route.connected {
                self.vm.unregister_irqfd(&route.eventfd, route.number)?;
                route.connected = false;
            }
            return Ok(());
        };
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if used.insert(route.number, message) != Some(message) {
            self.set(&used)?;
        }
        if !route.connected {
            self.vm.register_irqfd(&route.eventfd, route.number)?;
            route.connected = true;
        }
        Ok(())
    }

    /// Takes a route away.
    pub(crate) fn remove(&self, mut route: Route) {
        // What fails here fails for a machine that is ending.
        let _ = self.point(&mut route, None);
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.remove(&route.number);
        let _ = self.set(&used);
    }

    fn set(&self, used: &BTreeMap<u32, InterruptMessage>) -> io::Result<()> {
        let entries: Vec<kvm_irq_routing_entry> = used
            .iter()
            .filter(|(_, message)| message.address != 0)
            .map(|(number, message)| {
                let mut entry = kvm_irq_routing_entry {
                    gsi: *number,
                    type_: KVM_IRQ_ROUTING_MSI,
                    ..Default::default()
                };
                let [low, high] = message.address_halves();
                entry.u.msi.address_lo = low;
                entry.u.msi.address_hi = high;
                entry.u.msi.data = message.data;
                entry
            })
            .collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(io::Error::other)?;
        Ok(self.vm.set_gsi_routing(&table)?)
    }
}
