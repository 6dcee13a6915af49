//! A process: what it executes, as whom, and with which limits.

use std::{collections::HashSet, path::PathBuf};

use oci_spec::runtime::{
    IOPriorityClass, Linux, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, PosixRlimit, PosixRlimitType, Process, Scheduler,
};
use serde::{Deserialize, Serialize};

pub(in crate::container) use super::capabilities::{CapabilitySets, SYS_ADMIN};
use super::{
    super::{error::ContainerError, seccomp},
    bounded, capabilities,
};

/// A process of a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::container) struct ProcessPlan {
    /// Whether it is the container's init.
    pub(in crate::container) init: bool,
    pub(in crate::container) args: Vec<String>,
    pub(in crate::container) env: Vec<String>,
    pub(in crate::container) cwd: PathBuf,
    pub(in crate::container) uid: u32,
    pub(in crate::container) gid: u32,
    pub(in crate::container) additional_gids: Vec<u32>,
    pub(in crate::container) umask: u32,
    pub(in crate::container) capabilities: CapabilitySets,
    pub(in crate::container) no_new_privileges: bool,
    pub(in crate::container) apparmor_profile: Option<String>,
    pub(in crate::container) oom_score_adj: i32,
    pub(in crate::container) terminal: bool,
    /// Columns and rows.
    pub(in crate::container) console_size: Option<(u16, u16)>,
    pub(in crate::container) seccomp: Option<seccomp::Filter>,
    pub(in crate::container) personality: Option<u64>,
    /// The user as the guest numbers it, who must own the streams; `None` if unknown.
    pub(in crate::container) stdio_owner: Option<u32>,
    /// What the agent sets from outside once the process waits.
    pub(in crate::container) limits: ProcessLimits,
}

/// Attributes that need privileges which the process has given up when it waits for its start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct ProcessLimits {
    /// (`RLIMIT_*`, soft, hard).
    pub(in crate::container) rlimits: Vec<(u32, u64, u64)>,
    pub(in crate::container) scheduling: Option<SchedulingPlan>,
    /// (`IOPRIO_CLASS_*`, level).
    pub(in crate::container) io_priority: Option<(u32, u32)>,
    /// CPUs that it may run on.
    pub(in crate::container) cpus: Option<Vec<usize>>,
}

/// As sched_setattr(2) takes it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct SchedulingPlan {
    pub(in crate::container) policy: u32,
    pub(in crate::container) flags: u64,
    pub(in crate::container) nice: i32,
    pub(in crate::container) priority: u32,
    pub(in crate::container) runtime_ns: u64,
    pub(in crate::container) deadline_ns: u64,
    pub(in crate::container) period_ns: u64,
}

/// Plans `process`, a process of the container that `linux` describes; `field` is where it stands,
/// for errors.
pub(in crate::container) fn of(
    process: &Process,
    field: &str,
    linux: &Linux,
    console_size: Option<(u32, u32)>,
) -> Result<ProcessPlan, ContainerError> {
    let args = process.args().clone().unwrap_or_default();
    check_strings(&args, &format!("{field}.args"))?;
    if args.first().is_none_or(String::is_empty) {
        let reason = "empty; it must name the program";
        return Err(ContainerError::invalid(format!("{field}.args"), reason));
    }
    let env = environment(process.env().as_deref().unwrap_or_default(), field)?;
    if !process.cwd().is_absolute() {
        let reason = format!("{:?} is not absolute", process.cwd());
        return Err(ContainerError::invalid(format!("{field}.cwd"), reason));
    }
    if process
        .selinux_label()
        .as_deref()
        .is_some_and(|label| !label.is_empty())
    {
        let reason = "the guest's kernel has no SELinux";
        return Err(ContainerError::invalid(
            format!("{field}.selinuxLabel"),
            reason,
        ));
    }
    let terminal = process.terminal().unwrap_or(false);
    Ok(ProcessPlan {
        init: false,
        cwd: process.cwd().clone(),
        uid: process.user().uid(),
        gid: process.user().gid(),
        additional_gids: additional_gids(process, field)?,
        umask: process.user().umask().unwrap_or(0o022) & 0o777,
        capabilities: capabilities::of(process.capabilities().as_ref()),
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        apparmor_profile: process
            .apparmor_profile()
            .clone()
            .filter(|name| !name.is_empty()),
        oom_score_adj: oom_score_adj(process, field)?,
        terminal,
        console_size: window(process, console_size, field)?,
        seccomp: linux.seccomp().as_ref().map(seccomp::compile).transpose()?,
        personality: linux.personality().as_ref().map(personality).transpose()?,
        stdio_owner: None,
        limits: ProcessLimits {
            rlimits: rlimits(process.rlimits().as_deref().unwrap_or_default(), field)?,
            scheduling: process.scheduler().as_ref().map(scheduling).transpose()?,
            io_priority: io_priority(process, field)?,
            cpus: cpus(process, field)?,
        },
        args,
        env,
    })
}

