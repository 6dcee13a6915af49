//! Huge pages of a pod. Its guest gets a pool of its own, made of the VM's memory, and its volumes
//! of huge pages are hugetlbfs of the guest: neither can be the host's.
//!
//! How many pages a pod may have stands in its cgroup, where kubelet writes the sum of its
//! containers (`hugetlb.2MB.max`, cgroup-v2.rst, "HugeTLB"); containerd tells a runtime nothing of
//! them by default. The memory is ordinary memory of the host, so the pod's own limit must leave
//! it: a pod whose limit does not is refused, and not killed when it has used its pages.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;
use pericarp_protocol::guest::{Scratch, Storage, storage::Source};
use pericarp_runtime_config::{self as config, Settings};

use crate::{
    errors::CallError,
    guest::{
        agent_client::{Agent, agent_call},
        paths::HUGE_PAGES,
    },
    host::cgroup,
};

/// The size of page that guests have a pool of.
const PAGE_BYTES: u64 = 2 << 20;

/// How its cgroup's files call it.
const PAGE_NAME: &str = "2MB";

/// Pages that the pod with this cgroup may have; 0 where nobody said so.
fn pages_of(cgroup: &Path) -> Result<u64, CallError> {
    let mut pages = 0;
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let size = name.strip_prefix("hugetlb.");
        let Some(size) = size.and_then(|rest| rest.strip_suffix(".max")) else {
            continue;
        };
        // `max` is no limit, and nobody's wish.
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let bytes: u64 = text.trim().parse().unwrap_or_default();
        if size == PAGE_NAME {
            pages = bytes / PAGE_BYTES;
        } else if bytes > 0 && !size.contains('.') {
            let size = size.replace('B', "i");
            return Err(CallError::Invalid(format!(
                "resources.limits.hugepages-{size}: a pod in a VM has huge pages of 2 MiB alone: \
                 ask for hugepages-2Mi"
            )));
        }
    }
    Ok(pages)
}

/// The pod's pages, which its VM must have beside the memory of its containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pool {
    pages: u64,
}

impl Pool {
    /// Of the pod that the sandbox with this cgroup belongs to, noted in the settings of its VM. A
    /// VM that is made of huge pages of the host has nothing beside them.
    pub(crate) fn reserve(
        sandbox: Option<&PathBuf>,
        settings: &mut Settings,
    ) -> Result<Self, CallError> {
        let mut pages = 0;
        if settings.vm.huge_pages == config::HugePages::None
            && let Some(pod) = sandbox.and_then(|directory| directory.parent())
        {
            pages = pages_of(pod)?;
        }
        if pages > 0 {
            settings.vm.guest_reserve_mib += (pages * PAGE_BYTES) >> 20;
            let words = format!(" hugepagesz=2M hugepages={pages}");
            settings.kernel.extra_parameters.push_str(&words);
        }
        Ok(Self { pages })
    }

    /// Refuses a VM of this size when the pod's own limit would end it.
    pub(crate) fn check(
        self,
        sandbox: Option<&PathBuf>,
        memory_bytes: u64,
    ) -> Result<(), CallError> {
        let Some(directory) = sandbox.filter(|_| self.pages > 0) else {
            return Ok(());
        };
        match cgroup::memory_limit_below(directory, memory_bytes) {
            None => Ok(()),
            Some(below) => Err(CallError::Invalid(format!(
                "resources.limits.hugepages-2Mi: the pages of a VM are ordinary memory: {below}"
            ))),
        }
    }
}

