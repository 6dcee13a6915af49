//! The agent's counters in the types that containerd understands: cgroup v2's `Metrics`
//! (containerd/cgroups `cgroup2/stats/metrics.proto`), whatever the host's own cgroup version is,
//! because the guest's is 2.
//!
//! containerd 2.3 asks for the counters of every container once a second. Each question wakes the
//! guest, and an idle guest would do little else than answer. The guest cannot have done more than
//! its VM used processor time for, and that the host counts: as long as it is next to nothing, the
//! last answer is given again ([`Sample`], D17).

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    cgroups_v2::metrics::{
        CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat,
        PSIData, PSIStats, PidsStat,
    },
    protobuf::{Message, well_known_types::any::Any},
};
use pericarp_protocol::guest::{Pressure, PressureLine, StatsRequest, StatsResponse};
use protobuf::MessageField;

use crate::{
    errors::CallError,
    guest::agent_client::agent_call,
    host::cgroup::Meter,
    pod::{Pod, container::Container},
};

/// Longest time that one answer is given: the interval in which kubelet itself looks at a container
/// (its housekeeping interval is 10 s).
const SAMPLE_AGE_MAX: Duration = Duration::from_secs(10);

/// Share of one processor, in thousandths, up to which a VM counts as idle.
const IDLE_PER_MILLE: u128 = 20;

/// Most that one question may be taken to cost: what counters may fall short by.
pub(crate) const QUESTION_US_MAX: u64 = 100_000;

/// `Stats`: a container's counters; those of the whole sandbox for the one that stands for it.
pub(crate) async fn of_container(pod: &Pod, container: &Container) -> Result<Any, CallError> {
    let used_us = || pod.meter.as_ref().and_then(Meter::used_us);
    let used_before_us = used_us();
    if let Some(counters) = container
        .sample()
        .as_ref()
        .and_then(|sample| sample.holding(used_before_us))
    {
        return Ok(counters.clone());
    }
    let mut query = StatsRequest::new();
    if !container.pause {
        query.container_id.clone_from(&container.id);
    }
    let question = pod.meter.as_ref().map(Meter::question);
    let counters = metrics(&agent_call!(pod.agent, stats, &query)?);
    let took_us = question.map(|question| question.answered(QUESTION_US_MAX));
    *container.sample() = Sample::taken(&counters, used_us(), took_us);
    Ok(counters)
}

/// Counters of a container and what its VM had used when they were taken.
#[derive(Debug)]
pub(crate) struct Sample {
    at: Instant,
    vm_used_us: u64,
    question_us: u64,
    counters: Any,
}

impl Sample {
    /// Counters that were just answered, with what the VM has used and what the question took;
    /// `None` when nobody counts that.
    pub(crate) fn taken(
        counters: &Any,
        vm_used_us: Option<u64>,
        question_us: Option<u64>,
    ) -> Option<Self> {
        Some(Self {
            at: Instant::now(),
            vm_used_us: vm_used_us?,
            question_us: question_us?,
            counters: counters.clone(),
        })
    }

    /// The counters, while they still hold.
    pub(crate) fn holding(&self, vm_used_us: Option<u64>) -> Option<&Any> {
        let used_us = vm_used_us?.checked_sub(self.vm_used_us)?;
        holds(self.at.elapsed(), used_us, self.question_us).then_some(&self.counters)
    }
}

/// Whether counters of that age hold when the VM has used that much since: next to nothing, beside
/// what it takes to ask again. A question keeps the guest awake a little longer than its answer,
/// and were that to make the answer stale, a guest that only answers would never count as idle.
fn holds(age: Duration, used_us: u64, question_us: u64) -> bool {
    let own_us = u128::from(used_us.saturating_sub(question_us));
    age < SAMPLE_AGE_MAX && own_us * 1000 <= age.as_micros() * IDLE_PER_MILLE
}