/// The environment that the program gets. Where a name occurs twice, the last value counts and the
/// others go: containerd puts the pod's variables behind the image's, and getenv(3) returns the
/// first. An entry must have a name and a value. Both are as in runc (`prepareEnv` of
/// `libcontainer/env.go`).
fn environment(entries: &[String], field: &str) -> Result<Vec<String>, ContainerError> {
    let field = format!("{field}.env");
    check_strings(entries, &field)?;
    let mut names = HashSet::new();
    let mut env = Vec::new();
    for (index, entry) in entries.iter().enumerate().rev() {
        let invalid = |reason| {
            ContainerError::invalid(format!("{field}[{index}]"), format!("{entry:?} {reason}"))
        };
        let (name, _) = entry
            .split_once('=')
            .ok_or_else(|| invalid("has no \"=\""))?;
        if name.is_empty() {
            return Err(invalid("has no name"));
        }
        if names.insert(name) {
            env.push(entry.clone());
        }
    }
    env.reverse();
    Ok(env)
}

fn check_strings(strings: &[String], field: &str) -> Result<(), ContainerError> {
    match strings.iter().position(|string| string.contains('\0')) {
        Some(index) => Err(ContainerError::invalid(
            format!("{field}[{index}]"),
            "holds a NUL",
        )),
        None => Ok(()),
    }
}

fn additional_gids(process: &Process, field: &str) -> Result<Vec<u32>, ContainerError> {
    let gids = process.user().additional_gids().clone().unwrap_or_default();
    // NGROUPS_MAX of uapi/linux/limits.h is far higher; no image or pod comes near this.
    bounded(gids.len(), &format!("{field}.user.additionalGids"))?;
    Ok(gids)
}

fn oom_score_adj(process: &Process, field: &str) -> Result<i32, ContainerError> {
    // The agent's own must not be inherited, whatever it is.
    let value = process.oom_score_adj().unwrap_or(0);
    if !(-1000..=1000).contains(&value) {
        let reason = format!("{value} is not within -1000 and 1000");
        return Err(ContainerError::invalid(
            format!("{field}.oomScoreAdj"),
            reason,
        ));
    }
    Ok(value)
}

fn window(
    process: &Process,
    given: Option<(u32, u32)>,
    field: &str,
) -> Result<Option<(u16, u16)>, ContainerError> {
    let own = process
        .console_size()
        .map(|size| (size.width(), size.height()));
    let given = given.map(|(columns, rows)| (u64::from(columns), u64::from(rows)));
    let Some((columns, rows)) = given.or(own).filter(|size| *size != (0, 0)) else {
        return Ok(None);
    };
    match (u16::try_from(columns), u16::try_from(rows)) {
        (Ok(columns), Ok(rows)) => Ok(Some((columns, rows))),
        _ => Err(ContainerError::invalid(
            format!("{field}.consoleSize"),
            "is beyond 65535",
        )),
    }
}

