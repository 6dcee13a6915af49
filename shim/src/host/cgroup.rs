//! The pod's cgroup on the host: where the VMM and the file-system daemon live from their first
//! instruction.
//!
//! kubelet makes the pod's cgroup and limits it; the sandbox's own cgroup beneath it (the OCI
//! `cgroupsPath`) is made here and holds every process of the VM, so that what the VM costs is the
//! pod's to pay. No limit is written: those of the pod are kubelet's, and those of containers hold
//! in the guest.
//!
//! `cgroupsPath` has two forms: a path beneath the mount (cgroupfs driver), and `slice:prefix:name`
//! (systemd driver). The latter is a scope, of which systemd must hear ([`crate::host::scope`]).

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Where cgroups are mounted.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";
/// Memory of the VMM and the file-system daemon beside the guest's, which the pod's limit must
/// leave.
const PROCESSES_BYTES: u64 = 16 << 20;

/// How long killed processes may take to leave a cgroup.
const EMPTY_MS: u64 = 5_000;
/// Enough of cpu.stat to have its first line.
const METER_BYTES: usize = 128;

/// The directories of a sandbox's cgroup: one on cgroup v2, one a hierarchy on v1.
pub(crate) fn directories(cgroups_path: &Path) -> Vec<PathBuf> {
    let relative = relative(cgroups_path);
    if Path::new(ROOT).join("cgroup.controllers").exists() {
        return vec![Path::new(ROOT).join(relative)];
    }
    let Ok(entries) = fs::read_dir(ROOT) else {
        return Vec::new();
    };
    entries
        .filter_map(Result::ok)
        // Combined hierarchies have links under each of their names.
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter(|entry| entry.file_name() != "unified")
        .map(|entry| entry.path().join(&relative))
        .collect()
}

/// Makes `directory` and gives the file that moves a process into it.
pub(crate) fn make(directory: &Path) -> io::Result<File> {
    fs::create_dir_all(directory)?;
    OpenOptions::new()
        .write(true)
        .open(directory.join("cgroup.procs"))
}

/// Why a limit of `cgroup`, or above it, would end a VM that has used all of its memory.
pub(crate) fn memory_limit_below(cgroup: &Path, memory_bytes: u64) -> Option<String> {
    let needed = memory_bytes + PROCESSES_BYTES;
    let (limit, place) = lowest_limit(cgroup, Path::new(ROOT))?;
    (limit < needed).then(|| {
        format!(
            "{} MiB with its processes, but {} allows {} MiB: raise overhead.podFixed.memory of \
             the RuntimeClass",
            needed >> 20,
            place.display(),
            limit >> 20
        )
    })
}

/// The lowest limit of memory from `cgroup` up to `root`, and whose it is.
fn lowest_limit(cgroup: &Path, root: &Path) -> Option<(u64, PathBuf)> {
    let above = cgroup.ancestors().take_while(|path| *path != root);
    let limits = above.filter_map(|path| {
        let file = path.join("memory.max");
        let text = fs::read_to_string(&file).ok()?;
        Some((text.trim().parse().ok()?, file))
    });
    limits.min_by_key(|(limit, _)| *limit)
}

/// Counts the processor time of everything in a sandbox's cgroup.
#[derive(Debug)]
pub(crate) struct Meter {
    file: File,
    unified: bool,
    asking: AtomicBool,
    questions_us: AtomicU64,
}

impl Meter {
    /// Opens the counter of a directory that has one.
    pub(crate) fn open(directory: &Path) -> Option<Self> {
        let open = |name: &str| File::open(directory.join(name)).ok();
        match open("cpu.stat") {
            // The v1 controller `cpu` has a file of that name without what is needed here.
            Some(file) if !directory.join("cpuacct.usage").exists() => Some(Self::of(file, true)),
            _ => open("cpuacct.usage").map(|file| Self::of(file, false)),
        }
    }

    fn of(file: File, unified: bool) -> Self {
        Self {
            file,
            unified,
            asking: AtomicBool::new(false),
            questions_us: AtomicU64::new(0),
        }
    }

    /// Processor time since the cgroup's begin, in microseconds, without what answers to questions
    /// took: of those the containers know nothing.
    pub(crate) fn used_us(&self) -> Option<u64> {
        let questions_us = self.questions_us.load(Ordering::Relaxed);
        Some(self.raw_us()?.saturating_sub(questions_us))
    }

    /// A question to the guest begins.
    pub(crate) fn question(&self) -> Question<'_> {
        let alone = !self.asking.swap(true, Ordering::Relaxed);
        Question {
            meter: self,
            before_us: if alone { self.raw_us() } else { None },
            alone,
        }
    }

    fn raw_us(&self) -> Option<u64> {
        let mut buffer = [0; METER_BYTES];
        let count = self.file.read_at(&mut buffer, 0).ok()?;
        let text = std::str::from_utf8(buffer.get(..count)?).ok()?;
        used_us(text, self.unified)
    }
}

/// A question under way. Of two at once only the first is counted: they take the same time.
#[derive(Debug)]
pub(crate) struct Question<'a> {
    meter: &'a Meter,
    before_us: Option<u64>,
    alone: bool,
}

impl Question<'_> {
    /// It is answered: the processor time that it took, at most `most_us`.
    pub(crate) fn answered(self, most_us: u64) -> u64 {
        let took = || self.meter.raw_us()?.checked_sub(self.before_us?);
        let took_us = took().unwrap_or_default().min(most_us);
        self.meter
            .questions_us
            .fetch_add(took_us, Ordering::Relaxed);
        took_us
    }
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        if self.alone {
            self.meter.asking.store(false, Ordering::Relaxed);
        }
    }
}

