//! OCI seccomp profiles to filters of the kernel.
//!
//! Pure: a profile in, instructions out. Written here because libseccomp is a C library under the
//! LGPL that would be linked into a static binary, and because `seccompiler` knows one architecture
//! per filter and one action per match.
//!
//! Meaning, where config-linux.md leaves it open, as libseccomp and runc have it:
//! - A name that an architecture does not have is not an error: profiles list the calls of every
//!   kernel.
//! - Several conditions on one argument are alternatives; on different arguments all must hold.
//! - An entry whose action is the default one adds nothing.
//! - A system call newer than all that the profile names fails with ENOSYS where the default action
//!   would refuse it, so that C libraries fall back to older calls.
//! - An architecture that the profile does not name ends the thread.

use std::collections::BTreeMap;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag, LinuxSyscall,
};
use serde::{Deserialize, Serialize};

use super::error::ContainerError;

mod assemble;
mod table;
#[cfg(test)]
mod tests;

use assemble::{Condition, Rule};
use table::Architecture;

/// Most rules after every name and alternative was written out.
const RULES_MAX: usize = 1 << 16;

/// `BPF_MAXINSNS` of uapi/linux/bpf_common.h.
const INSTRUCTIONS_MAX: usize = 4096;

/// Largest value that an action carries (`SECCOMP_RET_DATA`), and the largest errno (`MAX_ERRNO`).
const ERRNO_MAX: u32 = 4095;

/// A compiled profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Filter {
    /// `SECCOMP_FILTER_FLAG_*`.
    pub(super) flags: u32,
    /// An instruction each: code, jumps and constant from the top.
    pub(super) instructions: Vec<u64>,
}

/// What a system call number leads to: its rules in order, then this for what none of them matches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Verdict {
    rules: Vec<Rule>,
    otherwise: Option<u32>,
}

/// Compiles `profile`.
pub(super) fn compile(profile: &LinuxSeccomp) -> Result<Filter, ContainerError> {
    if profile.listener_path().is_some() {
        let reason = "notification listeners are not supported: they would be outside of the guest";
        return Err(ContainerError::invalid(
            "linux.seccomp.listenerPath",
            reason,
        ));
    }
    let default = action(
        profile.default_action(),
        profile.default_errno_ret(),
        "linux.seccomp.defaultAction",
    )?;
    let mut sections = Vec::new();
    for architecture in architectures(profile)? {
        let verdicts = verdicts(profile, architecture, default)?;
        let unknown = unknown_action(profile, default);
        sections.push((
            architecture,
            assemble::section(&verdicts, default, unknown, architecture),
        ));
    }
    let instructions = assemble::program(sections);
    if instructions.len() > INSTRUCTIONS_MAX {
        let count = instructions.len();
        let reason = format!("needs {count} instructions, at most {INSTRUCTIONS_MAX}");
        return Err(ContainerError::invalid("linux.seccomp", reason));
    }
    let instructions = instructions.into_iter().map(assemble::pack).collect();
    Ok(Filter {
        flags: flags(profile)?,
        instructions,
    })
}

impl Filter {
    /// The instructions as the kernel takes them.
    pub(super) fn program(&self) -> Vec<pericarp_sys::seccomp::Instruction> {
        self.instructions
            .iter()
            .map(|packed| assemble::unpack(*packed))
            .collect()
    }
}

fn flags(profile: &LinuxSeccomp) -> Result<u32, ContainerError> {
    // uapi/linux/seccomp.h.
    const LOG: u32 = 1 << 1;
    const SPEC_ALLOW: u32 = 1 << 2;
    profile
        .flags()
        .iter()
        .flatten()
        .try_fold(0, |flags, flag| match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => Ok(flags | LOG),
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => Ok(flags | SPEC_ALLOW),
            // The filter is installed by a process of one thread: there is nothing to synchronise.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => Ok(flags),
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                Err(ContainerError::invalid(
                    "linux.seccomp.flags",
                    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV needs a notification listener",
                ))
            }
        })
}

