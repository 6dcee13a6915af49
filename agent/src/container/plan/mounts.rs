//! Mounts: their options as the kernel's attributes, what is left to the file system, and in which
//! order it all applies.

use oci_spec::runtime::{LinuxNamespaceType, Mount};
use serde::{Deserialize, Serialize};

use super::{
    super::error::ContainerError, IdMapping, bounded, id_mappings, namespaces::Namespaces,
};

/// One mount of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct MountPlan {
    /// `mounts[3]`, for errors.
    pub(in crate::container) field: String,
    pub(in crate::container) destination: String,
    pub(in crate::container) source: Source,
    /// Of this mount alone.
    pub(in crate::container) attributes: Attributes,
    /// Of this mount and all beneath it.
    pub(in crate::container) recursive_attributes: Attributes,
    pub(in crate::container) propagation: Option<Propagation>,
    /// Fill a tmpfs with what its mount point held.
    pub(in crate::container) copy_up: bool,
    pub(in crate::container) id_map: Option<IdMap>,
}

/// The source of a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) enum Source {
    /// A file or directory of the guest.
    Bind { path: String, recursive: bool },
    /// An instance of a file system; `data` are its options, `key` or `key=value`.
    FileSystem {
        kind: String,
        device: Option<String>,
        data: Vec<String>,
    },
}

/// `MOUNT_ATTR_*` to set and to clear (mount_setattr(2)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct Attributes {
    pub(in crate::container) set: u64,
    pub(in crate::container) clear: u64,
}

impl Attributes {
    fn apply(&mut self, set: u64, clear: u64) {
        self.set = (self.set & !clear) | set;
        self.clear = (self.clear & !set) | clear;
    }

    /// Whether nothing is to be changed.
    pub(in crate::container) fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// `MS_SHARED` and its kin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct Propagation {
    pub(in crate::container) kind: u64,
    pub(in crate::container) recursive: bool,
}

/// Owners of a mount's files, mapped as a user namespace with these mappings would.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct IdMap {
    /// Empty: as the container's user namespace.
    pub(in crate::container) uid_mappings: Vec<IdMapping>,
    pub(in crate::container) gid_mappings: Vec<IdMapping>,
    pub(in crate::container) recursive: bool,
}

const RELATIME: (u64, u64) = (libc::MOUNT_ATTR_RELATIME, libc::MOUNT_ATTR__ATIME);
const NOATIME: (u64, u64) = (libc::MOUNT_ATTR_NOATIME, libc::MOUNT_ATTR__ATIME);
const STRICTATIME: (u64, u64) = (libc::MOUNT_ATTR_STRICTATIME, libc::MOUNT_ATTR__ATIME);

/// config.md, "Linux mount options": (name, set, clear). Each exists with a leading `r` for the
/// whole tree. What changes the time of access clears its three-valued field first, as
/// mount_setattr(2) demands.
const ATTRIBUTES: [(&str, u64, u64); 18] = [
    ("ro", libc::MOUNT_ATTR_RDONLY, 0),
    ("rw", 0, libc::MOUNT_ATTR_RDONLY),
    ("nosuid", libc::MOUNT_ATTR_NOSUID, 0),
    ("suid", 0, libc::MOUNT_ATTR_NOSUID),
    ("nodev", libc::MOUNT_ATTR_NODEV, 0),
    ("dev", 0, libc::MOUNT_ATTR_NODEV),
    ("noexec", libc::MOUNT_ATTR_NOEXEC, 0),
    ("exec", 0, libc::MOUNT_ATTR_NOEXEC),
    ("nodiratime", libc::MOUNT_ATTR_NODIRATIME, 0),
    ("diratime", 0, libc::MOUNT_ATTR_NODIRATIME),
    ("nosymfollow", libc::MOUNT_ATTR_NOSYMFOLLOW, 0),
    ("symfollow", 0, libc::MOUNT_ATTR_NOSYMFOLLOW),
    ("relatime", RELATIME.0, RELATIME.1),
    ("norelatime", STRICTATIME.0, STRICTATIME.1),
    ("noatime", NOATIME.0, NOATIME.1),
    ("atime", RELATIME.0, RELATIME.1),
    ("strictatime", STRICTATIME.0, STRICTATIME.1),
    ("nostrictatime", RELATIME.0, RELATIME.1),
];

