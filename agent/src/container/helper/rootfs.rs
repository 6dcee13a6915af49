//! The container's root file system: what is mounted where, and the turn from the guest's root to
//! it.
//!
//! All of it happens on descriptors beneath the root's own ([`beneath`]), before the root is
//! entered: at no time does a path of the image lead to the guest.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::OFlag,
    mount::{MntFlags, umount2},
    sys::stat::{Mode, SFlag, fchmod, fstat},
    unistd::{chdir, fchdir, pivot_root},
};
use pericarp_sys::{
    fscontext::{DetachedMount, FsContext},
    mount_tree,
};

use super::{
    super::{
        error::ContainerError,
        plan::{
            ContainerPlan,
            mounts::{MountPlan, Source},
            process::ProcessPlan,
        },
    },
    Step, copy_up, devices, masks,
    sources::Sources,
    terminal::Terminal,
};
use crate::ground::beneath::{self, Make};

/// File systems whose instances are the kernel's own: `ro` is of the mount, not of an instance that
/// others use too.
const KERNEL_FILE_SYSTEMS: [&str; 7] = [
    "proc", "sysfs", "cgroup2", "mqueue", "devpts", "tmpfs", "devtmpfs",
];

/// The root on which a container is being built.
#[derive(Debug)]
pub(super) struct Root {
    directory: OwnedFd,
    /// The container's own instance of devpts.
    devpts: Option<OwnedFd>,
    /// Mounts that become read-only when everything in them is made.
    read_only_later: Vec<OwnedFd>,
}

