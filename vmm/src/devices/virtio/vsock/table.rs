//! The connection table: slots with generations, so that a stale readiness of a closed connection
//! finds nothing, and the room that each slot's connection gets, so that the table as a whole has a
//! bound in bytes.

use std::collections::BTreeSet;

use super::super::device::TOKEN_BITS;

/// Connections and handshakes at once.
pub(crate) const SLOTS_MAX: u32 = 4096;

/// Room in bytes by slot, widest first: few connections get a wide window each, thousands share a
/// bounded total.
const ROOMS: [(u32, u32); 3] = [(64, 256 << 10), (1024, 64 << 10), (SLOTS_MAX, 8 << 10)];

/// The most that all connections together can ever have buffered (100 MiB): every slot taken, every
/// host reader stopped, and a guest that fills each connection.
pub(crate) const BUFFERED_BYTES_MAX: u64 = 100 << 20;

const _: () = assert!(
    64 * (256 << 10) + (1024 - 64) * (64 << 10) + (SLOTS_MAX as u64 - 1024) * (8 << 10)
        <= BUFFERED_BYTES_MAX
);

/// Bits of a token that hold the slot.
const SLOT_BITS: u32 = 13;
/// Bits of a token that hold the slot's generation. A stale readiness is at most one round of the
/// event loop old, in which a slot is taken again a few times.
const GENERATION_BITS: u32 = 10;
/// Tokens below are the muxer's own descriptors.
const TOKENS_RESERVED: u32 = 2;

const _: () = assert!(SLOTS_MAX + TOKENS_RESERVED <= 1 << SLOT_BITS);
const _: () = assert!(SLOT_BITS + GENERATION_BITS <= TOKEN_BITS);

/// Bytes that the guest may have in flight towards the host on the connection in `slot`.
pub(crate) fn room_bytes(slot: u32) -> u32 {
    let mut rooms = ROOMS.iter();
    let found = rooms.find(|(slots, _)| slot < *slots);
    found.expect("the last entry covers all slots").1
}

/// A table of at most [`SLOTS_MAX`] entries; the lowest free slot is taken first.
#[derive(Debug)]
pub(crate) struct Table<T> {
    slots: Vec<(u32, Option<T>)>,
    free: BTreeSet<u32>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: BTreeSet::new(),
        }
    }
}

impl<T> Table<T> {
    /// Entries.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether [`Self::insert`] would refuse.
    pub(crate) fn is_full(&self) -> bool {
        self.len() >= SLOTS_MAX as usize
    }

    /// Puts an entry into the lowest free slot, made by `make` from its slot; `None` when the table
    /// is full.
    pub(crate) fn insert(&mut self, make: impl FnOnce(u32) -> T) -> Option<u32> {
        if let Some(slot) = self.free.pop_first() {
            self.slots[slot as usize].1 = Some(make(slot));
            return Some(slot);
        }
        let slot = u32::try_from(self.slots.len())
            .ok()
            .filter(|slot| *slot < SLOTS_MAX)?;
        self.slots.push((0, Some(make(slot))));
        Some(slot)
    }

    /// Takes an entry out; its tokens mean nothing from now on.
    pub(crate) fn remove(&mut self, slot: u32) -> Option<T> {
        let (generation, entry) = self.slots.get_mut(slot as usize)?;
        let taken = entry.take()?;
        *generation = generation.wrapping_add(1);
        self.free.insert(slot);
        Some(taken)
    }

    /// The entry in a slot.
    pub(crate) fn get_mut(&mut self, slot: u32) -> Option<&mut T> {
        self.slots.get_mut(slot as usize)?.1.as_mut()
    }

    /// Slots in use, with their entries.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let slots = (0..).zip(&self.slots);
        slots.filter_map(|(slot, (_, entry))| Some((slot, entry.as_ref()?)))
    }

    /// The number by which the event loop knows the entry's descriptor.
    pub(crate) fn token(&self, slot: u32) -> u32 {
        let generation = self
            .slots
            .get(slot as usize)
            .map_or(0, |(generation, _)| *generation);
        let generation = generation & ((1 << GENERATION_BITS) - 1);
        (generation << SLOT_BITS) | (slot + TOKENS_RESERVED)
    }

    /// The slot behind a token, unless its entry is gone or the token is the muxer's own.
    pub(crate) fn slot(&self, token: u32) -> Option<u32> {
        let slot = (token & ((1 << SLOT_BITS) - 1)).checked_sub(TOKENS_RESERVED)?;
        let (_, entry) = self.slots.get(slot as usize)?;
        (entry.is_some() && self.token(slot) == token).then_some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_table_refuses_and_a_freed_slot_is_taken_again() {
        let mut table = Table::default();
        for slot in 0..SLOTS_MAX {
            assert_eq!(table.insert(|slot| slot), Some(slot));
        }
        assert!(table.is_full());
        assert_eq!(table.insert(|slot| slot), None);
        for slot in [7, 3] {
            assert_eq!(table.remove(slot), Some(slot));
            assert_eq!(table.remove(slot), None);
        }
        assert_eq!(table.len() + 2, SLOTS_MAX as usize);
        assert_eq!(table.insert(|slot| slot), Some(3));
    }

    #[test]
    fn a_stale_token_finds_nothing() {
        let mut table = Table::default();
        let slot = table.insert(|_| ()).unwrap();
        let token = table.token(slot);
        assert_eq!(table.slot(token), Some(slot));
        table.remove(slot);
        assert_eq!(table.slot(token), None);
        table.insert(|_| ()).unwrap();
        assert_eq!(table.slot(token), None);
        assert_eq!(table.slot(table.token(slot)), Some(slot));
        for own in 0..TOKENS_RESERVED {
            assert_eq!(table.slot(own), None);
        }
        assert_eq!(table.slot(u32::MAX), None);
    }

    #[test]
    fn tokens_stay_in_their_bits_and_differ_between_neighbours() {
        let mut table = Table::default();
        let mut last = u32::MAX;
        for _ in 0..5000 {
            let slot = table.insert(|_| ()).unwrap();
            let token = table.token(slot);
            assert!(token < 1 << TOKEN_BITS && token != last);
            last = token;
            table.remove(slot);
        }
    }

    #[test]
    fn every_slot_has_room_and_the_sum_is_bounded() {
        let sum: u64 = (0..SLOTS_MAX).map(|slot| u64::from(room_bytes(slot))).sum();
        assert!(sum <= BUFFERED_BYTES_MAX, "{sum}");
        assert_eq!(room_bytes(0), 256 << 10);
        assert_eq!(room_bytes(SLOTS_MAX - 1), 8 << 10);
    }
}
