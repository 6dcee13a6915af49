//! A process that uses a volume on request, over TCP on the pod's loopback.
//!
//! A request is one line of words ([`Peer::obey`]). The answer is one line: `ok`, the data, or the
//! name of an error. Files, locks, mappings and watches last as long as the connection. There is
//! one connection at a time.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent};
use pericarp_sys::mapping::DeviceMapping;
use serde_json::Value;

use super::name;

/// Size of a mapped file.
const MAPPED_BYTES: usize = 4096;

/// Size of the word at its start that requests store and load.
const WORD_BYTES: usize = 4;

/// Deadline for inotify events.
const EVENTS_WAIT: Duration = Duration::from_secs(10);

/// Line that a server on a unix socket sends.
const GREETING: &str = "hello";

/// Serves until the process is killed.
pub(crate) fn serve(port: u16) -> Result<Value> {
    let listener = TcpListener::bind(("127.0.0.1", port)).context("cannot listen")?;
    for connection in listener.incoming() {
        let mut answers = connection?;
        // Answers are small and must be sent at once.
        answers.set_nodelay(true)?;
        converse(&mut answers)?;
    }
    Ok(Value::Null)
}

fn converse(answers: &mut TcpStream) -> Result<()> {
    let mut peer = Peer::default();
    for line in BufReader::new(answers.try_clone()?).lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let answer = match peer.obey(&words) {
            Ok(text) => text,
            Err(error) => name(&error),
        };
        writeln!(answers, "{answer}")?;
    }
    Ok(())
}

/// State of a connection.
#[derive(Default)]
struct Peer {
    whole_file_lock: Option<Flock<File>>,
    record_lock: Option<File>,
    mapping: Option<DeviceMapping>,
    watch: Option<Inotify>,
    opened: BTreeMap<String, File>,
}

impl Peer {
    fn obey(&mut self, words: &[&str]) -> io::Result<String> {
        let done = |()| "ok".to_owned();
        match words {
            ["bind", path] => bind(path).map(done),
            ["connect", path] => connect(path),
            ["flock", path] => self.lock_whole_file(path).map(done),
            ["record-lock", path] => self.lock_record(path).map(done),
            ["unlock"] => {
                self.whole_file_lock = None;
                self.record_lock = None;
                Ok(done(()))
            }
            ["map", path] => self.map(path).map(done),
            ["load"] => {
                let word = self.mapped()?.load(0, WORD_BYTES).ok_or(Errno::EFAULT)?;
                Ok(word.to_string())
            }
            ["store", word] => {
                let word = word.parse().map_err(io::Error::other)?;
                let stored = self.mapped()?.store(0, WORD_BYTES, word);
                stored.ok_or(Errno::EFAULT.into()).map(done)
            }
            ["watch", folder] => self.watch(folder).map(done),
            ["events", count] => self.events(count.parse().map_err(io::Error::other)?),
            ["write", path, text] => fs::write(path, text).map(done),
            ["zeros", path] => fs::write(path, [0; MAPPED_BYTES]).map(done),
            ["append", path, text] => append(path, text).map(done),
            ["replace", path, text] => replace(path, text).map(done),
            ["rename", from, to] => fs::rename(from, to).map(done),
            ["remove", path] => fs::remove_file(path).map(done),
            ["make-folder", path] => fs::create_dir(path).map(done),
            ["open", path] => {
                self.opened.insert((*path).to_owned(), File::open(path)?);
                Ok(done(()))
            }
            ["read-opened", path] => self.read_opened(path),
            ["read", path] => fs::read_to_string(path),
            ["size", path] => fs::metadata(path).map(|about| about.len().to_string()),
            ["list", path] => list(path),
            _ => Err(Errno::EINVAL.into()),
        }
    }

    fn lock_whole_file(&mut self, path: &str) -> io::Result<()> {
        let lock = Flock::lock(File::open(path)?, FlockArg::LockExclusiveNonblock);
        self.whole_file_lock = Some(lock.map_err(|(_, errno)| errno)?);
        Ok(())
    }

    fn lock_record(&mut self, path: &str) -> io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let small = |number: i32| libc::c_short::try_from(number).map_err(io::Error::other);
        let lock = libc::flock {
            l_type: small(libc::F_WRLCK)?,
            l_whence: small(libc::SEEK_SET)?,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_SETLK(&lock))?;
        self.record_lock = Some(file);
        Ok(())
    }

    fn map(&mut self, path: &str) -> io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        self.mapping = Some(DeviceMapping::new(file.as_fd(), 0, MAPPED_BYTES)?);
        Ok(())
    }

    fn mapped(&self) -> io::Result<&DeviceMapping> {
        self.mapping.as_ref().ok_or_else(|| Errno::EINVAL.into())
    }

    fn watch(&mut self, folder: &str) -> io::Result<()> {
        let watch = Inotify::init(InitFlags::IN_CLOEXEC)?;
        let kinds = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE;
        watch.add_watch(folder, kinds)?;
        self.watch = Some(watch);
        Ok(())
    }

    /// Returns `count` events, or fewer at the deadline.
    fn events(&mut self, count: usize) -> io::Result<String> {
        let watch = self.watch.as_ref().ok_or(Errno::EINVAL)?;
        let deadline = Instant::now() + EVENTS_WAIT;
        let mut events = Vec::new();
        while events.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).map_err(io::Error::other)?;
            let mut readable = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
            if poll(&mut readable, left)? == 0 {
                break;
            }
            events.extend(watch.read_events()?.iter().map(told));
        }
        Ok(events.join(" "))
    }

    fn read_opened(&mut self, path: &str) -> io::Result<String> {
        let file = self.opened.get_mut(path).ok_or(Errno::EINVAL)?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        Ok(text)
    }
}

fn told(event: &InotifyEvent) -> String {
    let name = event.name.clone().unwrap_or_default();
    let kind = format!("{:?}", event.mask);
    let kind = kind
        .trim_start_matches("AddWatchFlags(")
        .trim_end_matches(')');
    format!("{kind}:{}", name.to_string_lossy())
}

/// Listens on a unix socket and greets each client, until the process ends.
fn bind(path: &str) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    thread::spawn(move || {
        for mut client in listener.incoming().map_while(Result::ok) {
            let _client_is_gone = writeln!(client, "{GREETING}");
        }
    });
    Ok(())
}

fn connect(path: &str) -> io::Result<String> {
    let mut text = String::new();
    BufReader::new(UnixStream::connect(path)?).read_line(&mut text)?;
    Ok(text.trim().to_owned())
}

fn append(path: &str, text: &str) -> io::Result<()> {
    OpenOptions::new()
        .append(true)
        .open(path)?
        .write_all(text.as_bytes())
}

/// Writes a new file and renames it over the old one.
fn replace(path: &str, text: &str) -> io::Result<()> {
    let beside = format!("{path}.new");
    fs::write(&beside, text)?;
    fs::rename(beside, path)
}

fn list(path: &str) -> io::Result<String> {
    let entries = fs::read_dir(Path::new(path))?.filter_map(Result::ok);
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    Ok(names.join(" "))
}
