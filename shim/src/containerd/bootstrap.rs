//! `start`: answers containerd with the address of the sandbox's daemon, and launches the daemon
//! when there is none.
//!
//! containerd has asked in three ways, and each wants its own answer (containerd
//! `docs/runtime-v2.md`, "start"):
//!
//! | containerd | asks with | is answered with | task service |
//! |---|---|---|---|
//! | 2.3 and later | `BootstrapParams` (protobuf) on stdin | `BootstrapResult` (protobuf) | v3 |
//! | 2.0 - 2.2 | flags and environment | JSON, version 3 | v3 |
//! | 1.7 | flags and environment | JSON, version 2 | v2 |
//! | 1.6 and earlier | flags and environment without `MAX_SHIM_VERSION` | the bare address | v2 |
//!
//! containerd reads stdout and stderr of this process as one stream until both are closed, so
//! nothing but the answer is written and the daemon inherits neither. The listening socket is made
//! here and inherited by the daemon: when the answer is read, connecting works, whatever the daemon
//! is busy with.

use std::{
    env, fs,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, Extension};
use pericarp_runtime_config::RuntimeOptions;
use protobuf::Message;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{
    containerd::{args::Args, options},
    pod::bundle::{Bundle, Role},
};

/// Where sockets live unless containerd says otherwise. Unix socket paths end at 108 bytes and the
/// name is 64.
const SOCKET_DIR: &str = "/run/containerd/s";
/// What containerd itself allows on stdin.
const INPUT_BYTES_MAX: u64 = 10 << 20;
/// File descriptor number at which the daemon finds its listening socket.
pub(crate) const LISTENER_DESCRIPTOR: i32 = 3;
/// Environment variable with containerd's ttrpc socket.
pub(crate) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// Why a sandbox's daemon could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootstrapError {
    #[error("reading bootstrap parameters from stdin: {0}")]
    Stdin(io::Error),
    #[error(transparent)]
    Bundle(#[from] crate::pod::bundle::BundleError),
    #[error(transparent)]
    Options(#[from] crate::containerd::options::OptionsError),
    #[error(
        "sandbox {sandbox} of container {container} does not run: its socket {socket} refuses \
            connections"
    )]
    NoSandbox {
        sandbox: String,
        container: String,
        socket: PathBuf,
    },
    #[error("socket {path}: {source}")]
    Socket { path: PathBuf, source: io::Error },
    #[error("starting the shim daemon: {0}")]
    Spawn(io::Error),
    #[error("writing the answer: {0}")]
    Answer(io::Error),
}

/// How containerd wants to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    Protobuf,
    Json(u32),
    Bare,
}

/// Everything of one `start` call.
#[derive(Debug)]
struct Call {
    dialect: Dialect,
    socket_dir: PathBuf,
    ttrpc_address: String,
    options: RuntimeOptions,
}

/// Runs `start` in the current directory, which is the bundle.
pub(crate) fn start(args: &Args) -> Result<(), BootstrapError> {
    let call = read_call(args)?;
    let bundle_path = env::current_dir().map_err(BootstrapError::Spawn)?;
    let role = sandbox_role(&bundle_path)?;
    let group = match &role {
        Role::Member(sandbox) => sandbox.as_str(),
        Role::Sandbox | Role::Single => &args.id,
    };
    let socket = socket_path(&call.socket_dir, &args.address, &args.namespace, group);
    let address = format!("unix://{}", socket.display());
    if let Role::Member(sandbox) = &role {
        UnixStream::connect(&socket).map_err(|_| BootstrapError::NoSandbox {
            sandbox: sandbox.clone(),
            container: args.id.clone(),
            socket: socket.clone(),
        })?;
    } else {
        let listener = listen(&socket)?;
        let spawned = spawn(args, &call, listener);
        if spawned.is_err() {
            let _ = fs::remove_file(&socket);
        }
        spawned?;
    }
    // What `delete` reads when the daemon is dead.
    fs::write(bundle_path.join("address"), &address).map_err(BootstrapError::Answer)?;
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(&answer(call.dialect, &address))
        .map_err(BootstrapError::Answer)?;
    stdout.flush().map_err(BootstrapError::Answer)
}

