//! The cgroup of one container, in the unified hierarchy (Documentation/admin-guide/cgroup-v2.rst).
//!
//! ```text
//! <parent>/<id>      limits and device rules of the container; its processes, unless it makes
//!                    cgroups of its own beneath
//! ```
//!
//! Written on the files themselves: reading and writing a dozen of them is less than what a library
//! around them would be, and none of those at hand attaches device programs.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use oci_spec::runtime::{LinuxDevice, LinuxResources};
use pericarp_sys::bpf;

use super::error::ContainerError;

pub(super) mod devices;
pub(super) mod limits;
#[cfg(test)]
mod tests;

/// How long processes may take to freeze or to be gone after SIGKILL. Only a process that sleeps in
/// the kernel without being killable takes longer than milliseconds.
const SETTLE_TIME: Duration = Duration::from_secs(10);

/// Most processes that are listed, and cgroups that a container may have made beneath its own.
const ENTRIES_MAX: usize = 1 << 16;

/// Deepest nesting of cgroups that is walked; the kernel's own default (`cgroup.max.depth`) is
/// unlimited.
const DEPTH_MAX: usize = 64;

/// A container's cgroup. Exists from [`Cgroup::create`] to [`Cgroup::remove`].
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
    /// The attached device program; replaced when the rules change.
    device_program: Mutex<Option<OwnedFd>>,
    /// Devices that stay allowed whatever the rules of an update say.
    added_devices: Vec<LinuxDevice>,
}

/// Writes to a file of the kernel's, which is there or not: asked to create one, cgroup2 answers
/// EACCES for either.
fn put(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

fn write(path: &Path, value: &str) -> Result<(), ContainerError> {
    put(path, value).map_err(|error| {
        ContainerError::kernel("write", format!("{value:?} to {}", path.display()), &error)
    })
}

impl Cgroup {
    /// Makes the cgroup `name` beneath `parent` with the limits of `resources`.
    pub(super) fn create(
        parent: &Path,
        name: &str,
        resources: Option<&LinuxResources>,
        added_devices: &[LinuxDevice],
    ) -> Result<Self, ContainerError> {
        delegate_controllers(parent)?;
        let path = parent.join(name);
        fs::create_dir(&path)
            .map_err(|error| ContainerError::kernel("create", path.display(), &error))?;
        let cgroup = Self {
            path,
            device_program: Mutex::new(None),
            added_devices: added_devices.to_vec(),
        };
        let resources = resources.cloned().unwrap_or_default();
        let made = cgroup
            .update(&resources)
            .and_then(|()| cgroup.set_devices(&resources));
        if let Err(error) = made {
            // Nothing ran in it yet, so this removes it for sure.
            let _ = fs::remove_dir(&cgroup.path);
            return Err(error);
        }
        Ok(cgroup)
    }

    /// The directory of the cgroup.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the process `pid` in. `init` is the container's init when there is one: if
    /// the container has divided its cgroup, no process may live in its root, and the new one goes
    /// where init is.
    pub(super) fn add(&self, pid: i32, init: Option<i32>) -> Result<(), ContainerError> {
        let procs = self.path.join("cgroup.procs");
        match put(&procs, &pid.to_string()) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let home = init
                    .and_then(|init| self.home_of(init))
                    .ok_or_else(|| ContainerError::kernel("write", procs.display(), &error))?;
                write(&home.join("cgroup.procs"), &pid.to_string())
            }
            Err(error) => Err(ContainerError::kernel("write", procs.display(), &error)),
            Ok(()) => Ok(()),
        }
    }

    /// The cgroup of process `pid`, if that is within this one.
    fn home_of(&self, pid: i32) -> Option<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        home_in(&text, &self.path)
    }

    /// Applies the limits that `resources` names.
    pub(super) fn update(&self, resources: &LinuxResources) -> Result<(), ContainerError> {
        limits::check_usage(resources, || self.number("memory.current"))?;
        for setting in limits::of(resources, |file| self.path.join(file).exists())? {
            let path = self.path.join(&setting.file);
            match put(&path, &setting.value) {
                Err(error) if setting.optional && error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    let object = format!("{:?} to {}", setting.value, path.display());
                    return Err(ContainerError::kernel(
                        &format!("{}: write", setting.field),
                        object,
                        &error,
                    ));
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Attaches the device rules of `resources`, then takes away those that were attached: between
    /// the two both must allow.
    pub(super) fn set_devices(&self, resources: &LinuxResources) -> Result<(), ContainerError> {
        let rules = devices::rules(
            resources.devices().as_deref().unwrap_or_default(),
            &self.added_devices,
        )?;
        let refused = |action: &str, error: &io::Error| {
            ContainerError::kernel(
                action,
                format!("device rules of {}", self.path.display()),
                error,
            )
        };
        let program = bpf::load_device_program(&devices::program(&rules))
            .map_err(|error| refused("load", &error))?;
        let directory = File::open(&self.path).map_err(|error| refused("open", &error))?;
        bpf::attach_device_program(directory.as_fd(), program.as_fd())
            .map_err(|error| refused("attach", &error))?;
        let mut attached = self
            .device_program
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = attached.replace(program) {
            bpf::detach_device_program(directory.as_fd(), old.as_fd())
                .map_err(|error| refused("detach", &error))?;
        }
        Ok(())
    }

    /// Every process within, up to a bound.
    pub(super) fn pids(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        for directory in self.tree() {
            let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            if pids.len() >= ENTRIES_MAX {
                break;
            }
        }
        pids.truncate(ENTRIES_MAX);
        pids
    }

    /// This cgroup and those beneath it, parents first.
    fn tree(&self) -> Vec<PathBuf> {
        let mut all = vec![(self.path.clone(), 0)];
        let mut next = 0;
        while next < all.len() && all.len() < ENTRIES_MAX {
            let (directory, depth) = all[next].clone();
            next += 1;
            if depth >= DEPTH_MAX {
                continue;
            }
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            let directories =
                entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            all.extend(directories.map(|entry| (entry.path(), depth + 1)));
        }
        all.into_iter().map(|(directory, _)| directory).collect()
    }

    /// Sends SIGKILL to every process, those being forked included.
    pub(super) fn kill(&self) -> Result<(), ContainerError> {
        write(&self.path.join("cgroup.kill"), "1")
    }

    /// Freezes or thaws every process, and waits until it is so.
    pub(super) fn freeze(&self, frozen: bool) -> Result<(), ContainerError> {
        let value = if frozen { "1" } else { "0" };
        write(&self.path.join("cgroup.freeze"), value)?;
        self.settled(&format!("frozen {value}"))
    }

    /// Whether [`Self::freeze`] froze it.
    pub(super) fn is_frozen(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.freeze")).is_ok_and(|text| text.trim() == "1")
    }

    /// Waits for a line of `cgroup.events`. The kernel tells of changes there by POLLPRI.
    fn settled(&self, line: &str) -> Result<(), ContainerError> {
        let path = self.path.join("cgroup.events");
        let failed = |error: io::Error| ContainerError::kernel("read", path.display(), &error);
        let until = Instant::now() + SETTLE_TIME;
        loop {
            let mut file = File::open(&path).map_err(failed)?;
            let mut text = String::new();
            file.read_to_string(&mut text).map_err(failed)?;
            if text.lines().any(|present| present == line) {
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ContainerError::Helper {
                    reason: format!("{} did not say {line:?} in time", path.display()),
                });
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(
                &mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)],
                timeout,
            ) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(failed(error.into())),
            }
        }
    }

    fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.path.join(file))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    /// Kills what is left within, waits until it is gone, and removes the cgroup with those beneath
    /// it.
    pub(super) fn remove(&self) -> Result<(), ContainerError> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        self.settled("populated 0")?;
        for directory in self.tree().iter().rev() {
            match fs::remove_dir(directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(ContainerError::kernel(
                        "remove",
                        directory.display(),
                        &error,
                    ));
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }
}

