//! Host-side cpuset, `io.max` and `oom_score_adj` of the VM.
//!
//! kubelet sets these per container. On the host there is only the VM, so they are combined: all
//! CPUs and memory nodes of its containers, the sum of their limits, and the lowest of their
//! scores. Until the first container comes, the score is that of the pod's class, which the path of
//! its cgroup names (kubelet's `--cgroups-per-qos`).

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxResources, Spec};
use tracing::warn;

use crate::{
    errors::CallError,
    host::block_io::{self, Throttles},
};

/// kubelet's scores of pods that may be taken first and last (its `pkg/kubelet/qos`); those between
/// get theirs by their request.
const BEST_EFFORT: i32 = 1000;
const BURSTABLE: i32 = 999;
const GUARANTEED: i32 = -997;

/// Processors, memory nodes and processes that are looked at.
const NUMBERS_MAX: usize = 8192;

/// Host-side resources that one container asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HostResources {
    score: Option<i32>,
    cpus: Option<String>,
    memory_nodes: Option<String>,
    throttles: Throttles,
}

impl HostResources {
    /// That of a specification.
    pub(crate) fn of(spec: &Spec) -> Self {
        let process = spec.process().as_ref();
        let mut host_resources = Self {
            score: process.and_then(oci_spec::runtime::Process::oom_score_adj),
            ..Self::default()
        };
        let linux = spec.linux().as_ref();
        if let Some(resources) = linux.and_then(|linux| linux.resources().as_ref()) {
            host_resources.update(resources);
        }
        host_resources
    }

    /// Takes what an update names.
    pub(crate) fn update(&mut self, resources: &LinuxResources) {
        self.throttles.update(resources);
        let Some(cpu) = resources.cpu() else { return };
        let named = |list: &Option<String>| list.clone().filter(|list| !list.is_empty());
        self.cpus = named(cpu.cpus()).or(self.cpus.take());
        self.memory_nodes = named(cpu.mems()).or(self.memory_nodes.take());
    }
}

/// Takes out of resources that go to the guest what numbers processors, memory nodes and devices of
/// the host, where it holds for the VM.
pub(crate) fn keep_on_host(resources: &mut LinuxResources) {
    if let Some(cpu) = resources.cpu_mut() {
        cpu.set_cpus(None);
        cpu.set_mems(None);
    }
    block_io::take(resources);
}

/// The placement of a pod's processes.
#[derive(Debug, Default)]
pub(crate) struct Placement {
    directories: Vec<PathBuf>,
    class: Option<i32>,
}

impl Placement {
    /// That of the pod with this cgroup.
    pub(crate) fn new(cgroups_path: &Path, directories: Vec<PathBuf>) -> Self {
        Self {
            directories,
            class: class(&cgroups_path.to_string_lossy()),
        }
    }

    /// The pod's cgroup; of one hierarchy, where there are several.
    pub(crate) fn directory(&self) -> Option<&Path> {
        self.directories.first().map(PathBuf::as_path)
    }

    /// Applies the combination of `resources`, one per container.
    pub(crate) fn apply_all(
        &self,
        resources: impl Iterator<Item = HostResources>,
    ) -> Result<(), CallError> {
        self.apply(together(resources))
    }

    /// Sets score, cpuset and block limits; without resources the score is that of the pod's class.
    /// Where the host refuses a score or a cpuset, a warning says so and the pod lives on.
    pub(crate) fn apply(&self, host_resources: Option<HostResources>) -> Result<(), CallError> {
        let host_resources = host_resources.unwrap_or_default();
        // Not the shim's own, which they were started with.
        self.score(host_resources.score.or(self.class).unwrap_or_default());
        for (file, list) in [
            ("cpuset.cpus", host_resources.cpus),
            ("cpuset.mems", host_resources.memory_nodes),
        ] {
            let Some(list) = list else { continue };
            for directory in &self.directories {
                match pin(directory, file, &list) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => warn!(%error, file, list, "the host refuses the pod's cpuset"),
                    Ok(()) => {}
                }
            }
        }
        host_resources.throttles.hold(&self.directories)
    }

    fn score(&self, score: i32) {
        let mut processes = BTreeSet::new();
        for directory in &self.directories {
            let listed = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            processes.extend(listed.lines().take(NUMBERS_MAX).map(str::to_owned));
        }
        for process in processes {
            let path = format!("/proc/{process}/oom_score_adj");
            match fs::write(&path, score.to_string()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    warn!(%error, path, "the score for the OOM killer cannot be set");
                }
                _ => {}
            }
        }
    }
}

