//! What must be undone, written down before it is done.
//!
//! `/run/pericarp/<sandbox>/journal` holds one JSON line per resource, appended before the resource
//! is made. Undoing goes through the lines backwards and is idempotent, so that it can run in the
//! daemon at the end, in `delete` after the daemon was killed, and twice.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
    sync::mpsc::sync_channel,
    thread,
    time::Duration,
};

use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::host::private;

/// How long one step of undoing may take; emptying a cgroup is the longest.
const STEP_MAX: Duration = Duration::from_secs(6);

/// Something that outlives the daemon unless it is undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Entry {
    /// A process: PID and start time (field 22 of `/proc/<pid>/stat`), which tells a reused PID.
    Process { pid: i32, start: u64 },
    /// A mount.
    Mount { path: PathBuf },
    /// A cgroup directory that we made.
    Cgroup { path: PathBuf },
    /// An interface in a network namespace, and the interface it was paired with.
    Tap {
        namespace: PathBuf,
        name: String,
        peer: String,
    },
    /// A file or empty directory outside the sandbox's own directory.
    Path { path: PathBuf },
}

/// The journal of one sandbox.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
}

impl Journal {
    /// Opens the journal in `dir`, which exists.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        let file = private::file()
            .append(true)
            .create(true)
            .open(dir.join("journal"))?;
        Ok(Self { file })
    }

    /// Writes `entry` down. tmpfs keeps what write(2) took, whatever happens to the process.
    pub(crate) fn note(&mut self, entry: &Entry) -> io::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        self.file.write_all(&line)
    }
}

/// Removes the tap `name`, and what redirects to it from `peer`, in a network namespace.
pub(crate) type RemoveTap = fn(namespace: &Path, name: &str, peer: &str) -> io::Result<()>;

/// Undoes everything in the journal of `dir` and removes `dir`. What cannot be undone, or takes
/// longer than [`STEP_MAX`], is reported and does not stop the rest.
pub(crate) fn undo(dir: &Path, remove_tap: RemoveTap) -> Result<(), UndoError> {
    undo_within(dir, remove_tap, STEP_MAX)
}

fn undo_within(dir: &Path, remove_tap: RemoveTap, limit: Duration) -> Result<(), UndoError> {
    let entries = match File::open(dir.join("journal")) {
        Ok(file) => read(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(source) => {
            return Err(UndoError {
                object: dir.display().to_string(),
                source,
            });
        }
    };
    let mut first = None;
    for entry in entries.iter().rev() {
        if let Err(source) = undo_bounded(entry, remove_tap, limit) {
            warn!(?entry, %source, "cannot be undone");
            first.get_or_insert(UndoError {
                object: format!("{entry:?}"),
                source,
            });
        }
    }
    if first.is_none() {
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                first = Some(UndoError {
                    object: dir.display().to_string(),
                    source: error,
                });
            }
            _ => {}
        }
    }
    first.map_or(Ok(()), Err)
}

/// The first thing that could not be undone.
#[derive(Debug, thiserror::Error)]
#[error("cleaning up {object}: {source}")]
pub(crate) struct UndoError {
    object: String,
    source: io::Error,
}

/// A torn last line (the writer was killed) is of a resource that was not made yet.
fn read(file: File) -> Vec<Entry> {
    BufReader::new(file)
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| serde_json::from_str(&line).ok())
        .collect()
}

/// Undoes `entry` in a thread of its own, which is left behind when the kernel lets it hang: on a
/// file system of the host that does not answer, say.
fn undo_bounded(entry: &Entry, remove_tap: RemoveTap, limit: Duration) -> io::Result<()> {
    let (told, answer) = sync_channel(1);
    let own = entry.clone();
    let work = move || {
        let _ = told.send(undo_one(&own, remove_tap));
    };
    thread::Builder::new().name("undo".to_owned()).spawn(work)?;
    answer.recv_timeout(limit).unwrap_or_else(|_| {
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("not done within {limit:?}"),
        ))
    })
}

fn undo_one(entry: &Entry, remove_tap: RemoveTap) -> io::Result<()> {
    match entry {
        Entry::Process { pid, start } => end_process(*pid, *start),
        Entry::Mount { path } => unmount(path),
        Entry::Cgroup { path } => crate::host::cgroup::remove(path),
        Entry::Tap {
            namespace,
            name,
            peer,
        } => remove_tap(namespace, name, peer),
        Entry::Path { path } => remove(path),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    absent_is_fine(result)
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Unmounts everything at `path`; a busy mount is detached, as its users are being ended.
pub(crate) fn unmount(path: &Path) -> io::Result<()> {
    /// Mounts stacked on one path, before something must be wrong.
    const STACK_MAX: u32 = 64;
    for _ in 0..STACK_MAX {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::other("mounts without end"))
}

fn end_process(pid: i32, start: u64) -> io::Result<()> {
    let own = i32::try_from(std::process::id()).is_ok_and(|own| own == pid);
    if own || start_time(pid) != Some(start) {
        return Ok(());
    }
    match kill(Pid::from_raw(pid), Signal::SIGKILL) {
        Ok(()) | Err(nix::Error::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// When the process began, in clock ticks since boot.
pub(crate) fn start_time(pid: i32) -> Option<u64> {
    stat_field(pid, 22)
}

/// A number of `/proc/<pid>/stat` (proc(5)), from field 4 on.
pub(crate) fn stat_field(pid: i32, number: usize) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name is in brackets and may hold anything: count from its end. Field 3 follows
    // it.
    let fields = stat.rsplit_once(')')?.1;
    let index = number.checked_sub(3)?;
    fields.split_whitespace().nth(index)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn undo_goes_backwards_twice_and_past_a_torn_line() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        fs::create_dir(&state).unwrap();
        let outer = dir.path().join("outer");
        let mut journal = Journal::open(&state).unwrap();
        journal
            .note(&Entry::Path {
                path: outer.clone(),
            })
            .unwrap();
        fs::create_dir(&outer).unwrap();
        journal
            .note(&Entry::Path {
                path: outer.join("inner"),
            })
            .unwrap();
        fs::write(outer.join("inner"), "x").unwrap();
        journal
            .note(&Entry::Path {
                path: dir.path().join("never made"),
            })
            .unwrap();
        journal.file.write_all(b"{\"kind\":\"pa").unwrap();
        undo(&state, |_, _, _| Ok(())).unwrap();
        assert!(!outer.exists() && !state.exists());
        undo(&state, |_, _, _| Ok(())).unwrap();
    }

    #[test]
    fn a_step_that_hangs_is_reported_and_does_not_stop_the_rest() {
        fn hangs(_: &Path, _: &str, _: &str) -> io::Result<()> {
            loop {
                thread::park();
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        let path = file.clone();
        journal.note(&Entry::Path { path }).unwrap();
        let tap = Entry::Tap {
            namespace: "/n".into(),
            name: "tap0".to_owned(),
            peer: "eth0".to_owned(),
        };
        journal.note(&tap).unwrap();
        let error = undo_within(dir.path(), hangs, Duration::from_millis(20)).unwrap_err();
        assert!(error.to_string().contains("tap0"), "{error}");
        assert!(!file.exists() && dir.path().join("journal").exists());
    }

    #[test]
    fn a_reused_pid_is_left_alone() {
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let start = start_time(pid).unwrap();
        end_process(pid, start + 1).unwrap();
        assert!(child.try_wait().unwrap().is_none());
        end_process(pid, start).unwrap();
        assert!(!child.wait().unwrap().success());
    }
}
