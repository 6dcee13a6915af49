//! The work of a guest's first process for its kernel: the first mounts, cgroup delegation and
//! power-off.
//!
//! Before the host is dialled only what that needs is done ([`mount_early`]); the rest ([`set_up`])
//! runs while the host reads the hello. On a developer's machine (`--socket`) neither touches
//! anything.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        resource::{Resource, setrlimit},
        statfs::{FsType, TMPFS_MAGIC, statfs},
    },
    unistd::{chdir, chroot},
};

use crate::ground::{
    files, log,
    paths::{CGROUP_ROOT, RUN},
};

/// Threads at once in blocking calls of the kernel; a guest with more mounts than this stuck is
/// past help.
pub(crate) const BLOCKING_THREADS_MAX: usize = 32;

/// How long an unused thread waits for work: its stack is memory of the pod.
pub(crate) const BLOCKING_THREAD_KEEP_ALIVE: Duration = Duration::from_millis(100);

/// Descriptors of the agent: the kernel's default of 1024 is too few for a full pod's streams.
const DESCRIPTORS_MAX: u64 = 1 << 20;

/// File system type of an initramfs that is not a tmpfs (uapi/linux/magic.h).
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// Why the agent cannot begin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    /// An argument of the command line is not known.
    #[error("unknown argument {0:?}: only --socket PATH and --streams PATH are known")]
    Argument(OsString),
    /// `--socket` and `--streams` go together.
    #[error("--socket and --streams must both be given, or neither")]
    HalfDeveloper,
    /// A first mount failed.
    #[error("cannot mount {path}")]
    Mount {
        /// Where.
        path: &'static str,
        /// The error of the kernel.
        #[source]
        source: Errno,
    },
}

/// How the agent was started.
#[derive(Debug, Clone)]
pub(crate) enum Options {
    /// As the first process of a guest.
    Guest,
    /// On a developer's machine: dials the first socket, and accepts streams on the second.
    Developer {
        /// Socket of the host's side.
        socket: PathBuf,
        /// Socket that is made for streams.
        streams: PathBuf,
    },
}

impl Options {
    /// Reads the command line. Words that the kernel passes on to its first process are not options
    /// of ours.
    pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Self, InitError> {
        if std::process::id() == 1 && !files_asked(std::env::args_os()) {
            return Ok(Self::Guest);
        }
        let mut arguments = arguments;
        let (mut socket, mut streams) = (None, None);
        while let Some(argument) = arguments.next() {
            match argument.to_str() {
                Some("--socket") => socket = arguments.next(),
                Some("--streams") => streams = arguments.next(),
                _ => return Err(InitError::Argument(argument)),
            }
        }
        match (socket, streams) {
            (Some(socket), Some(streams)) => Ok(Self::Developer {
                socket: socket.into(),
                streams: streams.into(),
            }),
            (None, None) => Ok(Self::Guest),
            _ => Err(InitError::HalfDeveloper),
        }
    }

    /// Where the guest's own `resolv.conf` and `hosts` lie: a developer's are left alone.
    pub(crate) fn etc(&self) -> &'static Path {
        Path::new(if self.in_guest() { "/etc" } else { RUN })
    }

    /// Whether the machine is ours.
    pub(crate) fn in_guest(&self) -> bool {
        matches!(self, Self::Guest)
    }
}

fn files_asked(mut arguments: impl Iterator<Item = OsString>) -> bool {
    arguments.any(|argument| argument == OsStr::new("--socket"))
}

/// One of the first mounts: source, target, type, flags, options.
type FirstMount = (
    &'static str,
    &'static str,
    &'static str,
    MsFlags,
    &'static str,
);

const SAFE: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// Mounts that the agent itself needs before it can say hello. A kernel with
/// `CONFIG_DEVTMPFS_MOUNT` has mounted `/dev`.
const EARLY: [FirstMount; 3] = [
    ("proc", "/proc", "proc", SAFE, ""),
    ("sysfs", "/sys", "sysfs", SAFE, ""),
    // Not `nodev`: device nodes of raw volumes lie beneath.
    ("tmpfs", "/run", "tmpfs", MsFlags::MS_NOSUID, "mode=755"),
];

