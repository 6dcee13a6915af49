//! Figures of containers and of the guest itself.

use std::{
    fs::OpenOptions,
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use pericarp_protocol::{
    guest::{DiagnosticsResponse, StatsRequest, StatsResponse},
    limits::KERNEL_LOG_BYTES_MAX,
};

use crate::{
    ground::{
        errors::RpcError,
        files,
        stats::{memory_total_and_available, of_cgroup},
    },
    machine::init::{self, CGROUP_ROOT},
    pod::{Pod, blocking},
    rpc::connection,
    storage::Attached,
};

/// Largest record of the kernel's log in bytes (`PRINTKRB_RECORD_MAX`, and its dictionary).
const LOG_RECORD_BYTES_MAX: usize = 8192;

/// Records of the kernel's log that are read: its ring holds fewer.
const LOG_RECORDS_MAX: usize = 65536;

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
            kernel_release: connection::kernel_release(),
            uptime_us: init::boot_time_us(),
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
            kernel_log: kernel_log(),
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

/// The end of the kernel's log, one line a record (Documentation/ABI/testing/dev-kmsg).
pub(crate) fn kernel_log() -> String {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg");
    let Ok(mut records) = opened else {
        return String::new();
    };
    let mut log = String::new();
    let mut buffer = vec![0; LOG_RECORD_BYTES_MAX];
    for _ in 0..LOG_RECORDS_MAX {
        let length = match records.read(&mut buffer) {
            Ok(length) => length,
            // Overwritten while it was read: the next is there.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => continue,
            Err(_) => break,
        };
        append(&mut log, &buffer[..length]);
        if log.len() > 2 * KERNEL_LOG_BYTES_MAX {
            keep_end(&mut log);
        }
    }
    keep_end(&mut log);
    log
}

/// Adds a record's line. A container that may write to `/dev/kmsg` chooses its text.
fn append(log: &mut String, record: &[u8]) {
    let record = String::from_utf8_lossy(record);
    // priority,sequence,microseconds,flags;text
    let Some((head, text)) = record.split_once(';') else {
        return;
    };
    let time = head.split(',').nth(2).and_then(|time| time.parse().ok());
    let time_us: u64 = time.unwrap_or(0);
    let line = text.lines().next().unwrap_or_default();
    log.push_str(&format!(
        "[{:5}.{:06}] {line}\n",
        time_us / 1_000_000,
        time_us % 1_000_000
    ));
}

/// Records that are separated by NULs, which no record has.
#[cfg(feature = "fuzzing")]
pub(crate) fn read_log(records: &[u8]) {
    let mut log = String::new();
    for record in records.split(|byte| *byte == 0) {
        let lines = log.lines().count();
        append(&mut log, record);
        assert!(log.lines().count() <= lines + 1, "{record:?}");
        keep_end(&mut log);
        assert!(log.len() <= KERNEL_LOG_BYTES_MAX);
    }
}

/// Cuts whole lines from the beginning until the rest fits.
fn keep_end(log: &mut String) {
    let excess = log.len().saturating_sub(KERNEL_LOG_BYTES_MAX);
    if excess > 0 {
        let cut = log.as_bytes()[excess..]
            .iter()
            .position(|byte| *byte == b'\n');
        let cut = cut.map_or(log.len(), |position| excess + position + 1);
        log.drain(..cut);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_is_kept_by_whole_lines() {
        let mut log = "line of text\n".repeat(KERNEL_LOG_BYTES_MAX / 10);
        keep_end(&mut log);
        assert!(
            log.len() <= KERNEL_LOG_BYTES_MAX && log.starts_with("line"),
            "{}",
            log.len()
        );
        let mut short = "a\n".to_owned();
        keep_end(&mut short);
        assert_eq!(short, "a\n");
    }
}
