//! `emptyDir` volumes in memory. kubelet mounts a tmpfs on the host; the containers of a VM get a
//! tmpfs of their guest instead, so that its pages are charged to the container that writes them
//! (docs/decisions/0023-memory-volumes-of-the-guest.md).
//!
//! ```text
//! host                                               guest
//! .../pods/<uid>/volumes/kubernetes.io~empty-dir/<v> /run/pericarp/memory/<n>   one a volume
//! .../pods/<uid>/volume-subpaths/<v>/<container>/<i> /run/pericarp/part-<container>-<n>
//! ```
//!
//! Whether a volume is the guest's is decided when the first container comes with it, and stays so
//! as long as the VM. A tmpfs that holds something, and not only the directories that kubelet makes
//! for sub paths, stays the host's and is shared: nothing of it may be lost.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use oci_spec::runtime::Spec;
use pericarp_protocol::guest::{BindSource, Directory, Scratch, Storage, storage::Source};
use tokio::sync::OnceCell;
use tracing::warn;

use crate::{
    errors::CallError,
    guest::{
        agent_client::{Agent, agent_call},
        spec::{self, SourceKind},
    },
    storage::{kubelet, mountinfo},
};

mod find;

use find::Place;

/// Where the volumes are in the guest; a number follows.
const GUEST: &str = "/run/pericarp/memory";
/// Where a sub path is mounted for a container; its id and a number follow.
const GUEST_PART: &str = "/run/pericarp/part-";

/// What was decided about the volumes of a pod.
#[derive(Debug, Default)]
pub(crate) struct MemoryVolumes {
    /// A pod without one has no volumes of kubelet's.
    uid: Option<String>,
    /// Id of the sandbox.
    sandbox: String,
    /// Memory that the VM has.
    memory_bytes: u64,
    decided: Mutex<HashMap<PathBuf, Decided>>,
}

/// `None`: it stays the host's.
type Decided = Option<Arc<Volume>>;

/// A volume of the guest.
#[derive(Debug)]
struct Volume {
    storage: Storage,
    /// It is mounted. Who comes meanwhile waits for that.
    mounted: OnceCell<()>,
}

/// Where the mounts of one container are that lie in volumes of the guest.
#[derive(Debug, Default)]
pub(crate) struct Found {
    sandbox: String,
    places: HashMap<PathBuf, PathBuf>,
    /// To be mounted for the container.
    pub(crate) storages: Vec<Storage>,
}

impl Found {
    /// What the source of a mount is.
    pub(crate) fn kind(&self, source: &Path) -> SourceKind {
        match self.places.get(source) {
            Some(place) => SourceKind::Guests(place.clone()),
            None => spec::source_kind(source, &self.sandbox),
        }
    }
}

impl MemoryVolumes {
    /// Of the pod of this sandbox with these annotations, whose VM has that much memory.
    pub(crate) fn of(
        sandbox: &str,
        annotations: &HashMap<String, String>,
        memory_bytes: u64,
    ) -> Self {
        Self {
            uid: kubelet::pod_uid(annotations),
            sandbox: sandbox.to_owned(),
            memory_bytes,
            decided: Mutex::default(),
        }
    }

    /// Finds the mounts of container `id` that lie in volumes of the guest, and mounts the volumes
    /// that no container of the pod had before.
    pub(crate) async fn attach(
        &self,
        agent: &Agent,
        spec: &Spec,
        id: &str,
    ) -> Result<Found, CallError> {
        let mut found = Found {
            sandbox: self.sandbox.clone(),
            ..Found::default()
        };
        let Some(uid) = &self.uid else {
            return Ok(found);
        };
        for source in spec::bind_sources(spec) {
            let failed = |error| CallError::host(format!("volume {}", source.display()), error);
            let Some(place) = look(source, uid).map_err(failed)? else {
                continue;
            };
            let Some(volume) = self.decide(&place).map_err(failed)? else {
                continue;
            };
            volume
                .mounted
                .get_or_try_init(|| mount(agent, &volume))
                .await?;
            let mount_point = volume.storage.mount_point.clone();
            let whole = place.beneath.as_os_str().is_empty();
            let target = match &place.bind {
                None if whole => mount_point,
                _ => {
                    let target = format!("{GUEST_PART}{id}-{}", found.storages.len());
                    let part = part_storage(&place, mount_point, target.clone())?;
                    found.storages.push(part);
                    target
                }
            };
            found.places.insert(source.clone(), target.into());
        }
        Ok(found)
    }