/// Mounts the volumes of huge pages that a container has and no other of its pod had before: as on
/// the host, containers of a pod see each other's files in them.
pub(crate) async fn attach(agent: &Agent, spec: &Spec) -> Result<(), CallError> {
    for mount_point in volumes(spec) {
        let scratch = Scratch {
            huge_page_size_bytes: PAGE_BYTES,
            ..Default::default()
        };
        let storage = Storage {
            mount_point: mount_point.to_string_lossy().into_owned(),
            source: Some(Source::Scratch(scratch)),
            ..Default::default()
        };
        match agent_call!(agent, add_storage, &storage) {
            Err(error) if !error.is_already_there() => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn volumes(spec: &Spec) -> BTreeSet<&PathBuf> {
    let mounts = spec.mounts().iter().flatten();
    let sources = mounts.filter_map(|mount| mount.source().as_ref());
    sources
        .filter(|source| source.starts_with(HUGE_PAGES))
        .collect()
}

#[cfg(test)]
mod tests {
    use pericarp_runtime_config::Config;

    use super::*;
    use crate::guest::paths::huge_page_volume;

    fn pod(files: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let sandbox = folder.path().join("sandbox");
        (folder, sandbox)
    }

    #[test]
    fn the_pool_is_what_kubelet_allows_the_pod() {
        let (_folder, sandbox) = pod(&[
            ("hugetlb.2MB.max", "4194304\n"),
            ("hugetlb.2MB.rsvd.max", "max\n"),
            ("hugetlb.1GB.max", "0\n"),
        ]);
        let mut settings = Config::default().settings;
        let reserve_mib = settings.vm.guest_reserve_mib;
        let pool = Pool::reserve(Some(&sandbox), &mut settings).unwrap();
        assert_eq!(pool, Pool { pages: 2 });
        assert_eq!(settings.vm.guest_reserve_mib, reserve_mib + 4);
        assert!(settings.kernel.extra_parameters.ends_with(" hugepages=2"));
    }

    #[test]
    fn without_a_limit_there_is_no_pool() {
        let (_folder, sandbox) = pod(&[("hugetlb.2MB.max", "max\n")]);
        let before = Config::default().settings;
        for (place, pages_of_vm) in [
            (Some(&sandbox), config::HugePages::None),
            (None, config::HugePages::None),
            (Some(&sandbox), config::HugePages::Size2Mib),
        ] {
            let mut settings = before.clone();
            settings.vm.huge_pages = pages_of_vm;
            let pool = Pool::reserve(place, &mut settings).unwrap();
            assert_eq!(pool, Pool { pages: 0 });
            assert_eq!(settings.vm.guest_reserve_mib, before.vm.guest_reserve_mib);
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_name() {
        let (_folder, sandbox) = pod(&[("hugetlb.1GB.max", "1073741824\n")]);
        let mut settings = Config::default().settings;
        let error = Pool::reserve(Some(&sandbox), &mut settings).unwrap_err();
        assert!(error.to_string().contains("hugepages-1Gi"), "{error}");
        let (_folder, sandbox) = pod(&[("memory.max", "134217728\n")]);
        let error = Pool { pages: 2 }.check(Some(&sandbox), 128 << 20);
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("hugepages-2Mi") && error.contains("128 MiB"),
            "{error}"
        );
        assert!(Pool { pages: 2 }.check(Some(&sandbox), 64 << 20).is_ok());
        assert!(Pool { pages: 0 }.check(Some(&sandbox), 1 << 40).is_ok());
    }

    #[test]
    fn each_volume_is_mounted_once() {
        let source = Path::new("/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/h");
        let guest = huge_page_volume(source);
        let mount = |at: &str, source: &Path| {
            let source = source.to_string_lossy();
            serde_json::json!({"destination": at, "type": "bind", "source": source})
        };
        let mounts = [
            mount("/a", &guest),
            mount("/b", &guest),
            mount("/c", Path::new("/srv")),
        ];
        let spec = serde_json::json!({"ociVersion": "1.2.0", "mounts": mounts});
        let spec: Spec = serde_json::from_value(spec).unwrap();
        assert_eq!(volumes(&spec).into_iter().collect::<Vec<_>>(), [&guest]);
        assert!(guest.starts_with(HUGE_PAGES) && guest.parent() == Some(Path::new(HUGE_PAGES)));
    }
}
