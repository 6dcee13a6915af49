//! A process of a container: its init, or one that was executed beside it.
//!
//! ```text
//! created ──start──> running ──(ends)──> ended ──delete──> gone
//!    └──────────────(killed)───────────────┘
//! ```

use std::{
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::processes::{
    reaper::{Exit, ExitWatch, Reaper, exited},
    stdio::ProcessStreams,
};

/// One process.
#[derive(Debug)]
pub(crate) struct Process {
    /// In the guest's root namespace.
    pub(crate) pid: i32,
    started: AtomicBool,
    /// What a shell would answer, when the program could not be executed.
    start_failure: OnceLock<u32>,
    exit: ExitWatch,
    streams: ProcessStreams,
}

impl Process {
    /// A process that waits for its start.
    pub(crate) fn new(pid: i32, exit: ExitWatch, streams: ProcessStreams) -> Self {
        Self {
            pid,
            started: AtomicBool::new(false),
            start_failure: OnceLock::new(),
            exit,
            streams,
        }
    }

    /// Its terminal and standard input.
    pub(crate) fn streams(&self) -> &ProcessStreams {
        &self.streams
    }

    /// Marks it as started; `false` when it was already.
    pub(crate) fn begin_start(&self) -> bool {
        !self.started.swap(true, Ordering::AcqRel)
    }

    /// Whether [`Self::begin_start`] was called.
    pub(crate) fn was_started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    /// Remembers that its program could not be executed.
    pub(crate) fn start_failed(&self, status: u32) {
        // A second start is refused, so there is one failure at most.
        let _ = self.start_failure.set(status);
    }

    /// How it ended, if it has.
    pub(crate) fn exit(&self) -> Option<Exit> {
        let exit = *self.exit.borrow();
        exit.map(|exit| self.with_start_failure(exit))
    }

    /// Waits for its end.
    pub(crate) async fn ended(&self) -> Exit {
        let mut watch = self.exit.clone();
        self.with_start_failure(exited(&mut watch).await)
    }

    /// Waits for its end and for the delivery of what it wrote.
    pub(crate) async fn ended_and_delivered(&self) -> Exit {
        let exit = self.ended().await;
        self.streams.delivered().await;
        exit
    }

    /// Sends it a signal; `ESRCH` when it has ended.
    pub(crate) fn signal(&self, reaper: &Arc<Reaper>, signal: i32) -> io::Result<()> {
        reaper.signal(self.pid, signal)
    }

    fn with_start_failure(&self, exit: Exit) -> Exit {
        match self.start_failure.get() {
            Some(status) => Exit {
                status: *status,
                ..exit
            },
            None => exit,
        }
    }
}
