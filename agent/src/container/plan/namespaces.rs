//! Which namespaces a container gets: its own, somebody's, or the guest's.

use std::path::PathBuf;

use oci_spec::runtime::{Linux, LinuxNamespaceType};
use serde::{Deserialize, Serialize};

use super::{super::error::ContainerError, IdMapping, id_mappings};

/// Where the container's namespace of one type comes from. A type without an entry is the guest's
/// own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) enum Origin {
    New,
    /// A file such as `/proc/7/ns/net`.
    Path(PathBuf),
    /// Came along as a descriptor.
    Descriptor,
}

/// The namespaces of one container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct Namespaces {
    entries: Vec<(LinuxNamespaceType, Origin)>,
    pub(in crate::container) uid_mappings: Vec<IdMapping>,
    pub(in crate::container) gid_mappings: Vec<IdMapping>,
    /// (clock, seconds, nanoseconds) as time_namespaces(7) wants them.
    pub(in crate::container) time_offsets: Vec<(String, i64, u32)>,
}

impl Namespaces {
    /// Where the namespace of type `kind` comes from; `None`: it is the guest's.
    pub(in crate::container) fn origin(&self, kind: LinuxNamespaceType) -> Option<&Origin> {
        self.entries
            .iter()
            .find(|(entry, _)| *entry == kind)
            .map(|(_, origin)| origin)
    }

    /// Whether the container shares the guest's namespace of this type.
    pub(in crate::container) fn is_guests(&self, kind: LinuxNamespaceType) -> bool {
        self.origin(kind).is_none()
    }

    /// Whether the container gets a fresh namespace of this type.
    pub(in crate::container) fn is_new(&self, kind: LinuxNamespaceType) -> bool {
        self.origin(kind) == Some(&Origin::New)
    }

    /// Whether the container's root is not the guest's.
    pub(in crate::container) fn has_user_namespace(&self) -> bool {
        !self.is_guests(LinuxNamespaceType::User)
    }

    /// The guest's number of the container's user `uid`, where that is known.
    pub(in crate::container) fn outside_uid(&self, uid: u32) -> Option<u32> {
        if self.has_user_namespace() {
            IdMapping::to_outside(&self.uid_mappings, uid)
        } else {
            Some(uid)
        }
    }

    /// `CLONE_NEW*` of those to be made with the process; the time namespace is made before it.
    pub(in crate::container) fn clone_flags(&self) -> u64 {
        self.entries
            .iter()
            .filter(|(kind, origin)| *origin == Origin::New && *kind != LinuxNamespaceType::Time)
            .fold(0, |flags, (kind, _)| {
                flags | i64::from(clone_flag(*kind)).cast_unsigned()
            })
    }

    /// Those to be joined: (type, from where).
    pub(in crate::container) fn joined(
        &self,
    ) -> impl Iterator<Item = (LinuxNamespaceType, &Origin)> {
        let entries = self.entries.iter().map(|(kind, origin)| (*kind, origin));
        entries.filter(|(_, origin)| **origin != Origin::New)
    }
}

/// The flag of clone(2) for a type of namespace.
pub(in crate::container) fn clone_flag(kind: LinuxNamespaceType) -> i32 {
    match kind {
        LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
        LinuxNamespaceType::User => libc::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
        LinuxNamespaceType::Network => libc::CLONE_NEWNET,
        LinuxNamespaceType::Time => libc::CLONE_NEWTIME,
    }
}

/// Reads `linux.namespaces`, the id mappings and the clock offsets.
pub(super) fn of(linux: &Linux, sandbox_pid: bool) -> Result<Namespaces, ContainerError> {
    let mut entries: Vec<(LinuxNamespaceType, Origin)> = Vec::new();
    for (index, namespace) in linux.namespaces().iter().flatten().enumerate() {
        let kind = namespace.typ();
        let field = format!("linux.namespaces[{index}]");
        if entries.iter().any(|(entry, _)| *entry == kind) {
            return Err(ContainerError::invalid(
                field,
                format!("a second one of type {kind}"),
            ));
        }
        let path = namespace
            .path()
            .clone()
            .filter(|path| !path.as_os_str().is_empty());
        let origin = match path {
            None => Origin::New,
            Some(path) if path.is_absolute() => Origin::Path(path),
            Some(path) => {
                let reason = format!("{} is not absolute", path.display());
                return Err(ContainerError::invalid(format!("{field}.path"), reason));
            }
        };
        entries.push((kind, origin));
    }
    if sandbox_pid {
        entries.retain(|(kind, _)| *kind != LinuxNamespaceType::Pid);
        entries.push((LinuxNamespaceType::Pid, Origin::Descriptor));
    }
    let namespaces = Namespaces {
        entries,
        uid_mappings: id_mappings(linux.uid_mappings().as_deref(), "linux.uidMappings")?,
        gid_mappings: id_mappings(linux.gid_mappings().as_deref(), "linux.gidMappings")?,
        time_offsets: time_offsets(linux)?,
    };
    check(&namespaces)?;
    Ok(namespaces)
}

fn check(namespaces: &Namespaces) -> Result<(), ContainerError> {
    let refuse = |field: &str, reason: &str| Err(ContainerError::invalid(field, reason));
    if !namespaces.is_new(LinuxNamespaceType::Mount) {
        return refuse(
            "linux.namespaces",
            "a mount namespace of the container's own is needed",
        );
    }
    let mapped = !namespaces.uid_mappings.is_empty() || !namespaces.gid_mappings.is_empty();
    if namespaces.is_new(LinuxNamespaceType::User) {
        if IdMapping::to_outside(&namespaces.uid_mappings, 0).is_none() {
            return refuse(
                "linux.uidMappings",
                "id 0 of the user namespace must be mapped",
            );
        }
        if IdMapping::to_outside(&namespaces.gid_mappings, 0).is_none() {
            return refuse(
                "linux.gidMappings",
                "id 0 of the user namespace must be mapped",
            );
        }
    } else if mapped && namespaces.is_guests(LinuxNamespaceType::User) {
        return refuse(
            "linux.uidMappings",
            "mappings need a user namespace in linux.namespaces",
        );
    }
    if !namespaces.time_offsets.is_empty() && !namespaces.is_new(LinuxNamespaceType::Time) {
        return refuse("linux.timeOffsets", "offsets need a new time namespace");
    }
    Ok(())
}

fn time_offsets(linux: &Linux) -> Result<Vec<(String, i64, u32)>, ContainerError> {
    let mut offsets = Vec::new();
    for (clock, offset) in linux.time_offsets().iter().flatten() {
        if !["monotonic", "boottime"].contains(&clock.as_str()) {
            let reason = format!("{clock:?} is neither \"monotonic\" nor \"boottime\"");
            return Err(ContainerError::invalid("linux.timeOffsets", reason));
        }
        let (seconds, nanoseconds) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        offsets.push((clock.clone(), seconds, nanoseconds));
    }
    offsets.sort();
    Ok(offsets)
}
