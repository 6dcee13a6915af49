//! A number on the host for what runs in the guest.
//!
//! A task has a PID, and programs of the host do two things with it: containerd names the
//! namespaces of a container by it (`/proc/<pid>/ns/pid`, which says whose PID namespace another
//! container joins), and cAdvisor reads the counters of the pod's network from
//! `/proc/<pid>/net/dev`. A thread of ours that waits in the pod's network namespace has such a
//! number, distinct for each container, and costs one page of its stack.

use std::{
    fs::File,
    io,
    path::Path,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    unistd::gettid,
};

use crate::errors::CallError;

/// The thread calls nothing that needs more.
const STACK_BYTES: usize = 32 * 1024;

/// A thread that stands for a container, or for the pod, until this is dropped.
#[derive(Debug)]
pub(crate) struct Placeholder {
    number: u32,
    _until: SyncSender<()>,
}

impl Placeholder {
    /// Starts one, in the network namespace at that path.
    pub(crate) fn for_guest(network_namespace: Option<&Path>) -> Result<Self, CallError> {
        Self::start(network_namespace)
            .map_err(|error| CallError::host("placeholder for a PID of the guest", error))
    }

    fn start(network_namespace: Option<&Path>) -> io::Result<Self> {
        let namespace = network_namespace.map(File::open).transpose()?;
        let (told, answer) = sync_channel(1);
        let (until, end) = sync_channel(0);
        let work = move || {
            let _ = told.send(enter(namespace));
            // The other side never sends: this returns when it is dropped.
            let end: Receiver<()> = end;
            let _ = end.recv();
        };
        thread::Builder::new()
            .name("placeholder".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(work)?;
        let number = answer
            .recv()
            .map_err(|_| io::Error::other("the thread ended"))??;
        Ok(Self {
            number,
            _until: until,
        })
    }

    /// Its number: `/proc/<number>` is there as long as it is.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }
}

fn enter(namespace: Option<File>) -> io::Result<u32> {
    if let Some(file) = namespace {
        setns(file, CloneFlags::CLONE_NEWNET)?;
    }
    u32::try_from(gettid().as_raw()).map_err(io::Error::other)
}

/// The number in `/proc/<number>/ns/pid`, the form in which containerd names a PID namespace.
pub(crate) fn number_in(path: &Path) -> Option<u32> {
    let rest = path.to_str()?.strip_prefix("/proc/")?;
    rest.strip_suffix("/ns/pid")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_number_for_as_long_as_it_lives() {
        let first = Placeholder::start(None).unwrap();
        let second = Placeholder::start(None).unwrap();
        assert_ne!(first.number(), second.number());
        let folder = format!("/proc/{}", first.number());
        assert!(Path::new(&folder).join("ns/pid").exists());
        drop(first);
        while Path::new(&folder).exists() {
            thread::yield_now();
        }
        assert!(Path::new(&format!("/proc/{}", second.number())).exists());
    }

    #[test]
    fn a_namespace_that_is_not_there_is_an_error() {
        assert!(Placeholder::start(Some(Path::new("/not/there"))).is_err());
    }

    #[test]
    fn numbers_are_read_from_the_paths_of_containerd() {
        assert_eq!(number_in(Path::new("/proc/12/ns/pid")), Some(12));
        for path in [
            "/proc/self/ns/pid",
            "/proc/12/ns/net",
            "/run/ns/pid",
            "/proc/-1/ns/pid",
        ] {
            assert_eq!(number_in(Path::new(path)), None, "{path}");
        }
    }
}