fn action(
    action: LinuxSeccompAction,
    errno: Option<u32>,
    field: &str,
) -> Result<u32, ContainerError> {
    if action == LinuxSeccompAction::ScmpActNotify {
        let reason = "SCMP_ACT_NOTIFY is not supported: its listener would be outside of the guest";
        return Err(ContainerError::invalid(field, reason));
    }
    if let Some(errno) = errno.filter(|errno| *errno > ERRNO_MAX) {
        return Err(ContainerError::invalid(
            field,
            format!("errno {errno} is above {ERRNO_MAX}"),
        ));
    }
    Ok(action.as_u32(errno))
}

/// What becomes of system calls that are newer than the profile.
fn unknown_action(profile: &LinuxSeccomp, default: u32) -> u32 {
    match profile.default_action() {
        LinuxSeccompAction::ScmpActAllow | LinuxSeccompAction::ScmpActLog => default,
        _ => LinuxSeccompAction::ScmpActErrno.as_u32(Some(libc::ENOSYS.cast_unsigned())),
    }
}

fn architectures(profile: &LinuxSeccomp) -> Result<Vec<Architecture>, ContainerError> {
    let native = Architecture::native();
    let mut result = vec![native];
    for arch in profile.architectures().iter().flatten() {
        let known = match arch {
            Arch::ScmpArchNative => native,
            Arch::ScmpArchX86_64 => Architecture::X86_64,
            Arch::ScmpArchX86 => Architecture::X86,
            Arch::ScmpArchX32 => Architecture::X32,
            Arch::ScmpArchAarch64 => Architecture::Aarch64,
            Arch::ScmpArchArm => Architecture::Arm,
            // Of processors on which this guest cannot be: a program for one cannot run, filtered
            // or not.
            _ => continue,
        };
        if !result.contains(&known) {
            result.push(known);
        }
    }
    Ok(result)
}

/// Which verdict each named system call of one architecture gets.
fn verdicts(
    profile: &LinuxSeccomp,
    architecture: Architecture,
    default: u32,
) -> Result<BTreeMap<u32, Verdict>, ContainerError> {
    let mut verdicts: BTreeMap<u32, Verdict> = BTreeMap::new();
    let mut rules = 0;
    for (index, entry) in profile.syscalls().iter().flatten().enumerate() {
        let field = format!("linux.seccomp.syscalls[{index}]");
        let result = action(
            entry.action(),
            entry.errno_ret(),
            &format!("{field}.action"),
        )?;
        let alternatives = alternatives(entry, &field)?;
        for name in entry.names() {
            let Some(number) = architecture.number(name) else {
                continue;
            };
            let verdict = verdicts.entry(number).or_default();
            if result == default {
                continue;
            }
            rules += alternatives.len().max(1);
            if rules > RULES_MAX {
                return Err(ContainerError::invalid(
                    "linux.seccomp.syscalls",
                    "too many rules",
                ));
            }
            if alternatives.is_empty() {
                verdict.otherwise = verdict.otherwise.or(Some(result));
            }
            verdict
                .rules
                .extend(alternatives.iter().map(|conditions| Rule {
                    conditions: conditions.clone(),
                    result,
                }));
        }
    }
    Ok(verdicts)
}

/// The conditions of an entry: any of the lists must hold, each with all of its members. None: it
/// always applies.
fn alternatives(entry: &LinuxSyscall, field: &str) -> Result<Vec<Vec<Condition>>, ContainerError> {
    // seccomp(2): a system call has six arguments.
    const ARGUMENTS: usize = 6;
    let args = entry.args().as_deref().unwrap_or_default();
    let mut conditions = Vec::new();
    for (index, arg) in args.iter().enumerate() {
        if arg.index() >= ARGUMENTS {
            let field = format!("{field}.args[{index}].index");
            return Err(ContainerError::invalid(
                field,
                "a system call has six arguments",
            ));
        }
        conditions.push(Condition {
            argument: arg.index(),
            operator: arg.op(),
            value: arg.value(),
            value_two: arg.value_two().unwrap_or(0),
        });
    }
    let repeated = (0..ARGUMENTS).any(|argument| {
        conditions
            .iter()
            .filter(|condition| condition.argument == argument)
            .count()
            > 1
    });
    if conditions.is_empty() {
        return Ok(Vec::new());
    }
    if repeated {
        return Ok(conditions
            .into_iter()
            .map(|condition| vec![condition])
            .collect());
    }
    Ok(vec![conditions])
}