const PROPAGATIONS: [(&str, u64); 4] = [
    ("shared", libc::MS_SHARED),
    ("slave", libc::MS_SLAVE),
    ("private", libc::MS_PRIVATE),
    ("unbindable", libc::MS_UNBINDABLE),
];

/// Options that ask for the default.
const NO_EFFECT: [&str; 8] = [
    "defaults",
    "loud",
    "nomand",
    "noiversion",
    "async",
    "nolazytime",
    "nofail",
    "auto",
];

/// Plans `mounts`.
pub(super) fn of(
    mounts: &[Mount],
    namespaces: &Namespaces,
) -> Result<Vec<MountPlan>, ContainerError> {
    bounded(mounts.len(), "mounts")?;
    mounts
        .iter()
        .enumerate()
        .map(|(index, mount)| one(mount, index, namespaces))
        .collect()
}

fn one(mount: &Mount, index: usize, namespaces: &Namespaces) -> Result<MountPlan, ContainerError> {
    let field = format!("mounts[{index}]");
    let destination = destination(mount, &field)?;
    let options = mount.options().clone().unwrap_or_default();
    let kind = mount.typ().clone().unwrap_or_default();
    let source = mount
        .source()
        .as_ref()
        .map(|source| source.display().to_string());
    let mut plan = MountPlan {
        destination,
        source: Source::FileSystem {
            kind: kind.clone(),
            device: source.clone(),
            data: Vec::new(),
        },
        attributes: Attributes::default(),
        recursive_attributes: Attributes::default(),
        propagation: None,
        copy_up: false,
        id_map: None,
        field,
    };
    let mut data = Vec::new();
    let mut bind = None;
    for option in &options {
        match option.as_str() {
            "bind" => bind = bind.or(Some(false)),
            "rbind" => bind = Some(true),
            "idmap" | "ridmap" => {
                plan.id_map = Some(id_map(mount, option == "ridmap", &plan, namespaces)?)
            }
            "tmpcopyup" => plan.copy_up = true,
            "remount" => return Err(refused(&plan, "remounting is not for a new container")),
            other if plan.take(other) => {}
            other => data.push(other.to_owned()),
        }
    }
    if kind == "bind" && bind.is_none() {
        bind = Some(false);
    }
    plan.finish(bind, source, data)?;
    if let (None, Some(_)) = (&plan.id_map, mount.uid_mappings()) {
        plan.id_map = Some(id_map(mount, false, &plan, namespaces)?);
    }
    Ok(plan)
}

fn destination(mount: &Mount, field: &str) -> Result<String, ContainerError> {
    let destination = mount
        .destination()
        .to_str()
        .filter(|path| !path.contains('\0'));
    let refuse = |reason: &str| {
        let reason = format!("{:?} {reason}", mount.destination());
        Err(ContainerError::invalid(
            format!("{field}.destination"),
            reason,
        ))
    };
    let Some(destination) = destination else {
        return refuse("is not UTF-8");
    };
    // Relative destinations are deprecated (config.md, "Mounts") and mean the root, as runc reads
    // them.
    let names = destination
        .split('/')
        .filter(|name| !name.is_empty() && *name != ".");
    match names.clone().count() {
        0 => refuse("is the root itself"),
        _ if names.clone().any(|name| name == "..") => refuse("climbs"),
        _ => Ok(format!("/{}", names.collect::<Vec<_>>().join("/"))),
    }
}

fn refused(plan: &MountPlan, reason: &str) -> ContainerError {
    ContainerError::invalid(format!("{}.options", plan.field), reason)
}

