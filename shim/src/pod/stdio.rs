//! Bytes between containerd's FIFOs and the streams of a process in the guest.
//!
//! containerd names a FIFO (or `file://` path) per stream and opens the other ends when it likes,
//! and again after it restarted. So both ends of each FIFO are held here: an output FIFO is opened
//! for reading and writing, which needs no reader and never raises EPIPE; of the stdin FIFO a
//! writer is held until `CloseIO`, so that only the client's wish, not its restart, ends the
//! process's input. The same is what containerd's own shim does.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf, pipe},
    },
    task::JoinHandle,
};
use tracing::debug;

use crate::pod::logger::Logger;

/// Bytes moved at once: one default pipe's worth.
const CHUNK_BYTES: usize = 64 << 10;
/// How long the output of an ended process may take to reach a slow reader before `Delete` gives up
/// on it.
const DRAIN_MS: u64 = 2_000;

/// What containerd asked for; empty paths are streams not wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Paths {
    /// FIFO to read from.
    pub(crate) stdin: String,
    /// FIFO or URI to write to.
    pub(crate) stdout: String,
    /// FIFO or URI to write to; not with a terminal.
    pub(crate) stderr: String,
    /// The process has a terminal.
    pub(crate) terminal: bool,
}

/// Why a stream cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    #[error("{stream} {path:?}: {source}")]
    Open {
        stream: &'static str,
        path: String,
        source: io::Error,
    },
    #[error(
        "{stream} {path:?}: the scheme is not supported: use a FIFO path, file:// \
        or binary://"
    )]
    Scheme { stream: &'static str, path: String },
}

/// The opened ends on the host.
#[derive(Debug, Default)]
pub(crate) struct HostEnds {
    /// The program that takes the output.
    logger: Option<Logger>,
    stdin: Option<(pipe::Receiver, OwnedFd)>,
    stdout: Option<Output>,
    stderr: Option<Output>,
}

#[derive(Debug)]
enum Output {
    Fifo(pipe::Sender),
    File(tokio::fs::File),
}

impl HostEnds {
    /// Opens what `paths` names for process `id` of containerd's namespace.
    pub(crate) async fn open(paths: &Paths, id: &str, namespace: &str) -> Result<Self, StdioError> {
        let stdin = match paths.stdin.as_str() {
            "" => None,
            path => Some(open_input(path)?),
        };
        if Logger::is_named_by(&paths.stdout) {
            // As in containerd's own shim: the program that stdout names takes stderr too.
            let started = Logger::start(&paths.stdout, id, namespace).await;
            let (logger, [stdout, stderr]) = started.map_err(|source| StdioError::Open {
                stream: "stdout",
                path: paths.stdout.clone(),
                source,
            })?;
            return Ok(Self {
                logger: Some(logger),
                stdin,
                stdout: Some(Output::Fifo(stdout)),
                stderr: (!paths.terminal).then_some(Output::Fifo(stderr)),
            });
        }
        let stdout = open_output("stdout", &paths.stdout).await?;
        let stderr = if paths.terminal {
            None
        } else {
            open_output("stderr", &paths.stderr).await?
        };
        Ok(Self {
            logger: None,
            stdin,
            stdout,
            stderr,
        })
    }

    /// Which streams exist: stdin, stdout, stderr.
    pub(crate) fn wanted(&self) -> [bool; 3] {
        [
            self.stdin.is_some(),
            self.stdout.is_some(),
            self.stderr.is_some(),
        ]
    }
}

fn open_input(path: &str) -> Result<(pipe::Receiver, OwnedFd), StdioError> {
    let failed = |source| StdioError::Open {
        stream: "stdin",
        path: path.to_owned(),
        source,
    };
    let reader = pipe::OpenOptions::new()
        .open_receiver(path)
        .map_err(failed)?;
    let writer = pipe::OpenOptions::new().open_sender(path).map_err(failed)?;
    let writer = writer.into_nonblocking_fd().map_err(failed)?;
    Ok((reader, writer))
}

async fn open_output(stream: &'static str, path: &str) -> Result<Option<Output>, StdioError> {
    let failed = |source| StdioError::Open {
        stream,
        path: path.to_owned(),
        source,
    };
    if path.is_empty() {
        return Ok(None);
    }
    let file = match path.split_once("://") {
        None | Some(("fifo", _)) => {
            let fifo = path.strip_prefix("fifo://").unwrap_or(path);
            let opened = pipe::OpenOptions::new().read_write(true).open_sender(fifo);
            match opened {
                Ok(sender) => return Ok(Some(Output::Fifo(sender))),
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => PathBuf::from(fifo),
                Err(error) => return Err(failed(error)),
            }
        }
        Some(("file", file)) => {
            if let Some(parent) = Path::new(file).parent() {
                tokio::fs::create_dir_all(parent).await.map_err(failed)?;
            }
            PathBuf::from(file)
        }
        Some(_) => {
            return Err(StdioError::Scheme {
                stream,
                path: path.to_owned(),
            });
        }
    };
    let file = tokio::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(file)
        .await
        .map_err(failed)?;
    Ok(Some(Output::File(file)))
}

/// The copying of one process's streams.
#[derive(Debug, Default)]
pub(crate) struct Copying {
    /// Our own writer of the stdin FIFO; dropping it lets the client's close be seen.
    stdin_writer: Option<OwnedFd>,
    input: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
    logger: Option<Logger>,
}

