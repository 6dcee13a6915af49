//! Figures of containers and of the guest itself.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use pericarp_protocol::guest::{DiagnosticsResponse, StatsRequest, StatsResponse};

use crate::{
    ground::{
        clock,
        errors::RpcError,
        files, kernel,
        paths::CGROUP_ROOT,
        stats::{memory_total_and_available, of_cgroup},
    },
    pod::{Pod, blocking},
    storage::Attached,
};

/// Figures of one container, or of the pod.
pub(super) async fn stats(pod: Arc<Pod>, request: StatsRequest) -> Result<StatsResponse, RpcError> {
    let (cgroup, storages) = if request.container_id.is_empty() {
        let storages = pod
            .storages
            .all()
            .into_iter()
            .map(|(_, storage)| storage)
            .collect();
        (
            Pod::cgroup()
                .map_err(RpcError::kernel("make the pod's cgroup"))?
                .to_owned(),
            storages,
        )
    } else {
        let contained = pod.containers.get(&request.container_id)?;
        (contained.cgroup.clone(), contained.storages.clone())
    };
    // A file system may take its time to answer.
    blocking(move || of_cgroup(&cgroup, &on_disks(&storages))).await
}

fn on_disks(storages: &[Attached]) -> Vec<PathBuf> {
    storages
        .iter()
        .filter(|storage| storage.on_disk)
        .map(|storage| storage.mount_point.clone())
        .collect()
}

/// How the guest and the agent are.
pub(super) async fn diagnostics() -> Result<DiagnosticsResponse, RpcError> {
    blocking(|| {
        let (memory_total_bytes, memory_available_bytes) = memory_total_and_available();
        DiagnosticsResponse {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: kernel::release(),
            uptime_us: clock::boot_time_us(),
            agent_rss_bytes: agent_rss_bytes(),
            agent_open_descriptors: count_entries(Path::new("/proc/self/fd")),
            mounts: count(
                files::read("/proc/self/mountinfo")
                    .unwrap_or_default()
                    .lines(),
            ),
            cgroups: count_cgroups(),
            memory_total_bytes,
            memory_available_bytes,
            kernel_log: kernel::log(),
            ..Default::default()
        }
    })
    .await
}

fn agent_rss_bytes() -> u64 {
    let text = files::read("/proc/self/status").unwrap_or_default();
    text.lines()
        .find_map(|line| {
            line.strip_prefix("VmRSS:")?
                .trim()
                .strip_suffix(" kB")?
                .parse::<u64>()
                .ok()
        })
        .map_or(0, |kibibytes| kibibytes * 1024)
}

fn count(items: impl Iterator) -> u32 {
    u32::try_from(items.count()).unwrap_or(u32::MAX)
}

fn count_entries(directory: &Path) -> u32 {
    std::fs::read_dir(directory).map_or(0, count)
}

/// cgroups beneath the root, as the root itself counts them.
fn count_cgroups() -> u32 {
    let text = files::read(Path::new(CGROUP_ROOT).join("cgroup.stat")).unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("nr_descendants ")?.trim().parse().ok())
        .unwrap_or(0)
}
