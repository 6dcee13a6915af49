//! Volumes with real mounts, in a mount namespace of the test's own, and with a second one that
//! stands for the file-system daemon's.

use std::{
    fs::OpenOptions,
    io::Write,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    unistd::{geteuid, gettid},
};

use super::*;

type Work = Box<dyn FnOnce() + Send>;

/// A thread with a slave of our mounts, as the daemon has one.
struct Mirror {
    thread: i32,
    work: SyncSender<Work>,
}

impl Mirror {
    fn start() -> Self {
        let (work, asked): (_, Receiver<Work>) = sync_channel(1);
        let (sender, started) = sync_channel(1);
        thread::spawn(move || {
            own_mounts(MsFlags::MS_SLAVE);
            sender.send(gettid().as_raw()).unwrap();
            while let Ok(work) = asked.recv() {
                work();
            }
        });
        let thread = started.recv().unwrap();
        Self { thread, work }
    }

    /// Runs something as the daemon would.
    fn run<T: Send + 'static>(&self, action: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, done) = sync_channel(1);
        let work = move || sender.send(action()).unwrap();
        self.work.send(Box::new(work)).unwrap();
        done.recv().unwrap()
    }

    fn writes(&self, path: &Path) -> bool {
        let path = path.to_owned();
        self.run(move || {
            OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .is_ok()
        })
    }
}

fn own_mounts(propagation: MsFlags) {
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
    let flags = propagation | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
}

fn bind(source: &Path, target: &Path) {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), target, None::<&str>, flags, None::<&str>).unwrap();
}

fn tmpfs(target: &Path, flags: MsFlags) {
    mount(Some("tmpfs"), target, Some("tmpfs"), flags, None::<&str>).unwrap();
}

const UID: &str = "3a6c";

/// A pod's shared directory beside directories that stand for the host's.
struct Place {
    folder: tempfile::TempDir,
    volumes: Volumes,
    mirror: Mirror,
}

