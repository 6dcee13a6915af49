//! Messages between the agent and its helper.
//!
//! ```text
//! agent                                   helper
//!   InitMessage + descriptors  ─────────>
//!          <─────────  Report::Cloned + pidfd          (helper)
//!          <─────────  Report::Ready [+ terminal]      (new process)
//!   START byte  ────────────────────────>              (new process)
//!          <─────────  end of file: the program runs
//! Report::Failed may come in place of any answer and is the last.
//! ```
//!
//! A message is its length (u32, little-endian) and JSON. Descriptors travel with the first byte.
//! What comes from the helper is bounded as tightly as if the container had sent it: a privileged
//! container could trace its own init.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use pericarp_sys::descriptors;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    error::ContainerError,
    plan::{ContainerPlan, ExecPlan, hooks::HooksPlan},
};

/// Changes with every change of a type that crosses; both ends are the same binary, so a difference
/// means a broken guest image.
pub(super) const VERSION: u32 = 1;

/// Most bytes of an [`InitMessage`]: environment and arguments are bounded by the RPC that brought
/// them.
pub(super) const INIT_BYTES_MAX: u32 = 16 << 20;

/// Most bytes of a [`Report`]: one error text.
pub(super) const REPORT_BYTES_MAX: u32 = 64 << 10;

/// Lets a waiting process execute its program.
pub(super) const START: u8 = b's';

/// The one message to a helper.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct InitMessage {
    pub(super) version: u32,
    pub(super) job: Job,
    /// What each descriptor that came along is for, in their order.
    pub(super) roles: Vec<Role>,
}

/// The task of a helper.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Job {
    /// Build a container and its init.
    Container(Box<ContainerPlan>),
    /// Build a further process.
    Exec(Box<ExecPlan>),
    /// Run hooks in the guest's own namespaces.
    Hooks(HooksPlan),
}

/// The purpose of a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Role {
    Stdin,
    Stdout,
    Stderr,
    /// The PID namespace to join.
    PidNamespace,
    /// A pidfd of the container's init.
    Init,
}

/// What a helper, or the process it made, answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Report {
    /// The process exists; its pidfd comes along.
    Cloned { pid: i32 },
    /// It is built and waits; the terminal's master comes along when it has one.
    Ready,
    /// All hooks ran.
    Done,
    /// It failed and is gone.
    Failed(ContainerError),
}

/// Sends `message` with `fds`.
pub(super) fn send<T: Serialize>(
    mut socket: &UnixStream,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let body = serde_json::to_vec(message).map_err(io::Error::other)?;
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend(body);
    let sent = descriptors::send(socket.as_fd(), &bytes, fds)?;
    socket.write_all(&bytes[sent..])
}

/// Receives a message of at most `bytes_max` and what came along; `None` at the end of the stream.
pub(super) fn receive<T: DeserializeOwned>(
    mut socket: &UnixStream,
    bytes_max: u32,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut length = [0u8; 4];
    let (mut got, fds) = descriptors::receive(socket.as_fd(), &mut length)?;
    if got == 0 {
        return Ok(None);
    }
    while got < length.len() {
        match socket.read(&mut length[got..])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            more => got += more,
        }
    }
    let length = u32::from_le_bytes(length);
    if length > bytes_max {
        return Err(io::Error::other(format!(
            "a message of {length} bytes, at most {bytes_max}"
        )));
    }
    let mut body = Vec::new();
    socket.take(length.into()).read_to_end(&mut body)?;
    let message = serde_json::from_slice(&body).map_err(io::Error::other)?;
    Ok(Some((message, fds)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_keep_their_bounds_and_descriptors() {
        let (near, far) = UnixStream::pair().unwrap();
        let (reader, _writer) = io::pipe().unwrap();
        send(&near, &Report::Cloned { pid: 7 }, &[reader.as_fd()]).unwrap();
        send(&near, &Report::Ready, &[]).unwrap();
        let (report, fds) = receive::<Report>(&far, REPORT_BYTES_MAX).unwrap().unwrap();
        assert!(matches!(report, Report::Cloned { pid: 7 }));
        assert_eq!(fds.len(), 1);
        assert!(receive::<Report>(&far, 3).is_err());
        drop(near);
        let (near, far) = UnixStream::pair().unwrap();
        drop(near);
        assert!(receive::<Report>(&far, 3).unwrap().is_none());
    }
}
