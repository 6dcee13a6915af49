//! Runs one command or starts one service in the node.

use std::io::{Read, Write};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::serve::{Answers, Input};
use crate::node::channel::{Command, Exit, FRAME_PAYLOAD_BYTES_MAX, Frame, Kind, Service};

/// Longest sd_notify message that is looked at.
const NOTIFY_BYTES_MAX: usize = 4096;

/// What a service's watcher sends to its own notify socket when the service ends.
const ENDED: &[u8] = b"PERICARP-ENDED";

/// After a command's end, a grandchild that keeps its output open is waited for so long.
const OUTPUT_GRACE: Duration = Duration::from_secs(2);

/// How much of a log a failure quotes.
const TAIL_LINES: usize = 3;

/// What the threads of a command tell its owner.
enum Progress {
    Ended(ExitStatus),
    OutputClosed,
}

fn prepare(command: &Command, path: &str) -> Result<std::process::Command> {
    let Some((program, arguments)) = command.argv.split_first() else {
        bail!("an empty command");
    };
    let program = find(program, path)?;
    let mut prepared = std::process::Command::new(program);
    prepared.args(arguments).process_group(0);
    prepared
        .env("PATH", path)
        .env("HOME", "/root")
        .env("LC_ALL", "C.UTF-8");
    prepared.envs(&command.env);
    prepared.current_dir(command.cwd.as_deref().unwrap_or(Path::new("/root")));
    Ok(prepared)
}

fn find(program: &str, path: &str) -> Result<PathBuf> {
    if program.contains('/') {
        return Ok(PathBuf::from(program));
    }
    let mut candidates = path
        .split(':')
        .map(|folder| Path::new(folder).join(program));
    let found = candidates.find(|candidate| candidate.is_file());
    found.with_context(|| format!("{program} is not in the node's PATH ({path})"))
}

/// Runs a command to its end.
pub(super) fn run(
    id: u32,
    command: &Command,
    path: &str,
    answers: &Answers,
    input: Receiver<Input>,
) -> Result<Exit> {
    let mut prepared = prepare(command, path)?;
    prepared.stdout(Stdio::piped()).stderr(Stdio::piped());
    prepared.stdin(if command.stdin {
        Stdio::piped()
    } else {
        Stdio::null()
    });
    let mut child = prepared
        .spawn()
        .with_context(|| format!("cannot start {}", command.line()))?;
    let group = process_group(&child)?;
    let (progress, events) = sync_channel(3);
    if let Some(output) = child.stdout.take() {
        pump(id, Kind::Stdout, output, answers, &progress);
    }
    if let Some(output) = child.stderr.take() {
        pump(id, Kind::Stderr, output, answers, &progress);
    }
    feed(id, child.stdin.take(), input, answers, group);
    watch(child, move |status| {
        let _owner_gone = progress.send(Progress::Ended(status));
    });
    Ok(wait(&events, group, Duration::from_secs(command.timeout_s)))
}

fn process_group(child: &Child) -> Result<Pid> {
    Ok(Pid::from_raw(
        i32::try_from(child.id()).context("a process id that is none")?,
    ))
}

/// Waits for a child in a thread.
fn watch(mut child: Child, tell: impl FnOnce(ExitStatus) + Send + 'static) {
    std::thread::spawn(move || match child.wait() {
        Ok(status) => tell(status),
        Err(error) => eprintln!("node: cannot wait for a process: {error}"),
    });
}

fn wait(events: &Receiver<Progress>, group: Pid, timeout: Duration) -> Exit {
    let mut deadline = Instant::now() + timeout;
    let mut exit = None;
    let mut open_outputs = 2;
    while exit.is_none() || open_outputs > 0 {
        match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Progress::OutputClosed) => open_outputs -= 1,
            Ok(Progress::Ended(status)) => {
                exit.get_or_insert_with(|| exit_of(status));
                deadline = Instant::now() + OUTPUT_GRACE;
            }
            Err(RecvTimeoutError::Timeout) if exit.is_none() => {
                let _gone = killpg(group, Signal::SIGKILL);
                exit = Some(Exit::TimedOut);
                deadline = Instant::now() + OUTPUT_GRACE;
            }
            Err(_) => break,
        }
    }
    exit.unwrap_or(Exit::TimedOut)
}

fn exit_of(status: ExitStatus) -> Exit {
    let signalled = || Exit::Signal(status.signal().unwrap_or_default());
    status.code().map_or_else(signalled, Exit::Code)
}

