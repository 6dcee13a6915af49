//! Notices that the kernel's OOM killer ended something in a container, by watching its cgroup's
//! `memory.events` (Documentation/admin-guide/cgroup-v2.rst: the file "generates a file modified
//! event" when a value changes).

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::unix::AsyncFd;

use crate::{
    ground::{files, log},
    pod::events::Events,
};

/// What the kernel writes in a cgroup about its memory.
const EVENTS_FILE: &str = "memory.events";

/// The watches of all containers.
#[derive(Debug)]
pub(crate) struct OomWatch {
    kernel: AsyncFd<Kernel>,
    watched: Mutex<HashMap<WatchDescriptor, Watched>>,
    events: Arc<Events>,
}

#[derive(Debug)]
struct Watched {
    container_id: String,
    cgroup: PathBuf,
    kills: u64,
}

#[derive(Debug)]
struct Kernel(Inotify);

impl AsFd for Kernel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Kernel {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl OomWatch {
    /// A watch of nothing.
    pub(crate) fn new(events: Arc<Events>) -> io::Result<Self> {
        let kernel = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        Ok(Self {
            kernel: files::watch(Kernel(kernel))?,
            watched: Mutex::default(),
            events,
        })
    }

    /// Watches a container's cgroup. Where there is no memory controller there is nothing to watch.
    pub(crate) fn add(&self, container_id: &str, cgroup: &Path) {
        let file = cgroup.join(EVENTS_FILE);
        match self
            .kernel
            .get_ref()
            .0
            .add_watch(&file, AddWatchFlags::IN_MODIFY)
        {
            Ok(descriptor) => {
                let container_id = container_id.to_owned();
                self.lock().insert(
                    descriptor,
                    Watched {
                        container_id,
                        cgroup: cgroup.to_owned(),
                        kills: 0,
                    },
                );
            }
            Err(nix::Error::ENOENT) => {}
            Err(error) => log::warn(format_args!("cannot watch {}: {error}", file.display())),
        }
    }

    /// Forgets a container.
    pub(crate) fn remove(&self, container_id: &str) {
        let mut watched = self.lock();
        let found = watched
            .iter()
            .find(|(_, watched)| watched.container_id == container_id)
            .map(|(descriptor, _)| *descriptor);
        if let Some(descriptor) = found {
            watched.remove(&descriptor);
            // The kernel has removed it by itself when the cgroup is gone.
            let _ = self.kernel.get_ref().0.rm_watch(descriptor);
        }
    }

    /// Reports for ever.
    pub(crate) async fn run(&self) {
        loop {
            let Ok(mut guard) = self.kernel.readable().await else {
                return;
            };
            guard.clear_ready();
            while let Ok(changes) = self.kernel.get_ref().0.read_events() {
                for change in changes {
                    self.look(change.wd);
                }
            }
        }
    }

    fn look(&self, descriptor: WatchDescriptor) {
        let mut all = self.lock();
        let Some(watched) = all.get_mut(&descriptor) else {
            return;
        };
        let kills = kills(&watched.cgroup);
        if kills > watched.kills {
            watched.kills = kills;
            self.events.out_of_memory(&watched.container_id);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How often the OOM killer ended a process in a cgroup.
pub(crate) fn kills(cgroup: &Path) -> u64 {
    files::read(cgroup.join(EVENTS_FILE)).map_or(0, |text| kills_of(&text))
}

fn kills_of(text: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_read_by_their_name() {
        assert_eq!(kills_of("low 0\noom 9\noom_kill 3\noom_group_kill 1\n"), 3);
        assert_eq!(kills_of(""), 0);
        assert_eq!(kills_of("oom_kill x\n"), 0);
    }
}
