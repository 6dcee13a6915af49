//! The pod's processes on the host: started in the pod's cgroup, watched, ended.

use std::{
    fs::File,
    io,
    os::fd::RawFd,
    process::{Child, Command},
    sync::{Arc, Mutex, PoisonError},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pericarp_sys::process::{Placement, spawn_placed};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::host::journal::{self, Entry};

/// A process that somebody watches. Dropping it does not end it: the journal and its sockets do.
#[derive(Debug, Clone)]
pub(crate) struct Watched {
    /// Its PID on the host.
    pub(crate) pid: i32,
    /// When it began, for the journal.
    start: u64,
    ended: watch::Receiver<Option<String>>,
}

impl Watched {
    /// Starts `command` with `descriptors`, in `cgroups`, as the first process of a PID namespace.
    pub(crate) fn spawn(
        command: Command,
        descriptors: Vec<(RawFd, RawFd)>,
        cgroups: Arc<Vec<File>>,
    ) -> io::Result<Self> {
        let placement = Placement {
            descriptors: &descriptors,
            cgroups: &cgroups,
            new_pid_namespace: true,
        };
        Self::spawn_at(command, &placement)
    }

    /// Starts a program of the host's with `descriptors`, beside us.
    pub(crate) fn spawn_program(
        command: Command,
        descriptors: Vec<(RawFd, RawFd)>,
    ) -> io::Result<Self> {
        let placement = Placement {
            descriptors: &descriptors,
            cgroups: &[],
            new_pid_namespace: false,
        };
        Self::spawn_at(command, &placement)
    }

    /// Starts a program of the host's in `cgroups`.
    pub(crate) fn spawn_program_in(command: Command, cgroups: Arc<Vec<File>>) -> io::Result<Self> {
        let placement = Placement {
            descriptors: &[],
            cgroups: &cgroups,
            new_pid_namespace: false,
        };
        Self::spawn_at(command, &placement)
    }

    fn spawn_at(mut command: Command, placement: &Placement<'_>) -> io::Result<Self> {
        let mut exits = signal(SignalKind::child())?;
        let child = spawn_placed(&mut command, placement)?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        let start = journal::start_time(pid).unwrap_or_default();
        let (sender, ended) = watch::channel(None);
        let child = Arc::new(Mutex::new(child));
        tokio::spawn(async move {
            while !reaped(&child, &sender) {
                if exits.recv().await.is_none() {
                    break;
                }
            }
        });
        Ok(Self { pid, start, ended })
    }

    /// Waits for the end; the answer is how it ended, in words.
    pub(crate) async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(how) => how.clone().unwrap_or_default(),
            Err(_) => "nobody watches it any more".to_owned(),
        }
    }

    /// What ends it, for the journal.
    pub(crate) fn entry(&self) -> Entry {
        Entry::Process {
            pid: self.pid,
            start: self.start,
        }
    }

    /// Whether it is known to have ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Whether the kernel is ending it: PF_EXITING among its flags (proc(5), field 9 of stat).
    pub(crate) fn is_exiting(&self) -> bool {
        const PF_EXITING: u64 = 4;
        let flags = || journal::stat_field(self.pid, 9);
        !self.has_ended() && flags().is_some_and(|flags| flags & PF_EXITING != 0)
    }

    /// Kills it.
    pub(crate) fn kill(&self) {
        if !self.has_ended() {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

fn reaped(child: &Mutex<Child>, sender: &watch::Sender<Option<String>>) -> bool {
    let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
    match child.try_wait() {
        Ok(None) => false,
        Ok(Some(status)) => {
            let _ = sender.send(Some(status.to_string()));
            true
        }
        Err(error) => {
            let _ = sender.send(Some(error.to_string()));
            true
        }
    }
}
