//! Paths beneath a folder of the node that an unprivileged user reaches.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use nix::libc::O_NONBLOCK;
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use serde_json::{Value, json};

use super::outcome;

/// User and group `nobody`.
const NOBODY: u32 = 65534;

/// Largest number of paths; a few containers have fewer.
const PATHS_MAX: usize = 20_000;

/// Largest number of reached paths in the answer.
const TOLD_MAX: usize = 20;

/// The set-user-ID bit.
const SETUID: u32 = 0o4000;

/// Lists everything beneath `root` as root, then tries to open each path as nobody, and to run
/// every set-user-ID program.
pub(crate) fn as_nobody(root: &str) -> Result<Value> {
    let paths = beneath(root)?;
    setgroups(&[]).context("cannot leave the groups of root")?;
    setgid(Gid::from_raw(NOBODY))?;
    setuid(Uid::from_raw(NOBODY))?;
    let mut reached = Vec::new();
    let mut executed = Vec::new();
    for (path, mode) in &paths {
        // The open of a FIFO would block.
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(O_NONBLOCK)
            .open(path);
        let opened = outcome(opened);
        // Any other error means that all folders above were searched.
        if opened != "EACCES" && opened != "ENOENT" {
            reached.push(format!("{}: {opened}", path.display()));
        }
        if mode & SETUID != 0 {
            let child = Command::new(path).stdout(Stdio::null()).spawn();
            if let Ok(mut child) = child {
                child.wait()?;
                executed.push(path.display().to_string());
            }
        }
    }
    let count = reached.len();
    reached.truncate(TOLD_MAX);
    let programs = paths.iter().filter(|(_, mode)| mode & SETUID != 0).count();
    Ok(json!({
        "paths": paths.len(),
        "set_user_id_programs": programs,
        "reached": count,
        "some_reached": reached,
        "executed": executed,
    }))
}

/// Every path at and beneath `root`, with its mode; links are not followed.
fn beneath(root: &str) -> Result<Vec<(PathBuf, u32)>> {
    let mut found = Vec::new();
    let mut next = vec![PathBuf::from(root)];
    while let Some(path) = next.pop() {
        let Ok(about) = fs::symlink_metadata(&path) else {
            continue;
        };
        if about.is_dir() {
            let entries = fs::read_dir(&path)?.filter_map(Result::ok);
            next.extend(entries.map(|entry| entry.path()));
        }
        if !about.is_symlink() {
            found.push((path, about.permissions().mode()));
        }
        if found.len() == PATHS_MAX {
            break;
        }
    }
    Ok(found)
}
