//! Running hooks, with their time limits.

use std::{
    ffi::CStr,
    fs::File,
    io::{self, Read, Seek, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Child, Command, Stdio},
};

use nix::sys::memfd::{MFdFlags, memfd_create};
use pericarp_sys::{attributes, pidfd, signals};

use super::{
    super::{error::ContainerError, plan::hooks::Hook},
    NOFILE,
};

/// How much of what a hook said on its standard error is repeated in an error.
const WORDS_BYTES_MAX: u64 = 1024;

/// How long a hook without a limit of its own may take. The specification sets none; a builder that
/// waits for ever helps nobody.
const DEFAULT_TIMEOUT_S: u32 = 60;

/// Runs `hooks` in their order; the first that fails ends it. `descriptors` is their limit of open
/// files, soft and hard; without one they have that of this process.
pub(super) fn run(
    hooks: &[Hook],
    state: &[u8],
    descriptors: Option<(u64, u64)>,
) -> Result<(), ContainerError> {
    for hook in hooks {
        let failed = |reason: String| ContainerError::Hook {
            stage: hook.stage.clone(),
            path: hook.path.clone(),
            reason,
        };
        let mut words = memory(c"hook-stderr").map_err(|error| failed(error.to_string()))?;
        let mut child =
            spawn(hook, state, &words, descriptors).map_err(|error| failed(error.to_string()))?;
        let outcome = wait(&mut child, hook.timeout_s.unwrap_or(DEFAULT_TIMEOUT_S))
            .map_err(|error| failed(error.to_string()))?;
        if let Some(reason) = outcome {
            let mut said = Vec::new();
            let read = words
                .rewind()
                .and_then(|()| (&words).take(WORDS_BYTES_MAX).read_to_end(&mut said));
            let said = read.map(|_| String::from_utf8_lossy(&said).trim().to_owned());
            return Err(failed(match said {
                Ok(said) if !said.is_empty() => format!("{reason}: {said}"),
                _ => reason,
            }));
        }
    }
    Ok(())
}

/// A file in memory: a hook that does not read its input, or says too much, blocks nobody.
fn memory(name: &CStr) -> io::Result<File> {
    Ok(memfd_create(name, MFdFlags::MFD_CLOEXEC)?.into())
}

fn spawn(
    hook: &Hook,
    state: &[u8],
    words: &File,
    descriptors: Option<(u64, u64)>,
) -> io::Result<Child> {
    let mut input = memory(c"hook-state")?;
    input.write_all(state)?;
    input.rewind()?;
    let (name, args) = hook.args.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let env = hook.env.iter().filter_map(|entry| entry.split_once('='));
    let mut command = Command::new(&hook.path);
    if let Some(limit) = descriptors {
        attributes::limit_in(&mut command, NOFILE, limit);
    }
    signals::reset_in(&mut command)
        .arg0(name)
        .args(args)
        .env_clear()
        .envs(env)
        .stdin(input)
        .stdout(Stdio::null())
        .stderr(words.try_clone()?)
        .spawn()
}

/// What went wrong, if something did.
fn wait(child: &mut Child, timeout_s: u32) -> io::Result<Option<String>> {
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    let handle = pidfd::open(pid)?;
    let timeout_ms = i32::try_from(timeout_s.saturating_mul(1000)).unwrap_or(i32::MAX);
    let ended = pidfd::wait_ended(handle.as_fd(), timeout_ms)?;
    if !ended {
        child.kill()?;
    }
    let status = child.wait()?;
    Ok(match (ended, status.success()) {
        (false, _) => Some(format!("not done after {timeout_s} s")),
        (true, false) => Some(status.to_string()),
        (true, true) => None,
    })
}
