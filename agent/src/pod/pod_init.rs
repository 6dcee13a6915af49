//! The first process of a PID namespace that the containers of a pod share
//! (`shareProcessNamespace`).
//!
//! It keeps the namespace and collects its orphans. Containers see it as their PID 1, so it holds
//! nothing of the guest: no capability, a user of its own, and an empty read-only root.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    process::{Command, Stdio},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::signal::{SigSet, Signal},
    unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid},
};
use pericarp_sys::{
    children::{collect, peek_ended},
    process::{Placement, spawn_placed},
    signals,
};

use crate::ground::{log, paths};

/// The first argument that makes the agent's binary this.
pub(crate) const COMMAND: &str = "pod-init";

/// User and group that it runs as: "nobody" of pause images.
const USER: u32 = 65535;

/// The namespace and its init.
#[derive(Debug)]
pub(crate) struct PodInit {
    /// In the guest's root namespace.
    pub(crate) pid: i32,
    /// What containers join.
    pub(crate) namespace: OwnedFd,
}

/// Makes the namespace. The caller holds the reaper and registers the process.
pub(crate) fn spawn() -> io::Result<PodInit> {
    let mut command = Command::new(paths::AGENT);
    command
        .arg(COMMAND)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .env_clear();
    let placement = Placement {
        new_pid_namespace: true,
        ..Placement::default()
    };
    let child = spawn_placed(&mut command, &placement)?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    let namespace = File::open(format!("/proc/{pid}/ns/pid"))?.into();
    Ok(PodInit { pid, namespace })
}

/// What the process does. Never returns.
pub(crate) fn main() -> ! {
    let mut child_ended = SigSet::empty();
    child_ended.add(Signal::SIGCHLD);
    // Containers see this process, and under runc the pause process has no ignored signal either.
    if let Err(error) = signals::reset_all()
        .map_err(|_| Errno::last())
        .and_then(|()| child_ended.thread_block())
        .and_then(|()| give_everything_up())
    {
        log::error(format_args!("cannot keep the pod's PID namespace: {error}"));
        std::process::exit(1);
    }
    loop {
        while let Some(pid) = peek_ended() {
            // It has ended, so it is collected at once.
            let _ = collect(pid);
        }
        // The first process of a namespace gets no signal that it does not expect, so only SIGCHLD
        // ends the wait.
        let _ = child_ended.wait();
    }
}

fn give_everything_up() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    mount(
        Some("none"),
        "/run",
        Some("tmpfs"),
        flags,
        Some("size=4k,mode=555"),
    )?;
    chdir("/run")?;
    // The old root comes to lie over the new one and goes (pivot_root(2), NOTES).
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    setgroups(&[])?;
    let (uid, gid) = (Uid::from_raw(USER), Gid::from_raw(USER));
    setresgid(gid, gid, gid)?;
    // Leaving user 0 drops every capability (capabilities(7)).
    setresuid(uid, uid, uid)
}
