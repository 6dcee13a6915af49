//! A further process of a running container: joins the namespaces of its init.

use std::{
    fs,
    io::{Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
};

use nix::sched::{CloneFlags, setns};
use pericarp_sys::clone::{Forked, fork_sibling};

use super::{
    super::{
        error::ContainerError,
        message::{Report, Role},
        plan::ExecPlan,
    },
    Descriptors, Step, Streams, apparmor, init,
    program::{self, Program},
    report,
    terminal::Terminal,
};
use crate::ground::beneath;

/// Builds the process `plan`. Returns in the helper; the new process becomes its program.
pub(super) fn build(
    plan: &ExecPlan,
    mut descriptors: Descriptors,
    socket: &UnixStream,
) -> Result<(), ContainerError> {
    apparmor::check(plan.process.apparmor_profile.as_deref())?;
    let score = plan.process.oom_score_adj.to_string();
    fs::write("/proc/self/oom_score_adj", &score).step("write", "/proc/self/oom_score_adj")?;
    let streams = Streams::take(&mut descriptors)?;
    streams.give_to(plan.process.stdio_owner);
    let init = descriptors
        .take(Role::Init)
        .ok_or_else(|| ContainerError::Helper {
            reason: "the pidfd of the container's init is missing".to_owned(),
        })?;
    // All at once: the process to be joined may end at any time, and then none is joined.
    setns(init.as_fd(), CloneFlags::from_bits_retain(plan.join))
        .step("join", "the namespaces of the container")?;
    drop(init);
    let (mut near, far) = UnixStream::pair().step("create", "a socket pair")?;
    match fork_sibling(0).step("fork", "the process")? {
        Forked::New => {
            drop(near);
            let Err(error) = become_program(plan, streams, socket, far);
            program::fail(error, socket)
        }
        Forked::Caller { pid, pidfd } => {
            drop((far, streams));
            report(socket, &Report::Cloned { pid }, Some(&pidfd))?;
            near.write_all(&[0]).step("write", "the new process")
        }
    }
}

fn become_program(
    plan: &ExecPlan,
    streams: Streams,
    socket: &UnixStream,
    mut helper: UnixStream,
) -> Result<std::convert::Infallible, ContainerError> {
    helper.read_exact(&mut [0]).step("read", "the helper")?;
    drop(helper);
    if plan.join & libc::CLONE_NEWUSER != 0 {
        init::become_root()?;
    }
    init::new_session("exec")?;
    let terminal = plan
        .process
        .terminal
        .then(|| containers_terminal(plan))
        .transpose()?;
    let program = Program {
        plan: &plan.process,
        streams,
        terminal,
        start_hooks: &[],
        hook_state: Vec::new(),
    };
    program::run(program, socket)
}

fn containers_terminal(plan: &ExecPlan) -> Result<Terminal, ContainerError> {
    let root = fs::File::open("/").step("open", "/")?;
    let devpts = beneath::open(root.as_fd(), "/dev/pts").step("open", "/dev/pts")?;
    let terminal = Terminal::open(devpts.as_fd())?;
    terminal.resize(plan.process.console_size)?;
    Ok(terminal)
}
