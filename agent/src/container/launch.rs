//! The agent's side of building a process: starts the helper, tells it what to do, hears what came
//! of it.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Command, Stdio as Inherit},
    time::Duration,
};

use nix::sched::{CpuSet, sched_setaffinity};
use pericarp_sys::{attributes, pidfd};

use crate::ground::paths;

use super::{
    cgroup::Cgroup,
    error::ContainerError,
    message::{self, InitMessage, Job, REPORT_BYTES_MAX, Report, Role},
    options::{ResourceLimit, Stdio},
    plan::process::ProcessLimits,
};

/// How long the helper may be silent. Building takes milliseconds; hooks, which are part of it, may
/// take a minute each.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// The word that makes the agent a helper.
const COMMAND: &str = "container-init";

/// A process that was built, and the way to its start.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
    pub(super) socket: UnixStream,
    pub(super) terminal: Option<OwnedFd>,
}

/// Descriptors for the helper.
#[derive(Debug, Default)]
pub(super) struct PassedFds(Vec<(Role, OwnedFd)>);

impl PassedFds {
    /// The streams of a process.
    pub(super) fn of(stdio: Stdio) -> Self {
        let streams = [
            (Role::Stdin, stdio.stdin),
            (Role::Stdout, stdio.stdout),
            (Role::Stderr, stdio.stderr),
        ];
        Self(
            streams
                .into_iter()
                .filter_map(|(role, fd)| Some((role, fd?)))
                .collect(),
        )
    }

    /// Adds a descriptor.
    pub(super) fn add(&mut self, role: Role, fd: OwnedFd) {
        self.0.push((role, fd));
    }
}

/// Where a helper works, and what it and its children inherit.
#[derive(Debug)]
pub(super) struct Place<'a> {
    /// The container's cgroup, with the container's init when there is one already.
    pub(super) cgroup: Option<(&'a Cgroup, Option<i32>)>,
    /// Limits of processes where the specification sets none. The helper has them too, as runc has
    /// those that it passes on: a user namespace is bounded by those of its maker
    /// (`create_user_ns()` of kernel/user_namespace.c).
    pub(super) default_limits: &'a [ResourceLimit],
}

/// The running helper. Whatever becomes of the work, it is collected.
struct Helper {
    pidfd: OwnedFd,
    socket: UnixStream,
}

impl Drop for Helper {
    fn drop(&mut self) {
        // It ends by itself when its work is done; when it hangs, its work has failed. Somebody
        // else may collect it.
        if !pidfd::wait_ended(self.pidfd.as_fd(), 0).unwrap_or(false) {
            let _ = pidfd::wait_ended(self.pidfd.as_fd(), GRACE_MS);
            let _ = pidfd::send_signal(self.pidfd.as_fd(), libc::SIGKILL);
        }
        let _ = pidfd::collect(&self.pidfd);
    }
}

/// How long a helper may take to end after its last word.
const GRACE_MS: i32 = 1000;

fn broken(what: &str, error: &io::Error) -> ContainerError {
    ContainerError::Helper {
        reason: format!("{what}: {error}"),
    }
}

impl Helper {
    /// Starts a helper, in its place before it does anything.
    fn start(place: &Place<'_>) -> Result<Self, ContainerError> {
        let (near, far) =
            UnixStream::pair().map_err(|error| broken("make a socket pair", &error))?;
        near.set_read_timeout(Some(SILENCE_MAX))
            .and_then(|()| near.set_write_timeout(Some(SILENCE_MAX)))
            .map_err(|error| broken("prepare the socket", &error))?;
        // The socket is its standard input: no other child that is started meanwhile inherits that.
        let child = Command::new(paths::AGENT)
            .arg(COMMAND)
            .env_clear()
            .current_dir("/")
            .stdin(OwnedFd::from(far))
            .stdout(Inherit::null())
            .stderr(Inherit::inherit())
            .spawn()
            .map_err(|error| broken("start the helper", &error))?;
        let pid = i32::try_from(child.id()).map_err(|_| ContainerError::Helper {
            reason: "an impossible pid".to_owned(),
        })?;
        let pidfd = pidfd::open(pid).map_err(|error| broken("watch the helper", &error))?;
        let helper = Self {
            pidfd,
            socket: near,
        };
        if let Some((cgroup, init)) = place.cgroup {
            cgroup.add(pid, init)?;
        }
        set_limits(pid, place.default_limits, DEFAULTS)?;
        Ok(helper)
    }

    fn instruct(&self, job: Job, fds: PassedFds) -> Result<(), ContainerError> {
        let (roles, fds): (Vec<_>, Vec<_>) = fds.0.into_iter().unzip();
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let message = InitMessage {
            version: message::VERSION,
            job,
            roles,
        };
        message::send(&self.socket, &message, &fds)
            .map_err(|error| broken("instruct the helper", &error))
    }
}

fn next_report(socket: &UnixStream) -> Result<(Report, Vec<OwnedFd>), ContainerError> {
    match message::receive::<Report>(socket, REPORT_BYTES_MAX) {
        Ok(Some((Report::Failed(error), _))) => Err(error),
        Ok(Some(report)) => Ok(report),
        Ok(None) => {
            let reason = "the helper ended without a word; was it killed for want of memory?";
            Err(ContainerError::Helper {
                reason: reason.to_owned(),
            })
        }
        Err(error) => Err(broken("hear the helper", &error)),
    }
}