/// cgroup v2 has the controller in a cgroup when its parent passes it on (cgroup-v2.rst, "Enabling
/// and Disabling"); kubelet passes it as far as the pod's cgroup.
fn pin(directory: &Path, file: &str, list: &str) -> io::Result<()> {
    let file = directory.join(file);
    if !file.exists() {
        let parent = directory.parent().unwrap_or(directory);
        fs::write(parent.join("cgroup.subtree_control"), "+cpuset")?;
    }
    fs::write(file, list)
}

/// The score of a pod's class; `None` where no kubelet made the cgroup.
fn class(cgroups_path: &str) -> Option<i32> {
    if !cgroups_path.contains("kubepods") {
        None
    } else if cgroups_path.contains("besteffort") {
        Some(BEST_EFFORT)
    } else if cgroups_path.contains("burstable") {
        Some(BURSTABLE)
    } else {
        Some(GUARANTEED)
    }
}

/// What several containers want together: where one may run anywhere, all may.
fn together(resources: impl Iterator<Item = HostResources>) -> Option<HostResources> {
    resources.reduce(|one, other| HostResources {
        score: match (one.score, other.score) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        },
        cpus: union(one.cpus, other.cpus),
        memory_nodes: union(one.memory_nodes, other.memory_nodes),
        throttles: one.throttles.and(other.throttles),
    })
}

/// The kernel takes lists that name a number twice.
fn union(one: Option<String>, other: Option<String>) -> Option<String> {
    match (one?, other?) {
        (one, other) if one == other => Some(one),
        (one, other) => Some(format!("{one},{other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host_resources(score: i32, cpus: Option<&str>) -> HostResources {
        HostResources {
            score: Some(score),
            cpus: cpus.map(str::to_owned),
            ..HostResources::default()
        }
    }

    #[test]
    fn classes_of_both_cgroup_drivers() {
        for (path, score) in [
            ("/kubepods/besteffort/pod1/x", Some(BEST_EFFORT)),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:x",
                Some(BURSTABLE),
            ),
            ("/kubepods/pod1/x", Some(GUARANTEED)),
            ("/default/x", None),
        ] {
            assert_eq!(class(path), score, "{path}");
        }
    }

    #[test]
    fn a_pod_stands_where_its_containers_may() {
        assert_eq!(together(std::iter::empty()), None);
        let both = [
            host_resources(-997, Some("0-1")),
            host_resources(5, Some("3")),
        ];
        assert_eq!(
            together(both.into_iter()),
            Some(host_resources(-997, Some("0-1,3")))
        );
        let anywhere = [host_resources(3, Some("0")), host_resources(2, None)];
        assert_eq!(
            together(anywhere.into_iter()),
            Some(host_resources(2, None))
        );
    }

    #[test]
    fn an_update_names_what_it_changes() {
        let spec = serde_json::json!({
            "ociVersion": "1.2.0",
            "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "oomScoreAdj": -997},
            "linux": {"resources": {"cpu": {"cpus": "2", "mems": "0"}}}
        });
        let mut found = HostResources::of(&serde_json::from_value(spec).unwrap());
        let text = r#"{"cpu": {"cpus": "1,3", "mems": ""}, "memory": {"limit": 1}}"#;
        found.update(&serde_json::from_str(text).unwrap());
        let expected = HostResources {
            memory_nodes: Some("0".to_owned()),
            ..host_resources(-997, Some("1,3"))
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn scores_reach_every_process() {
        let folder = tempfile::tempdir().unwrap();
        let mut sleeper = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let listed = format!("{}\n", sleeper.id());
        fs::write(folder.path().join("cgroup.procs"), listed).unwrap();
        fs::write(folder.path().join("cpuset.cpus"), "").unwrap();
        let placement = Placement::new(
            Path::new("/kubepods/besteffort/pod1/x"),
            vec![folder.path().to_owned()],
        );
        let score = || {
            let path = format!("/proc/{}/oom_score_adj", sleeper.id());
            fs::read_to_string(path).unwrap().trim().to_owned()
        };
        placement.apply(None).unwrap();
        let of_class = score();
        placement
            .apply(Some(host_resources(998, Some("0"))))
            .unwrap();
        let of_container = score();
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert_eq!((of_class.as_str(), of_container.as_str()), ("1000", "998"));
        let pinned = fs::read_to_string(folder.path().join("cpuset.cpus")).unwrap();
        assert_eq!(pinned, "0");
    }
}
