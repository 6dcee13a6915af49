//! Events that wait for the host: out of memory, device gone.
//!
//! The queue holds [`EVENTS_PENDING_MAX`] at most. An event equal to one that waits says nothing
//! new and is folded into it; when the queue is full all the same, the oldest goes.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pericarp_protocol::{
    guest::{DeviceGone, Event, OutOfMemory, event},
    limits::EVENTS_PENDING_MAX,
};
use tokio::sync::Notify;

use crate::ground::{
    files, log,
    uevents::{UEVENT_BYTES_MAX, Uevents, removed_function},
};

/// The queue.
#[derive(Debug, Default)]
pub(crate) struct Events {
    pending: Mutex<VecDeque<Event>>,
    arrived: Notify,
}

impl Events {
    /// The kernel's OOM killer ended something in a container.
    pub(crate) fn out_of_memory(&self, container_id: &str) {
        self.push(event::Event::OutOfMemory(OutOfMemory {
            container_id: container_id.to_owned(),
            ..Default::default()
        }));
    }

    /// A device is gone from the bus.
    pub(crate) fn device_gone(&self, pci_address: &str) {
        self.push(event::Event::DeviceGone(DeviceGone {
            pci_address: pci_address.to_owned(),
            ..Default::default()
        }));
    }

    /// Waits for the next event.
    pub(crate) async fn next(&self) -> Event {
        loop {
            let arrived = self.arrived.notified();
            if let Some(event) = self.lock().pop_front() {
                return event;
            }
            arrived.await;
        }
    }

    fn push(&self, event: event::Event) {
        let event = Event {
            event: Some(event),
            ..Default::default()
        };
        let mut pending = self.lock();
        if pending.contains(&event) {
            return;
        }
        if pending.len() >= EVENTS_PENDING_MAX {
            pending.pop_front();
        }
        pending.push_back(event);
        drop(pending);
        self.arrived.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Event>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the host of PCI functions that are gone, whoever took them away. For ever.
pub(crate) async fn report_removals(events: Arc<Events>) {
    let uevents = match Uevents::new().and_then(files::watch) {
        Ok(uevents) => uevents,
        Err(error) => {
            log::warn(format_args!("cannot hear of devices: {error}"));
            return;
        }
    };
    loop {
        let Ok(mut guard) = uevents.readable().await else {
            return;
        };
        guard.clear_ready();
        let mut buffer = [0; UEVENT_BYTES_MAX];
        while let Ok(message) = uevents.get_ref().receive(&mut buffer) {
            if let Some(address) = removed_function(message) {
                events.device_gone(address.as_ref());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_events_are_folded_and_the_oldest_dropped() {
        let events = Events::default();
        for _ in 0..3 {
            events.out_of_memory("a");
        }
        assert_eq!(events.lock().len(), 1);
        for index in 0..EVENTS_PENDING_MAX {
            events.device_gone(&index.to_string());
        }
        assert_eq!(events.lock().len(), EVENTS_PENDING_MAX);
        assert!(!events.lock()[0].has_out_of_memory());
    }
}