impl Place {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a directory of the host.
    fn directory(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// kubelet's `emptyDir` called `v`.
    fn empty_dir(&self) -> PathBuf {
        self.directory(&format!("pods/{UID}/volumes/kubernetes.io~empty-dir/v"))
    }

    /// kubelet's bind mount of a directory in the volume `v`.
    fn sub_path(&self, number: u32, of: &Path) -> PathBuf {
        let path = self.directory(&format!("pods/{UID}/volume-subpaths/v/c/{number}"));
        bind(of, &path);
        path
    }

    fn try_add(&self, id: &str, source: &Path, read_only: bool) -> Result<PathBuf, CallError> {
        let share = Share {
            source: source.to_owned(),
            mount: 0,
            recursive: true,
            id_map: None,
            read_only,
        };
        let place = self.volumes.add(id, &[share])?.remove(0);
        let name = place.strip_prefix(paths::SHARED).unwrap();
        Ok(self.volumes.shared.join(name))
    }

    /// Shares something; the answer is where it is on the host.
    fn add(&self, id: &str, source: &Path, read_only: bool) -> PathBuf {
        self.try_add(id, source, read_only).unwrap()
    }

    fn remove(&self, id: &str) -> usize {
        self.volumes.remove(id).unwrap().len()
    }

    fn nothing_is_left(&self) {
        let directory = self.volumes.mount_points.join(DIRECTORY);
        assert_eq!(fs::read_dir(directory).unwrap().count(), 0);
        let mounts = mountinfo::parse(&fs::read(mountinfo::OWN).unwrap());
        let below = self.volumes.shared.join(DIRECTORY);
        assert!(mounts.iter().all(|mount| !mount.point.starts_with(&below)));
    }
}

/// Runs a test where its mounts are nobody else's.
fn with_mounts(test: fn(&Place)) {
    if !geteuid().is_root() {
        eprintln!("skipped: only root may mount");
        return;
    }
    let run = move || {
        own_mounts(MsFlags::MS_PRIVATE);
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let [mount_points, shared] = ["mount-points", "shared"].map(|name| root.join(name));
        fs::create_dir(&mount_points).unwrap();
        fs::create_dir(&shared).unwrap();
        bind(&mount_points, &shared);
        let flags = MsFlags::MS_SHARED;
        mount(None::<&str>, &shared, None::<&str>, flags, None::<&str>).unwrap();
        let volumes = Volumes::new(&mount_points, &shared, Some(UID.to_owned()));
        let mirror = Mirror::start();
        let daemon = Daemon::of(mirror.thread, &shared).unwrap();
        volumes.daemon.set(daemon).unwrap();
        let place = Place {
            folder,
            volumes,
            mirror,
        };
        test(&place);
        // Nothing of the host's may be mounted when the folder is removed.
        umount2(&shared, MntFlags::MNT_DETACH).unwrap();
        drop(place.mirror);
    };
    thread::spawn(run).join().unwrap();
}

#[test]
fn a_source_is_shared_once_and_until_its_last_container_is_gone() {
    with_mounts(|place| {
        let volume = place.directory("volume");
        fs::write(volume.join("f"), "x").unwrap();
        let first = place.add("a", &volume, false);
        let other_path = place.directory("elsewhere");
        bind(&volume, &other_path);
        assert_eq!(place.add("b", &volume, false), first);
        assert_eq!(place.add("c", &other_path, true), first);
        assert_eq!(place.add("c", &volume.join("f"), true), first.join("f"));
        assert_ne!(place.add("c", &place.directory("v"), true), first);
        assert_eq!((place.remove("a"), place.remove("b")), (0, 0));
        assert_eq!(fs::read_to_string(first.join("f")).unwrap(), "x");
        assert_eq!((place.remove("c"), place.remove("c")), (2, 0));
        place.nothing_is_left();
        // The guest may remember a name: it is not used again.
        assert_ne!(place.add("d", &volume, false), first);
        assert_eq!(place.remove("d"), 1);
    });
}

#[test]
fn files_are_shared_once_too() {
    with_mounts(|place| {
        let hosts = place.path("hosts");
        fs::write(&hosts, "x").unwrap();
        let first = place.add("a", &hosts, true);
        assert!(!place.mirror.writes(&first));
        assert_eq!(place.add("b", &hosts, false), first);
        assert!(place.mirror.writes(&first));
        assert_eq!((place.remove("a"), place.remove("b")), (0, 1));
        place.nothing_is_left();
    });
}

#[test]
fn a_sub_path_is_a_part_of_its_volume() {
    with_mounts(|place| {
        let volume = place.directory("pv");
        let sub = place.directory("pv/sub");
        let bound = place.sub_path(0, &sub);
        let whole = place.add("a", &volume, false);
        assert_eq!(place.add("b", &bound, false), whole.join("sub"));
        // A volume that others may have too is not shared further than asked for.
        assert_eq!((place.remove("a"), place.remove("b")), (0, 1));
        let part = place.add("b", &bound, false);
        let whole = place.add("a", &volume, false);
        assert!(!whole.starts_with(&part) && !part.starts_with(&whole));
        assert_eq!(fs::read_dir(&part).unwrap().count(), 0);
        assert_eq!(place.add("c", &sub, false), part);
        place.remove("a");
        place.remove("b");
        place.remove("c");
        place.nothing_is_left();
    });
}

#[test]
fn an_empty_dir_is_shared_whole_from_its_first_part_on() {
    with_mounts(|place| {
        let volume = place.empty_dir();
        fs::create_dir(volume.join("sub")).unwrap();
        let bound = place.sub_path(0, &volume.join("sub"));
        let part = place.add("a", &bound, true);
        let whole = place.add("b", &volume, true);
        assert_eq!(part, whole.join("sub"));
        assert!(!place.mirror.writes(&whole.join("f")));
        // The volume is the pod's own, and so is the right to write a part of it.
        assert_eq!(place.add("c", &volume.join("sub"), false), part);
        assert!(place.mirror.writes(&part.join("f")));
        place.remove("a");
        place.remove("b");
        place.remove("c");
        // The same when the first part is a file.
        fs::write(volume.join("file"), "x").unwrap();
        let part = place.add("a", &volume.join("file"), true);
        let whole = place.add("b", &volume, true);
        assert_eq!(part, whole.join("file"));
        // A directory of another volume by the name of this one is not of it.
        let foreign = place.directory("foreign");
        let foreign = place.add("d", &place.sub_path(1, &foreign), false);
        assert!(!foreign.starts_with(&whole));
        for id in ["a", "b", "d"] {
            place.remove(id);
        }
        place.nothing_is_left();
    });
}

#[test]
fn a_read_only_mount_of_the_host_is_shared_apart() {
    with_mounts(|place| {
        let volume = place.directory("volume");
        let view = place.directory("view");
        bind(&volume, &view);
        let remount = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, &view, None::<&str>, remount, None::<&str>).unwrap();
        for (first, second) in [(&view, &volume), (&volume, &view)] {
            let shares = [place.add("a", first, false), place.add("b", second, false)];
            assert_ne!(shares[0], shares[1]);
            let writes = shares.map(|share| place.mirror.writes(&share.join("f")));
            assert_eq!(writes, [first == &volume, second == &volume]);
            place.remove("a");
            place.remove("b");
        }
        place.nothing_is_left();
    });
}

