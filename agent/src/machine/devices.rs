//! Devices of the machine as sysfs shows them: PCI functions, the block devices on them, vCPUs and
//! memory blocks.
//!
//! Hot-plug needs no ACPI here: the host adds a function and asks for a rescan of the bus, or asks
//! for a function's removal and then takes it away. Waiting for a device means waiting for the
//! kernel's uevent, with [`DEVICE_WAIT`] as its bound.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType};
use pericarp_protocol::limits::DRIVER_SECONDS_MAX;

use crate::ground::{files, pci::PciAddress, stats, uevents::Uevents};

/// How long a device that the host added may take to appear.
const DEVICE_WAIT: Duration = Duration::from_secs(10);

/// How long the driver of a function that is passed through may take.
const DRIVER_WAIT: Duration = Duration::from_secs(DRIVER_SECONDS_MAX);

/// Entries of one directory of sysfs that are looked at.
const ENTRIES_MAX: usize = 65536;

/// Deepest directory beneath a PCI function in sysfs.
const DEPTH_MAX: usize = 12;

/// Why a device cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    /// Not an address.
    #[error("{field}: {text:?} is not a PCI address such as \"0000:00:05.0\"")]
    Address {
        /// Of the request.
        field: &'static str,
        /// The text of the field.
        text: String,
    },
    /// No such function.
    #[error("no PCI function {0} in the guest")]
    Unknown(PciAddress),
    /// It did not appear in time.
    #[error("no {what} appeared on PCI function {address} within {} \
        seconds", DEVICE_WAIT.as_secs())]
    Missing {
        /// "block device", "partition 2".
        what: String,
        /// Where.
        address: PciAddress,
    },
    /// Nothing in the guest drives it.
    #[error("no driver of the guest's kernel has made a device of function {address} ({model}) \
        within {} seconds: choose a kernel that has one (paths.kernel), such as that of \
        FLAVOUR=passthrough", DRIVER_WAIT.as_secs())]
    Driver {
        /// Vendor and device.
        model: String,
        /// Where.
        address: PciAddress,
    },
    /// A file of sysfs cannot be read or written.
    #[error("cannot use {path}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
}

/// The address in the field `field` of a request.
pub(crate) fn address(field: &'static str, text: &str) -> Result<PciAddress, DeviceError> {
    PciAddress::parse(text).ok_or_else(|| DeviceError::Address {
        field,
        text: text.to_owned(),
    })
}

/// Lets the kernel look for new functions. Answers all that are there.
pub(crate) fn rescan() -> Result<Vec<PciAddress>, DeviceError> {
    write("/sys/bus/pci/rescan", "1")?;
    let mut addresses: Vec<PciAddress> = names("/sys/bus/pci/devices")?
        .into_iter()
        .filter_map(|name| PciAddress::parse(&name))
        .collect();
    addresses.sort();
    Ok(addresses)
}

/// Lets the kernel give a function up; the host may take it away afterwards.
pub(crate) fn remove(address: &PciAddress) -> Result<(), DeviceError> {
    let file = address.directory().join("remove");
    if !file.exists() {
        return Err(DeviceError::Unknown(address.clone()));
    }
    write(file, "1")
}

/// A block device of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockNode {
    /// Beneath `/dev`.
    pub(crate) path: PathBuf,
    /// Major number.
    pub(crate) major: u64,
    /// Minor number.
    pub(crate) minor: u64,
}

impl BlockNode {
    /// The node as a container has it, at `path`.
    pub(crate) fn at(&self, path: &str) -> LinuxDevice {
        let mut device = LinuxDevice::default();
        device
            .set_path(path.into())
            .set_typ(LinuxDeviceType::B)
            .set_major(i64::try_from(self.major).unwrap_or_default())
            .set_minor(i64::try_from(self.minor).unwrap_or_default())
            .set_file_mode(Some(0o660));
        device
    }
}

/// The disk on a function, or its partition when `partition` is not 0. Waits until it is there.
pub(crate) fn block_device(address: &PciAddress, partition: u32) -> Result<BlockNode, DeviceError> {
    let found = await_device(address, DEVICE_WAIT, |address| {
        find_block_device(address, partition)
    })?;
    found.ok_or_else(|| DeviceError::Missing {
        what: match partition {
            0 => "block device".to_owned(),
            number => format!("partition {number}"),
        },
        address: address.clone(),
    })
}