    /// Whose the volume is that `place` lies in.
    fn decide(&self, place: &Place) -> io::Result<Decided> {
        let mut decided = self.decided.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = decided.get(&place.volume) {
            return Ok(known.clone());
        }
        let volume = if is_unused(place)? {
            let mount_point = format!("{GUEST}/{}", decided.len());
            Some(Arc::new(Volume {
                storage: volume_storage(place, mount_point, self.memory_bytes)?,
                mounted: OnceCell::new(),
            }))
        } else {
            warn!(
                volume = %place.volume.display(),
                "it holds files of the host, and stays the host's: no container is charged for it"
            );
            None
        };
        decided.insert(place.volume.clone(), volume.clone());
        Ok(volume)
    }
}

async fn mount(agent: &Agent, volume: &Volume) -> Result<(), CallError> {
    match agent_call!(agent, add_storage, &volume.storage) {
        // There already: its answer to an earlier call came too late.
        Err(error) if !error.is_already_there() => Err(error),
        _ => Ok(()),
    }
}

/// The place of a mount's source in a volume in memory, if it lies in one of this pod's.
fn look(source: &Path, uid: &str) -> io::Result<Option<Place>> {
    // What is not there is refused by its field later.
    let Ok(real) = source.canonicalize() else {
        return Ok(None);
    };
    if !find::is_candidate(&real, uid) || statfs(&real)?.filesystem_type() != TMPFS_MAGIC {
        return Ok(None);
    }
    let Some(place) = find::find(&fs::read(mountinfo::OWN)?, &real, uid) else {
        return Ok(None);
    };
    // Paths of mountinfo may be hidden by other mounts: by the volume's own path the same thing
    // must be there.
    let through = place.volume.join(&place.beneath).symlink_metadata();
    let itself = real.metadata()?;
    let same = through.is_ok_and(|it| (it.dev(), it.ino()) == (itself.dev(), itself.ino()));
    Ok(same.then_some(place))
}

/// Whether a volume holds nothing but the directories that kubelet made for sub paths.
fn is_unused(place: &Place) -> io::Result<bool> {
    let mut known = place.mounted.clone();
    known.push(place.beneath.clone());
    // Each directory that is entered leads to one of `known`, which bounds the walk.
    let mut left = vec![PathBuf::new()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(place.volume.join(&directory))? {
            let entry = entry?;
            let path = directory.join(entry.file_name());
            let leads = known.iter().any(|way| way.starts_with(&path));
            if !leads || !entry.file_type()?.is_dir() {
                return Ok(false);
            }
            left.push(path);
        }
    }
    Ok(true)
}

/// The guest's tmpfs: its root and its bounds are those of the host's, but that one which the VM
/// could not hold has the kernel's own bound, half of the memory: full, it must not end the VM.
fn volume_storage(place: &Place, mount_point: String, memory_bytes: u64) -> io::Result<Storage> {
    let size_bytes = place.size_bytes.filter(|size| *size < memory_bytes);
    let root = place.volume.metadata()?;
    let files = statfs(&place.volume)?.files();
    let mut options = place.options.clone();
    options.push(format!("mode={:o}", root.mode() & 0o7777));
    options.push(format!("uid={}", root.uid()));
    options.push(format!("gid={}", root.gid()));
    // The kernel's own bound goes by the size of its memory, which a small guest has little of; a
    // container pays for its files' kernel memory in any case.
    options.push(format!("nr_inodes={files}"));
    if place.size_bytes == Some(0) {
        options.push("size=0".to_owned());
    }
    Ok(Storage {
        mount_point,
        options,
        source: Some(Source::Scratch(Scratch {
            size_bytes: size_bytes.unwrap_or_default(),
            ..Default::default()
        })),
        ..Default::default()
    })
}

/// A sub path of a volume that is mounted at `volume` in the guest.
fn part_storage(place: &Place, volume: String, mount_point: String) -> Result<Storage, CallError> {
    let mut path = place.volume.clone();
    let failed = |path: &Path, error| CallError::host(path.display(), error);
    let mut beneath = Vec::new();
    for name in &place.beneath {
        path.push(name);
        let found = path
            .symlink_metadata()
            .map_err(|error| failed(&path, error))?;
        if !found.is_dir() {
            return Err(CallError::Invalid(format!(
                "{}: the host has put it into a volume in memory whose files are the guest's: \
                 write it from a container",
                path.display()
            )));
        }
        let name = name.to_str().ok_or_else(|| {
            CallError::Invalid(format!("{}: its name is not UTF-8", path.display()))
        })?;
        beneath.push(Directory {
            name: name.to_owned(),
            mode: found.mode() & 0o7777,
            owner_id: found.uid(),
            group_id: found.gid(),
            ..Default::default()
        });
    }
    Ok(Storage {
        mount_point,
        options: place.bind.clone().unwrap_or_default(),
        source: Some(Source::Bind(BindSource {
            path: volume,
            beneath,
            ..Default::default()
        })),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests;