impl Copying {
    /// Starts copying between the host's ends and the guest's streams, which stand in the order of
    /// [`HostEnds::wanted`].
    pub(crate) fn start(ends: HostEnds, streams: [Option<UnixStream>; 3]) -> Self {
        let [stdin, stdout, stderr] = streams;
        let mut copying = Self::default();
        copying.logger = ends.logger;
        if let (Some((reader, writer)), Some(stream)) = (ends.stdin, stdin) {
            copying.stdin_writer = Some(writer);
            copying.input = Some(tokio::spawn(copy_input(reader, stream)));
        }
        for (output, stream) in [(ends.stdout, stdout), (ends.stderr, stderr)] {
            if let (Some(output), Some(stream)) = (output, stream) {
                copying
                    .outputs
                    .push(tokio::spawn(copy_output(stream, output)));
            }
        }
        copying
    }

    /// `CloseIO`: the process's input ends when the client has closed its end too.
    pub(crate) fn close_stdin(&mut self) {
        self.stdin_writer = None;
    }

    /// Waits for what the process wrote to be delivered, for a bounded time, and ends all copying.
    pub(crate) async fn finish(mut self) {
        if let Some(input) = self.input.take() {
            input.abort();
        }
        let deadline = tokio::time::Instant::now() + Duration::from_millis(DRAIN_MS);
        for mut output in std::mem::take(&mut self.outputs) {
            if tokio::time::timeout_at(deadline, &mut output)
                .await
                .is_err()
            {
                debug!("output of an ended process was not read in time and is dropped");
                output.abort();
            }
        }
        if let Some(logger) = self.logger.take() {
            logger.finish().await;
        }
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        for task in self.input.iter().chain(&self.outputs) {
            task.abort();
        }
    }
}

/// FIFO to guest. The guest closing its end (the process closed its stdin) ends the copy.
async fn copy_input(mut reader: pipe::Receiver, stream: UnixStream) {
    let (mut answers, mut writer): (OwnedReadHalf, OwnedWriteHalf) = stream.into_split();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut ignored = [0; 64];
    loop {
        tokio::select! {
            read = reader.read(&mut buffer) => match read {
                Ok(0) | Err(_) => break,
                Ok(count) => {
                    let Some(bytes) = buffer.get(..count) else { break };
                    if writer.write_all(bytes).await.is_err() {
                        return;
                    }
                }
            },
            closed = answers.read(&mut ignored) => if matches!(closed, Ok(0) | Err(_)) { return },
        }
    }
    // Half-close: the guest sees the end of input and may still hold its side open.
    let _ = writer.shutdown().await;
}

/// Guest to FIFO or file.
async fn copy_output(mut stream: UnixStream, mut output: Output) {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let count = match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        let Some(bytes) = buffer.get(..count) else {
            break;
        };
        let written = match &mut output {
            Output::Fifo(fifo) => fifo.write_all(bytes).await,
            Output::File(file) => file.write_all(bytes).await,
        };
        if let Err(error) = written {
            debug!(%error, "an output of a process cannot be written");
            break;
        }
    }
    if let Output::File(mut file) = output {
        let _ = file.flush().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fifo(dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn input_ends_only_after_close_io() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths {
            stdin: fifo(dir.path(), "in"),
            ..Paths::default()
        };
        let ends = HostEnds::open(&paths, "c", "n").await.unwrap();
        assert_eq!(ends.wanted(), [true, false, false]);
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let mut copying = Copying::start(ends, [Some(ours), None, None]);
        let mut client = pipe::OpenOptions::new().open_sender(&paths.stdin).unwrap();
        client.write_all(b"one").await.unwrap();
        drop(client); // a restart of containerd
        let mut client = pipe::OpenOptions::new().open_sender(&paths.stdin).unwrap();
        client.write_all(b"two").await.unwrap();
        copying.close_stdin();
        drop(client);
        let mut text = String::new();
        guest.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "onetwo");
    }

    #[tokio::test]
    async fn output_reaches_a_late_reader_and_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("new/err");
        let paths = Paths {
            stdout: fifo(dir.path(), "out"),
            stderr: format!("file://{}", file.display()),
            ..Paths::default()
        };
        let ends = HostEnds::open(&paths, "c", "n").await.unwrap();
        let (out, mut guest_out) = UnixStream::pair().unwrap();
        let (err, mut guest_err) = UnixStream::pair().unwrap();
        let copying = Copying::start(ends, [None, Some(out), Some(err)]);
        guest_out.write_all(b"hello").await.unwrap();
        guest_err.write_all(b"oops").await.unwrap();
        let mut reader = pipe::OpenOptions::new()
            .open_receiver(&paths.stdout)
            .unwrap();
        drop((guest_out, guest_err));
        copying.finish().await;
        let mut text = String::new();
        reader.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello");
        assert_eq!(std::fs::read_to_string(file).unwrap(), "oops");
    }

    #[tokio::test]
    async fn refuses_other_schemes_and_missing_paths() {
        let scheme = Paths {
            stdout: "http://log/x".into(),
            ..Paths::default()
        };
        assert!(matches!(
            HostEnds::open(&scheme, "c", "n").await,
            Err(StdioError::Scheme { .. })
        ));
        let missing = Paths {
            stdin: "/nowhere/fifo".into(),
            ..Paths::default()
        };
        assert!(matches!(
            HostEnds::open(&missing, "c", "n").await,
            Err(StdioError::Open { .. })
        ));
    }
}