#[test]
fn the_host_refuses_writes_while_no_container_may_write() {
    with_mounts(|place| {
        let volume = place.directory("volume");
        for (name, flags) in [("ro", MsFlags::MS_RDONLY), ("rw", MsFlags::empty())] {
            tmpfs(&place.directory(&format!("volume/{name}")), flags);
        }
        let share = place.add("reader", &volume, true);
        let state = || ["", "rw", "ro"].map(|way| place.mirror.writes(&share.join(way).join("f")));
        let identity = || Source::open(&share).unwrap().identity;
        let before = identity();
        assert_eq!(state(), [false, false, false]);
        assert_eq!(place.add("writer", &volume, false), share);
        // What the host has read-only itself stays so.
        assert_eq!((state(), identity()), ([true, true, false], before));
        let path = share.join("f");
        let mut open = place
            .mirror
            .run(move || OpenOptions::new().append(true).open(path).unwrap());
        // Busy, and tried again with the next container.
        assert_eq!(place.remove("writer"), 0);
        open.write_all(b"x").unwrap();
        assert_eq!(state(), [true, true, false]);
        drop(open);
        assert_eq!(place.remove("nobody"), 0);
        assert_eq!(state(), [false, false, false]);
        place.add("writer", &volume, false);
        assert_eq!(state(), [true, true, false]);
        assert_eq!((place.remove("writer"), state()), (0, [false; 3]));
        assert_eq!(place.remove("reader"), 1);
        place.nothing_is_left();
    });
}

#[test]
fn write_access_to_a_part_does_not_open_the_whole() {
    with_mounts(|place| {
        let volume = place.directory("srv");
        let part = place.directory("srv/part");
        let whole = place.add("reader", &volume, true);
        let separate = place.add("writer", &part, false);
        assert!(place.mirror.writes(&separate.join("f")));
        assert!(!place.mirror.writes(&whole.join("part/f")));
        assert!(!separate.starts_with(&whole));
        assert_eq!(place.add("other", &part, false), separate);
        place.remove("reader");
        place.remove("writer");
        place.remove("other");
        place.nothing_is_left();
    });
}

#[test]
fn attributes_of_the_hosts_mount_are_kept() {
    with_mounts(|place| {
        let volume = place.directory("volume");
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        tmpfs(&volume, flags);
        let share = place.add("a", &volume, true);
        let options = |path: &Path| {
            let mounts = mountinfo::parse(&fs::read(mountinfo::OWN).unwrap());
            let mount = mounts.into_iter().rfind(|mount| mount.point == path);
            mount.unwrap().options
        };
        assert!(options(&share).starts_with("ro,nosuid,nodev"));
        place.add("b", &volume, false);
        assert!(options(&share).starts_with("rw,nosuid,nodev"));
        place.remove("a");
        place.remove("b");
        umount2(&volume, MntFlags::MNT_DETACH).unwrap();
    });
}