fn find_block_device(
    address: &PciAddress,
    partition: u32,
) -> Result<Option<BlockNode>, DeviceError> {
    let class = Path::new("/sys/class/block");
    let mut found: Vec<String> = Vec::new();
    for name in names(class)? {
        // ../../devices/pci0000:00/0000:00:05.0/virtio3/block/vda[/vda1]
        let Ok(target) = fs::read_link(class.join(&name)) else {
            continue;
        };
        let on_function = target
            .components()
            .any(|part| part.as_os_str() == address.as_ref());
        let number = files::read(class.join(&name).join("partition"))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0);
        if on_function && number == partition {
            found.push(name);
        }
    }
    // A controller with several disks: its first.
    found.sort();
    let Some(name) = found.into_iter().next() else {
        return Ok(None);
    };
    let path = Path::new("/dev").join(&name);
    let number_file = class.join(&name).join("dev");
    let text = files::read(&number_file).map_err(|source| DeviceError::Kernel {
        path: number_file,
        source,
    })?;
    Ok(parse_number(&text).map(|(major, minor)| BlockNode { path, major, minor }))
}

/// Base classes of PCI (code and ID assignment 1.11 §1) whose functions are of no use without a
/// driver: storage, network, display.
const STORAGE: u32 = 0x01;
const NETWORK: u32 = 0x02;
const DISPLAY: u32 = 0x03;

/// A driver whose nodes a program of its vendor makes, long after the driver is there.
const MAKES_NO_NODES: &str = "nvidia";

/// Every device node of a function that the host passes through, as entries for a container's
/// `/dev`, once its driver has made them. Functions of other kinds than storage, network and
/// display are taken as they are: they come along with others, such as the sound of a display.
pub(crate) fn passed_through(address: &PciAddress) -> Result<Vec<LinuxDevice>, DeviceError> {
    let directory = address.directory();
    let mut base = 0;
    let mut nodes_now = Vec::new();
    await_device(address, DRIVER_WAIT, |_| {
        if !directory.exists() {
            return Ok(None);
        }
        let class = files::read(directory.join("class")).unwrap_or_default();
        base = u32::from_str_radix(class.trim().trim_start_matches("0x"), 16).unwrap_or(0) >> 16;
        let driver = fs::read_link(directory.join("driver")).ok();
        nodes_now = nodes(address)?;
        let ready = match (base, driver) {
            (NETWORK, driver) => driver.is_some(),
            (STORAGE | DISPLAY, None) => false,
            (STORAGE, Some(_)) => nodes_now
                .iter()
                .any(|node| node.typ() == LinuxDeviceType::B),
            (DISPLAY, Some(driver)) => driver.ends_with(MAKES_NO_NODES) || !nodes_now.is_empty(),
            _ => true,
        };
        Ok(ready.then_some(()))
    })?
    .ok_or_else(|| {
        let id = |file| files::read(directory.join(file)).unwrap_or_default();
        let id = |file| id(file).trim().trim_start_matches("0x").to_owned();
        DeviceError::Driver {
            model: format!("{}:{}", id("vendor"), id("device")),
            address: address.clone(),
        }
    })?;
    Ok(nodes_now)
}

/// Looks with `look` until it finds what it wants, whenever the kernel announces something; `None`
/// when `wait` has passed. A function that is not there yet is looked for first.
fn await_device<T>(
    address: &PciAddress,
    wait: Duration,
    mut look: impl FnMut(&PciAddress) -> Result<Option<T>, DeviceError>,
) -> Result<Option<T>, DeviceError> {
    let not_heard = |source| DeviceError::Kernel {
        path: "the uevent socket".into(),
        source,
    };
    let uevents = Uevents::new().map_err(not_heard)?;
    let deadline = Instant::now() + wait;
    if !address.directory().exists() {
        write("/sys/bus/pci/rescan", "1")?;
    }
    loop {
        if let Some(found) = look(address)? {
            return Ok(Some(found));
        }
        if !uevents.wait(deadline).map_err(not_heard)? {
            return Ok(None);
        }
    }
}

/// Vendor, device and class of a PCI function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Model {
    /// Vendor id.
    pub(crate) vendor: u16,
    /// Device id of that vendor.
    pub(crate) device: u16,
    /// Base class and subclass.
    pub(crate) class: u16,
}

impl Model {
    /// As sysfs has it.
    pub(crate) fn of(address: &PciAddress) -> Result<Self, DeviceError> {
        let number = |file: &str, digits: usize| {
            let path = address.directory().join(file);
            let text = files::read(&path).and_then(|text| {
                let digits = text.trim().trim_start_matches("0x").get(..digits);
                let number = digits.and_then(|digits| u16::from_str_radix(digits, 16).ok());
                number.ok_or_else(|| io::ErrorKind::InvalidData.into())
            });
            text.map_err(|source| DeviceError::Kernel { path, source })
        };
        Ok(Self {
            vendor: number("vendor", 4)?,
            device: number("device", 4)?,
            class: number("class", 4)?,
        })
    }
}

