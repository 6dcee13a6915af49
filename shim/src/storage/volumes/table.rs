//! Which shares a pod has, who uses them, and which share a source belongs to: decisions without
//! any call to the kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use super::source::Location;
use crate::host::id_map::IdMap;

/// Deepest path within a share, in components: the agent resolves no deeper paths than 64, and
/// subPaths are far shallower.
const WAY_COMPONENTS_MAX: usize = 32;

/// What a mount asks for, beside the source itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct View {
    /// Mounts beneath the source come along.
    pub(super) recursive: bool,
    /// How owners of files are shown, and whether those of mounts beneath too.
    pub(super) id_map: Option<(IdMap, bool)>,
}

/// A source as a mount asks for it.
#[derive(Debug)]
pub(super) struct Asked<'a> {
    /// `None`: no path leads to it.
    pub(super) location: Option<&'a Location>,
    pub(super) view: &'a View,
    pub(super) is_directory: bool,
    pub(super) writes: bool,
}

/// A source that the guest has.
#[derive(Debug)]
pub(super) struct Shared {
    /// Where it was when it was shared; `None` when nothing else can be found to be the same.
    pub(super) location: Option<Location>,
    pub(super) view: View,
    /// It belongs to this pod alone, so that a container that may write a part of it may as well
    /// write all of it.
    pub(super) is_private: bool,
    /// Mounts of it that this shim makes read-only and writable, as paths beneath it: those that
    /// the host had writable.
    pub(super) own_mounts: Vec<PathBuf>,
    /// The host refuses writes.
    pub(super) read_only: bool,
    users: Vec<User>,
}

#[derive(Debug)]
struct User {
    container: String,
    /// It has the whole share and not a part.
    whole: bool,
    writes: bool,
}

impl Shared {
    /// A share that nobody uses yet.
    pub(super) fn new(location: Option<Location>, view: View, is_private: bool) -> Self {
        Self {
            location,
            view,
            is_private,
            own_mounts: Vec::new(),
            read_only: false,
            users: Vec::new(),
        }
    }

    /// Whether a container may write to it.
    pub(super) fn is_written(&self) -> bool {
        self.users.iter().any(|user| user.writes)
    }

    /// Whether no container has it any more.
    pub(super) fn is_unused(&self) -> bool {
        self.users.is_empty()
    }

    /// The path from this share to `asked`, if it may be used for it. Write access to a part never
    /// opens the rest of a share that another container has read-only: that is more than the pod
    /// was given.
    fn way_to(&self, asked: &Asked<'_>) -> Option<PathBuf> {
        let (own, other) = (self.location.as_ref()?, asked.location?);
        let same_mounts = self.view.recursive == asked.view.recursive || !asked.is_directory;
        // A source that is reached by a read-only mount of the host must not be written through
        // another mount of it, nor the other way round.
        let same_access = own.read_only == other.read_only;
        let same_view = self.view.id_map == asked.view.id_map && same_mounts && same_access;
        if own.device != other.device || !same_view {
            return None;
        }
        let way = other.path.strip_prefix(&own.path).ok()?;
        let whole = way.as_os_str().is_empty();
        let written_whole = || self.users.iter().any(|user| user.whole && user.writes);
        let may_write = whole || self.is_private || written_whole();
        (fits(way) && (may_write || !asked.writes)).then(|| way.to_owned())
    }
}

/// Whether a path within a share can be told to the agent, which takes text.
pub(super) fn fits(way: &Path) -> bool {
    way.to_str().is_some() && way.components().count() <= WAY_COMPONENTS_MAX
}

/// The shares of a pod by their numbers.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) shares: BTreeMap<u64, Shared>,
    next: u64,
}

impl Table {
    /// A number that no share of this pod had before: the guest may remember it for a while.
    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The share that `asked` belongs to, and the path from there; of several the narrowest. Those
    /// in `refused` turned out to hold something else at that path.
    pub(super) fn find(
        &self,
        asked: &Asked<'_>,
        refused: &BTreeSet<u64>,
    ) -> Option<(u64, PathBuf)> {
        let others = self
            .shares
            .iter()
            .filter(|(number, _)| !refused.contains(number));
        let found = others.filter_map(|(number, share)| Some((*number, share.way_to(asked)?)));
        found.min_by_key(|(_, way)| way.components().count())
    }

    /// Container `id` uses share `number`, at `way` beneath it.
    pub(super) fn take(&mut self, number: u64, id: &str, way: &Path, writes: bool) {
        if let Some(share) = self.shares.get_mut(&number) {
            share.users.push(User {
                container: id.to_owned(),
                whole: way.as_os_str().is_empty(),
                writes,
            });
        }
    }

    /// Undoes the last [`Self::take`] of container `id`.
    pub(super) fn give_back(&mut self, number: u64, id: &str) {
        if let Some(share) = self.shares.get_mut(&number)
            && let Some(index) = share.users.iter().rposition(|user| user.container == id)
        {
            share.users.remove(index);
        }
    }

