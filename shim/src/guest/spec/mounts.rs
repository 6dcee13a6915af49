//! Bind mounts: what the guest gets of the host's files, and under which owners.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};
use oci_spec::runtime::{LinuxIdMapping, Mount, Spec};

use super::{devices::is_pseudo, invalid};
use crate::{
    errors::CallError,
    guest::paths::{self, SHARED_MEMORY},
    host::id_map::IdMap,
};

/// A directory or file of the host that the guest gets by the shared directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Share {
    /// On the host.
    pub(crate) source: PathBuf,
    /// The mount that it is for, by its number in the specification.
    pub(crate) mount: usize,
    /// Submounts come along.
    pub(crate) recursive: bool,
    /// How owners of files are shown, and whether those of submounts too.
    pub(crate) id_map: Option<(IdMap, bool)>,
    /// The host itself refuses writes.
    pub(crate) read_only: bool,
}

/// What a bind mount's source is on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SourceKind {
    Missing,
    Directory,
    File,
    BlockDevice,
    CharacterDevice,
    SharedMemory,
    HugePages,
    /// The guest has it in its place, here.
    Guests(PathBuf),
}

/// Finds out on the host what the mount source of a container of `sandbox` is.
pub(crate) fn source_kind(path: &Path, sandbox: &str) -> SourceKind {
    use std::os::unix::fs::FileTypeExt;
    if is_shared_memory(path, sandbox) {
        return SourceKind::SharedMemory;
    }
    if is_on(path, HUGETLBFS_MAGIC) {
        return SourceKind::HugePages;
    }
    match std::fs::metadata(path) {
        Err(_) => SourceKind::Missing,
        Ok(metadata) if metadata.is_dir() => SourceKind::Directory,
        Ok(metadata) if metadata.file_type().is_block_device() => SourceKind::BlockDevice,
        Ok(metadata) if metadata.file_type().is_char_device() => SourceKind::CharacterDevice,
        Ok(_) => SourceKind::File,
    }
}

/// Whether a mount source is the pod's shared memory. containerd and CRI-O keep that in a directory
/// called `shm` on a tmpfs, beneath a directory named after the sandbox. A volume that merely has
/// this name is a volume.
fn is_shared_memory(path: &Path, sandbox: &str) -> bool {
    let mut above = path.parent().into_iter().flat_map(Path::components);
    let in_sandbox = !sandbox.is_empty()
        && path.ends_with("shm")
        && above.any(|component| component.as_os_str() == sandbox);
    // Without such a directory, the source is the node's /dev/shm.
    (in_sandbox || path == Path::new(SHARED_MEMORY)) && is_on(path, TMPFS_MAGIC)
}

fn is_on(path: &Path, kind: FsType) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == kind)
}

pub(super) fn translate(
    mut mount: Mount,
    number: usize,
    own: &Mappings,
    shares: &mut Vec<Share>,
    source_kind: &impl Fn(&Path) -> SourceKind,
) -> Result<Mount, CallError> {
    if !is_bind(&mount) {
        return Ok(mount);
    }
    let options = mount.options().clone().unwrap_or_default();
    let destination = mount.destination().clone();
    let field = format!("mounts[{}].source", destination.display());
    let Some(source) = mount.source().clone() else {
        return Err(invalid(&field, "a bind mount needs one"));
    };
    refuse_bidirectional(&options, &destination)?;
    let kind = source_kind(&source);
    if let SourceKind::Guests(place) = kind {
        // Owners too are the guest's to map.
        mount.set_source(Some(place));
        return Ok(mount);
    }
    let id_map = take_id_map(&mut mount, own);
    if let Some(own) = guests_own(&kind, &source, &destination) {
        mount.set_source(Some(own));
        return Ok(mount);
    }
    match kind {
        SourceKind::Missing => {
            return Err(invalid(
                &field,
                &format!("{} does not exist on the host", source.display()),
            ));
        }
        SourceKind::BlockDevice | SourceKind::CharacterDevice if !is_pseudo(&source) => {
            let reason = format!(
                "{} is a device of the host: a disk can be given as a persistent volume of \
                 volumeMode Block (volumeDevices), a PCI function by its IOMMU group",
                source.display()
            );
            return Err(invalid(&field, &reason));
        }
        SourceKind::CharacterDevice | SourceKind::BlockDevice => return Ok(mount),
        _ => {}
    }
    // Its source in the guest is known when it is shared.
    shares.push(Share {
        source,
        mount: number,
        recursive: options.iter().any(|option| option == "rbind"),
        id_map,
        read_only: options
            .iter()
            .any(|option| option == "ro" || option == "rro"),
    });
    Ok(mount)
}

fn refuse_bidirectional(options: &[String], destination: &Path) -> Result<(), CallError> {
    let mut options = options.iter();
    if !options.any(|option| option == "rshared" || option == "shared") {
        return Ok(());
    }
    let field = format!(
        "mounts[{}].options: rshared (volumeMounts.mountPropagation: Bidirectional)",
        destination.display()
    );
    Err(invalid(
        &field,
        "mounts that are made in a VM cannot reach the host: leave the field out or use another \
         RuntimeClass",
    ))
}

fn is_bind(mount: &Mount) -> bool {
    let mut options = mount.options().iter().flatten();
    mount.typ().as_deref() == Some("bind")
        || options.any(|option| option == "bind" || option == "rbind")
}

/// Every path of the host that a container has a bind mount of, once.
pub(crate) fn bind_sources(spec: &Spec) -> BTreeSet<&PathBuf> {
    let mounts = spec.mounts().iter().flatten();
    let binds = mounts.filter(|mount| is_bind(mount));
    binds.filter_map(|mount| mount.source().as_ref()).collect()
}

/// Where the guest has what only a kernel can give.
fn guests_own(kind: &SourceKind, source: &Path, destination: &Path) -> Option<PathBuf> {
    match kind {
        SourceKind::SharedMemory if destination == Path::new("/dev/shm") => {
            Some(SHARED_MEMORY.into())
        }
        SourceKind::HugePages => Some(paths::huge_page_volume(source)),
        _ => None,
    }
}

/// Ids of the container's user namespace.
pub(super) struct Mappings {
    uids: Vec<LinuxIdMapping>,
    gids: Vec<LinuxIdMapping>,
}

impl Mappings {
    pub(super) fn of(spec: &Spec) -> Self {
        let linux = spec.linux().as_ref();
        let taken = |mappings: Option<&Option<Vec<LinuxIdMapping>>>| {
            mappings.cloned().flatten().unwrap_or_default()
        };
        Self {
            uids: taken(linux.map(|linux| linux.uid_mappings())),
            gids: taken(linux.map(|linux| linux.gid_mappings())),
        }
    }
}

/// Takes what a mount says about the owners of its files: the host maps them, since the guest's
/// virtio-fs cannot. Mappings of its own come before those of the container (config.md, "Mounts").
fn take_id_map(mount: &mut Mount, own: &Mappings) -> Option<(IdMap, bool)> {
    let options = mount.options_mut().get_or_insert_default();
    let all = options.iter().any(|option| option == "ridmap");
    let asked = all || options.iter().any(|option| option == "idmap");
    options.retain(|option| option != "idmap" && option != "ridmap");
    let uids = mount.uid_mappings().clone().unwrap_or_default();
    let gids = mount.gid_mappings().clone().unwrap_or_default();
    mount.set_uid_mappings(None);
    mount.set_gid_mappings(None);
    let map = match IdMap::of_mappings(&uids, &gids) {
        None if asked => IdMap::of_mappings(&own.uids, &own.gids),
        map => map,
    };
    map.map(|map| (map, all))
}