/// The cgroup that a `/proc/<pid>/cgroup` names, if that is within `own`. A container names the
/// cgroups that it makes.
pub(super) fn home_in(text: &str, own: &Path) -> Option<PathBuf> {
    let home = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let names: Vec<_> = home.split('/').collect();
    // The line shows the path from the root of the agent's view; ours ends with the same names.
    let ours = [
        own.parent()?.file_name()?.to_str()?,
        own.file_name()?.to_str()?,
    ];
    let at = names.windows(ours.len()).position(|pair| pair == ours)?;
    let beneath = &names[at + ours.len()..];
    let plain = beneath.iter().all(|part| !matches!(*part, "" | "." | ".."));
    plain.then(|| own.join(beneath.join("/")))
}

/// Lets the children of `parent` have every controller that the hierarchy has.
fn delegate_controllers(parent: &Path) -> Result<(), ContainerError> {
    fs::create_dir_all(parent)
        .map_err(|error| ContainerError::kernel("create", parent.display(), &error))?;
    let mut path: Vec<_> = parent.ancestors().collect();
    path.retain(|directory| directory.join("cgroup.subtree_control").exists());
    for directory in path.into_iter().rev() {
        let enabled = enable_controllers(directory);
        // Further up another may have set what is allowed; what then is missing here is missed by
        // the limit that needs it.
        if directory == parent {
            enabled?;
        }
    }
    Ok(())
}

fn enable_controllers(directory: &Path) -> Result<(), ContainerError> {
    let read = |file: &str| {
        let path = directory.join(file);
        let text = fs::read_to_string(&path);
        text.map_err(|error| ContainerError::kernel("read", path.display(), &error))
    };
    let (controllers, enabled) = (read("cgroup.controllers")?, read("cgroup.subtree_control")?);
    for controller in controllers.split_whitespace() {
        if !enabled
            .split_whitespace()
            .any(|present| present == controller)
        {
            write(
                &directory.join("cgroup.subtree_control"),
                &format!("+{controller}"),
            )?;
        }
    }
    Ok(())
}
