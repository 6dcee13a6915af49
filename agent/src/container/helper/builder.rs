//! The helper's own part of a container: opens what lies in the guest, joins namespaces, and makes
//! the process.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::LinuxNamespaceType;
use pericarp_sys::clone::{Forked, fork_sibling};

use super::{
    super::{
        error::ContainerError,
        message::{Report, Role},
        plan::{
            ContainerPlan, IdMapping,
            namespaces::{Origin, clone_flag},
        },
    },
    Descriptors, Step, Streams, apparmor, hook_descriptors, hooks, init, report,
    sources::Sources,
};

/// Builds the container `plan`. Returns in the helper; the new process ends in [`init::run`].
pub(super) fn build(
    plan: &ContainerPlan,
    mut descriptors: Descriptors,
    socket: &UnixStream,
) -> Result<(), ContainerError> {
    apparmor::check(plan.process.apparmor_profile.as_deref())?;
    let score = plan.process.oom_score_adj.to_string();
    fs::write("/proc/self/oom_score_adj", &score).step("write", "/proc/self/oom_score_adj")?;
    let streams = Streams::take(&mut descriptors)?;
    streams.give_to(plan.process.stdio_owner);
    // What lies in the guest is opened while this is still a process of the guest.
    let mut sources = Sources::open(plan)?;
    let users = join(plan, &mut descriptors)?;
    sources.mount_shared(plan)?;
    if plan.namespaces.is_new(LinuxNamespaceType::Time) {
        new_time_namespace(plan)?;
    }
    if let Some(users) = users {
        setns(users.as_fd(), CloneFlags::CLONE_NEWUSER).step("join", "the user namespace")?;
    }
    let (near, far) = UnixStream::pair().step("create", "a socket pair")?;
    let flags = plan.namespaces.clone_flags();
    match fork_sibling(flags).step("create", "the namespaces of the container")? {
        Forked::New => {
            drop(near);
            init::run(plan, sources, streams, socket, far)
        }
        Forked::Caller { pid, pidfd } => {
            drop((far, sources, streams));
            report(socket, &Report::Cloned { pid }, Some(&pidfd))?;
            accompany(plan, pid, near)
        }
    }
}

/// Does for the new process what only the helper can: its id maps, and hooks in the guest's
/// namespaces.
fn accompany(plan: &ContainerPlan, pid: i32, mut near: UnixStream) -> Result<(), ContainerError> {
    if plan.namespaces.is_new(LinuxNamespaceType::User) {
        map_ids(
            pid,
            &plan.namespaces.uid_mappings,
            &plan.namespaces.gid_mappings,
        )?;
    }
    near.write_all(&pid.to_le_bytes())
        .step("write", "the container's init")?;
    if plan.create_runtime_hooks.is_empty() {
        return Ok(());
    }
    let mut mounted = [0u8];
    if near
        .read(&mut mounted)
        .step("read", "the container's init")?
        == 0
    {
        // It failed and said why itself.
        return Ok(());
    }
    hooks::run(
        &plan.create_runtime_hooks,
        &plan.hook_state.json("creating", pid),
        hook_descriptors(),
    )?;
    near.write_all(&mounted)
        .step("write", "the container's init")
}

/// Writes the id maps of the user namespace in which process `pid` is.
pub(super) fn map_ids(
    pid: i32,
    uid_mappings: &[IdMapping],
    gid_mappings: &[IdMapping],
) -> Result<(), ContainerError> {
    for (file, mappings) in [("uid_map", uid_mappings), ("gid_map", gid_mappings)] {
        let path = format!("/proc/{pid}/{file}");
        let lines = IdMapping::lines(mappings);
        // One write: the kernel takes the whole map at once or not at all (user_namespaces(7)).
        fs::write(&path, &lines).step("write", format!("{lines:?} to {path}"))?;
    }
    Ok(())
}

/// Joins what is to be joined, but for the user namespace, which takes away the right to; that is
/// given back.
fn join(
    plan: &ContainerPlan,
    descriptors: &mut Descriptors,
) -> Result<Option<OwnedFd>, ContainerError> {
    let mut users = None;
    let mut opened = Vec::new();
    for (kind, origin) in plan.namespaces.joined() {
        let (fd, object) = match origin {
            Origin::Path(path) => {
                let object = format!("{kind} namespace {}", path.display());
                (
                    OwnedFd::from(File::open(path).step("open", &object)?),
                    object,
                )
            }
            _ => {
                let fd = descriptors.take(Role::PidNamespace).ok_or_else(|| {
                    let reason = "the descriptor of the namespace is missing".to_owned();
                    ContainerError::Helper { reason }
                })?;
                (fd, format!("{kind} namespace of the sandbox"))
            }
        };
        opened.push((kind, fd, object));
    }
    for (kind, fd, object) in opened {
        if kind == LinuxNamespaceType::User {
            users = Some(fd);
            continue;
        }
        let flag = CloneFlags::from_bits_retain(clone_flag(kind));
        setns(fd.as_fd(), flag).step("join", object)?;
    }
    Ok(users)
}

/// A new time namespace is for children; its clocks can be set until the first of them is in it
/// (time_namespaces(7)).
fn new_time_namespace(plan: &ContainerPlan) -> Result<(), ContainerError> {
    let flag = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);
    nix::sched::unshare(flag).step("create", "a time namespace")?;
    let offsets: String = plan
        .namespaces
        .time_offsets
        .iter()
        .map(|(clock, seconds, nanoseconds)| format!("{clock} {seconds} {nanoseconds}\n"))
        .collect();
    if offsets.is_empty() {
        return Ok(());
    }
    let path = "/proc/self/timens_offsets";
    fs::write(path, &offsets).step("write", format!("{offsets:?} to {path}"))
}