fn rlimits(limits: &[PosixRlimit], field: &str) -> Result<Vec<(u32, u64, u64)>, ContainerError> {
    let mut result: Vec<(u32, u64, u64)> = Vec::new();
    for (index, limit) in limits.iter().enumerate() {
        let field = format!("{field}.rlimits[{index}]");
        let resource = resource(limit.typ());
        if result.iter().any(|(known, ..)| *known == resource) {
            return Err(ContainerError::invalid(
                field,
                format!("a second {}", limit.typ()),
            ));
        }
        if limit.soft() > limit.hard() {
            return Err(ContainerError::invalid(field, "soft is above hard"));
        }
        result.push((resource, limit.soft(), limit.hard()));
    }
    Ok(result)
}

fn resource(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
    .cast_into()
}

/// `RLIMIT_*` are signed in one C library and unsigned in the other.
trait CastInto {
    fn cast_into(self) -> u32;
}

impl CastInto for u32 {
    fn cast_into(self) -> u32 {
        self
    }
}

impl CastInto for i32 {
    fn cast_into(self) -> u32 {
        self.cast_unsigned()
    }
}

fn scheduling(scheduler: &Scheduler) -> Result<SchedulingPlan, ContainerError> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
        LinuxSchedulerPolicy::SchedIso => {
            let reason = "SCHED_ISO is not implemented by Linux";
            return Err(ContainerError::invalid("process.scheduler.policy", reason));
        }
    };
    // uapi/linux/sched.h, SCHED_FLAG_*.
    let flags = scheduler.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSchedulerFlag::SchedResetOnFork => 0x01,
                LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
                LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
                LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
                LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
                LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
                LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
            }
    });
    let priority = u32::try_from(scheduler.priority().unwrap_or(0)).map_err(|_| {
        ContainerError::invalid("process.scheduler.priority", "must not be negative")
    })?;
    Ok(SchedulingPlan {
        policy: policy.cast_unsigned(),
        flags,
        nice: scheduler.nice().unwrap_or(0),
        priority,
        runtime_ns: scheduler.runtime().unwrap_or(0),
        deadline_ns: scheduler.deadline().unwrap_or(0),
        period_ns: scheduler.period().unwrap_or(0),
    })
}

fn io_priority(process: &Process, field: &str) -> Result<Option<(u32, u32)>, ContainerError> {
    let Some(priority) = process.io_priority() else {
        return Ok(None);
    };
    // uapi/linux/ioprio.h.
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let level = u32::try_from(priority.priority())
        .ok()
        .filter(|level| *level <= 7);
    let level = level.ok_or_else(|| {
        ContainerError::invalid(format!("{field}.ioPriority.priority"), "must be 0 to 7")
    })?;
    Ok(Some((class, level)))
}

fn cpus(process: &Process, field: &str) -> Result<Option<Vec<usize>>, ContainerError> {
    let Some(affinity) = process.exec_cpu_affinity() else {
        return Ok(None);
    };
    let parse = |name: &str, list: &Option<String>| -> Result<Option<Vec<usize>>, ContainerError> {
        let Some(list) = list else { return Ok(None) };
        parse_cpu_list(list).map(Some).ok_or_else(|| {
            let reason = format!("{list:?} is not a list of CPUs such as \"0-3,7\"");
            ContainerError::invalid(format!("{field}.execCPUAffinity.{name}"), reason)
        })
    };
    let initial = parse("initial", affinity.initial())?;
    // The process is in its cgroup before it runs anything of its own, so the last word holds.
    Ok(parse("final", affinity.cpu_affinity_final())?.or(initial))
}

/// The list format of cpuset(7), "Formats".
pub(in crate::container) fn parse_cpu_list(list: &str) -> Option<Vec<usize>> {
    // CPU_SETSIZE of the C library.
    const CPUS_MAX: usize = 1024;
    let mut cpus = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= CPUS_MAX {
            return None;
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Some(cpus)
}

fn personality(personality: &LinuxPersonality) -> Result<u64, ContainerError> {
    if personality
        .flags()
        .as_ref()
        .is_some_and(|flags| !flags.is_empty())
    {
        let reason = "no flags are known (config-linux.md, \"Personality\")";
        return Err(ContainerError::invalid("linux.personality.flags", reason));
    }
    // uapi/linux/personality.h.
    Ok(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    })
}