impl Root {
    /// Attaches the root's mount, over the guest's root for want of a better place: [`Self::pivot`]
    /// takes that away.
    pub(super) fn attach(mount: DetachedMount) -> Result<Self, ContainerError> {
        // What is mounted in the container is nobody else's, whatever the guest shares.
        mount_tree::set_propagation(mount.as_fd(), libc::MS_PRIVATE, true)
            .step("set the propagation of", "the root file system")?;
        let directory = mount
            .as_fd()
            .try_clone_to_owned()
            .step("keep", "the root file system")?;
        let place = std::fs::File::open("/").step("open", "/")?;
        mount
            .attach(place.as_fd())
            .step("mount", "the root file system")?;
        Ok(Self {
            directory,
            devpts: None,
            read_only_later: Vec::new(),
        })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Makes the mounts of `plan` in their order.
    pub(super) fn mount_all(
        &mut self,
        plan: &ContainerPlan,
        sources: &mut Sources,
    ) -> Result<(), ContainerError> {
        for (index, mount) in plan.mounts.iter().enumerate() {
            let prepared = sources.binds.remove(&index);
            let detached = match prepared.or_else(|| sources.file_systems.remove(&index)) {
                Some(detached) => detached,
                None => make_file_system(mount)?,
            };
            self.place(mount, detached)?;
        }
        Ok(())
    }

    fn place(&mut self, mount: &MountPlan, detached: DetachedMount) -> Result<(), ContainerError> {
        let object = || format!("{} at {}", mount.field, mount.destination);
        let make = match fstat(detached.as_fd()) {
            Ok(stat)
                if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFDIR =>
            {
                Make::File
            }
            _ => Make::Directory,
        };
        let target = beneath::create(self.fd(), &mount.destination, make)
            .step("create the mount point of", object())?;
        let kept = detached
            .as_fd()
            .try_clone_to_owned()
            .step("keep", object())?;
        if let Source::FileSystem { kind, data, .. } = &mount.source {
            if kind == "tmpfs" {
                inherit_mode(&kept, &target, data).step("set the mode of", object())?;
            }
            if mount.copy_up {
                copy_up::copy(&target, &kept).step("copy into", object())?;
            }
        }
        detached.attach(target.as_fd()).step("mount", object())?;
        if let Some(propagation) = mount.propagation {
            mount_tree::set_propagation(kept.as_fd(), propagation.kind, propagation.recursive)
                .step("set the propagation of", object())?;
        }
        match &mount.source {
            Source::FileSystem { kind, .. } if kind == "devpts" => self.devpts = Some(kept),
            Source::FileSystem { kind, .. } if kind == "tmpfs" && is_read_only(mount) => {
                self.read_only_later.push(kept);
            }
            _ => {}
        }
        Ok(())
    }

    /// Makes `process.cwd` where the image has none, as runc does.
    pub(super) fn make_working_directory(
        &self,
        process: &ProcessPlan,
    ) -> Result<(), ContainerError> {
        let cwd = process.cwd.display().to_string();
        match beneath::create(self.fd(), &cwd, Make::Directory) {
            // A read-only image: entering the directory will tell.
            Err(error) if error.raw_os_error() == Some(libc::EROFS) => Ok(()),
            result => result.map(drop).step("create process.cwd", cwd),
        }
    }

    /// Makes devices, links and the terminal in `/dev`.
    pub(super) fn add_devices(
        &self,
        plan: &ContainerPlan,
        sources: &mut Sources,
    ) -> Result<Option<Terminal>, ContainerError> {
        // A /dev of the caller's is complete.
        let given = plan.mounts.iter().any(|mount| {
            mount.destination == "/dev" && matches!(mount.source, Source::Bind { .. })
        });
        if !given {
            devices::make(self.fd(), plan, sources)?;
        }
        if !plan.process.terminal {
            return Ok(None);
        }
        let terminal = match &self.devpts {
            Some(devpts) => Terminal::open(devpts.as_fd())?,
            None => Terminal::open_guests()?,
        };
        terminal.resize(plan.process.console_size)?;
        let target = beneath::create(self.fd(), "/dev/console", Make::File)
            .step("create", "/dev/console")?;
        let console = DetachedMount::clone_of(terminal.slave(), false)
            .step("clone", "the terminal of /dev/console")?;
        console
            .attach(target.as_fd())
            .step("mount", "/dev/console")?;
        Ok(Some(terminal))
    }

    /// Makes the read-only paths read-only, covers the masked ones, and at last makes the root
    /// read-only where asked.
    pub(super) fn mask_paths(
        &self,
        plan: &ContainerPlan,
        sources: Sources,
    ) -> Result<(), ContainerError> {
        masks::make_read_only(self.fd(), &plan.readonly_paths)?;
        masks::mask(self.fd(), &plan.masked_paths, sources.null)?;
        for mount in &self.read_only_later {
            mount_tree::set_attributes(mount.as_fd(), libc::MOUNT_ATTR_RDONLY, 0, false)
                .step("make read-only", "a tmpfs")?;
        }
        if plan.rootfs_readonly {
            mount_tree::set_attributes(self.fd(), libc::MOUNT_ATTR_RDONLY, 0, false)
                .step("make read-only", "the root file system")?;
        }
        Ok(())
    }

    /// Makes the root the process's own and lets go of the guest's.
    pub(super) fn pivot(self, plan: &ContainerPlan) -> Result<(), ContainerError> {
        fchdir(&self.directory).step("enter", "the root file system")?;
        // pivot_root(2), "pivot_root(".", ".")": the old root ends up on top of the new one, whence
        // it is taken off.
        pivot_root(".", ".").step("pivot to", "the root file system")?;
        umount2(".", MntFlags::MNT_DETACH).step("unmount", "the guest's root")?;
        chdir("/").step("enter", "/")?;
        let propagation = plan.rootfs_propagation;
        mount_tree::set_propagation(self.fd(), propagation.kind, propagation.recursive)
            .step("set linux.rootfsPropagation of", "the root file system")
    }
}

fn is_read_only(mount: &MountPlan) -> bool {
    mount.attributes.set & libc::MOUNT_ATTR_RDONLY != 0
}

/// Makes the instance of a file system that `mount` asks for.
pub(super) fn make_file_system(mount: &MountPlan) -> Result<DetachedMount, ContainerError> {
    let Source::FileSystem { kind, device, data } = &mount.source else {
        let reason = format!("{} is a bind mount without its source", mount.field);
        return Err(ContainerError::Helper { reason });
    };
    let object = || format!("{} ({kind}) at {}", mount.field, mount.destination);
    let text =
        |text: &str| CString::new(text).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    let name = text(kind).step("mount", object())?;
    let context = FsContext::open(&name).step("mount", object())?;
    let configure = || -> io::Result<DetachedMount> {
        if let Some(device) = device {
            context.set_string(c"source", &text(device)?)?;
        }
        if is_read_only(mount) && !KERNEL_FILE_SYSTEMS.contains(&kind.as_str()) {
            context.set_flag(c"ro")?;
        }
        for option in data {
            match option.split_once('=') {
                Some((key, value)) => context.set_string(&text(key)?, &text(value)?)?,
                None => context.set_flag(&text(option)?)?,
            }
        }
        let later = if kind == "tmpfs" {
            libc::MOUNT_ATTR_RDONLY
        } else {
            0
        };
        context.mount(mount.attributes.set & !later)
    };
    let made = configure().map_err(|error| {
        // Where the kernel has words of its own, they name the option.
        let words = context.complaint().filter(|words| !words.is_empty());
        let object = words.map_or_else(object, |words| format!("{} ({words})", object()));
        ContainerError::kernel("mount", object, &error)
    })?;
    let whole = mount.recursive_attributes;
    if !whole.is_empty() {
        made.set_attributes(whole.set, whole.clear, true)
            .step("set the options of", object())?;
    }
    Ok(made)
}

/// A tmpfs without a mode of its own takes that of the directory that it covers, as runc has it.
fn inherit_mode(mount: &OwnedFd, target: &OwnedFd, data: &[String]) -> io::Result<()> {
    if data.iter().any(|option| option.starts_with("mode=")) {
        return Ok(());
    }
    let mode = Mode::from_bits_truncate(fstat(target)?.st_mode);
    let root = beneath::open_with(mount.as_fd(), "/", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    Ok(fchmod(&root, mode)?)
}
