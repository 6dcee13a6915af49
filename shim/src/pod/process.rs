//! A process of the pod as containerd sees it, and which calls are lawful when.
//!
//! ```text
//!            create            start              exit
//! (reserved) ------> Created --------> Running ---------> Stopped --delete--> (gone)
//!                       |                                    ^
//!                       '-- exit (killed, failed start, VM gone)
//! ```
//!
//! A process is watched from Create on, so it has an end even when it never ran. An end that comes
//! during a start is held back until containerd has been told of the start.
//!
//! The decisions are pure functions of [`Phase`]; the lock around it is never held across a wait.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

use tokio::sync::{Notify, watch};

use crate::{
    errors::CallError,
    pod::stdio::{Copying, Paths},
};

/// What a process is said to have ended with when its VM is gone: SIGKILL's.
pub(crate) const LOST_STATUS: u32 = 137;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// As a shell says it: 128 + n for signal n.
    pub(crate) status: u32,
    /// When.
    pub(crate) at: SystemTime,
}

impl Exit {
    /// An end that happens now.
    pub(crate) fn now(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }
}

/// Where in its life a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Being built; only its creator may touch it.
    Reserved,
    /// Built, not started.
    Created,
    /// A start is under way.
    Starting,
    /// Runs.
    Running,
    /// Ended.
    Stopped(Exit),
    /// A delete is under way; what it was before, in case the delete fails.
    Deleting(Option<Exit>),
}

impl Phase {
    fn word(self) -> &'static str {
        match self {
            Self::Reserved => "being created",
            Self::Created => "created",
            Self::Starting => "being started",
            Self::Running => "running",
            Self::Stopped(_) => "stopped",
            Self::Deleting(_) => "being deleted",
        }
    }

    fn begin_start(self) -> Result<Self, Self> {
        if self == Self::Created {
            Ok(Self::Starting)
        } else {
            Err(self)
        }
    }

    fn begin_delete(self) -> Result<Self, Self> {
        match self {
            Self::Created => Ok(Self::Deleting(None)),
            Self::Stopped(exit) => Ok(Self::Deleting(Some(exit))),
            other => Err(other),
        }
    }

    /// An end is final: a second one changes nothing.
    fn stop(self, exit: Exit) -> Option<Self> {
        match self {
            Self::Stopped(_) | Self::Deleting(Some(_)) | Self::Reserved => None,
            Self::Created | Self::Starting | Self::Running => Some(Self::Stopped(exit)),
            // A delete of a process that never ran ends it.
            Self::Deleting(None) => Some(Self::Deleting(Some(exit))),
        }
    }
}

/// A process: a container's init, or an exec.
#[derive(Debug)]
pub(crate) struct Process {
    /// For messages: "container x" or "exec y of container x".
    pub(crate) name: String,
    /// Empty for a container's init.
    pub(crate) exec_id: String,
    /// The PID that containerd is told: its container's placeholder.
    pub(crate) pid: u32,
    /// What containerd asked for.
    pub(crate) paths: Paths,
    phase: Mutex<Phase>,
    /// Its start has succeeded.
    ran: AtomicBool,
    /// Wakes those who wait for the end of a creation or a start.
    step_over: Notify,
    exit: watch::Sender<Option<Exit>>,
    copying: Mutex<Option<Copying>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    /// A process that is about to be built.
    pub(crate) fn reserve(container_id: &str, exec_id: &str, pid: u32, paths: Paths) -> Self {
        let name = if exec_id.is_empty() {
            format!("container {container_id}")
        } else {
            format!("exec {exec_id} of container {container_id}")
        };
        Self {
            name,
            exec_id: exec_id.to_owned(),
            pid,
            paths,
            phase: Mutex::new(Phase::Reserved),
            ran: AtomicBool::new(false),
            step_over: Notify::new(),
            exit: watch::Sender::new(None),
            copying: Mutex::new(None),
        }
    }

    /// The phase it is in.
    pub(crate) fn phase(&self) -> Phase {
        *locked(&self.phase)
    }

