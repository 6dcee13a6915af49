//! Device nodes of a container.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use serde::{Deserialize, Serialize};

use super::{super::error::ContainerError, bounded};

/// One node in the container's file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct DevicePlan {
    pub(in crate::container) path: String,
    /// `S_IFCHR`, `S_IFBLK` or `S_IFIFO`.
    pub(in crate::container) file_type: u32,
    pub(in crate::container) major: u32,
    pub(in crate::container) minor: u32,
    pub(in crate::container) mode: u32,
    pub(in crate::container) uid: u32,
    pub(in crate::container) gid: u32,
}

/// config-linux.md, "Default Devices": (name, major, minor).
const DEFAULTS: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// The nodes of `linux.devices`, those of the caller, and the default ones that neither names.
pub(super) fn of(
    devices: &[LinuxDevice],
    added: &[LinuxDevice],
) -> Result<Vec<DevicePlan>, ContainerError> {
    bounded(devices.len() + added.len(), "linux.devices")?;
    let mut plans = Vec::new();
    for (index, device) in devices.iter().chain(added).enumerate() {
        plans.push(one(device, &format!("linux.devices[{index}]"))?);
    }
    for (name, major, minor) in DEFAULTS {
        let path = format!("/dev/{name}");
        if !plans.iter().any(|plan| plan.path == path) {
            let file_type = libc::S_IFCHR;
            plans.push(DevicePlan {
                path,
                file_type,
                major,
                minor,
                mode: 0o666,
                uid: 0,
                gid: 0,
            });
        }
    }
    Ok(plans)
}

fn one(device: &LinuxDevice, field: &str) -> Result<DevicePlan, ContainerError> {
    let path = device
        .path()
        .to_str()
        .filter(|path| path.starts_with('/') && !path.contains('\0'));
    let path = path.ok_or_else(|| {
        ContainerError::invalid(
            format!("{field}.path"),
            format!("{:?} is not absolute", device.path()),
        )
    })?;
    let file_type = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
        LinuxDeviceType::B => libc::S_IFBLK,
        LinuxDeviceType::P => libc::S_IFIFO,
        LinuxDeviceType::A => {
            return Err(ContainerError::invalid(
                format!("{field}.type"),
                "\"a\" is not a node",
            ));
        }
    };
    let number = |value: i64, part: &str| {
        // makedev(3): 12 bits of major and 20 of minor are what the kernel keeps.
        let bits = if part == "major" { 12 } else { 20 };
        u32::try_from(value)
            .ok()
            .filter(|value| value >> bits == 0)
            .ok_or_else(|| {
                ContainerError::invalid(
                    format!("{field}.{part}"),
                    format!("{value} is out of range"),
                )
            })
    };
    Ok(DevicePlan {
        path: path.to_owned(),
        file_type,
        major: number(device.major(), "major")?,
        minor: number(device.minor(), "minor")?,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}