/// Mounts that containers need.
const LATE: [FirstMount; 6] = [
    (
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        "mode=755",
    ),
    (
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        "newinstance,ptmxmode=0666,mode=620,gid=5",
    ),
    ("mqueue", "/dev/mqueue", "mqueue", SAFE, ""),
    (
        "cgroup2",
        CGROUP_ROOT,
        "cgroup2",
        SAFE,
        "nsdelegate,memory_recursiveprot",
    ),
    ("tmpfs", "/tmp", "tmpfs", SAFE, "mode=1777"),
    ("tmpfs", "/etc", "tmpfs", SAFE, "mode=755,size=1m"),
];

/// Makes the mounts without which the agent cannot say hello.
pub(crate) fn mount_early(options: &Options) -> Result<(), InitError> {
    if !options.in_guest() {
        return Ok(());
    }
    leave_initramfs().map_err(|source| InitError::Mount { path: "/", source })?;
    for entry in &EARLY {
        mount_one(entry).map_err(|source| InitError::Mount {
            path: entry.1,
            source,
        })?;
    }
    Ok(())
}

/// Moves to a mount of its own when the root is an initramfs: containers could not change their
/// root from the kernel's first one (pivot_root(2), NOTES).
fn leave_initramfs() -> nix::Result<()> {
    let kind = statfs("/")?.filesystem_type();
    if kind != TMPFS_MAGIC && kind != RAMFS_MAGIC {
        return Ok(());
    }
    mount(
        Some("/"),
        "/mnt",
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )?;
    chdir("/mnt")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    chdir("/")
}

/// Does the rest of an init's work: containers need it, the hello does not.
pub(crate) fn set_up(options: &Options) {
    if options.in_guest() {
        for entry in &LATE {
            if let Some(parent) = Path::new(entry.1).parent()
                && parent.starts_with("/dev")
            {
                // On devtmpfs, where it is not there yet.
                let _ = fs::create_dir(entry.1);
            }
            if let Err(error) = mount_one(entry) {
                log::warn(format_args!("cannot mount {}: {error}", entry.1));
            }
        }
        for (link, target) in [
            ("/dev/fd", "/proc/self/fd"),
            ("/dev/stdin", "/proc/self/fd/0"),
            ("/dev/stdout", "/proc/self/fd/1"),
            ("/dev/stderr", "/proc/self/fd/2"),
        ] {
            let _ = std::os::unix::fs::symlink(target, link);
        }
    }
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS_MAX, DESCRIPTORS_MAX) {
        log::warn(format_args!(
            "cannot raise the limit of descriptors: {error}"
        ));
    }
    if let Err(error) = fs::create_dir_all(RUN) {
        log::warn(format_args!("cannot make {RUN}: {error}"));
    }
    if let Err(error) = delegate_controllers() {
        log::warn(format_args!("cannot delegate cgroup controllers: {error}"));
    }
}

fn mount_one((source, target, fs_type, flags, data): &FirstMount) -> nix::Result<()> {
    let data = (!data.is_empty()).then_some(*data);
    match mount(Some(*source), *target, Some(*fs_type), *flags, data) {
        // Mounted by the kernel or by an initramfs.
        Err(Errno::EBUSY) => Ok(()),
        other => other,
    }
}

/// Gives the children of the root cgroup every controller that this kernel has. The agent stays in
/// the root itself, where cgroup v2 allows processes beside children
/// (Documentation/admin-guide/cgroup-v2.rst, "No Internal Process Constraint").
fn delegate_controllers() -> io::Result<()> {
    let root = Path::new(CGROUP_ROOT);
    let controllers = files::read(root.join("cgroup.controllers"))?;
    for controller in controllers.split_whitespace() {
        if let Err(error) = files::write(
            root.join("cgroup.subtree_control"),
            &format!("+{controller}"),
        ) {
            log::warn(format_args!(
                "cannot delegate cgroup controller {controller}: {error}"
            ));
        }
    }
    Ok(())
}

/// Writes everything back and powers the machine off. Returns only on a developer's machine.
pub(crate) fn power_off(options: &Options) {
    if !options.in_guest() {
        std::process::exit(0);
    }
    nix::unistd::sync();
    // Returns only when the kernel refuses.
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    log::error(format_args!("cannot power off: {error}"));
    // A restart ends the VM as surely.
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    log::error(format_args!("cannot restart: {error}"));
}
