//! MSI-X (PCI 3.0 §6.8.2): a table of messages in a BAR, a mask for each, and bits for what waited
//! behind a mask.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::routes::{InterruptMessage, Route, Routes};
use serde::{Deserialize, Serialize};

/// Bytes of a table entry: address, data, control.
const ENTRY_BYTES: u64 = 16;

/// Capability id.
pub(crate) const CAPABILITY: u8 = 0x11;

/// Message control: enabled, and all vectors masked.
const ENABLED: u16 = 1 << 15;
const ALL_MASKED: u16 = 1 << 14;

/// The most vectors of a function: the size field has 11 bits.
pub(crate) const VECTORS_MAX: u16 = 2048;

#[derive(Debug, Default)]
struct Entry {
    message: InterruptMessage,
    masked: bool,
    pending: bool,
    route: Option<Route>,
}

#[derive(Debug, Default)]
struct Table {
    entries: Vec<Entry>,
    enabled: bool,
    all_masked: bool,
}

/// One vector as it is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedVector {
    message: InterruptMessage,
    masked: bool,
    pending: bool,
}

/// The vectors of one function. Any thread may signal.
#[derive(Debug)]
pub(crate) struct Msix {
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    sent: Arc<AtomicU64>,
    table: Mutex<Table>,
}

impl Msix {
    /// `count` vectors, all masked.
    pub(crate) fn new(
        vm: Arc<VmFd>,
        routes: Arc<Routes>,
        sent: Arc<AtomicU64>,
        count: u16,
    ) -> Self {
        assert!(count <= VECTORS_MAX, "the size field holds it");
        let masked = || Entry {
            masked: true,
            ..Entry::default()
        };
        let table = Table {
            entries: (0..count).map(|_| masked()).collect(),
            ..Table::default()
        };
        Self {
            vm,
            routes,
            sent,
            table: Mutex::new(table),
        }
    }