fn id_map(
    mount: &Mount,
    recursive: bool,
    plan: &MountPlan,
    namespaces: &Namespaces,
) -> Result<IdMap, ContainerError> {
    let list = |list: &Option<_>, name: &str| -> Result<Vec<IdMapping>, ContainerError> {
        id_mappings(Option::as_deref(list), &format!("{}.{name}", plan.field))
    };
    let uid_mappings = list(mount.uid_mappings(), "uidMappings")?;
    let gid_mappings = list(mount.gid_mappings(), "gidMappings")?;
    if uid_mappings.is_empty() != gid_mappings.is_empty() {
        return Err(refused(plan, "uidMappings and gidMappings go together"));
    }
    if uid_mappings.is_empty() && !namespaces.is_new(LinuxNamespaceType::User) {
        let reason = "an id-mapped mount needs mappings, its own or the container's";
        return Err(refused(plan, reason));
    }
    Ok(IdMap {
        uid_mappings,
        gid_mappings,
        recursive,
    })
}

impl MountPlan {
    /// Takes an option that concerns the mount and not its file system; says whether it did.
    fn take(&mut self, option: &str) -> bool {
        if NO_EFFECT.contains(&option) {
            return true;
        }
        let find = |name: &str| ATTRIBUTES.iter().find(|(known, ..)| *known == name);
        if let Some((_, set, clear)) = find(option) {
            self.attributes.apply(*set, *clear);
            return true;
        }
        let tree = option.strip_prefix('r');
        if let Some((_, set, clear)) = tree.and_then(find) {
            self.recursive_attributes.apply(*set, *clear);
            return true;
        }
        let propagation = |name: &str| PROPAGATIONS.iter().find(|(known, _)| *known == name);
        let found = propagation(option).map(|found| (found, false));
        if let Some(((_, kind), recursive)) =
            found.or_else(|| tree.and_then(propagation).map(|found| (found, true)))
        {
            self.propagation = Some(Propagation {
                kind: *kind,
                recursive,
            });
            return true;
        }
        false
    }

    fn finish(
        &mut self,
        bind: Option<bool>,
        source: Option<String>,
        data: Vec<String>,
    ) -> Result<(), ContainerError> {
        if let Some(recursive) = bind {
            let path = source.filter(|path| path.starts_with('/')).ok_or_else(|| {
                let field = format!("{}.source", self.field);
                ContainerError::invalid(field, "a bind mount needs an absolute path of the guest")
            })?;
            if !data.is_empty() {
                let reason = format!("{data:?} mean nothing for a bind mount");
                return Err(refused(self, &reason));
            }
            self.source = Source::Bind { path, recursive };
        } else if let Source::FileSystem {
            kind, data: own, ..
        } = &mut self.source
        {
            if kind.is_empty() {
                return Err(ContainerError::invalid(
                    format!("{}.type", self.field),
                    "missing, and the options name no bind",
                ));
            }
            // The guest has the unified hierarchy alone, whatever the specification's author saw on
            // the host.
            if kind == "cgroup" {
                "cgroup2".clone_into(kind);
            }
            *own = data.into_iter().filter(|_| kind != "cgroup2").collect();
        }
        let tmpfs = matches!(&self.source, Source::FileSystem { kind, .. } if kind == "tmpfs");
        if self.copy_up && !tmpfs {
            return Err(refused(self, "\"tmpcopyup\" is for tmpfs"));
        }
        Ok(())
    }
}

/// `linux.rootfsPropagation`; runc's answer to none is a recursive slave.
pub(super) fn rootfs_propagation(name: Option<&str>) -> Result<Propagation, ContainerError> {
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        return Ok(Propagation {
            kind: libc::MS_SLAVE,
            recursive: true,
        });
    };
    let find = |name: &str| PROPAGATIONS.iter().find(|(known, _)| *known == name);
    match (find(name), name.strip_prefix('r').and_then(find)) {
        (Some((_, kind)), _) => Ok(Propagation {
            kind: *kind,
            recursive: false,
        }),
        (None, Some((_, kind))) => Ok(Propagation {
            kind: *kind,
            recursive: true,
        }),
        (None, None) => Err(ContainerError::invalid(
            "linux.rootfsPropagation",
            format!("{name:?} is not shared, slave, private, unbindable or their r forms"),
        )),
    }
}
