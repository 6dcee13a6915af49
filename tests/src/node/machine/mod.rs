//! What a node runs on: QEMU, or this computer itself.

pub mod host;
pub mod qemu;

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// A machine is given so long to power off before it is killed.
pub const POWER_OFF_TIMEOUT: Duration = Duration::from_secs(30);

/// What a node runs on.
pub trait Machine: Send + Sync {
    /// Names of logs in the results folder.
    fn logs(&self) -> Vec<PathBuf>;
    /// Waits for its end, and makes it end when the time is over.
    fn end(&self, timeout: Duration);
    /// Kills it, and waits until it is gone.
    fn kill(&self);
}

/// A started machine and its control channel.
pub struct Started {
    /// The machine.
    pub machine: Arc<dyn Machine>,
    /// From the node.
    pub reader: Box<dyn Read + Send>,
    /// To the node.
    pub writer: Box<dyn Write + Send>,
    /// Says why the machine is gone, once its channel is closed.
    pub ended: Box<dyn FnOnce() -> String + Send>,
}

impl std::fmt::Debug for Started {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Started").finish_non_exhaustive()
    }
}

/// A child process kept by a thread of its own.
///
/// The signal that ends a child with its parent is bound to the *thread* that started it
/// (PR_SET_PDEATHSIG in prctl(2)); a test's thread ends long before its node.
#[derive(Debug)]
pub struct Kept {
    group: Pid,
    ended: Mutex<Receiver<ExitStatus>>,
}

impl Kept {
    /// Starts the command in a process group of its own.
    pub fn start(mut command: std::process::Command) -> Result<(Self, ChildPipes)> {
        use std::os::unix::process::CommandExt;
        command.process_group(0);
        let (started, starting) = sync_channel::<Result<(i32, ChildPipes)>>(1);
        let (tell, ended) = sync_channel(1);
        std::thread::spawn(move || {
            let spawned = command.spawn().context("cannot start the machine");
            let child = match spawned.and_then(take_pipes) {
                Ok((child, pid, pipes)) => {
                    let _starter_waits = started.send(Ok((pid, pipes)));
                    child
                }
                Err(error) => {
                    let _starter_waits = started.send(Err(error));
                    return;
                }
            };
            let mut child = child;
            if let Ok(status) = child.wait() {
                let _nobody_asks = tell.send(status);
            }
        });
        let (pid, pipes) = starting.recv().context("the machine's thread is gone")??;
        let ended = Mutex::new(ended);
        Ok((
            Self {
                group: Pid::from_raw(pid),
                ended,
            },
            pipes,
        ))
    }

    /// Waits for its end.
    pub fn wait(&self, timeout: Duration) -> Option<ExitStatus> {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.recv_timeout(timeout).ok()
    }

    /// Kills the whole process group.
    pub fn kill(&self) {
        let _gone = killpg(self.group, Signal::SIGKILL);
    }
}

/// Standard input and output of a child.
#[derive(Debug)]
pub struct ChildPipes {
    /// To the child.
    pub stdin: std::process::ChildStdin,
    /// From the child.
    pub stdout: std::process::ChildStdout,
}

fn take_pipes(mut child: Child) -> Result<(Child, i32, ChildPipes)> {
    let pid = i32::try_from(child.id()).context("a process id that is none")?;
    let stdin = child
        .stdin
        .take()
        .context("the machine has no standard input")?;
    let stdout = child
        .stdout
        .take()
        .context("the machine has no standard output")?;
    Ok((child, pid, ChildPipes { stdin, stdout }))
}
