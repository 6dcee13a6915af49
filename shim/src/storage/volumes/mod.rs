//! Volumes of a pod: each source of the host is shared with the guest once, whatever containers,
//! subPaths and read-only views there are of it. They are bind mounts in the guest, and so a file
//! is one inode there (docs/decisions/0026-one-share-per-volume.md).
//!
//! ```text
//! <state>/shared/.volumes/<n>   the host's bind mount of a source
//! ```
//!
//! The state directory is unmounted as a tree by the journal, so that a killed shim leaves nothing.
//! Calls block: they are made off the event loop.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, DirBuilder, File},
    io,
    os::{fd::AsFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use pericarp_sys::{fscontext::DetachedMount, mount_tree};
use tracing::debug;

use crate::{
    errors::CallError,
    guest::{paths, spec::Share},
    host::{id_map, journal::unmount},
    storage::{
        kubelet,
        mountinfo::{self, Mount},
    },
};

mod attributes;
mod source;
mod table;

use attributes::Daemon;
use source::{Location, Source};
use table::{Asked, Shared, Table, View};

/// The directory of shares in the shared directory. No container can be called so: names of
/// containerd begin with a letter or digit.
const DIRECTORY: &str = ".volumes";

/// The shared volumes of a pod.
#[derive(Debug)]
pub(crate) struct Volumes {
    /// Where mount points are made: the shared directory itself is read-only.
    mount_points: PathBuf,
    /// The shared directory.
    shared: PathBuf,
    pod_uid: Option<String>,
    table: Mutex<Table>,
    daemon: OnceLock<Daemon>,
}

impl Volumes {
    /// In a new shared directory, whose mount points are made in `mount_points`.
    pub(super) fn new(mount_points: &Path, shared: &Path, pod_uid: Option<String>) -> Self {
        Self {
            mount_points: mount_points.to_owned(),
            shared: shared.to_owned(),
            pod_uid,
            table: Mutex::default(),
            daemon: OnceLock::new(),
        }
    }

    /// The daemon that serves the shared directory, with process id `pid`. It has the directory as
    /// its root.
    pub(super) fn served_by(&self, pid: i32) -> io::Result<()> {
        let _ = self.daemon.set(Daemon::of(pid, Path::new("/"))?);
        Ok(())
    }

    /// Shares what a container has. The answer is where each is in the guest. After a failure
    /// [`Self::remove`] gives back what was shared.
    pub(super) fn add(&self, id: &str, shares: &[Share]) -> Result<Vec<PathBuf>, CallError> {
        let failed = |share: &Share, error| {
            CallError::host(format!("sharing {}", share.source.display()), error)
        };
        let mut sources = Vec::with_capacity(shares.len());
        for share in shares {
            let source = Source::open(&share.source).map_err(|error| failed(share, error))?;
            sources.push((share, source));
        }
        let mounts = fs::read(mountinfo::OWN)
            .map(|text| mountinfo::parse(&text))
            .map_err(|error| CallError::host(mountinfo::OWN, error))?;
        let places = sources.iter().map(|(share, source)| {
            self.add_one(id, share, source, &mounts)
                .map_err(|error| failed(share, error))
        });
        places.collect()
    }

    fn add_one(
        &self,
        id: &str,
        share: &Share,
        source: &Source,
        mounts: &[Mount],
    ) -> io::Result<PathBuf> {
        let location = source.location(mounts)?;
        let view = View {
            recursive: share.recursive,
            id_map: share.id_map.clone(),
        };
        let asked = Asked {
            location: location.as_ref(),
            view: &view,
            is_directory: source.is_directory,
            writes: !share.read_only,
        };
        let mut refused = BTreeSet::new();
        // Each turn refuses one of the pod's shares.
        loop {
            let mut table = self.table();
            let Some((number, way)) = table.find(&asked, &refused) else {
                return self.share(&mut table, id, &asked, source, mounts);
            };
            // It is kept, but looked at without the lock: its file system may be slow.
            table.take(number, id, &way, false);
            drop(table);
            let point = self.point(number);
            let same = Source::open(&point).is_ok_and(|share| share.leads_to(&way, source));
            let mut table = self.table();
            table.give_back(number, id);
            if same {
                return self.join(&mut table, number, id, &way, asked.writes);
            }
            refused.insert(number);
        }
    }

    /// Container `id` uses what is at `way` beneath a share.
    fn join(
        &self,
        table: &mut Table,
        number: u64,
        id: &str,
        way: &Path,
        writes: bool,
    ) -> io::Result<PathBuf> {
        table.take(number, id, way, writes);
        if let Some(share) = table.shares.get_mut(&number)
            && writes
            && share.read_only
        {
            self.set_read_only(number, share, false)
                .inspect_err(|_| table.give_back(number, id))?;
        }
        let mut place = guest_path(number);
        if !way.as_os_str().is_empty() {
            place.push(way);
        }
        Ok(place)
    }

    /// Shares a source that the guest does not have: what was asked for alone, since others may
    /// have the rest of its volume, or the whole volume, if it belongs to this pod alone.
    fn share(
        &self,
        table: &mut Table,
        id: &str,
        asked: &Asked<'_>,
        source: &Source,
        mounts: &[Mount],
    ) -> io::Result<PathBuf> {
        let volume = asked
            .location
            .and_then(|location| self.private_volume(location, source, mounts));
        let is_private = volume.is_some();
        let number = table.number();
        let (whole, location, way) = match &volume {
            Some((whole, location, way)) => (whole, Some(location), way.clone()),
            None => (source, asked.location, PathBuf::new()),
        };
        let mut share = Shared::new(location.cloned(), asked.view.clone(), is_private);
        share.own_mounts = location
            .map(|location| writable_mounts(mounts, location, share.view.recursive))
            .unwrap_or_default();
        share.read_only = !asked.writes;
        if let Err(error) = self.mount(number, whole, &share) {
            let _ = self.unmount(number);
            return Err(error);
        }
        table.shares.insert(number, share);
        self.join(table, number, id, &way, asked.writes)
    }

    /// The pod's own volume that `source` lies in, and the path from there: an `emptyDir` of
    /// kubelet's.
    fn private_volume(
        &self,
        location: &Location,
        source: &Source,
        mounts: &[Mount],
    ) -> Option<(Source, Location, PathBuf)> {
        let path = kubelet::empty_dir(&location.host_path, self.pod_uid.as_deref()?)?;
        let volume = Source::open(&path).ok()?;
        let whole = volume.location(mounts).ok()??;
        let way = location.path.strip_prefix(&whole.path).ok()?.to_owned();
        let inside = whole.device == location.device
            && whole.host_path == path
            && volume.is_directory
            && table::fits(&way)
            && volume.leads_to(&way, source);
        inside.then_some((volume, whole, way))
    }

    /// Mounts a source for the guest.
    fn mount(&self, number: u64, source: &Source, share: &Shared) -> io::Result<()> {
        let point = self.make_mount_point(number, source.is_directory)?;
        let recursive = share.view.recursive;
        let tree = DetachedMount::clone_of(source.as_fd(), recursive)?;
        if let Some((map, all)) = &share.view.id_map {
            map.mapper()?.map(tree.as_fd(), *all).map_err(|error| {
                let path = share.location.as_ref().map(|location| &location.host_path);
                id_map::unsupported(&error, path.unwrap_or(&point))
            })?;
        }
        if share.read_only {
            tree.set_attributes(libc::MOUNT_ATTR_RDONLY, 0, recursive)?;
        }
        // Mounts that appear in the source later come along, and nothing goes back.
        mount_tree::set_propagation(tree.as_fd(), libc::MS_SLAVE, true)?;
        tree.attach(Source::open(&point)?.as_fd())
    }

    fn make_mount_point(&self, number: u64, is_directory: bool) -> io::Result<PathBuf> {
        let path = self.mount_points.join(DIRECTORY);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)?;
        let path = path.join(number.to_string());
        if is_directory {
            DirBuilder::new().mode(0o700).create(&path)?;
        } else {
            File::create_new(&path)?;
        }
        Ok(self.point(number))
    }

    fn set_read_only(&self, number: u64, share: &mut Shared, read_only: bool) -> io::Result<()> {
        let daemon = self
            .daemon
            .get()
            .ok_or_else(|| io::Error::other("the file-system daemon does not run"))?;
        let name = name(number);
        attributes::set_read_only((&self.shared, &name), &share.own_mounts, daemon, read_only)?;
        share.read_only = read_only;
        Ok(())
    }

    /// Container `id` has no volumes any more; unknown is fine. The answer is where the guest has
    /// shares that are gone now.
    pub(super) fn remove(&self, id: &str) -> io::Result<Vec<PathBuf>> {
        let mut table = self.table();
        table.forget(id);
        let mut gone = Vec::new();
        let mut first = Ok(());
        table.shares.retain(|number, share| {
            if share.is_unused() {
                let unmounted = self.unmount(*number);
                let done = unmounted.is_ok();
                if done {
                    gone.push(guest_path(*number));
                } else if first.is_ok() {
                    first = unmounted;
                }
                return !done;
            }
            if !share.read_only && !share.is_written() {
                // Busy as long as the guest has a file open for writing; the next change of a
                // container tries again.
                if let Err(error) = self.set_read_only(*number, share, true) {
                    debug!(number, %error, "a volume without a writer stays writable for now");
                }
            }
            true
        });
        first.map(|()| gone)
    }

    /// Takes a share away. Absent is fine.
    fn unmount(&self, number: u64) -> io::Result<()> {
        unmount(&self.point(number))?;
        let path = self.mount_points.join(name(number));
        let removed = match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => fs::remove_dir(&path),
            Ok(_) => fs::remove_file(&path),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn point(&self, number: u64) -> PathBuf {
        self.shared.join(name(number))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn name(number: u64) -> PathBuf {
    Path::new(DIRECTORY).join(number.to_string())
}

fn guest_path(number: u64) -> PathBuf {
    Path::new(paths::SHARED).join(name(number))
}

/// The mounts of a source that are writable on the host, as paths beneath it; the empty one is its
/// own.
fn writable_mounts(mounts: &[Mount], location: &Location, recursive: bool) -> Vec<PathBuf> {
    let mut ways = Vec::new();
    if !location.read_only {
        ways.push(PathBuf::new());
    }
    if recursive {
        let beneath = |mount: &Mount| {
            let way = mount.point.strip_prefix(&location.host_path).ok()?;
            (!way.as_os_str().is_empty()).then(|| (way.to_owned(), mount.is_read_only()))
        };
        // Of mounts on one path the last is seen.
        let seen: BTreeMap<_, _> = mounts.iter().filter_map(beneath).collect();
        ways.extend(
            seen.into_iter()
                .filter_map(|(way, read_only)| (!read_only).then_some(way)),
        );
    }
    ways
}

#[cfg(test)]
mod tests;
