//! `delete`: removes what a dead daemon left.
//!
//! containerd runs it for every container whose shim it cannot reach, in the container's bundle.
//! Only the sandbox's own id has a state directory; for its other containers there is nothing on
//! the host that the sandbox's journal does not hold.

use std::{
    env, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::SystemTime,
};

use containerd_shim_protos::api::DeleteResponse;
use nix::sys::signal::Signal;
use pericarp_runtime_config::Config;
use protobuf::Message;

use crate::{
    containerd::args::Args,
    host::journal,
    machine::template_maker,
    network,
    pod::{bundle::Bundle, container::timestamp},
};

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
    let bundle = args.bundle.clone().or_else(|| env::current_dir().ok());
    let state = state_of(&args.id, bundle.as_deref());
    if state.is_dir() {
        journal::undo(&state, network::remove_tap)?;
    }
    if let Some(run_dir) = state.parent() {
        template_maker::undo_stale(run_dir);
    }
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

/// The state directory of sandbox `id`: what its bundle says, or where it is by default. A broken
/// configuration must not keep anything from being removed.
fn state_of(id: &str, bundle: Option<&Path>) -> PathBuf {
    let noted = bundle.and_then(|bundle| Bundle::noted_state(bundle, id));
    let by_default = || {
        let config = Config::load(None, true).unwrap_or_default();
        config.settings.paths.run_dir.join(id)
    };
    noted.unwrap_or_else(by_default)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_is_where_the_bundle_says_if_it_is_the_sandboxs() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle {
            path: dir.path().to_owned(),
            spec: oci_spec::runtime::Spec::default(),
        };
        let by_default = PathBuf::from("/run/pericarp/pod");
        assert_eq!(state_of("pod", Some(dir.path())), by_default);
        bundle.note_state(Path::new("/run/other/pod")).unwrap();
        let noted = PathBuf::from("/run/other/pod");
        assert_eq!(state_of("pod", Some(dir.path())), noted);
        for wrong in ["/run/other/another", "relative/pod", "/"] {
            bundle.note_state(Path::new(wrong)).unwrap();
            assert_eq!(state_of("pod", Some(dir.path())), by_default, "{wrong}");
        }
        assert_eq!(state_of("pod", None), by_default);
    }
}
