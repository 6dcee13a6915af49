//! `linux.resources` as files of a cgroup and their values. Pure.
//!
//! The specification speaks of the first version of cgroups; the conversions to the second are
//! those of runc 1.5 (`opencontainers/cgroups`), so that a pod gets the same share here as there.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::super::{error::ContainerError, plan};

/// One file to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::container) struct Setting {
    /// In the cgroup's directory.
    pub(in crate::container) file: String,
    pub(in crate::container) value: String,
    /// The specification's field, for errors.
    pub(in crate::container) field: &'static str,
    /// No error when the kernel has no such file, because the value says what is so then.
    pub(in crate::container) optional: bool,
}

fn setting(file: impl ToString, value: impl ToString, field: &'static str) -> Setting {
    Setting {
        file: file.to_string(),
        value: value.to_string(),
        field,
        optional: false,
    }
}

/// The period of cpu.max that the kernel starts with, in microseconds.
const CPU_PERIOD_DEFAULT_US: u64 = 100_000;

/// The files for `resources`; `exists` says whether the cgroup has a file.
pub(in crate::container) fn of(
    resources: &LinuxResources,
    exists: impl Fn(&str) -> bool,
) -> Result<Vec<Setting>, ContainerError> {
    refuse_what_only_the_first_version_has(resources)?;
    let mut settings = Vec::new();
    if let Some(cpu) = resources.cpu() {
        cpu_settings(cpu, &mut settings)?;
    }
    if let Some(memory) = resources.memory() {
        memory_settings(memory, &mut settings)?;
    }
    if let Some(pids) = resources.pids() {
        // 0 is what callers say that set nothing; below it there is no limit.
        match pids.limit() {
            0 => {}
            limit => settings.push(setting("pids.max", or_max(limit), "linux.resources.pids")),
        }
    }
    if let Some(block_io) = resources.block_io() {
        io_settings(block_io, &mut settings, &exists)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let size = limit.page_size();
        if !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            let reason = format!("{size:?} is not a page size such as \"2MB\"");
            return Err(ContainerError::invalid(
                "linux.resources.hugepageLimits",
                reason,
            ));
        }
        let field = "linux.resources.hugepageLimits";
        settings.push(setting(
            format!("hugetlb.{size}.max"),
            or_max(limit.limit()),
            field,
        ));
        // Reservations count as well (hugetlb_cgroup); kernels before 5.7 have no such file.
        let mut reserved = setting(
            format!("hugetlb.{size}.rsvd.max"),
            or_max(limit.limit()),
            field,
        );
        reserved.optional = true;
        settings.push(reserved);
    }
    if resources
        .rdma()
        .as_ref()
        .is_some_and(|rdma| !rdma.is_empty())
    {
        let reason = "the guest's kernel has no RDMA";
        return Err(ContainerError::invalid("linux.resources.rdma", reason));
    }
    // Last: what is named verbatim wins over what was converted.
    settings.extend(unified(resources)?);
    Ok(settings)
}

/// Refuses what the unified hierarchy cannot do, where it asks for something.
fn refuse_what_only_the_first_version_has(
    resources: &LinuxResources,
) -> Result<(), ContainerError> {
    // 0 and -1 are what callers say that want no limit.
    let asks = |limit: Option<i64>| limit.is_some_and(|limit| limit > 0);
    let cpu = resources.cpu().as_ref();
    let memory = resources.memory().as_ref();
    let block_io = resources.block_io().as_ref();
    let asked = [
        ("network", resources.network().is_some()),
        (
            "cpu.realtimeRuntime",
            asks(cpu.and_then(LinuxCpu::realtime_runtime)),
        ),
        (
            "cpu.realtimePeriod",
            cpu.and_then(LinuxCpu::realtime_period).unwrap_or(0) > 0,
        ),
        ("memory.kernel", asks(memory.and_then(LinuxMemory::kernel))),
        (
            "memory.kernelTCP",
            asks(memory.and_then(LinuxMemory::kernel_tcp)),
        ),
        (
            "memory.swappiness",
            memory.and_then(LinuxMemory::swappiness).is_some(),
        ),
        (
            "memory.disableOOMKiller",
            memory.and_then(LinuxMemory::disable_oom_killer) == Some(true),
        ),
        (
            "memory.useHierarchy",
            memory.and_then(LinuxMemory::use_hierarchy) == Some(false),
        ),
        (
            "blockIO.leafWeight",
            block_io.and_then(LinuxBlockIo::leaf_weight).unwrap_or(0) > 0,
        ),
    ];
    match asked.iter().find(|(_, asked)| *asked) {
        None => Ok(()),
        Some((field, _)) => Err(ContainerError::invalid(
            format!("linux.resources.{field}"),
            "exists in the first version of cgroups only",
        )),
    }
}