/// `usage_usec` of cpu.stat (cgroup-v2.rst, "CPU Interface Files") or the nanoseconds of
/// cpuacct.usage (cgroup-v1/cpuacct.rst).
fn used_us(text: &str, unified: bool) -> Option<u64> {
    if unified {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "));
        return line?.trim().parse().ok();
    }
    let nanoseconds: u64 = text.trim().parse().ok()?;
    Some(nanoseconds / 1000)
}

/// Ends what is left in `directory` and removes it.
pub(crate) fn remove(directory: &Path) -> io::Result<()> {
    let deadline = Instant::now() + Duration::from_millis(EMPTY_MS);
    // cgroup.kill is Linux 5.14's; without it the processes were ended by the journal's own
    // entries.
    let _ = fs::write(directory.join("cgroup.kill"), "1");
    if let Ok(events) = File::open(directory.join("cgroup.events")) {
        wait_empty(directory, &events, deadline)?;
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// cgroup.events is notified by POLLPRI whenever `populated` changes (cgroup-v2.rst, "populated").
fn wait_empty(directory: &Path, events: &File, deadline: Instant) -> io::Result<()> {
    loop {
        let text = fs::read_to_string(directory.join("cgroup.events"))?;
        if !text.lines().any(|line| line == "populated 1") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        if poll(&mut polled, timeout)? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "processes do not leave the cgroup",
            ));
        }
    }
}

fn relative(cgroups_path: &Path) -> PathBuf {
    let text = cgroups_path.to_string_lossy();
    match slice_and_scope(&text) {
        Some((slice, scope)) => slice_path(slice).join(scope),
        None => text.trim_start_matches('/').into(),
    }
}

/// The units that a path of the systemd driver names.
pub(crate) fn slice_and_scope(cgroups_path: &str) -> Option<(&str, String)> {
    let parts: Vec<&str> = cgroups_path.split(':').collect();
    match parts.as_slice() {
        [slice, "", name] => Some((slice, format!("{name}.scope"))),
        [slice, prefix, name] => Some((slice, format!("{prefix}-{name}.scope"))),
        _ => None,
    }
}

/// `a-b-c.slice` lies at `a.slice/a-b.slice/a-b-c.slice` (systemd.slice(5)); `-.slice` is the root.
fn slice_path(slice: &str) -> PathBuf {
    let name = slice.trim_end_matches(".slice");
    let mut path = PathBuf::new();
    if name.is_empty() || name == "-" {
        return path;
    }
    let mut end = 0;
    for part in name.split('-') {
        end += part.len();
        path.push(format!("{}.slice", name.get(..end).unwrap_or(name)));
        end += 1;
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_drivers_paths() {
        assert_eq!(
            relative(Path::new("/kubepods/besteffort/pod1/abc")),
            Path::new("kubepods/besteffort/pod1/abc")
        );
        assert_eq!(
            relative(Path::new(
                "kubepods-burstable-pod1.slice:cri-containerd:abc"
            )),
            Path::new(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/\
                 cri-containerd-abc.scope"
            )
        );
        assert_eq!(relative(Path::new("-.slice::abc")), Path::new("abc.scope"));
    }

    #[test]
    fn both_versions_counters() {
        assert_eq!(used_us("usage_usec 12\nuser_usec 7\n", true), Some(12));
        assert_eq!(used_us("5000\n", false), Some(5));
        assert_eq!(used_us("nr_periods 0\nnr_thr", true), None);
    }

    #[test]
    fn answers_to_questions_are_not_the_containers_doing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cpu.stat");
        let use_up = |us: u64| fs::write(&path, format!("usage_usec {us}\n")).unwrap();
        use_up(100);
        let meter = Meter::open(folder.path()).unwrap();
        let question = meter.question();
        let second = meter.question();
        use_up(130);
        assert_eq!(second.answered(1000), 0);
        assert_eq!(question.answered(1000), 30);
        assert_eq!(meter.used_us(), Some(100));
        use_up(180);
        assert_eq!(meter.used_us(), Some(150));
        // Nobody's fault that it was not answered, and a long answer excuses no more than that.
        drop(meter.question());
        let question = meter.question();
        use_up(5_180);
        assert_eq!(question.answered(1000), 1000);
        assert_eq!(meter.used_us(), Some(4_150));
    }

    #[test]
    fn removal_of_what_is_not_there() {
        remove(Path::new("/sys/fs/cgroup/pericarp-test-absent")).unwrap();
    }

    #[test]
    fn the_lowest_limit_counts() {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("kubepods/pod1");
        let sandbox = pod.join("sandbox");
        fs::create_dir_all(&sandbox).unwrap();
        fs::write(root.path().join("memory.max"), "1\n").unwrap();
        assert_eq!(lowest_limit(&sandbox, root.path()), None);
        fs::write(sandbox.join("memory.max"), "max\n").unwrap();
        fs::write(pod.join("memory.max"), "268435456\n").unwrap();
        fs::write(pod.with_file_name("memory.max"), "536870912\n").unwrap();
        let (limit, place) = lowest_limit(&sandbox, root.path()).unwrap();
        assert_eq!((limit, place), (256 << 20, pod.join("memory.max")));
        // The root of real cgroups has no such file.
        fs::remove_file(root.path().join("memory.max")).unwrap();
        let below = |mib: u64| memory_limit_below(&sandbox, mib << 20);
        assert!(below(240).is_none());
        let error = below(241).unwrap();
        assert!(
            error.contains("257 MiB") && error.contains("overhead"),
            "{error}"
        );
    }
}