/// Sends a command's output as it comes.
fn pump(
    id: u32,
    kind: Kind,
    mut output: impl Read + Send + 'static,
    answers: &Answers,
    progress: &SyncSender<Progress>,
) {
    let (answers, progress) = (answers.clone(), progress.clone());
    std::thread::spawn(move || {
        let mut buffer = vec![0; FRAME_PAYLOAD_BYTES_MAX];
        while let Ok(count) = output.read(&mut buffer) {
            if count == 0 {
                break;
            }
            answers.bytes(id, kind, &buffer[..count]);
        }
        let _owner_gone = progress.send(Progress::OutputClosed);
    });
}

/// Writes standard input as it comes, gives credit for what was written, and kills on demand.
fn feed(
    id: u32,
    mut stdin: Option<ChildStdin>,
    input: Receiver<Input>,
    answers: &Answers,
    group: Pid,
) {
    let answers = answers.clone();
    std::thread::spawn(move || {
        for item in input {
            match item {
                Input::Cancel => {
                    let _gone = killpg(group, Signal::SIGKILL);
                }
                Input::Bytes(bytes) if bytes.is_empty() => stdin = None,
                Input::Bytes(bytes) => {
                    // A command may stop reading; the rest of its input is then of no use.
                    let written = stdin.as_mut().map(|pipe| pipe.write_all(&bytes));
                    if !matches!(written, Some(Ok(()))) {
                        stdin = None;
                    }
                    let credit = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                    let payload = credit.to_le_bytes().to_vec();
                    answers.send(&Frame {
                        id,
                        kind: Kind::Credit,
                        payload,
                    });
                }
            }
        }
    });
}

/// Starts a service and waits until it is ready, has ended, or its time is over.
pub(super) fn start_service(service: &Service, path: &str) -> Result<Exit> {
    let Service {
        name,
        command,
        log,
        notifies,
    } = service;
    if let Some(folder) = log.parent() {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let output = std::fs::File::options().create(true).append(true).open(log);
    let output = output.with_context(|| format!("cannot open the log {}", log.display()))?;
    let errors = output.try_clone().context("cannot share a log")?;
    let socket_path = PathBuf::from(format!("/run/pericarp-node-{name}.notify"));
    let _not_there = std::fs::remove_file(&socket_path);
    let socket = UnixDatagram::bind(&socket_path)
        .with_context(|| format!("cannot make the notify socket {}", socket_path.display()))?;
    let mut prepared = prepare(command, path)?;
    prepared.stdin(Stdio::null()).stdout(output).stderr(errors);
    if *notifies {
        prepared.env("NOTIFY_SOCKET", &socket_path);
    }
    let child = prepared
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let group = process_group(&child)?;
    let own_socket = socket_path.clone();
    watch(child, move |status| {
        eprintln!("node: service ended: {status}");
        let sender = UnixDatagram::unbound();
        let _nobody_waits = sender.and_then(|sender| sender.send_to(ENDED, own_socket));
    });
    let ready = !notifies || ready(&socket, Duration::from_secs(command.timeout_s), name, log)?;
    std::fs::remove_file(&socket_path).context("cannot remove a notify socket")?;
    if !ready {
        let _gone = killpg(group, Signal::SIGKILL);
        bail!(
            "{name} was not ready within {} s: see {}{}",
            command.timeout_s,
            log.display(),
            tail(log)
        );
    }
    Ok(Exit::Code(0))
}

fn ready(socket: &UnixDatagram, timeout: Duration, name: &str, log: &Path) -> Result<bool> {
    let deadline = Instant::now() + timeout;
    let mut buffer = [0; NOTIFY_BYTES_MAX];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        socket
            .set_read_timeout(Some(left))
            .context("cannot set a time-out")?;
        let message = match socket.recv(&mut buffer) {
            Ok(count) => &buffer[..count],
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("cannot read a notify socket"),
        };
        if message == ENDED {
            bail!(
                "{name} ended before it was ready: see {}{}",
                log.display(),
                tail(log)
            );
        }
        if message
            .split(|byte| *byte == b'\n')
            .any(|line| line == b"READY=1")
        {
            return Ok(true);
        }
    }
}

/// The last lines of a log, on one line.
fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().rev().take(TAIL_LINES).collect();
    let lines: Vec<&str> = lines.into_iter().rev().collect();
    if lines.is_empty() {
        String::new()
    } else {
        format!(": {}", lines.join(" | "))
    }
}
