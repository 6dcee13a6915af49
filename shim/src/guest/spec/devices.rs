//! Devices of the host in a container's specification: PCI functions, block devices as volumes, and
//! pseudo devices that the guest has too.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::invalid;
use crate::{errors::CallError, guest::vfio::VfioPath};

/// Devices that every Linux has and that are not the host's hardware: the guest makes its own.
const PSEUDO_DEVICES: [&str; 9] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/tty",
    "/dev/random",
    "/dev/urandom",
    "/dev/fuse",
    "/dev/net/tun",
    "/dev/console",
];

/// A block device of the host, under a path of the container's own choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockVolume {
    /// Its path in the container.
    pub(crate) path: PathBuf,
    /// Its number on the host.
    pub(crate) number: (i64, i64),
    /// The container may not write.
    pub(crate) read_only: bool,
}

/// Takes devices out of the specification, with the rules about them, which come along: their
/// numbers are other devices' in the guest.
fn take_devices(
    linux: &mut Linux,
    wanted: impl Fn(&LinuxDevice) -> bool,
) -> (Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>) {
    let devices = linux.devices().clone().unwrap_or_default();
    let (taken, kept): (Vec<_>, Vec<_>) = devices.into_iter().partition(wanted);
    if taken.is_empty() {
        return (taken, Vec::new());
    }
    linux.set_devices(Some(kept));
    let rules = linux
        .resources_mut()
        .as_mut()
        .and_then(|resources| resources.devices_mut().as_mut());
    let Some(rules) = rules else {
        return (taken, Vec::new());
    };
    let (about, others) = std::mem::take(rules)
        .into_iter()
        .partition(|rule| taken.iter().any(|device| is_about(rule, device)));
    *rules = others;
    (taken, about)
}

fn is_about(rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> bool {
    (rule.major(), rule.minor()) == (Some(device.major()), Some(device.minor()))
}

/// Takes the block devices that have a path of their own in the container: kubelet gives volumes
/// so. A container that is given the host's devices, as a privileged one under runc, has them where
/// the host has them, and they stay.
pub(super) fn take_disks(linux: &mut Linux) -> Vec<BlockVolume> {
    let (volumes, rules) = take_devices(linux, |device| {
        device.typ() == LinuxDeviceType::B && !device.path().exists()
    });
    let lets_write = |rule: &LinuxDeviceCgroup| {
        let access = rule.access().as_deref();
        access.is_some_and(|access| access.contains('w'))
    };
    let volume = |device: &LinuxDevice| BlockVolume {
        path: device.path().clone(),
        number: (device.major(), device.minor()),
        read_only: !rules
            .iter()
            .any(|rule| is_about(rule, device) && lets_write(rule)),
    };
    volumes.iter().map(volume).collect()
}

/// Takes VFIO's nodes of the host out of the specification. The agent puts what the functions are
/// there in their place.
pub(super) fn take_functions(linux: &mut Linux) -> Result<Vec<VfioPath>, CallError> {
    let (nodes, _) = take_devices(linux, |device| VfioPath::of(device.path()).is_some());
    let mut functions = Vec::new();
    for device in &nodes {
        match VfioPath::of(device.path()) {
            Some(VfioPath::Other) => {
                return Err(invalid(
                    &format!("linux.devices[{}]", device.path().display()),
                    "only functions behind an IOMMU are passed through, by /dev/vfio/<group> or \
                        /dev/vfio/devices/vfio<number>",
                ));
            }
            Some(VfioPath::Container) | None => {}
            Some(path) if functions.contains(&path) => {}
            Some(path) => functions.push(path),
        }
    }
    Ok(functions)
}

pub(super) fn check(device: &LinuxDevice) -> Result<(), CallError> {
    let pseudo = is_pseudo(device.path()) && device.typ() != LinuxDeviceType::B;
    if pseudo || device.typ() == LinuxDeviceType::P {
        return Ok(());
    }
    Err(invalid(
        &format!("linux.devices[{}]", device.path().display()),
        "a device of the host that is not passed through (for privileged pods set \
         privileged_without_host_devices = true in containerd's runtime handler)",
    ))
}

pub(super) fn is_pseudo(path: &Path) -> bool {
    PSEUDO_DEVICES
        .iter()
        .any(|device| path == Path::new(device))
}
