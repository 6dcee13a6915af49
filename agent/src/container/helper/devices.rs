//! `/dev` of a container: nodes and the links that every program expects.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::AtFlags,
    sys::stat::{Mode, SFlag, fstatat, makedev, mknodat},
    unistd::{fchownat, symlinkat},
};

use super::{
    super::{
        error::ContainerError,
        plan::{ContainerPlan, devices::DevicePlan},
    },
    Step,
    sources::Sources,
};
use crate::ground::beneath::{self, Make};

/// config-linux.md, "Default Devices" and runtime-linux.md, "Dev symbolic links".
const LINKS: [(&str, &str); 6] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/core", "/proc/kcore"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// Makes the nodes of `plan` beneath `root`, then the links.
pub(super) fn make(
    root: BorrowedFd<'_>,
    plan: &ContainerPlan,
    sources: &mut Sources,
) -> Result<(), ContainerError> {
    for (index, device) in plan.devices.iter().enumerate() {
        let object = || format!("device {}", device.path);
        if let Some(node) = sources.devices.remove(&index) {
            let target =
                beneath::create(root, &device.path, Make::File).step("create", object())?;
            node.attach(target.as_fd()).step("mount", object())?;
            continue;
        }
        let (directory, name) = beneath::parent(root, &device.path).step("create", object())?;
        node(&directory, &name, device).step("create", object())?;
    }
    for (path, target) in LINKS {
        let (directory, name) = beneath::parent(root, path).step("create", path)?;
        if path == "/dev/ptmx" {
            // An image's own node would lead to the guest's terminals.
            let _ = nix::unistd::unlinkat(
                &directory,
                name.as_str(),
                nix::unistd::UnlinkatFlags::NoRemoveDir,
            );
        }
        match symlinkat(target, &directory, name.as_str()) {
            Err(Errno::EEXIST) | Ok(()) => {}
            // A read-only /dev that is the image's.
            Err(Errno::EROFS) if !plan.mounts.iter().any(|mount| mount.destination == "/dev") => {}
            result => result.step("create", path)?,
        }
    }
    Ok(())
}

fn node(directory: &OwnedFd, name: &str, device: &DevicePlan) -> io::Result<()> {
    let file_type = SFlag::from_bits_truncate(device.file_type);
    let number = makedev(u64::from(device.major), u64::from(device.minor));
    match mknodat(
        directory,
        name,
        file_type,
        Mode::from_bits_truncate(device.mode),
        number,
    ) {
        Err(Errno::EEXIST) => {
            let there = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            let same = SFlag::from_bits_truncate(there.st_mode) & SFlag::S_IFMT == file_type
                && there.st_rdev == number;
            if !same {
                return Err(Errno::EEXIST.into());
            }
        }
        result => result?,
    }
    let (uid, gid) = (Some(device.uid.into()), Some(device.gid.into()));
    Ok(fchownat(
        directory,
        name,
        uid,
        gid,
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )?)
}
