//! The test's end of the control channel: requests out, answers in, several at a time.
//!
//! One thread reads frames and puts them where they belong. The end of the channel ends every
//! wait with the reason that the machine gives.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::channel::{Exit, FRAME_PAYLOAD_BYTES_MAX, Frame, Kind, Request, STDIN_WINDOW_BYTES};

/// How much output of one command is kept; what comes after is dropped and said to be.
pub const OUTPUT_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A command's own time is kept in the node; its answer may come this much later.
const ANSWER_GRACE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 120 });

/// What a command gave.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Whether output beyond [`OUTPUT_BYTES_MAX`] was dropped.
    pub truncated: bool,
    /// From the request to the answer, seen from outside.
    pub elapsed: Duration,
}

/// Receives output while a command runs.
pub type Sink = Box<dyn FnMut(Kind, &[u8]) + Send>;

#[derive(Default)]
struct Pending {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    truncated: bool,
    credit: usize,
    exit: Option<Exit>,
    sink: Option<Sink>,
}

#[derive(Default)]
struct State {
    said_hello: bool,
    /// Why the channel is closed.
    closed: Option<String>,
    next_id: u32,
    pending: HashMap<u32, Pending>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready` gives something, the channel closes, or the time is over.
    fn wait<T>(
        &self,
        timeout: Duration,
        what: &str,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            if let Some(value) = ready(&mut state) {
                return Ok(value);
            }
            if let Some(reason) = &state.closed {
                bail!("{reason}");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("{what} did not happen within {} s", timeout.as_secs());
            }
            let woken = self.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The channel to one node.
pub struct Control {
    shared: Arc<Shared>,
    writer: Mutex<Box<dyn Write + Send>>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

impl Control {
    /// Starts to read. `ended` says why the channel closed, once it has.
    pub fn new(
        reader: Box<dyn Read + Send>,
        writer: Box<dyn Write + Send>,
        ended: impl FnOnce() -> String + Send + 'static,
    ) -> Self {
        let state = Mutex::new(State {
            next_id: 1,
            ..State::default()
        });
        let shared = Arc::new(Shared {
            state,
            changed: Condvar::new(),
        });
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || {
            let read = read_all(reader, &theirs);
            let mut reason = ended();
            if let Err(error) = read {
                reason = format!("{reason} ({error:#})");
            }
            theirs.lock().closed = Some(reason);
            theirs.changed.notify_all();
        });
        Self {
            shared,
            writer: Mutex::new(writer),
        }
    }

    /// Waits for the node's first word.
    pub fn hello(&self, timeout: Duration) -> Result<()> {
        self.shared.wait(timeout, "the node's first word", |state| {
            state.said_hello.then_some(())
        })
    }

    /// Sends a request and waits for its end; `stdin` is written as the command takes it.
    pub fn request(
        &self,
        request: &Request,
        stdin: Option<&mut dyn Read>,
        sink: Option<Sink>,
        timeout: Duration,
    ) -> Result<Output> {
        let start = Instant::now();
        let id = self.register(sink)?;
        self.send(&Frame::json(id, Kind::Request, request)?)?;
        if let Some(stdin) = stdin {
            self.feed(id, stdin, timeout)?;
        }
        let answered = self
            .shared
            .wait(timeout + ANSWER_GRACE, "the node's answer", |state| {
                let done = state
                    .pending
                    .get(&id)
                    .is_some_and(|pending| pending.exit.is_some());
                done.then(|| state.pending.remove(&id)).flatten()
            });
        let pending = match answered {
            Ok(pending) => pending,
            Err(error) => {
                let mut state = self.shared.lock();
                state.pending.remove(&id);
                // A node ends what takes too long: one that does not say so is as good as dead.
                let reason = || format!("the node ended (it answers no more): {error:#}");
                bail!("{}", state.closed.get_or_insert_with(reason));
            }
        };
        Ok(Output {
            exit: pending.exit.unwrap_or(Exit::TimedOut),
            stdout: String::from_utf8_lossy(&pending.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&pending.stderr).into_owned(),
            truncated: pending.truncated,
            elapsed: start.elapsed(),
        })
    }

    /// Whether the channel is closed: nothing more will be answered.
    pub fn is_closed(&self) -> bool {
        self.shared.lock().closed.is_some()
    }

    fn register(&self, sink: Option<Sink>) -> Result<u32> {
        let mut state = self.shared.lock();
        if let Some(reason) = &state.closed {
            bail!("{reason}");
        }
        let id = state.next_id;
        state.next_id += 1;
        let pending = Pending {
            sink,
            credit: STDIN_WINDOW_BYTES,
            ..Pending::default()
        };
        state.pending.insert(id, pending);
        Ok(id)
    }

    fn send(&self, frame: &Frame) -> Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = frame.write(&mut *writer);
        // Why the node is gone says more than that a write failed.
        sent.map_err(|error| match &self.shared.lock().closed {
            Some(reason) => anyhow::anyhow!("{reason}"),
            None => error,
        })
    }

    fn feed(&self, id: u32, stdin: &mut dyn Read, timeout: Duration) -> Result<()> {
        let mut buffer = vec![0; FRAME_PAYLOAD_BYTES_MAX];
        loop {
            let count = stdin
                .read(&mut buffer)
                .context("cannot read the standard input to send")?;
            let granted =
                self.shared
                    .wait(timeout, "the command's reading of its input", |state| {
                        let Some(pending) = state.pending.get_mut(&id) else {
                            return Some(false);
                        };
                        if pending.exit.is_some() {
                            return Some(false);
                        }
                        let enough = pending.credit >= count;
                        enough.then(|| {
                            pending.credit -= count;
                            true
                        })
                    })?;
            if !granted {
                return Ok(());
            }
            let payload = buffer[..count].to_vec();
            self.send(&Frame {
                id,
                kind: Kind::Stdin,
                payload,
            })?;
            if count == 0 {
                return Ok(());
            }
        }
    }
}

fn read_all(mut reader: Box<dyn Read + Send>, shared: &Shared) -> Result<()> {
    while let Some(frame) = Frame::read(&mut reader)? {
        let mut state = shared.lock();
        if frame.kind == Kind::Hello {
            state.said_hello = true;
        } else if let Some(pending) = state.pending.get_mut(&frame.id) {
            take(pending, &frame)?;
        }
        drop(state);
        shared.changed.notify_all();
    }
    Ok(())
}

fn take(pending: &mut Pending, frame: &Frame) -> Result<()> {
    match frame.kind {
        Kind::Stdout | Kind::Stderr => {
            if let Some(sink) = &mut pending.sink {
                sink(frame.kind, &frame.payload);
                return Ok(());
            }
            let is_stdout = frame.kind == Kind::Stdout;
            let to = if is_stdout {
                &mut pending.stdout
            } else {
                &mut pending.stderr
            };
            let room = OUTPUT_BYTES_MAX - to.len();
            pending.truncated |= frame.payload.len() > room;
            to.extend_from_slice(&frame.payload[..frame.payload.len().min(room)]);
        }
        Kind::Credit => {
            let bytes = <[u8; 4]>::try_from(frame.payload.as_slice());
            let credit = u32::from_le_bytes(bytes.context("a credit that is no number")?);
            pending.credit = STDIN_WINDOW_BYTES.min(pending.credit + usize::try_from(credit)?);
        }
        Kind::Done => {
            let exit = serde_json::from_slice(&frame.payload);
            pending.exit = Some(exit.context("the node's answer is none")?);
        }
        _ => bail!("the node sent a frame that only tests send"),
    }
    Ok(())
}

impl Output {
    /// The output of a command that had to succeed; else an error that quotes it.
    pub fn checked(self, line: &str) -> Result<Self> {
        if self.exit.success() {
            return Ok(self);
        }
        let said = if self.stderr.trim().is_empty() {
            &self.stdout
        } else {
            &self.stderr
        };
        let said: Vec<&str> = said.trim().lines().rev().take(4).collect();
        let said: Vec<&str> = said.into_iter().rev().collect();
        bail!("`{line}` in the node: {}: {}", self.exit, said.join(" | "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::channel::Command;
    use std::os::unix::net::UnixStream;

    const LONG: Duration = Duration::from_secs(20);

    fn pair() -> (Control, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let reader = Box::new(ours.try_clone().unwrap());
        (
            Control::new(reader, Box::new(ours), || "the node is gone".to_owned()),
            theirs,
        )
    }

    #[test]
    fn a_node_that_answers_no_more_is_given_up() {
        let (control, _silent) = pair();
        let ask = || {
            let request = Request::Run(Command::new("true"));
            let answer = control.request(&request, None, None, Duration::ZERO);
            format!("{:#}", answer.unwrap_err())
        };
        assert!(!control.is_closed());
        let first = ask();
        assert!(first.starts_with("the node ended (it answers no more)"));
        assert!(control.is_closed());
        assert_eq!(ask(), first);
    }

    #[test]
    fn output_and_exit_reach_the_caller() {
        let (control, mut node) = pair();
        let served = std::thread::spawn(move || {
            let request = Frame::read(&mut node).unwrap().unwrap();
            assert_eq!(request.kind, Kind::Request);
            let id = request.id;
            let payload = b"out".to_vec();
            Frame {
                id,
                kind: Kind::Stdout,
                payload,
            }
            .write(&mut node)
            .unwrap();
            Frame::json(id, Kind::Done, &Exit::Code(3))
                .unwrap()
                .write(&mut node)
                .unwrap();
            node
        });
        let request = Request::Run(Command::new("x"));
        let output = control.request(&request, None, None, LONG).unwrap();
        assert_eq!(
            (output.exit, output.stdout.as_str()),
            (Exit::Code(3), "out")
        );
        served.join().unwrap();
    }

    #[test]
    fn the_end_of_the_node_ends_every_wait_with_its_reason() {
        let (control, node) = pair();
        drop(node);
        let error = control.hello(LONG).unwrap_err();
        assert_eq!(format!("{error:#}"), "the node is gone");
        assert!(
            control
                .request(&Request::PowerOff, None, None, LONG)
                .is_err()
        );
    }
}