/// What containerd looks up to decode the value.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Converts the counters of one container.
pub(crate) fn metrics(stats: &StatsResponse) -> Any {
    let metrics = Metrics {
        pids: Some(PidsStat {
            current: stats.pids_current,
            limit: stats.pids_limit,
            ..Default::default()
        })
        .into(),
        cpu: Some(cpu(stats)).into(),
        memory: Some(memory(stats)).into(),
        memory_events: Some(memory_events(stats)).into(),
        io: Some(io(stats)).into(),
        hugetlb: stats
            .huge_pages
            .iter()
            .map(|pages| HugeTlbStat {
                current: pages.usage_bytes,
                max: pages.peak_bytes,
                pagesize: pages.page_size.clone(),
                failcnt: pages.failures,
                ..Default::default()
            })
            .collect(),
        network: stats
            .networks
            .iter()
            .map(|network| NetworkStat {
                name: network.name.clone(),
                rx_bytes: network.rx_bytes,
                rx_packets: network.rx_packets,
                rx_errors: network.rx_errors,
                rx_dropped: network.rx_dropped,
                tx_bytes: network.tx_bytes,
                tx_packets: network.tx_packets,
                tx_errors: network.tx_errors,
                tx_dropped: network.tx_dropped,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    };
    let mut any = Any::new();
    any.type_url = TYPE_URL.to_owned();
    any.value = metrics.write_to_bytes().unwrap_or_default();
    any
}

fn pressure(pressure: &MessageField<Pressure>) -> MessageField<PSIStats> {
    let Some(pressure) = pressure.as_ref() else {
        return MessageField::none();
    };
    Some(PSIStats {
        some: line(&pressure.some),
        full: line(&pressure.full),
        ..Default::default()
    })
    .into()
}

fn line(line: &MessageField<PressureLine>) -> MessageField<PSIData> {
    let Some(line) = line.as_ref() else {
        return MessageField::none();
    };
    // Percent times 100 on the wire; far below the 2^53 that a double holds exactly.
    let percent = |value: u64| f64::from(u32::try_from(value).unwrap_or(u32::MAX)) / 100.0;
    Some(PSIData {
        avg10: percent(line.avg10),
        avg60: percent(line.avg60),
        avg300: percent(line.avg300),
        total: line.total_us,
        ..Default::default()
    })
    .into()
}

fn cpu(stats: &StatsResponse) -> CPUStat {
    let cpu = &stats.cpu;
    CPUStat {
        usage_usec: cpu.usage_us,
        user_usec: cpu.user_us,
        system_usec: cpu.system_us,
        nr_periods: cpu.periods,
        nr_throttled: cpu.throttled_periods,
        throttled_usec: cpu.throttled_us,
        psi: pressure(&cpu.pressure),
        ..Default::default()
    }
}

fn memory(stats: &StatsResponse) -> MemoryStat {
    let memory = &stats.memory;
    let stat = |name: &str| get(&memory.stat, name);
    MemoryStat {
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        anon_thp: stat("anon_thp"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        workingset_refault: stat("workingset_refault_anon") + stat("workingset_refault_file"),
        workingset_activate: stat("workingset_activate_anon") + stat("workingset_activate_file"),
        workingset_nodereclaim: stat("workingset_nodereclaim"),
        pgrefill: stat("pgrefill"),
        pgscan: stat("pgscan"),
        pgsteal: stat("pgsteal"),
        pgactivate: stat("pgactivate"),
        pgdeactivate: stat("pgdeactivate"),
        pglazyfree: stat("pglazyfree"),
        pglazyfreed: stat("pglazyfreed"),
        thp_fault_alloc: stat("thp_fault_alloc"),
        thp_collapse_alloc: stat("thp_collapse_alloc"),
        usage: memory.usage_bytes,
        usage_limit: memory.limit_bytes,
        swap_usage: memory.swap_usage_bytes,
        swap_limit: memory.swap_limit_bytes,
        max_usage: memory.peak_bytes,
        psi: pressure(&memory.pressure),
        ..Default::default()
    }
}

fn memory_events(stats: &StatsResponse) -> MemoryEvents {
    let event = |name: &str| get(&stats.memory.events, name);
    MemoryEvents {
        low: event("low"),
        high: event("high"),
        max: event("max"),
        oom: event("oom"),
        oom_kill: event("oom_kill"),
        oom_group_kill: event("oom_group_kill"),
        ..Default::default()
    }
}

fn io(stats: &StatsResponse) -> IOStat {
    let usage = stats
        .io
        .iter()
        .map(|device| IOEntry {
            major: device.major,
            minor: device.minor,
            rbytes: device.read_bytes,
            wbytes: device.write_bytes,
            rios: device.read_operations,
            wios: device.write_operations,
            ..Default::default()
        })
        .collect();
    IOStat {
        usage,
        psi: pressure(&stats.io_pressure),
        ..Default::default()
    }
}

fn get(table: &HashMap<String, u64>, name: &str) -> u64 {
    table.get(name).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use pericarp_protocol::guest::{CpuStats, MemoryStats};

    use super::*;

    #[test]
    fn counters_hold_while_the_vm_is_idle_and_they_are_young() {
        let second = Duration::from_secs(1);
        assert!(holds(second, 0, 0));
        assert!(holds(second, 20_000, 0));
        assert!(!holds(second, 20_001, 0));
        assert!(holds(second, 30_001, 10_001));
        assert!(!holds(second, 30_002, 10_001));
        assert!(holds(9 * second, 180_000, 0));
        assert!(!holds(10 * second, 0, 0));
    }

    #[test]
    fn counters_hold_only_where_the_vms_time_is_counted() {
        let counters = metrics(&StatsResponse::new());
        assert!(Sample::taken(&counters, Some(1), None).is_none());
        assert!(Sample::taken(&counters, None, Some(1)).is_none());
        let sample = Sample::taken(&counters, Some(7), Some(2)).unwrap();
        assert!(sample.holding(Some(9)).is_some());
        assert!(sample.holding(None).is_none());
        assert!(
            sample.holding(Some(6)).is_none(),
            "another cgroup's counter"
        );
    }

    #[test]
    fn counters_arrive_under_containerds_names() {
        let stats = StatsResponse {
            cpu: Some(CpuStats {
                usage_us: 5,
                pressure: Some(Pressure {
                    some: Some(PressureLine {
                        avg10: 150,
                        ..Default::default()
                    })
                    .into(),
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            })
            .into(),
            memory: Some(MemoryStats {
                usage_bytes: 7,
                stat: [("inactive_file".to_owned(), 3)].into(),
                events: [("oom_kill".to_owned(), 1)].into(),
                ..Default::default()
            })
            .into(),
            pids_current: 2,
            ..Default::default()
        };
        let any = metrics(&stats);
        assert_eq!(any.type_url, TYPE_URL);
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.cpu.usage_usec, metrics.pids.current), (5, 2));
        assert!((metrics.cpu.psi.some.avg10 - 1.5).abs() < 1e-9);
        assert_eq!((metrics.memory.usage, metrics.memory.inactive_file), (7, 3));
        assert_eq!(metrics.memory_events.oom_kill, 1);
    }
}