    fn refuse(&self, call: &str, phase: Phase) -> CallError {
        CallError::WrongState(format!("{call} {}: it is {}", self.name, phase.word()))
    }

    /// It is built; `copying` moves its streams.
    pub(crate) fn created(&self, copying: Option<Copying>) {
        *locked(&self.copying) = copying;
        self.end_creation(Phase::Created);
    }

    /// Its creation failed. Nobody hears of an end: containerd never had the process.
    pub(crate) fn creation_failed(&self) {
        self.end_creation(Phase::Stopped(Exit::now(LOST_STATUS)));
    }

    fn end_creation(&self, next: Phase) {
        {
            let mut phase = locked(&self.phase);
            if *phase == Phase::Reserved {
                *phase = next;
            }
        }
        self.step_over.notify_waiters();
    }

    /// Waits until its creation is over.
    pub(crate) async fn creation_over(&self) {
        self.leaves(Phase::Reserved).await;
    }

    /// Claims the right to start it.
    pub(crate) fn begin_start(&self) -> Result<(), CallError> {
        let mut phase = locked(&self.phase);
        *phase = phase
            .begin_start()
            .map_err(|phase| self.refuse("start", phase))?;
        Ok(())
    }

    /// The start succeeded or failed. A process that ended meanwhile stays ended.
    pub(crate) fn end_start(&self, started: bool) {
        self.ran.fetch_or(started, Ordering::Relaxed);
        {
            let mut phase = locked(&self.phase);
            if *phase == Phase::Starting {
                *phase = if started {
                    Phase::Running
                } else {
                    Phase::Created
                };
            }
        }
        self.step_over.notify_waiters();
    }

    /// Waits until no start is in flight.
    pub(crate) async fn start_over(&self) {
        self.leaves(Phase::Starting).await;
    }

    /// Waits until it is not in `phase` any more.
    async fn leaves(&self, phase: Phase) {
        loop {
            let over = self.step_over.notified();
            if self.phase() != phase {
                return;
            }
            over.await;
        }
    }

    /// Whether containerd is told of its end. As in containerd's own shim, an exec that never ran
    /// has no exit event; a container's init always has one.
    pub(crate) fn tells_its_end(&self) -> bool {
        self.exec_id.is_empty() || self.ran.load(Ordering::Relaxed)
    }

    /// Claims the right to delete it; the answer is how it had ended.
    pub(crate) fn begin_delete(&self) -> Result<Option<Exit>, CallError> {
        let mut phase = locked(&self.phase);
        *phase = phase
            .begin_delete()
            .map_err(|phase| self.refuse("delete", phase))?;
        match *phase {
            Phase::Deleting(exit) => Ok(exit),
            _ => Ok(None),
        }
    }

    /// The delete failed.
    pub(crate) fn undo_delete(&self) {
        let mut phase = locked(&self.phase);
        if let Phase::Deleting(exit) = *phase {
            *phase = exit.map_or(Phase::Created, Phase::Stopped);
        }
    }

    /// Notes how it ended; false when that was known.
    pub(crate) fn stop(&self, exit: Exit) -> bool {
        let next = {
            let mut phase = locked(&self.phase);
            let next = phase.stop(exit);
            if let Some(next) = next {
                *phase = next;
            }
            next
        };
        if next.is_some() {
            self.exit.send_replace(Some(exit));
            self.step_over.notify_waiters();
        }
        next.is_some()
    }

    /// Waits for its end.
    pub(crate) async fn wait(&self) -> Result<Exit, CallError> {
        let mut exit = self.exit.subscribe();
        let gone = || CallError::NotFound(self.name.clone());
        let known = exit.wait_for(Option::is_some).await.map_err(|_| gone())?;
        known.ok_or_else(gone)
    }

    /// Fails unless it has been started and lives.
    pub(crate) fn expect_alive(&self, call: &str) -> Result<(), CallError> {
        match self.phase() {
            Phase::Running | Phase::Created | Phase::Starting => Ok(()),
            phase => Err(self.refuse(call, phase)),
        }
    }