fn or_max(limit: i64) -> String {
    if limit < 0 {
        "max".to_owned()
    } else {
        limit.to_string()
    }
}

fn unified(resources: &LinuxResources) -> Result<Vec<Setting>, ContainerError> {
    let mut settings = Vec::new();
    let entries = resources.unified().iter().flatten();
    for (file, value) in entries {
        plan::bounded(settings.len(), "linux.resources.unified")?;
        // A controller's file and nothing else: no path, and none of cgroup's own, which would
        // break the container's cage.
        if file.contains('/') || !file.contains('.') || file.starts_with("cgroup.") {
            let reason = format!("{file:?} is not a file of a controller");
            return Err(ContainerError::invalid("linux.resources.unified", reason));
        }
        if value.is_empty() {
            let reason = format!("{file:?} has no value");
            return Err(ContainerError::invalid("linux.resources.unified", reason));
        }
        for line in value.lines() {
            settings.push(setting(file, line, "linux.resources.unified"));
        }
    }
    settings.sort_by(|one, other| one.file.cmp(&other.file));
    Ok(settings)
}

fn cpu_settings(cpu: &LinuxCpu, settings: &mut Vec<Setting>) -> Result<(), ContainerError> {
    if let Some(idle) = cpu.idle() {
        settings.push(setting("cpu.idle", idle, "linux.resources.cpu.idle"));
    }
    if let Some(weight) = cpu.shares().and_then(cpu_weight) {
        // An idle cgroup has no weight, and the kernel refuses one.
        if cpu.idle() != Some(1) {
            settings.push(setting("cpu.weight", weight, "linux.resources.cpu.shares"));
        }
    }
    if cpu.quota().is_some() || cpu.period().is_some() {
        let quota = match cpu.quota() {
            Some(quota) if quota > 0 => quota.to_string(),
            _ => "max".to_owned(),
        };
        let period = cpu
            .period()
            .filter(|period| *period > 0)
            .unwrap_or(CPU_PERIOD_DEFAULT_US);
        settings.push(setting(
            "cpu.max",
            format!("{quota} {period}"),
            "linux.resources.cpu.quota",
        ));
    }
    if let Some(burst) = cpu.burst() {
        settings.push(setting("cpu.max.burst", burst, "linux.resources.cpu.burst"));
    }
    let sets = [
        ("cpuset.cpus", cpu.cpus(), "linux.resources.cpu.cpus"),
        ("cpuset.mems", cpu.mems(), "linux.resources.cpu.mems"),
    ];
    for (file, list, field) in sets {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            if plan::process::parse_cpu_list(list).is_none() {
                return Err(ContainerError::invalid(
                    field,
                    format!("{list:?} is not a list"),
                ));
            }
            settings.push(setting(file, list, field));
        }
    }
    Ok(())
}

/// Shares (2 to 262144, 1024 usual) as weight (1 to 10000, 100 usual).
///
/// A quadratic in the logarithm through the three pairs (2, 1), (1024, 100) and (262144, 10000), so
/// that the usual value of one is the usual value of the other.
pub(super) fn cpu_weight(shares: u64) -> Option<u64> {
    match shares {
        0 => None,
        1..=2 => Some(1),
        262_144.. => Some(10_000),
        _ => {
            #[expect(clippy::cast_precision_loss, reason = "shares are below 2^18 here")]
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            let weight = 10f64.powf(exponent).ceil().clamp(1.0, 10_000.0);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "clamped to 1..=10000"
            )]
            let weight = weight as u64;
            Some(weight)
        }
    }
}

