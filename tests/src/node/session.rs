//! A test's use of the node that its test binary shares.
//!
//! A boot takes seconds to minutes, so the tests of one binary share a node; cargo runs one test
//! binary at a time. A test that fails leaves `out/node/failed-<test>/` with everything that
//! explains it: serial log, containerd's log, logs of shim and VMM, the commands that were run and
//! QEMU's command line.

use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};

use super::{Builder, Node, paths};

/// The node of this process, once it is booted; never dropped, but its machine ends with the
/// process.
static SHARED: Mutex<Option<&'static Node>> = Mutex::new(None);

/// A test's time with the node. One test has it at a time, so that each can compare the whole node
/// before and after.
#[derive(Debug)]
pub struct Session {
    node: &'static Node,
    test: String,
    /// Guests that had met a triple fault when the test began.
    lost_before: usize,
    _alone: MutexGuard<'static, Option<&'static Node>>,
}

/// Gives a test the shared node, and boots it for the first, and for the first after its death;
/// `builder` is used by no other.
pub fn session(test: &str, builder: impl FnOnce() -> Builder) -> Result<Session> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    let node = match *shared {
        Some(node) if !node.is_dead() => node,
        _ => {
            let booted: &'static Node = Box::leak(Box::new(builder().boot()?));
            *shared = Some(booted);
            booted
        }
    };
    let stale = paths::results().join(format!("failed-{test}"));
    if stale.exists() {
        std::fs::remove_dir_all(&stale)
            .with_context(|| format!("cannot remove {}", stale.display()))?;
    }
    Ok(Session {
        node,
        test: test.to_owned(),
        lost_before: lost_guests(node),
        _alone: shared,
    })
}

impl Deref for Session {
    type Target = Node;

    fn deref(&self) -> &Node {
        self.node
    }
}

/// How many guests have ended by a triple fault, by containerd's logs. Emulation has lost guests so
/// that did nothing wrong; a guest that means to end has other ways.
fn lost_guests(node: &Node) -> usize {
    let logs = std::fs::read_dir(node.results()).into_iter().flatten();
    let logs = logs.flatten().map(|entry| entry.path());
    let logs = logs.filter(|path| path.extension().is_some_and(|end| end == "log"));
    let texts = logs.filter_map(|path| std::fs::read(path).ok());
    let count = |text: &[u8]| String::from_utf8_lossy(text).matches(LOST).count();
    texts.map(|text| count(&text)).sum()
}

/// What the shim logs of such an end.
const LOST: &str = "could not go on: triple fault";

impl Session {
    /// Keeps what explains a failure, and leaves the node to the next test. A test that panics
    /// while it has the session need not ask for it.
    pub fn failed(&self) {
        let folder = paths::results().join(format!("failed-{}", self.test));
        let collected = self.node.collect(&folder);
        eprintln!("{} failed: its logs are in {}", self.test, folder.display());
        if let Err(error) = collected {
            eprintln!("not all logs could be collected: {error:#}");
        }
        // The next test must not fail for what this one left.
        if let Err(error) = self.node.remove_pods() {
            eprintln!("{} leaves its pods behind: {error:#}", self.test);
        }
        let lost = lost_guests(self.node).saturating_sub(self.lost_before);
        if lost > 0 {
            eprintln!("{}: a guest met a triple fault ({lost})", self.test);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.failed();
        }
    }
}