/// Every device node of a function.
fn nodes(address: &PciAddress) -> Result<Vec<LinuxDevice>, DeviceError> {
    let directory = address.directory();
    let root = fs::canonicalize(&directory).map_err(|_| DeviceError::Unknown(address.clone()))?;
    let mut nodes = Vec::new();
    let mut left = vec![(root, 0)];
    while let Some((directory, depth)) = left.pop() {
        if let Some(node) = node_of(&directory) {
            nodes.push(node);
        }
        for name in names(&directory)? {
            let path = directory.join(name);
            // Links lead to other devices; what belongs to this one lies beneath it.
            let is_directory =
                fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.file_type().is_dir());
            if is_directory && depth < DEPTH_MAX {
                left.push((path, depth + 1));
            }
        }
    }
    Ok(nodes)
}

fn node_of(directory: &Path) -> Option<LinuxDevice> {
    let (major, minor) = parse_number(&files::read(directory.join("dev")).ok()?)?;
    let uevent = files::read(directory.join("uevent")).ok()?;
    let name = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))?;
    let subsystem = fs::read_link(directory.join("subsystem")).ok()?;
    let kind = if subsystem.ends_with("block") {
        LinuxDeviceType::B
    } else {
        LinuxDeviceType::C
    };
    LinuxDeviceBuilder::default()
        .path(Path::new("/dev").join(name))
        .typ(kind)
        .major(i64::try_from(major).ok()?)
        .minor(i64::try_from(minor).ok()?)
        .file_mode(0o666u32)
        .uid(0u32)
        .gid(0u32)
        .build()
        .ok()
}

fn parse_number(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// vCPUs and memory that are online.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Online {
    /// vCPUs.
    pub(crate) vcpus: u32,
    /// Memory in all.
    pub(crate) memory_bytes: u64,
}

/// Brings vCPUs to `vcpus` (0: leaves them) and all memory online, as far as the kernel allows.
pub(crate) fn online(vcpus: u32, memory: bool) -> Result<Online, DeviceError> {
    if vcpus != 0 {
        online_vcpus(vcpus)?;
    }
    if memory {
        let blocks = Path::new("/sys/devices/system/memory");
        for name in names(blocks).unwrap_or_default() {
            let state = blocks.join(&name).join("state");
            if files::read(&state).is_ok_and(|text| text.trim() == "offline") {
                // What the kernel refuses shows in the answer.
                let _ = files::write(&state, "online");
            }
        }
    }
    let online = "/sys/devices/system/cpu/online";
    let text = files::read(online).map_err(|source| DeviceError::Kernel {
        path: online.into(),
        source,
    })?;
    let memory = stats::memory_total_and_available();
    Ok(Online {
        vcpus: count_list(&text),
        memory_bytes: memory.0,
    })
}

/// vCPU 0 has no `online` file and is always online; the others are taken in order of their number.
fn online_vcpus(wanted: u32) -> Result<(), DeviceError> {
    let directory = Path::new("/sys/devices/system/cpu");
    let mut present: Vec<(u32, PathBuf)> = names(directory)?
        .into_iter()
        .filter_map(|name| {
            let number = name.strip_prefix("cpu")?.parse().ok()?;
            Some((number, directory.join(name).join("online")))
        })
        .filter(|(number, file)| *number != 0 && file.exists())
        .collect();
    present.sort();
    for (position, (_, file)) in present.iter().enumerate() {
        // Position 0 is the second vCPU.
        let shall = u32::try_from(position).is_ok_and(|position| position + 1 < wanted);
        let is = files::read(file).is_ok_and(|text| text.trim() == "1");
        if shall != is {
            // What the kernel refuses shows in the answer.
            let _ = files::write(file, if shall { "1" } else { "0" });
        }
    }
    Ok(())
}

/// How many numbers a list such as "0-3,6" holds.
fn count_list(text: &str) -> u32 {
    text.trim()
        .split(',')
        .filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
            last.checked_sub(first)?.checked_add(1)
        })
        .sum()
}

fn write(path: impl AsRef<Path>, value: &str) -> Result<(), DeviceError> {
    files::write(&path, value).map_err(|source| DeviceError::Kernel {
        path: path.as_ref().to_owned(),
        source,
    })
}

fn names(directory: impl AsRef<Path>) -> Result<Vec<String>, DeviceError> {
    let directory = directory.as_ref();
    let entries = fs::read_dir(directory).map_err(|source| DeviceError::Kernel {
        path: directory.to_owned(),
        source,
    })?;
    Ok(entries
        .take(ENTRIES_MAX)
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_the_kernel_are_counted() {
        for (text, count) in [
            ("0\n", 1),
            ("0-3,6\n", 5),
            ("\n", 0),
            ("3-1", 0),
            ("0-4294967295", 0),
        ] {
            assert_eq!(count_list(text), count, "{text:?}");
        }
    }
}
