//! What runs in `pericarp-agent container-init`: a process of one thread that builds one process of
//! a container.
//!
//! A process of its own because building changes what belongs to a whole process (namespaces,
//! umask, working directory, `oom_score_adj`, session), which the agent with its threads cannot
//! lend, and because a fork of a process with one thread may go on with ordinary code.
//!
//! From its first instruction it cannot be traced or read by a container (not dumpable), and it is
//! in the container's cgroup before it reads what to do, so that all it uses is the container's to
//! pay.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::OnceLock,
};

use nix::sys::stat::{Mode, SFlag, fstat, umask};
use pericarp_sys::{attributes, descriptors};

use super::{
    error::ContainerError,
    message::{self, INIT_BYTES_MAX, InitMessage, Job, Report, Role},
};

mod apparmor;
mod builder;
mod copy_up;
mod devices;
mod exec;
#[cfg(feature = "fuzzing")]
pub(super) mod fuzzing;
mod hooks;
mod identity;
mod init;
mod masks;
mod passwd;
mod program;
mod rootfs;
mod sources;
mod terminal;

/// The descriptors that came with the message.
#[derive(Debug)]
struct Descriptors(Vec<(Role, OwnedFd)>);

impl Descriptors {
    fn take(&mut self, role: Role) -> Option<OwnedFd> {
        let index = self.0.iter().position(|(known, _)| *known == role)?;
        Some(self.0.swap_remove(index).1)
    }
}

/// Standard streams of a process.
#[derive(Debug)]
struct Streams {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Streams {
    fn take(descriptors: &mut Descriptors) -> Result<Self, ContainerError> {
        let mut one = |role| match descriptors.take(role) {
            Some(fd) => Ok(fd),
            None => null(),
        };
        Ok(Self {
            stdin: one(Role::Stdin)?,
            stdout: one(Role::Stdout)?,
            stderr: one(Role::Stderr)?,
        })
    }

    /// Lets the user of the process open its streams again, as `/dev/stdout`: pipes are files with
    /// an owner.
    fn give_to(&self, owner: Option<u32>) {
        let Some(owner) = owner.filter(|owner| *owner != 0) else {
            return;
        };
        for fd in [&self.stdin, &self.stdout, &self.stderr] {
            let is_pipe = fstat(fd).is_ok_and(|stat| {
                SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFIFO
            });
            if is_pipe {
                // A stream that cannot be given away is still usable as the descriptor that it is.
                let _ = nix::unistd::fchown(fd, Some(owner.into()), None);
            }
        }
    }
}

/// The guest's `/dev/null`.
fn null() -> Result<OwnedFd, ContainerError> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null");
    file.map(OwnedFd::from)
        .map_err(|error| ContainerError::kernel("open", "/dev/null", &error))
}

/// A step of the kernel's that may fail, with the words for it.
trait Step<T> {
    fn step(self, action: &str, object: impl ToString) -> Result<T, ContainerError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, action: &str, object: impl ToString) -> Result<T, ContainerError> {
        self.map_err(|error| ContainerError::kernel(action, object, &error.into()))
    }
}

/// Descriptors that a helper may have: one for each mount of a container, which may have more than
/// the node's limit allows a process.
const DESCRIPTORS_MAX: u64 = 1 << 20;

/// The limit of descriptors that the agent gave this process for its children, soft and hard.
static DESCRIPTORS_OF_CHILDREN: OnceLock<(u64, u64)> = OnceLock::new();

/// Raises the limit of descriptors for the work here, and remembers it for hooks. The agent sets it
/// again for the process of the container, once that has closed what it does not need.
fn raise_descriptors() -> io::Result<()> {
    let (soft, hard) = attributes::own_limit(NOFILE)?;
    let _ = DESCRIPTORS_OF_CHILDREN.set((soft, hard));
    let most = hard.max(DESCRIPTORS_MAX);
    attributes::set_limit(0, NOFILE, most, most)
        .or_else(|_| attributes::set_limit(0, NOFILE, hard, hard))
}

/// The limit of open files for hooks that do not run in the container's own process.
fn hook_descriptors() -> Option<(u64, u64)> {
    DESCRIPTORS_OF_CHILDREN.get().copied()
}

/// `RLIMIT_NOFILE` of asm-generic/resource.h; the C libraries differ in its type.
const NOFILE: u32 = 7;

/// See [`super::init_main`].
pub(super) fn main() -> ! {
    let done = serve();
    std::process::exit(i32::from(done.is_err()))
}

fn serve() -> io::Result<()> {
    // Before anything secret is read: neither /proc/<pid>/mem nor ptrace reach a process that is
    // not dumpable.
    nix::sys::prctl::set_dumpable(false)?;
    umask(Mode::empty());
    let socket = UnixStream::from(descriptors::take_stdin()?);
    let Some((message, fds)) = message::receive::<InitMessage>(&socket, INIT_BYTES_MAX)? else {
        return Ok(());
    };
    raise_descriptors()?;
    let outcome = check(&message, fds.len()).and_then(|()| {
        let descriptors = Descriptors(message.roles.into_iter().zip(fds).collect());
        match message.job {
            Job::Container(plan) => builder::build(&plan, descriptors, &socket),
            Job::Exec(plan) => exec::build(&plan, descriptors, &socket),
            Job::Hooks(plan) => {
                let state = plan.state.json(&plan.status, plan.pid);
                hooks::run(&plan.hooks, &state, hook_descriptors())
                    .and_then(|()| report(&socket, &Report::Done, None))
            }
        }
    });
    outcome.or_else(|error| message::send(&socket, &Report::Failed(error), &[]))
}

fn check(message: &InitMessage, fds: usize) -> Result<(), ContainerError> {
    if message.version != message::VERSION || message.roles.len() != fds {
        let reason = format!(
            "a message of version {} with {fds} descriptors, not of {} with {}",
            message.version,
            message::VERSION,
            message.roles.len(),
        );
        return Err(ContainerError::Helper { reason });
    }
    Ok(())
}

fn report(
    socket: &UnixStream,
    report: &Report,
    fd: Option<&OwnedFd>,
) -> Result<(), ContainerError> {
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
    message::send(socket, report, &fds).step("write", "the agent's socket")
}
