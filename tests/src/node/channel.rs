//! What crosses the control channel between a test and the node: frames, requests and answers.
//!
//! A frame is `length: u32 LE`, `id: u32 LE`, `kind: u8`, then `length` bytes. The id names the
//! request that the frame belongs to; 0 is the node itself. Both ends are ours, but a frame is
//! still checked: a kernel message or a crash can put anything on a serial line.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// Longest payload of one frame; longer data is sent in several.
pub const FRAME_PAYLOAD_BYTES_MAX: usize = 64 * 1024;

/// How many bytes of standard input may be on their way to one command: the sender waits for
/// credit, so that a command that does not read cannot block the others.
pub const STDIN_WINDOW_BYTES: usize = 256 * 1024;

/// Length of a frame's header.
const HEADER_BYTES: usize = 9;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Node to test: the agent lives. No payload.
    Hello,
    /// Test to node: a [`Request`] as JSON.
    Request,
    /// Test to node: bytes for the command's standard input; an empty payload is its end.
    Stdin,
    /// Test to node: kill the command. No payload.
    Cancel,
    /// Node to test: bytes of the command's standard output.
    Stdout,
    /// Node to test: bytes of the command's standard error.
    Stderr,
    /// Node to test: that many more bytes (u32 LE) of standard input are welcome.
    Credit,
    /// Node to test: the [`Exit`] as JSON; the last frame of its id.
    Done,
}

const KINDS: [Kind; 8] = [
    Kind::Hello,
    Kind::Request,
    Kind::Stdin,
    Kind::Cancel,
    Kind::Stdout,
    Kind::Stderr,
    Kind::Credit,
    Kind::Done,
];

impl Kind {
    fn code(self) -> u8 {
        let index = KINDS.iter().position(|kind| *kind == self);
        u8::try_from(index.expect("every kind is in the table")).expect("the table is short")
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The request it belongs to.
    pub id: u32,
    /// What it carries.
    pub kind: Kind,
    /// At most [`FRAME_PAYLOAD_BYTES_MAX`] bytes.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame around a JSON value.
    pub fn json(id: u32, kind: Kind, value: &impl Serialize) -> Result<Self> {
        let payload = serde_json::to_vec(value).context("cannot encode a control message")?;
        if payload.len() > FRAME_PAYLOAD_BYTES_MAX {
            bail!("a control message of {} bytes is too long", payload.len());
        }
        Ok(Self { id, kind, payload })
    }

    /// Writes the frame in one call, so that two writers behind one lock never interleave.
    pub fn write(&self, to: &mut impl Write) -> Result<()> {
        let length = u32::try_from(self.payload.len()).context("frame too long")?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.payload.len());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&self.id.to_le_bytes());
        bytes.push(self.kind.code());
        bytes.extend_from_slice(&self.payload);
        to.write_all(&bytes)
            .context("cannot write to the control channel")?;
        to.flush().context("cannot write to the control channel")
    }

    /// Reads the next frame; `None` at the end of the stream.
    pub fn read(from: &mut impl Read) -> Result<Option<Self>> {
        let mut header = [0u8; HEADER_BYTES];
        let mut filled = 0;
        while filled < HEADER_BYTES {
            match from.read(&mut header[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => bail!("the control channel ended inside a frame"),
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot read the control channel"),
            }
        }
        let [l0, l1, l2, l3, i0, i1, i2, i3, code] = header;
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3]))?;
        if length > FRAME_PAYLOAD_BYTES_MAX {
            bail!("the control channel carries a frame of {length} bytes: it is out of step");
        }
        let Some(kind) = KINDS.get(usize::from(code)).copied() else {
            bail!("the control channel carries a frame of unknown kind {code}");
        };
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)
            .context("the control channel ended inside a frame")?;
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        Ok(Some(Self { id, kind, payload }))
    }
}

/// What a test can ask of the node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Request {
    /// Make the node ready: once, before anything else.
    SetUp(SetUp),
    /// Write a small text file, with the folders above it.
    Write {
        /// The file.
        path: PathBuf,
        /// Its content.
        text: String,
    },
    /// Run a command to its end.
    Run(Command),
    /// Start a service and answer when it is ready.
    Start(Service),
    /// Sync and power off (a node of its own) or end (this machine).
    PowerOff,
}