    /// The capability without its header (§6.8.2.3): control, table offset, offset of the pending
    /// bits, both in `bar`; and which bits of it the guest may write.
    pub(crate) fn capability(&self, bar: u8, table: u32, pending: u32) -> ([u8; 10], [u8; 2]) {
        let count = u16::try_from(self.lock().entries.len()).expect("at most VECTORS_MAX");
        let mut bytes = [0; 10];
        bytes[..2].copy_from_slice(&(count - 1).to_le_bytes());
        bytes[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        bytes[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        (bytes, (ENABLED | ALL_MASKED).to_le_bytes())
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every vector; message control stands in configuration space.
    pub(crate) fn save(&self) -> Vec<SavedVector> {
        let saved = |entry: &Entry| SavedVector {
            message: entry.message,
            masked: entry.masked,
            pending: entry.pending,
        };
        self.lock().entries.iter().map(saved).collect()
    }

    /// Takes them over; false when they are those of another function. Nothing is sent before
    /// message control is set again.
    pub(crate) fn restore(&self, saved: &[SavedVector]) -> bool {
        let mut table = self.lock();
        if table.entries.len() != saved.len() {
            return false;
        }
        for (entry, saved) in table.entries.iter_mut().zip(saved) {
            entry.message = saved.message;
            entry.masked = saved.masked;
            entry.pending = saved.pending;
        }
        true
    }

    /// The guest wrote message control.
    pub(crate) fn set_control(&self, control: u16) {
        let mut table = self.lock();
        table.enabled = control & ENABLED != 0;
        table.all_masked = control & ALL_MASKED != 0;
        for vector in 0..table.entries.len() {
            self.update(&mut table, vector);
        }
    }

    /// The guest wrote the one message of MSI, which has no table and no mask.
    pub(crate) fn set_message(&self, message: InterruptMessage, enabled: bool) {
        let mut table = self.lock();
        table.enabled = enabled;
        let Some(entry) = table.entries.first_mut() else {
            return;
        };
        entry.message = message;
        entry.masked = false;
        self.update(&mut table, 0);
    }

    /// The guest reads the table.
    pub(crate) fn read_table(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        data.fill(0);
        let Some((vector, at)) = locate(&table, offset, data.len()) else {
            return;
        };
        let entry = &table.entries[vector];
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&entry.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&entry.message.data.to_le_bytes());
        bytes[12] = u8::from(entry.masked);
        data.copy_from_slice(&bytes[at..at + data.len()]);
    }

    /// The guest writes the table: 4 or 8 bytes, aligned (§6.8.2); others are dropped.
    pub(crate) fn write_table(&self, offset: u64, data: &[u8]) {
        let mut table = self.lock();
        let Some((vector, at)) = locate(&table, offset, data.len()) else {
            return;
        };
        if !matches!(data.len(), 4 | 8) || at % data.len() != 0 {
            return;
        }
        let entry = &mut table.entries[vector];
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&entry.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&entry.message.data.to_le_bytes());
        bytes[12] = u8::from(entry.masked);
        bytes[at..at + data.len()].copy_from_slice(data);
        let [a, b, c, d, e, f, g, h, i, j, k, l, control, ..] = bytes;
        entry.message.address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        entry.message.data = u32::from_le_bytes([i, j, k, l]);
        entry.masked = control & 1 != 0;
        self.update(&mut table, vector);
    }

    /// The guest reads the pending bits.
    pub(crate) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        for (at, byte) in (offset..).zip(data) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            let entries = table.entries.iter().skip(first).take(8).enumerate();
            *byte = entries.fold(0, |bits, (bit, entry)| {
                bits | u8::from(entry.pending) << bit
            });
        }
    }

    /// Whether the guest uses them.
    pub(crate) fn is_enabled(&self) -> bool {
        self.lock().enabled
    }

    /// Whether a vector would interrupt now.
    pub(crate) fn is_open(&self, vector: u16) -> bool {
        let table = self.lock();
        let entry = table.entries.get(usize::from(vector));
        table.enabled && !table.all_masked && entry.is_some_and(|entry| !entry.masked)
    }

    /// After a change: reconnects the vector's route, and sends what waited.
    fn update(&self, table: &mut Table, vector: usize) {
        let open = table.enabled && !table.all_masked && !table.entries[vector].masked;
        let entry = &mut table.entries[vector];
        if let Some(route) = &mut entry.route {
            // On failure the vector stays silent: only the guest's own device suffers.
            let _ = self.routes.point(route, open.then_some(entry.message));
        }
        if open && entry.pending {
            entry.pending = false;
            self.send(entry.message);
        }
    }

    fn send(&self, message: InterruptMessage) {
        let [address_lo, address_hi] = message.address_halves();
        let message = kvm_msi {
            address_lo,
            address_hi,
            data: message.data,
            ..Default::default()
        };
        // A message that reaches no vCPU is the guest's own doing.
        let _ = self.vm.signal_msi(message);
        self.sent.fetch_add(1, Relaxed);
    }

    /// Interrupts the guest by `vector`; one beyond the table (0xffff: none chosen) does nothing.
    pub(crate) fn signal(&self, vector: u16) {
        let mut table = self.lock();
        if !table.enabled {
            return;
        }
        let all_masked = table.all_masked;
        let Some(entry) = table.entries.get_mut(usize::from(vector)) else {
            return;
        };
        if all_masked || entry.masked {
            entry.pending = true;
            return;
        }
        let message = entry.message;
        drop(table);
        self.send(message);
    }

    /// The eventfd that interrupts by `vector`, made when first asked for.
    pub(crate) fn eventfd(&self, vector: u16) -> io::Result<Option<EventFd>> {
        let mut table = self.lock();
        let index = usize::from(vector);
        if index >= table.entries.len() {
            return Ok(None);
        }
        if table.entries[index].route.is_none() {
            table.entries[index].route = Some(self.routes.make()?);
            self.update(&mut table, index);
        }
        table.entries[index]
            .route
            .as_ref()
            .map(Route::eventfd)
            .transpose()
    }

    /// Gives every route back, at a reset of the device.
    pub(crate) fn forget_routes(&self) {
        let mut table = self.lock();
        for entry in &mut table.entries {
            if let Some(route) = entry.route.take() {
                self.routes.remove(route);
            }
        }
    }
}

fn locate(table: &Table, offset: u64, length: usize) -> Option<(usize, usize)> {
    let vector = usize::try_from(offset / ENTRY_BYTES).ok()?;
    let at = usize::try_from(offset % ENTRY_BYTES).ok()?;
    (vector < table.entries.len() && at + length <= 16).then_some((vector, at))
}