    /// `CloseIO`.
    pub(crate) fn close_stdin(&self) {
        if let Some(copying) = locked(&self.copying).as_mut() {
            copying.close_stdin();
        }
    }

    /// Ends the copying of its streams after what is left was delivered.
    pub(crate) async fn finish_copying(&self) {
        let copying = locked(&self.copying).take();
        if let Some(copying) = copying {
            copying.finish().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Process {
        Process::reserve("c", "", 1, Paths::default())
    }

    #[test]
    fn lawful_life() {
        let process = process();
        assert!(process.begin_start().is_err());
        process.created(None);
        process.begin_start().unwrap();
        assert!(process.begin_start().is_err());
        assert!(process.begin_delete().is_err());
        process.end_start(true);
        assert_eq!(process.phase(), Phase::Running);
        let exit = Exit::now(3);
        assert!(process.stop(exit));
        assert!(!process.stop(Exit::now(4)));
        assert_eq!(process.begin_delete().unwrap(), Some(exit));
        assert!(process.begin_delete().is_err());
        process.undo_delete();
        assert_eq!(process.phase(), Phase::Stopped(exit));
    }

    #[tokio::test]
    async fn a_delete_can_wait_for_the_creation() {
        for fails in [false, true] {
            let process = std::sync::Arc::new(process());
            let deleted = tokio::spawn({
                let process = std::sync::Arc::clone(&process);
                async move {
                    process.creation_over().await;
                    process.begin_delete().unwrap().is_some()
                }
            });
            tokio::task::yield_now().await;
            assert!(process.begin_delete().is_err());
            if fails {
                process.creation_failed();
            } else {
                process.created(None);
            }
            assert_eq!(deleted.await.unwrap(), fails);
        }
    }

    #[test]
    fn an_end_during_the_start_is_kept() {
        let process = process();
        process.created(None);
        process.begin_start().unwrap();
        assert!(process.stop(Exit::now(137)));
        process.end_start(true);
        assert!(matches!(process.phase(), Phase::Stopped(_)));
    }

    #[test]
    fn what_never_ran_ends_in_its_delete() {
        let process = process();
        process.created(None);
        assert_eq!(process.begin_delete().unwrap(), None);
        let exit = Exit::now(137);
        assert!(process.stop(exit));
        assert!(!process.stop(Exit::now(0)));
        // The delete failed: the end is not forgotten.
        process.undo_delete();
        assert_eq!(process.phase(), Phase::Stopped(exit));
    }

    #[tokio::test]
    async fn an_end_waits_for_the_end_of_the_start() {
        let process = std::sync::Arc::new(process());
        process.created(None);
        process.start_over().await;
        process.begin_start().unwrap();
        let waiter = tokio::spawn({
            let process = process.clone();
            async move { process.start_over().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        process.end_start(true);
        waiter.await.unwrap();
    }

    #[test]
    fn an_exec_that_never_ran_has_no_exit_event() {
        let exec = Process::reserve("c", "e", 1, Paths::default());
        exec.created(None);
        assert!(!exec.tells_its_end() && process().tells_its_end());
        exec.begin_start().unwrap();
        exec.end_start(false);
        assert!(!exec.tells_its_end());
        exec.begin_start().unwrap();
        exec.end_start(true);
        assert!(exec.tells_its_end());
    }

    #[test]
    fn refusals_name_object_and_state() {
        let error = process().begin_start().unwrap_err();
        assert_eq!(error.to_string(), "start container c: it is being created");
    }

    #[tokio::test]
    async fn wait_sees_an_end_before_and_after() {
        let process = std::sync::Arc::new(process());
        process.created(None);
        let waiter = tokio::spawn({
            let process = process.clone();
            async move { process.wait().await.unwrap().status }
        });
        tokio::task::yield_now().await;
        process.stop(Exit::now(7));
        assert_eq!(waiter.await.unwrap(), 7);
        assert_eq!(process.wait().await.unwrap().status, 7);
    }
}
