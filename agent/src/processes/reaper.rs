//! Ended processes. As the first process of the guest the agent inherits every orphan, and must
//! collect it.
//!
//! ```text
//! SIGCHLD ─> waitid(all, leave it) ─┬─ registered ──> waitid(pid), its watcher hears the exit
//!                                   ├─ an orphan ───> waitid(pid), forgotten
//!                                   └─ an orphan while a Hold lives: left alone, since some
//!                                      code may be about to register or to collect it
//! ```
//!
//! A process is signalled under the same lock under which it is collected, so a signal never
//! reaches a reused number.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pericarp_sys::children::{Ended, collect, peek_ended, send_signal};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Notify, watch},
};

use crate::ground::{clock, log};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// As a shell would say it: 128 + n for signal n.
    pub(crate) status: u32,
    /// When it was collected.
    pub(crate) at_ns: i64,
}

/// Tells of the exit of one process; holds `None` until then.
pub(crate) type ExitWatch = watch::Receiver<Option<Exit>>;

#[derive(Debug, Default)]
struct State {
    registered: HashMap<i32, watch::Sender<Option<Exit>>>,
    holds: usize,
}

/// Collects ended processes.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    state: Mutex<State>,
    released: Notify,
}

/// While it lives, ended processes that nobody registered are left alone.
#[derive(Debug)]
pub(crate) struct Hold(Arc<Reaper>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.state().holds -= 1;
        self.0.released.notify_one();
    }
}

impl Reaper {
    /// Keeps unknown children uncollected: for code that makes processes and collects or registers
    /// them itself.
    pub(crate) fn hold(self: &Arc<Self>) -> Hold {
        self.state().holds += 1;
        Hold(Arc::clone(self))
    }

    /// Watches `pid`, a child of the agent made under a [`Hold`] that still lives.
    pub(crate) fn register(&self, pid: i32) -> ExitWatch {
        let (sender, receiver) = watch::channel(None);
        self.state().registered.insert(pid, sender);
        self.released.notify_one();
        receiver
    }

    /// Sends `signal` to a registered process; `ESRCH` when it has ended.
    pub(crate) fn signal(&self, pid: i32, signal: i32) -> io::Result<()> {
        let state = self.state();
        if !state.registered.contains_key(&pid) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        send_signal(pid, signal)
    }

    /// Collects for ever.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut child_ended: Signal = match signal(SignalKind::child()) {
            Ok(stream) => stream,
            Err(error) => {
                log::error(format_args!("cannot listen for ended processes: {error}"));
                return;
            }
        };
        loop {
            self.collect();
            tokio::select! {
                _ = child_ended.recv() => {}
                () = self.released.notified() => {}
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The table stays whole whatever panicked beside it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Collects everything that may be collected now. Each round ends one process, so the loop is
    /// bounded by them.
    fn collect(&self) {
        let mut state = self.state();
        while let Some(pid) = peek_ended() {
            if state.registered.contains_key(&pid) {
                state.collect_one(pid);
            } else if state.holds == 0 {
                let _ = collect(pid);
            } else {
                // It hides those that ended after it: ask for each by number.
                let pids: Vec<i32> = state.registered.keys().copied().collect();
                for pid in pids {
                    state.collect_one(pid);
                }
                return;
            }
        }
    }
}

impl State {
    fn collect_one(&mut self, pid: i32) {
        let status = match collect(pid) {
            Ok(Some(Ended::Exited(code))) => u32::from(code.to_le_bytes()[0]),
            Ok(Some(Ended::Signaled(signal))) => 128 + signal.unsigned_abs(),
            Ok(None) => return,
            // Not yet inherited: whoever made it has not ended.
            Err(_) if send_signal(pid, 0).is_ok() => return,
            Err(error) => {
                log::warn(format_args!("process {pid} ended unseen: {error}"));
                255
            }
        };
        if let Some(sender) = self.registered.remove(&pid) {
            sender.send_replace(Some(Exit {
                status,
                at_ns: clock::wall_clock_ns(),
            }));
        }
    }
}

/// Waits for the exit of a watched process.
pub(crate) async fn exited(watch: &mut ExitWatch) -> Exit {
    loop {
        if let Some(exit) = *watch.borrow_and_update() {
            return exit;
        }
        if watch.changed().await.is_err() {
            // The reaper drops a sender only after it has sent.
            return Exit {
                status: 255,
                at_ns: clock::wall_clock_ns(),
            };
        }
    }
}