/// How the node is to be prepared.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SetUp {
    /// Folder shared writable with the test, at the same path on both sides.
    pub results: PathBuf,
    /// Whether the node is a machine of its own (QEMU) or namespaces of this computer.
    pub is_machine: bool,
    /// Search path of every command.
    pub path: String,
    /// Image layout that the registry serves.
    pub image_layout: Option<PathBuf>,
    /// Files to copy into the node: source, destination, mode.
    pub install: Vec<(PathBuf, PathBuf, u32)>,
    /// PCI addresses of devices that start bound to vfio-pci.
    pub vfio: Vec<String>,
    /// Whether what daemons write lies on the machine's first virtio disk instead of in memory.
    pub state_disk: bool,
}

/// A command to run in the node.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Command {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables in addition to the node's PATH and HOME.
    pub env: BTreeMap<String, String>,
    /// Working folder; `/root` when not given.
    pub cwd: Option<PathBuf>,
    /// After that many seconds the command's process group is killed.
    pub timeout_s: u64,
    /// Whether standard input follows in frames; without, it is `/dev/null`.
    pub stdin: bool,
}

/// Time that a command gets when nothing else is said: emulation on a busy computer is slow.
pub const COMMAND_TIMEOUT_S: u64 = 180;

impl Command {
    /// A program without arguments.
    #[must_use]
    pub fn new(program: impl Into<String>) -> Self {
        Self {
            argv: vec![program.into()],
            timeout_s: COMMAND_TIMEOUT_S,
            ..Self::default()
        }
    }

    /// A line for bash, which stops at the first error.
    #[must_use]
    pub fn shell(line: impl Into<String>) -> Self {
        Self::new("bash").args(["-euo", "pipefail", "-c"]).arg(line)
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<String>) -> Self {
        self.argv.push(argument.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<String>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.argv.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.insert(key.into(), value.into());
        self
    }

    /// Changes the time it gets.
    #[must_use]
    pub fn timeout_s(mut self, seconds: u64) -> Self {
        self.timeout_s = seconds;
        self
    }

    /// The command as a person would type it.
    #[must_use]
    pub fn line(&self) -> String {
        self.argv.join(" ")
    }
}

/// A program that stays and says when it is ready.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Service {
    /// What it is called in messages.
    pub name: String,
    /// How to start it; `timeout_s` is the time until it is ready.
    pub command: Command,
    /// Its output.
    pub log: PathBuf,
    /// Whether it reports `READY=1` as systemd's sd_notify(3) says; without, it is ready at once.
    pub notifies: bool,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// The process ended by itself with this status; 0 for requests that are no command.
    Code(i32),
    /// The process was ended by this signal.
    Signal(i32),
    /// The command was killed because its time was over.
    TimedOut,
    /// The request could not be carried out.
    Failed(String),
}

impl Exit {
    /// Whether the request did what was asked.
    #[must_use]
    pub fn success(&self) -> bool {
        *self == Self::Code(0)
    }

    /// The exit status a shell would give.
    #[must_use]
    pub fn status(&self) -> i32 {
        match self {
            Self::Code(code) => *code,
            Self::Signal(signal) => 128 + signal,
            Self::TimedOut => 124,
            Self::Failed(_) => 125,
        }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(signal) => write!(f, "killed by signal {signal}"),
            Self::TimedOut => write!(f, "killed because its time was over"),
            Self::Failed(why) => write!(f, "failed: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_went() {
        let frame = Frame {
            id: 7,
            kind: Kind::Stderr,
            payload: b"text".to_vec(),
        };
        let mut bytes = Vec::new();
        frame.write(&mut bytes).unwrap();
        let mut reader = bytes.as_slice();
        assert_eq!(Frame::read(&mut reader).unwrap(), Some(frame));
        assert_eq!(Frame::read(&mut reader).unwrap(), None);
    }

    #[test]
    fn text_on_the_line_is_an_error_and_not_a_giant_frame() {
        let noise = b"[    1.0] Kernel panic - not syncing";
        assert!(Frame::read(&mut noise.as_slice()).is_err());
        assert!(Frame::read(&mut [1, 0].as_slice()).is_err());
        assert!(Frame::read(&mut [0, 0, 0, 0, 0, 0, 0, 0, 99].as_slice()).is_err());
    }

    #[test]
    fn the_longest_setup_fits_a_frame() {
        let set_up = SetUp {
            path: "/x".repeat(4096),
            install: vec![("/a".repeat(128).into(), "/b".repeat(64).into(), 0o755); 64],
            ..SetUp::default()
        };
        assert!(Frame::json(1, Kind::Request, &Request::SetUp(set_up)).is_ok());
    }
}