fn unexpected(report: &Report) -> ContainerError {
    ContainerError::Helper {
        reason: format!("the helper said {report:?} out of turn"),
    }
}

/// Builds the process of `job` in `place` and gives it `limits`.
pub(super) fn build(
    job: Job,
    fds: PassedFds,
    place: &Place<'_>,
    limits: &ProcessLimits,
) -> Result<Waiting, ContainerError> {
    let helper = Helper::start(place)?;
    helper.instruct(job, fds)?;
    let (pid, pidfd) = match next_report(&helper.socket)? {
        (Report::Cloned { pid }, mut fds) if fds.len() == 1 => (pid, fds.remove(0)),
        (report, _) => return Err(unexpected(&report)),
    };
    let outcome = match next_report(&helper.socket) {
        // The helper raises its limit of descriptors, and its children have that.
        Ok((Report::Ready, mut fds)) => set_limits(pid, place.default_limits, DEFAULTS)
            .and_then(|()| apply(pid, limits))
            .map(|()| fds.pop()),
        Ok((report, _)) => Err(unexpected(&report)),
        Err(error) => Err(error),
    };
    match outcome {
        Ok(terminal) => {
            let socket = helper
                .socket
                .try_clone()
                .map_err(|error| broken("keep", &error))?;
            Ok(Waiting {
                pid,
                pidfd,
                socket,
                terminal,
            })
        }
        Err(error) => {
            end(&pidfd);
            Err(error)
        }
    }
}

/// Kills and collects a process that was never handed out.
pub(super) fn end(pidfd: &OwnedFd) {
    let _ = pidfd::send_signal(pidfd.as_fd(), libc::SIGKILL);
    let _ = pidfd::collect(pidfd);
}

/// Whose limits those are that the specification does not set.
const DEFAULTS: &str = "the node's limit of";

fn set_limits(pid: i32, limits: &[ResourceLimit], object: &str) -> Result<(), ContainerError> {
    for (resource, soft, hard) in limits {
        attributes::set_limit(pid, *resource, *soft, *hard).map_err(|error| {
            let object = format!("{object} resource {resource} = {soft}/{hard}");
            ContainerError::kernel("set", object, &error)
        })?;
    }
    Ok(())
}

/// Sets what takes rights that the process has not: it waits meanwhile.
fn apply(pid: i32, limits: &ProcessLimits) -> Result<(), ContainerError> {
    set_limits(pid, &limits.rlimits, "process.rlimits")?;
    if let Some(plan) = &limits.scheduling {
        let scheduling = attributes::Scheduling {
            policy: plan.policy,
            flags: plan.flags,
            nice: plan.nice,
            priority: plan.priority,
            runtime_ns: plan.runtime_ns,
            deadline_ns: plan.deadline_ns,
            period_ns: plan.period_ns,
        };
        attributes::set_scheduling(pid, &scheduling).map_err(|error| {
            ContainerError::kernel("set", format!("process.scheduler {plan:?}"), &error)
        })?;
    }
    if let Some((class, level)) = limits.io_priority {
        attributes::set_io_priority(pid, class, level).map_err(|error| {
            let object = format!("process.ioPriority class {class} level {level}");
            ContainerError::kernel("set", object, &error)
        })?;
    }
    if let Some(cpus) = &limits.cpus {
        let mut set = CpuSet::new();
        let all = cpus.iter().try_for_each(|cpu| set.set(*cpu));
        all.and_then(|()| sched_setaffinity(nix::unistd::Pid::from_raw(pid), &set))
            .map_err(|error| {
                let object = format!("process.execCPUAffinity {cpus:?}");
                ContainerError::kernel("set", object, &error.into())
            })?;
    }
    Ok(())
}

/// Lets the process at the other end of `socket` execute its program; answers when it does.
pub(super) fn start(socket: UnixStream) -> Result<(), ContainerError> {
    use std::io::Write;
    (&socket)
        .write_all(&[message::START])
        .map_err(|error| broken("start the process", &error))?;
    match message::receive::<Report>(&socket, REPORT_BYTES_MAX) {
        // Its end of the socket went with the old program.
        Ok(None) => Ok(()),
        Ok(Some((Report::Failed(error), _))) => Err(error),
        Ok(Some((report, _))) => Err(unexpected(&report)),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(broken("hear the process", &error)),
    }
}

/// Runs hooks in the guest's own namespaces, in a helper that collects their processes.
pub(super) fn hooks(
    plan: super::plan::hooks::HooksPlan,
    default_limits: &[ResourceLimit],
) -> Result<(), ContainerError> {
    if plan.hooks.is_empty() {
        return Ok(());
    }
    let helper = Helper::start(&Place {
        cgroup: None,
        default_limits,
    })?;
    helper.instruct(Job::Hooks(plan), PassedFds::default())?;
    match next_report(&helper.socket)? {
        (Report::Done, _) => Ok(()),
        (report, _) => Err(unexpected(&report)),
    }
}