    /// Container `id` uses nothing any more.
    pub(super) fn forget(&mut self, id: &str) {
        for share in self.shares.values_mut() {
            share.users.retain(|user| user.container != id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn location(device: &str, path: &str) -> Location {
        Location {
            device: device.to_owned(),
            path: path.into(),
            host_path: "/unused".into(),
            read_only: false,
        }
    }

    fn view(recursive: bool) -> View {
        View {
            recursive,
            id_map: None,
        }
    }

    fn table(paths: &[&str]) -> Table {
        let mut table = Table::default();
        for path in paths {
            let number = table.number();
            let share = Shared::new(Some(location("8:1", path)), view(true), false);
            table.shares.insert(number, share);
        }
        table
    }

    fn find(table: &Table, location: &Location, writes: bool) -> Option<(u64, String)> {
        let asked = Asked {
            location: Some(location),
            view: &view(true),
            is_directory: true,
            writes,
        };
        let (number, way) = table.find(&asked, &BTreeSet::new())?;
        Some((number, way.to_str().unwrap().to_owned()))
    }

    #[test]
    fn a_source_belongs_to_the_narrowest_share_above_it() {
        let table = table(&["/v", "/v/a/b", "/w"]);
        let at = |path: &str| find(&table, &location("8:1", path), false);
        let share = |number: u64, way: &str| Some((number, way.to_owned()));
        assert_eq!(at("/v"), share(1, ""));
        assert_eq!(at("/v/a"), share(1, "a"));
        assert_eq!(at("/v/a/b"), share(2, ""));
        assert_eq!(at("/v/a/b/c/d"), share(2, "c/d"));
        // Names are whole names, and what lies above a share is not of it.
        assert_eq!((at("/vv"), at("/"), at("/x")), (None, None, None));
        assert_eq!(find(&table, &location("8:2", "/v"), false), None);
        let deep = "/v".to_owned() + &"/d".repeat(WAY_COMPONENTS_MAX);
        assert!(at(&deep).is_some() && at(&(deep + "/d")).is_none());
        use std::os::unix::ffi::OsStrExt;
        let mut binary = location("8:1", "/v");
        binary.path.push(std::ffi::OsStr::from_bytes(b"\xff"));
        assert_eq!(find(&table, &binary, false), None);
    }

    #[test]
    fn what_looks_different_is_shared_apart() {
        let table = table(&["/v"]);
        let inside = location("8:1", "/v/f");
        let find = |view: &View, is_directory| {
            let asked = Asked {
                location: Some(&inside),
                view,
                is_directory,
                writes: false,
            };
            table.find(&asked, &BTreeSet::new())
        };
        assert!(find(&view(true), true).is_some());
        assert!(find(&view(false), true).is_none());
        // Nothing can be mounted beneath a file.
        assert!(find(&view(false), false).is_some());
        let id_map = IdMap::of_options("0:1:2", "0:1:2").map(|map| (map, false));
        let mapped = View {
            recursive: true,
            id_map,
        };
        assert!(find(&mapped, true).is_none());
    }

    #[test]
    fn shares_without_a_path_and_refused_ones_are_not_found() {
        let mut table = table(&["/v"]);
        let number = table.number();
        table
            .shares
            .insert(number, Shared::new(None, view(true), false));
        let mut asked = Asked {
            location: None,
            view: &view(true),
            is_directory: true,
            writes: false,
        };
        assert_eq!(table.find(&asked, &BTreeSet::new()), None);
        let wanted = location("8:1", "/v");
        asked.location = Some(&wanted);
        assert!(table.find(&asked, &BTreeSet::new()).is_some());
        assert_eq!(table.find(&asked, &BTreeSet::from([1])), None);
    }

    #[test]
    fn a_part_is_not_written_through_what_the_pod_may_only_read() {
        let mut table = table(&["/v"]);
        let (whole, part) = (location("8:1", "/v"), location("8:1", "/v/a"));
        table.take(1, "reader", Path::new(""), false);
        assert!(find(&table, &part, false).is_some());
        assert_eq!(find(&table, &part, true), None);
        // Whoever asks for the same may write it, and then others may write a part.
        assert!(find(&table, &whole, true).is_some());
        table.take(1, "writer", Path::new(""), true);
        assert!(find(&table, &part, true).is_some());
        table.forget("writer");
        assert_eq!(find(&table, &part, true), None);
        // A volume of the pod's own is given to the pod as a whole.
        table.shares.get_mut(&1).unwrap().is_private = true;
        assert!(find(&table, &part, true).is_some());
    }

    #[test]
    fn a_share_is_used_until_its_last_container_is_gone() {
        let mut table = table(&["/v"]);
        let state = |table: &Table| {
            let share = &table.shares[&1];
            (share.is_unused(), share.is_written())
        };
        assert_eq!(state(&table), (true, false));
        table.take(1, "a", Path::new(""), false);
        table.take(1, "a", Path::new("sub"), true);
        table.take(1, "b", Path::new(""), false);
        assert_eq!(state(&table), (false, true));
        table.give_back(1, "a");
        assert_eq!(state(&table), (false, false));
        table.forget("b");
        table.forget("nobody");
        assert_eq!(state(&table), (false, false));
        table.forget("a");
        assert_eq!(state(&table), (true, false));
        assert_eq!((table.number(), table.number()), (2, 3));
    }
}
