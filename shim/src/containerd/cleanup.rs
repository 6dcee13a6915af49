//! `delete`: removes what a dead daemon left.
//!
//! containerd runs it for every container whose shim it cannot reach, in the container's bundle.
//! Only the sandbox's own id has a state directory; for its other containers there is nothing on
//! the host that the sandbox's journal does not hold.

use std::{
    env, fs,
    io::{self, Write},
    path::Path,
    time::SystemTime,
};

use containerd_shim_protos::api::DeleteResponse;
use nix::sys::signal::Signal;
use pericarp_runtime_config::Config;
use protobuf::Message;

use crate::{containerd::args::Args, host::journal, network, pod::container::timestamp};

/// What `delete` could not remove.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CleanupError {
    #[error(transparent)]
    Undo(#[from] journal::UndoError),
    #[error("writing the answer: {0}")]
    Answer(io::Error),
}

/// Runs `delete`.
pub(crate) fn delete(args: &Args) -> Result<(), CleanupError> {
    // A broken configuration must not keep anything from being removed: then the state is where it
    // is by default.
    let run_dir = Config::load(None, true)
        .unwrap_or_default()
        .settings
        .paths
        .run_dir;
    let state = run_dir.join(&args.id);
    if state.is_dir() {
        journal::undo(&state, network::remove_tap)?;
    }
    let bundle = args.bundle.clone().or_else(|| env::current_dir().ok());
    if let Some(bundle) = bundle {
        remove_socket(&bundle);
    }
    let answer = DeleteResponse {
        exit_status: 128 + Signal::SIGKILL as u32,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..Default::default()
    };
    let bytes = answer
        .write_to_bytes()
        .map_err(io::Error::other)
        .map_err(CleanupError::Answer)?;
    io::stdout().write_all(&bytes).map_err(CleanupError::Answer)
}

/// `start` left the address in the bundle. A socket that still answers is of a living daemon.
fn remove_socket(bundle: &Path) {
    let Ok(address) = fs::read_to_string(bundle.join("address")) else {
        return;
    };
    let Some(path) = address.trim().strip_prefix("unix://") else {
        return;
    };
    if std::os::unix::net::UnixStream::connect(path).is_err() {
        let _ = fs::remove_file(path);
    }
}
