//! A bounded table of named things that take time to make and to remove.
//!
//! ```text
//! (none) ──reserve──> busy ──fill──> ready ──begin_removal──> busy ──drop──> (none)
//!                      └──drop──> (none)                       └──fill──> ready (it failed)
//! ```
//!
//! A name is taken from the moment somebody begins to make the thing, so a second create is refused
//! rather than raced.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Why a name cannot be reserved or found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TableError {
    /// The name is taken.
    #[error("{kind} {name:?} already exists")]
    Exists {
        /// The kind of entries in the table.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// No such thing.
    #[error("{kind} {name:?} does not exist")]
    Unknown {
        /// The kind of entries in the table.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// It is being made or removed.
    #[error("{kind} {name:?} is being made or removed")]
    Busy {
        /// The kind of entries in the table.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// No room.
    #[error("{kind} {name:?}: there are already {limit}; delete ended ones")]
    Full {
        /// The kind of entries in the table.
        kind: &'static str,
        /// The name.
        name: String,
        /// The bound.
        limit: usize,
    },
}

/// The table. `None` is busy.
#[derive(Debug)]
pub(crate) struct Table<T> {
    kind: &'static str,
    limit: usize,
    entries: Arc<Mutex<HashMap<String, Option<T>>>>,
}

impl<T: Clone> Table<T> {
    /// An empty table of at most `limit` things called `kind` in errors.
    pub(crate) fn new(kind: &'static str, limit: usize) -> Self {
        Self {
            kind,
            limit,
            entries: Arc::default(),
        }
    }

    /// Takes a name for a thing to be made.
    pub(crate) fn reserve(&self, name: &str) -> Result<Reservation<T>, TableError> {
        let mut entries = lock(&self.entries);
        if entries.contains_key(name) {
            return Err(TableError::Exists {
                kind: self.kind,
                name: name.to_owned(),
            });
        }
        if entries.len() >= self.limit {
            return Err(TableError::Full {
                kind: self.kind,
                name: name.to_owned(),
                limit: self.limit,
            });
        }
        entries.insert(name.to_owned(), None);
        Ok(self.reservation(name))
    }

    /// The thing of this name.
    pub(crate) fn get(&self, name: &str) -> Result<T, TableError> {
        match lock(&self.entries).get(name) {
            Some(Some(thing)) => Ok(thing.clone()),
            Some(None) => Err(TableError::Busy {
                kind: self.kind,
                name: name.to_owned(),
            }),
            None => Err(TableError::Unknown {
                kind: self.kind,
                name: name.to_owned(),
            }),
        }
    }

    /// Takes the thing to remove it. Its name stays taken until the reservation is dropped.
    pub(crate) fn begin_removal(&self, name: &str) -> Result<(T, Reservation<T>), TableError> {
        let mut entries = lock(&self.entries);
        let Some(slot) = entries.get_mut(name) else {
            return Err(TableError::Unknown {
                kind: self.kind,
                name: name.to_owned(),
            });
        };
        let Some(thing) = slot.take() else {
            return Err(TableError::Busy {
                kind: self.kind,
                name: name.to_owned(),
            });
        };
        Ok((thing, self.reservation(name)))
    }

    /// Everything that is ready.
    pub(crate) fn all(&self) -> Vec<(String, T)> {
        lock(&self.entries)
            .iter()
            .filter_map(|(name, thing)| Some((name.clone(), thing.clone()?)))
            .collect()
    }

    fn reservation(&self, name: &str) -> Reservation<T> {
        Reservation {
            name: Some(name.to_owned()),
            entries: Arc::clone(&self.entries),
        }
    }
}

/// A name that is taken; dropping it gives the name back.
#[derive(Debug)]
pub(crate) struct Reservation<T> {
    name: Option<String>,
    entries: Arc<Mutex<HashMap<String, Option<T>>>>,
}

impl<T> Reservation<T> {
    /// Puts the thing in its place.
    pub(crate) fn fill(mut self, thing: T) {
        if let Some(name) = self.name.take() {
            lock(&self.entries).insert(name, Some(thing));
        }
    }
}

impl<T> Drop for Reservation<T> {
    fn drop(&mut self) {
        if let Some(name) = self.name.take() {
            lock(&self.entries).remove(&name);
        }
    }
}

fn lock<V>(mutex: &Mutex<V>) -> MutexGuard<'_, V> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_from_reservation_to_removal() {
        let table: Table<u32> = Table::new("thing", 2);
        let first = table.reserve("a").unwrap();
        assert!(matches!(table.reserve("a"), Err(TableError::Exists { .. })));
        assert!(matches!(table.get("a"), Err(TableError::Busy { .. })));
        first.fill(1);
        assert_eq!(table.get("a"), Ok(1));
        drop(table.reserve("b").unwrap());
        assert!(matches!(table.get("b"), Err(TableError::Unknown { .. })));
        let _second = table.reserve("b").unwrap();
        assert!(matches!(table.reserve("c"), Err(TableError::Full { .. })));
        let (thing, removal) = table.begin_removal("a").unwrap();
        assert!(matches!(
            table.begin_removal("a"),
            Err(TableError::Busy { .. })
        ));
        removal.fill(thing);
        let (_, removal) = table.begin_removal("a").unwrap();
        drop(removal);
        assert!(matches!(table.get("a"), Err(TableError::Unknown { .. })));
    }
}