fn memory_settings(
    memory: &LinuxMemory,
    settings: &mut Vec<Setting>,
) -> Result<(), ContainerError> {
    let limit = memory.limit().filter(|limit| *limit != 0);
    // First the swap when it becomes unlimited, then the memory: neither order can fail in this
    // version of cgroups.
    if let Some(swap) = memory_swap(memory.swap(), limit)? {
        let mut swap = setting("memory.swap.max", swap, "linux.resources.memory.swap");
        // A kernel without swap has no such file; no swap is what these two say.
        swap.optional = swap.value == "max" || swap.value == "0";
        settings.push(swap);
    }
    if let Some(limit) = limit {
        settings.push(setting(
            "memory.max",
            or_max(limit),
            "linux.resources.memory.limit",
        ));
    }
    if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
        let field = "linux.resources.memory.reservation";
        settings.push(setting("memory.low", or_max(reservation), field));
    }
    Ok(())
}

/// The specification counts memory and swap together, the kernel swap alone.
fn memory_swap(swap: Option<i64>, limit: Option<i64>) -> Result<Option<String>, ContainerError> {
    let Some(swap) = swap.filter(|swap| *swap != 0) else {
        return Ok(None);
    };
    if swap < 0 {
        return Ok(Some("max".to_owned()));
    }
    let field = "linux.resources.memory.swap";
    match limit {
        None => Err(ContainerError::invalid(
            field,
            "needs linux.resources.memory.limit",
        )),
        Some(limit) if limit < 0 => Err(ContainerError::invalid(field, "memory is unlimited")),
        Some(limit) if swap < limit => Err(ContainerError::invalid(
            field,
            "is below linux.resources.memory.limit",
        )),
        Some(limit) => Ok(Some((swap - limit).to_string())),
    }
}

/// `memory.checkBeforeUpdate`: refuses a limit below what is in use.
pub(in crate::container) fn check_usage(
    resources: &LinuxResources,
    usage: impl FnOnce() -> Option<u64>,
) -> Result<(), ContainerError> {
    let Some(memory) = resources.memory() else {
        return Ok(());
    };
    if memory.check_before_update() != Some(true) {
        return Ok(());
    }
    let limit = memory.limit().and_then(|limit| u64::try_from(limit).ok());
    match (limit, usage()) {
        (Some(limit), Some(usage)) if limit > 0 && usage > limit => Err(ContainerError::invalid(
            "linux.resources.memory.limit",
            format!("{limit} is below the {usage} bytes in use"),
        )),
        _ => Ok(()),
    }
}

fn io_settings(
    block_io: &LinuxBlockIo,
    settings: &mut Vec<Setting>,
    exists: &impl Fn(&str) -> bool,
) -> Result<(), ContainerError> {
    let throttles = [
        block_io.throttle_read_bps_device(),
        block_io.throttle_write_bps_device(),
        block_io.throttle_read_iops_device(),
        block_io.throttle_write_iops_device(),
    ];
    let mut named = throttles.into_iter().flatten().flatten();
    let mut weighed = block_io.weight_device().iter().flatten();
    if named.next().is_some() || weighed.next().is_some() {
        return Err(ContainerError::invalid(
            "linux.resources.blockIO",
            "numbers block devices of the host, whose limits hold there",
        ));
    }
    let bfq = exists("io.bfq.weight");
    if let Some(weight) = block_io.weight().filter(|weight| *weight != 0) {
        let field = "linux.resources.blockIO.weight";
        if !(10..=1000).contains(&weight) {
            return Err(ContainerError::invalid(
                field,
                format!("{weight} is not in 10 to 1000"),
            ));
        }
        let setting = if bfq {
            setting("io.bfq.weight", weight, field)
        } else {
            // 10 to 1000 as 1 to 10000.
            let weight = 1 + (u64::from(weight) - 10) * 9999 / 990;
            setting("io.weight", format!("default {weight}"), field)
        };
        settings.push(setting);
    }
    Ok(())
}
