//! Owners of files for pods with a user namespace of their own.
//!
//! The container's user namespace is in the guest, but the file systems that its files are on are
//! the host's: they are mounted with mapped owners here, and the guest sees the mapped ones. A file
//! of host user 0 then is of user 65536, say, on its way through the shared directory, and of user
//! 0 again in the container, whose namespace maps 0 to 65536.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use oci_spec::runtime::LinuxIdMapping;
use pericarp_sys::{fscontext::DetachedMount, mount_tree, user_namespace};

/// Which owners are shown as which, as the kernel reads it: lines of id in the file system, id
/// shown, count (user_namespaces(7)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IdMap {
    uids: String,
    gids: String,
}

impl IdMap {
    /// From `linux.uidMappings` and `linux.gidMappings`, or a mount's own; `None` without any.
    pub(crate) fn of_mappings(uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Option<Self> {
        let lines = |mappings: &[LinuxIdMapping]| {
            let line = |mapping: &LinuxIdMapping| {
                let (inside, outside) = (mapping.container_id(), mapping.host_id());
                format!("{inside} {outside} {}\n", mapping.size())
            };
            mappings.iter().map(line).collect()
        };
        (!uids.is_empty() && !gids.is_empty()).then(|| Self {
            uids: lines(uids),
            gids: lines(gids),
        })
    }

    /// From the options `uidmap=` and `gidmap=` of a snapshotter: `inside:outside:count[,...]`.
    pub(crate) fn of_options(uidmap: &str, gidmap: &str) -> Option<Self> {
        let lines = |option: &str| {
            let line = |range: &str| {
                let numbers: Vec<u32> = range
                    .split(':')
                    .map(|number| number.parse().ok())
                    .collect::<Option<_>>()?;
                match numbers[..] {
                    [inside, outside, count] => Some(format!("{inside} {outside} {count}\n")),
                    _ => None,
                }
            };
            option.split(',').map(line).collect::<Option<String>>()
        };
        Some(Self {
            uids: lines(uidmap)?,
            gids: lines(gidmap)?,
        })
    }

    /// What maps owners so.
    pub(crate) fn mapper(&self) -> io::Result<Mapper> {
        user_namespace::with_maps(&self.uids, &self.gids).map(Mapper)
    }
}

/// Mounts with mapped owners.
#[derive(Debug)]
pub(crate) struct Mapper(OwnedFd);

impl Mapper {
    /// Mounts the directory `source` on `target` with mapped owners.
    pub(crate) fn bind(&self, source: &Path, target: &Path) -> io::Result<()> {
        let tree = DetachedMount::clone_at(source, false)?;
        self.map(tree.as_fd(), false)
            .map_err(|error| unsupported(&error, source))?;
        tree.attach(File::open(target)?.as_fd())
    }

    /// Maps the owners of a mount that is attached nowhere yet, and of those beneath it when `all`.
    pub(crate) fn map(&self, tree: BorrowedFd<'_>, all: bool) -> io::Result<()> {
        mount_tree::map_ids(tree, self.0.as_fd(), all)
    }
}

/// Explains why the owners of `source` cannot be mapped.
pub(crate) fn unsupported(error: &io::Error, source: &Path) -> io::Error {
    let reason = format!(
        "the file system of {} cannot map owners ({error}): its pods cannot have a user namespace \
         of their own",
        source.display()
    );
    io::Error::new(error.kind(), reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_snapshotters_are_the_kernels_lines() {
        let map = IdMap::of_options("0:65536:10,10:0:1", "0:65536:65536").unwrap();
        assert_eq!(map.uids, "0 65536 10\n10 0 1\n");
        assert_eq!(map.gids, "0 65536 65536\n");
        for wrong in ["", "0:1", "0:1:2:3", "a:1:2", "0:-1:2", "0:1:2,", "0 1 2"] {
            assert_eq!(IdMap::of_options(wrong, "0:1:2"), None, "{wrong:?}");
            assert_eq!(IdMap::of_options("0:1:2", wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn mappings_of_the_specification_are_the_kernels_lines() {
        let mapping: LinuxIdMapping =
            serde_json::from_str(r#"{"containerID": 0, "hostID": 65536, "size": 9}"#).unwrap();
        let map = IdMap::of_mappings(&[mapping], &[mapping]).unwrap();
        assert_eq!(
            (map.uids.as_str(), map.gids.as_str()),
            ("0 65536 9\n", "0 65536 9\n")
        );
        assert_eq!(IdMap::of_mappings(&[], &[]), None);
    }
}