/// A sandbox of the sandbox service comes without a specification: its bundle has no `config.json`.
fn sandbox_role(bundle_path: &Path) -> Result<Role, BootstrapError> {
    if !bundle_path.join("config.json").exists() {
        return Ok(Role::Sandbox);
    }
    Ok(Bundle::read(bundle_path)?.role())
}

fn read_call(args: &Args) -> Result<Call, BootstrapError> {
    let mut input = Vec::new();
    io::stdin()
        .lock()
        .take(INPUT_BYTES_MAX)
        .read_to_end(&mut input)
        .map_err(BootstrapError::Stdin)?;
    if let Some(params) = parse_params(&input, &args.id) {
        return Ok(Call {
            dialect: Dialect::Protobuf,
            socket_dir: params
                .socket_dir
                .filter(|d| !d.is_empty())
                .map_or_else(|| SOCKET_DIR.into(), Into::into),
            options: extension_options(&params.extensions)?,
            ttrpc_address: params.containerd_ttrpc_address,
        });
    }
    let dialect = if env::var_os("MAX_SHIM_VERSION").is_none() {
        Dialect::Bare
    } else {
        Dialect::Json(json_version(&containerd_version(&args.publish_binary)))
    };
    Ok(Call {
        dialect,
        socket_dir: SOCKET_DIR.into(),
        ttrpc_address: env::var(TTRPC_ADDRESS).unwrap_or_default(),
        options: options::of_stdin(&input)?,
    })
}

fn extension_options(extensions: &[Extension]) -> Result<RuntimeOptions, BootstrapError> {
    for extension in extensions {
        let options = options::of_any(&extension.value)?;
        if options != RuntimeOptions::default() {
            return Ok(options);
        }
    }
    Ok(RuntimeOptions::default())
}

/// Older versions send their runtime options on stdin, which can parse as anything: the id tells.
fn parse_params(input: &[u8], id: &str) -> Option<BootstrapParams> {
    if input.is_empty() {
        return None;
    }
    BootstrapParams::parse_from_bytes(input)
        .ok()
        .filter(|params| params.instance_id == id)
}

/// 1.7 refuses version 3, and 2.x offers its sandbox service only from version 3 on; both announce
/// `MAX_SHIM_VERSION=2`, so the version of the binary decides.
fn json_version(version_line: &str) -> u32 {
    let major = version_line
        .split_whitespace()
        .filter_map(|word| {
            word.trim_start_matches('v')
                .split('.')
                .next()?
                .parse::<u32>()
                .ok()
        })
        .next();
    match major {
        Some(major) if major >= 2 => 3,
        _ => 2,
    }
}

fn containerd_version(binary: &str) -> String {
    if binary.is_empty() {
        return String::new();
    }
    match Command::new(binary)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
    {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(_) => String::new(),
    }
}

/// One name per containerd, namespace and sandbox.
fn socket_path(dir: &Path, address: &str, namespace: &str, group: &str) -> PathBuf {
    let mut hash = Sha256::new();
    for part in ["pericarp", address, namespace, group] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let name: String = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    dir.join(name)
}

fn listen(path: &Path) -> Result<UnixListener, BootstrapError> {
    let failed = |source| BootstrapError::Socket {
        path: path.to_owned(),
        source,
    };
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(failed)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o711)).map_err(failed)?;
    }
    let listener = match UnixListener::bind(path) {
        Err(error)
            if error.kind() == io::ErrorKind::AddrInUse && UnixStream::connect(path).is_err() =>
        {
            fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path)
        }
        other => other,
    }
    .map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

