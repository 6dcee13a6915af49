//! Attributes of processes that the kernel keeps beside their memory: limits, scheduling, I/O
//! priority, execution domain, session keyring.

use std::{ffi::CStr, io, os::unix::process::CommandExt, process::Command};

/// Sets the limit `resource` (`RLIMIT_*`) of the process `pid`; 0 is the calling one.
///
/// # Errors
/// `EPERM` when the hard limit is raised without `CAP_SYS_RESOURCE`, `EINVAL` when soft is above
/// hard.
pub fn set_limit(pid: i32, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: the new limit lives through the call, and no old limit is asked for. The system call
    // itself takes 64-bit limits whatever the C library's `rlim_t` is.
    let result = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid,
            resource,
            &raw const limit,
            std::ptr::null_mut::<libc::rlimit64>(),
        )
    };
    check(result)
}

/// Makes the program of `command` begin with the limit `resource`.
pub fn limit_in(command: &mut Command, resource: u32, (soft, hard): (u64, u64)) -> &mut Command {
    // SAFETY: the closure runs between fork and exec and makes one system call, which is
    // async-signal-safe, with memory of its own.
    unsafe { command.pre_exec(move || set_limit(0, resource, soft, hard)) }
}

/// The limit `resource` (`RLIMIT_*`) of this process: soft, hard.
///
/// # Errors
/// `EINVAL` when there is no such resource.
pub fn own_limit(resource: u32) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: no new limit is given, and the old one is written to a structure that lives through
    // the call. Process 0 is the calling one.
    let result = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            std::ptr::null::<libc::rlimit64>(),
            &raw mut limit,
        )
    };
    check(result)?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// `SCHED_ATTR_SIZE_VER0` of uapi/linux/sched/types.h.
const SCHED_ATTR_SIZE: u32 = 48;
const _: () = assert!(size_of::<libc::sched_attr>() == SCHED_ATTR_SIZE as usize);

/// As `sched_setattr(2)` takes it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scheduling {
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// For the ordinary policies.
    pub nice: i32,
    /// For the real-time policies.
    pub priority: u32,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub runtime_ns: u64,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub deadline_ns: u64,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub period_ns: u64,
}

/// Sets how the process `pid` is scheduled.
///
/// # Errors
/// The kernel's.
pub fn set_scheduling(pid: i32, scheduling: &Scheduling) -> io::Result<()> {
    let attributes = libc::sched_attr {
        size: SCHED_ATTR_SIZE,
        sched_policy: scheduling.policy,
        sched_flags: scheduling.flags,
        sched_nice: scheduling.nice,
        sched_priority: scheduling.priority,
        sched_runtime: scheduling.runtime_ns,
        sched_deadline: scheduling.deadline_ns,
        sched_period: scheduling.period_ns,
    };
    // SAFETY: the structure lives through the call and states its own size.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw const attributes, 0) };
    check(result)
}

/// Sets the I/O priority of the process `pid`: `class` is `IOPRIO_CLASS_*`, `level` 0 to 7.
///
/// # Errors
/// The kernel's.
pub fn set_io_priority(pid: i32, class: u32, level: u32) -> io::Result<()> {
    // uapi/linux/ioprio.h: the class stands above 13 bits of data; 1 is IOPRIO_WHO_PROCESS.
    let value = (class << 13) | level;
    // SAFETY: takes numbers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, 1, pid, value) })
}

/// Sets the execution domain of the calling thread (personality(2)).
///
/// # Errors
/// `EINVAL` when the kernel does not know it.
pub fn set_personality(persona: u64) -> io::Result<()> {
    // SAFETY: takes a number only.
    check(unsafe { libc::personality(persona) }.into())
}

/// Gives the calling thread a new session keyring, so that it sees no key of whoever started it.
///
/// # Errors
/// `ENOSYS` when the kernel has no keyrings, `EDQUOT` when too many exist.
pub fn join_session_keyring(name: &CStr) -> io::Result<()> {
    // KEYCTL_JOIN_SESSION_KEYRING of uapi/linux/keyctl.h.
    const JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: the name is NUL-terminated and lives through the call; the kernel copies it.
    check(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, name.as_ptr()) })
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