#[test]
fn what_is_mounted_later_comes_along_and_nothing_goes_back() {
    with_mounts(|place| {
        let volume = place.directory("volume");
        tmpfs(&volume, MsFlags::empty());
        let flags = MsFlags::MS_SHARED;
        mount(None::<&str>, &volume, None::<&str>, flags, None::<&str>).unwrap();
        let later = place.directory("volume/later");
        let share = place.add("a", &volume, false);
        tmpfs(&later, MsFlags::empty());
        fs::write(later.join("f"), "x").unwrap();
        let path = share.join("later/f");
        let seen = place.mirror.run(move || fs::read_to_string(path).unwrap());
        assert_eq!(seen, "x");
        // It is another file system, so a container that has it alone has a share of its own.
        let alone = place.add("b", &later, false);
        assert!(!alone.starts_with(&share));
        let mounted = place.directory("volume/mounted");
        tmpfs(&share.join("mounted"), MsFlags::empty());
        fs::write(share.join("mounted/f"), "x").unwrap();
        assert!(!mounted.join("f").exists());
        place.remove("a");
        place.remove("b");
        place.nothing_is_left();
        umount2(&volume, MntFlags::MNT_DETACH).unwrap();
    });
}

#[test]
fn what_was_deleted_is_no_part_of_what_is_there_now() {
    with_mounts(|place| {
        let volume = place.directory("pv");
        let gone = place.directory("pv/gone");
        let bound = place.sub_path(0, &gone);
        place.add("a", &volume, false);
        fs::remove_dir(&gone).unwrap();
        place.directory("pv/gone");
        // The kernel mounts nothing that was deleted, for runc neither.
        let error = place.try_add("b", &bound, false).unwrap_err();
        assert!(
            error.to_string().contains("volume-subpaths/v/c/0"),
            "{error}"
        );
        assert_eq!((place.remove("b"), place.remove("a")), (0, 1));
        place.nothing_is_left();
    });
}

#[test]
fn a_container_that_fails_half_way_leaves_nothing() {
    with_mounts(|place| {
        let volume = place.directory("volume");
        let share = place.add("a", &volume, true);
        let error = place.try_add("b", &place.path("missing"), false);
        assert!(error.unwrap_err().to_string().contains("missing"));
        assert!(!place.mirror.writes(&share.join("f")));
        place.remove("b");
        assert_eq!(place.remove("a"), 1);
        place.nothing_is_left();
    });
}

#[test]
fn without_a_daemon_nothing_becomes_writable() {
    with_mounts(|place| {
        let (mount_points, shared) = (place.path("mount-points"), place.path("shared"));
        let volumes = Volumes::new(&mount_points, &shared, None);
        let share = Share {
            source: place.directory("volume"),
            mount: 0,
            recursive: true,
            id_map: None,
            read_only: true,
        };
        volumes.add("reader", std::slice::from_ref(&share)).unwrap();
        let writer = Share {
            read_only: false,
            ..share
        };
        let error = volumes.add("writer", &[writer]).unwrap_err();
        assert!(error.to_string().contains("daemon"), "{error}");
        assert!(!volumes.table().shares[&1].is_written());
        assert!(!place.mirror.writes(&shared.join(".volumes/1/f")));
        volumes.remove("reader").unwrap();
        place.nothing_is_left();
    });
}

#[test]
fn two_hundred_containers_in_turn_leave_nothing() {
    with_mounts(|place| {
        let volume = place.directory("volume");
        for turn in 0..200 {
            let id = format!("c{turn}");
            place.add(&id, &volume, turn % 2 == 0);
            assert_eq!(place.remove(&id), 1);
        }
        place.nothing_is_left();
    });
}