fn spawn(args: &Args, call: &Call, listener: UnixListener) -> Result<(), BootstrapError> {
    let exe = env::current_exe().map_err(BootstrapError::Spawn)?;
    let mut command = Command::new(exe);
    command.args([
        "-namespace",
        &args.namespace,
        "-id",
        &args.id,
        "-address",
        &args.address,
    ]);
    command.args(["-publish-binary", &args.publish_binary]);
    if args.debug {
        command.arg("-debug");
    }
    if let Some(path) = &call.options.config_path {
        command.arg("-config").arg(path);
    }
    if let Some(flavour) = &call.options.flavour {
        command.args(["-flavour", flavour]);
    }
    command
        .arg("daemon")
        .env(TTRPC_ADDRESS, &call.ttrpc_address)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    let listener: OwnedFd = listener.into();
    let child = pericarp_sys::process::spawn_with_descriptor(
        &mut command,
        listener.as_raw_fd(),
        LISTENER_DESCRIPTOR,
    )
    .map_err(BootstrapError::Spawn)?;
    // An out-of-memory node loses containers before it loses what looks after them (containerd's
    // own shims do the same).
    let _ = fs::write(format!("/proc/{}/oom_score_adj", child.id()), "-998");
    Ok(())
}

#[derive(Serialize)]
struct JsonAnswer<'a> {
    version: u32,
    address: &'a str,
    protocol: &'a str,
}

fn answer(dialect: Dialect, address: &str) -> Vec<u8> {
    match dialect {
        Dialect::Bare => address.as_bytes().to_vec(),
        Dialect::Json(version) => {
            let answer = JsonAnswer {
                version,
                address,
                protocol: "ttrpc",
            };
            serde_json::to_vec(&answer).unwrap_or_default()
        }
        Dialect::Protobuf => {
            let mut answer = BootstrapResult::new();
            answer.version = 3;
            answer.address = address.to_owned();
            answer.protocol = "ttrpc".to_owned();
            answer.write_to_bytes().unwrap_or_default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dialects() {
        assert_eq!(answer(Dialect::Bare, "unix:///s"), b"unix:///s");
        assert_eq!(
            answer(Dialect::Json(2), "unix:///s"),
            br#"{"version":2,"address":"unix:///s","protocol":"ttrpc"}"#
        );
        let result =
            BootstrapResult::parse_from_bytes(&answer(Dialect::Protobuf, "unix:///s")).unwrap();
        assert_eq!(
            (
                result.version,
                result.address.as_str(),
                result.protocol.as_str()
            ),
            (3, "unix:///s", "ttrpc")
        );
    }

    #[test]
    fn containerd_versions() {
        assert_eq!(
            json_version("containerd github.com/containerd/containerd 1.7.35 abc"),
            2
        );
        assert_eq!(
            json_version("containerd github.com/containerd/containerd/v2 v2.2.0 abc"),
            3
        );
        assert_eq!(json_version(""), 2);
    }

    #[test]
    fn params_of_another_container_are_runtime_options() {
        let mut params = BootstrapParams::new();
        params.instance_id = "a".into();
        let bytes = params.write_to_bytes().unwrap();
        assert!(parse_params(&bytes, "a").is_some());
        assert!(parse_params(&bytes, "b").is_none());
        assert!(parse_params(&[], "a").is_none());
    }

    #[test]
    fn socket_names_differ() {
        let dir = Path::new("/s");
        let name = socket_path(dir, "/a", "n", "g");
        assert_eq!(name.file_name().unwrap().len(), 64);
        assert_ne!(name, socket_path(dir, "/a", "n", "h"));
        assert_ne!(name, socket_path(dir, "/a", "m", "g"));
    }

    #[test]
    fn stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(listen(&path).unwrap());
        let live = listen(&path).unwrap();
        assert!(matches!(listen(&path), Err(BootstrapError::Socket { .. })));
        drop(live);
    }
}
