//! Logging programs: a stream URI `binary:///path?name=value` has the host's program at that path
//! take the output of a container's process (containerd, `docs/runtime-v2.md`, "Logging").
//!
//! The program gets its parameters as arguments, in their order, the container's id and namespace
//! in its environment, stdout and stderr as descriptors 3 and 4, and says that it is ready by
//! closing descriptor 5; with `binary-v2` by writing a byte to it first, so that a program that
//! died is told from one that is ready. Its input ends with the process; it has [`END_MS`] to
//! follow.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use nix::{fcntl::OFlag, unistd::pipe2};
use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};

use crate::host::child::Watched;

/// How long a program may take to be ready.
const READY_MS: u64 = 10_000;
/// How long it may take to write down what is left.
const END_MS: u64 = 12_000;
/// Parameters of a URI.
const PARAMETERS_MAX: usize = 64;
/// Where the program finds its descriptors.
const STDOUT: i32 = 3;
const STDERR: i32 = 4;
const READY: i32 = 5;

/// What a URI names.
#[derive(Debug, PartialEq, Eq)]
struct Program {
    path: PathBuf,
    arguments: Vec<String>,
    says_ready: bool,
}

/// A program that takes output.
#[derive(Debug)]
pub(crate) struct Logger(Watched);

impl Logger {
    /// True when `uri` names a program.
    pub(crate) fn is_named_by(uri: &str) -> bool {
        uri.starts_with("binary://") || uri.starts_with("binary-v2://")
    }

    /// Starts the program for process `id` and gives the ends that stdout and stderr go to.
    pub(crate) async fn start(
        uri: &str,
        id: &str,
        namespace: &str,
    ) -> io::Result<(Self, [pipe::Sender; 2])> {
        let program = parse(uri).ok_or_else(|| io::Error::other("no URI of a program"))?;
        let (stdout, out) = pipe2(OFlag::O_CLOEXEC)?;
        let (stderr, err) = pipe2(OFlag::O_CLOEXEC)?;
        let (ready, closed_when_ready) = pipe2(OFlag::O_CLOEXEC)?;
        let mut command = Command::new(&program.path);
        command
            .args(&program.arguments)
            .env_clear()
            .env("CONTAINER_ID", id)
            .env("CONTAINER_NAMESPACE", namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let descriptors = [
            (&stdout, STDOUT),
            (&stderr, STDERR),
            (&closed_when_ready, READY),
        ]
        .map(|(descriptor, number)| (descriptor.as_raw_fd(), number));
        let logger = Self(Watched::spawn_program(command, descriptors.to_vec())?);
        drop((stdout, stderr, closed_when_ready));
        if let Err(error) = wait_until_ready(ready, program.says_ready).await {
            logger.0.kill();
            return Err(error);
        }
        Ok((logger, [sender(out)?, sender(err)?]))
    }

    /// Waits for the end of a program whose input has ended; past the time for it, ends it.
    pub(crate) async fn finish(self) {
        let ended = timeout(Duration::from_millis(END_MS), self.0.ended());
        if ended.await.is_err() {
            self.0.kill();
        }
    }
}

fn sender(end: OwnedFd) -> io::Result<pipe::Sender> {
    pipe::Sender::from_owned_fd(end)
}

async fn wait_until_ready(ready: OwnedFd, says_ready: bool) -> io::Result<()> {
    let mut ready = pipe::Receiver::from_owned_fd(ready)?;
    let mut byte = [0];
    let read = timeout(Duration::from_millis(READY_MS), ready.read(&mut byte));
    match read.await {
        Ok(Ok(0)) if says_ready => Err(io::Error::other("the program ended before it was ready")),
        Ok(read) => read.map(drop),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the program was not ready within {READY_MS} ms"),
        )),
    }
}

/// `binary://<path>?<name>=<value>&..`: each parameter is one argument or two.
fn parse(uri: &str) -> Option<Program> {
    let (scheme, rest) = uri.split_once("://")?;
    let says_ready = match scheme {
        "binary" => false,
        "binary-v2" => true,
        _ => return None,
    };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = decoded(path, false)?;
    let mut arguments = Vec::new();
    for (count, parameter) in query.split('&').filter(|part| !part.is_empty()).enumerate() {
        if count == PARAMETERS_MAX {
            return None;
        }
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        // containerd gives a value that is empty as an argument too.
        arguments.extend([decoded(name, true)?, decoded(value, true)?]);
    }
    path.starts_with('/').then(|| Program {
        path: path.into(),
        arguments,
        says_ready,
    })
}

/// RFC 3986 §2.1, and the plus sign of forms in queries.
fn decoded(text: &str, query: bool) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digits = [0; 2];
                rest.by_ref()
                    .take(2)
                    .zip(&mut digits)
                    .for_each(|(from, to)| *to = from);
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            b'+' if query => b' ',
            0 => return None,
            other => other,
        });
    }
    String::from_utf8(bytes)
        .ok()
        .filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tokio::io::AsyncWriteExt;

    use super::*;

    #[test]
    fn uris_become_programs() {
        let program = parse("binary:///usr/bin/log%20it?--file=/a+b&quiet").unwrap();
        assert_eq!(program.path, PathBuf::from("/usr/bin/log it"));
        assert_eq!(program.arguments, ["--file", "/a b", "quiet", ""]);
        assert!(!program.says_ready);
        assert!(parse("binary-v2:///x").unwrap().says_ready);
        let many = format!("binary:///x?{}", "a&".repeat(PARAMETERS_MAX + 1));
        for uri in [
            "binary://x",
            "binary:///%zz",
            "binary:///%0",
            "binary:///a%00",
            "file:///x",
            &many,
        ] {
            assert!(parse(uri).is_none(), "{uri}");
        }
    }

    /// A program that need not be written first.
    fn shell(scheme: &str, line: &str, argument: &str) -> String {
        let encoded: String = line.bytes().map(|byte| format!("%{byte:02x}")).collect();
        format!("{scheme}:///bin/sh?-c={encoded}&{argument}")
    }

    #[tokio::test]
    async fn a_program_takes_both_streams() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let line = "exec 5>&-; \
            { echo \"$CONTAINER_ID $CONTAINER_NAMESPACE\"; cat <&3; cat <&4; } > \"$0\"";
        let uri = shell("binary", line, &out.display().to_string());
        let (logger, [mut stdout, mut stderr]) = Logger::start(&uri, "c", "k8s.io").await.unwrap();
        stdout.write_all(b"one\n").await.unwrap();
        stderr.write_all(b"two\n").await.unwrap();
        drop((stdout, stderr));
        logger.finish().await;
        assert_eq!(fs::read_to_string(out).unwrap(), "c k8s.io\none\ntwo\n");
    }

    #[tokio::test]
    async fn a_program_that_dies_is_not_ready() {
        let error = Logger::start(&shell("binary-v2", "exit 1", ""), "c", "n").await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("before it was ready"), "{error}");
        let missing = Logger::start("binary:///nowhere/logger", "c", "n").await;
        assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
