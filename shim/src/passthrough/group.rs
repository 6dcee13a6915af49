//! What the host knows of an IOMMU group, and whether a pod may have its functions.
//!
//! Every refusal names the function and what to do about it; they all come before anything is
//! opened.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use pericarp_runtime_config::{PciAddress, PciSelector, is_vfio_driver};

use crate::{errors::CallError, guest::vfio::VfioPath};

/// Functions of one group: beyond 256 functions of a bus there are bridges only.
const FUNCTIONS_MAX: usize = 1024;

/// Base class and subclass of what connects buses (PCI code and ID assignment 1.11 §1.7).
const BRIDGE: u32 = 0x06;

/// A function of the host, and that a pod may have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostFunction {
    /// "0000:3b:00.0".
    pub(crate) address: String,
}

/// The host's files about devices.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// `/sys`.
    pub(crate) sys: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self { sys: "/sys".into() }
    }
}

/// A group that a pod asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Its number.
    pub(crate) group: u32,
    /// What asks for it: a device of a container's specification, or the pod's setting.
    pub(crate) field: String,
}

impl Wanted {
    /// By the node of a group in a container's specification.
    pub(crate) fn by_device(group: u32) -> Self {
        Self {
            group,
            field: format!("linux.devices[/dev/vfio/{group}]"),
        }
    }

    /// That it is refused, and why.
    pub(crate) fn refuse(&self, reason: impl std::fmt::Display) -> CallError {
        CallError::Invalid(format!("{}: {reason}", self.field))
    }
}

impl Host {
    /// The group that a node in a container's specification means.
    pub(crate) fn wanted(&self, path: VfioPath) -> Result<Wanted, CallError> {
        let number = match path {
            VfioPath::Device(number) => number,
            VfioPath::Group(group) => return Ok(Wanted::by_device(group)),
            VfioPath::Container | VfioPath::Other => {
                let reason = "linux.devices: a node of VFIO that means no function";
                return Err(CallError::Invalid(reason.to_owned()));
            }
        };
        let field = format!("linux.devices[/dev/vfio/devices/vfio{number}]");
        let device = self.sys.join(format!("class/vfio-dev/vfio{number}/device"));
        match group_at(&device) {
            Some(group) => Ok(Wanted { group, field }),
            None => Err(CallError::Invalid(format!(
                "{field}: the host has no function of this number"
            ))),
        }
    }

    /// The node of a function's own, where the kernel makes one.
    pub(crate) fn own_node(&self, address: &str) -> Option<PathBuf> {
        let entries = fs::read_dir(self.device(address).join("vfio-dev")).ok()?;
        let name = entries
            .take(1)
            .find_map(|entry| Some(entry.ok()?.file_name()))?;
        Some(Path::new("/dev/vfio/devices").join(name))
    }

    /// The group of the function at `address`, for pods that name it.
    pub(crate) fn group_of(&self, address: &PciAddress) -> Result<Wanted, CallError> {
        let address = address.as_str();
        let field = format!("devices.functions[{address}]");
        let refuse = |reason: &str| Err(CallError::Invalid(format!("{field}: {reason}")));
        let device = self.device(address);
        if !device.exists() {
            return refuse("the host has no PCI function at this address");
        }
        match group_at(&device) {
            Some(group) => Ok(Wanted { group, field }),
            None => refuse(NO_IOMMU),
        }
    }

    /// The functions of a group, all of which a pod may have.
    pub(crate) fn functions(
        &self,
        wanted: &Wanted,
        allowed: &[PciSelector],
    ) -> Result<Vec<HostFunction>, CallError> {
        let folder = self.sys.join("kernel/iommu_groups");
        let devices = folder.join(wanted.group.to_string()).join("devices");
        let entries = fs::read_dir(&devices).map_err(|_| no_group(wanted, &folder))?;
        let mut names: Vec<String> = entries
            .take(FUNCTIONS_MAX)
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        names.sort();
        let mut functions = Vec::new();
        for address in names {
            if self.is_bridge(&address) {
                continue;
            }
            self.check(wanted, &address, allowed)?;
            functions.push(HostFunction { address });
        }
        if functions.is_empty() {
            return Err(wanted.refuse("the group has no PCI function to pass through"));
        }
        Ok(functions)
    }

    fn device(&self, address: &str) -> PathBuf {
        self.sys.join("bus/pci/devices").join(address)
    }

    fn number(&self, address: &str, file: &str) -> io::Result<u32> {
        let text = fs::read_to_string(self.device(address).join(file))?;
        let digits = text.trim().trim_start_matches("0x");
        u32::from_str_radix(digits, 16).map_err(io::Error::other)
    }

    fn is_bridge(&self, address: &str) -> bool {
        let class = self.number(address, "class");
        class.is_ok_and(|class| class >> 16 == BRIDGE)
    }

    fn check(
        &self,
        wanted: &Wanted,
        address: &str,
        allowed: &[PciSelector],
    ) -> Result<(), CallError> {
        let id = |file| {
            let read = self.number(address, file);
            read.map_err(|error| CallError::host(format!("{file} of function {address}"), error))
        };
        let (vendor, device) = (id("vendor")?, id("device")?);
        let model = format!("{vendor:04x}:{device:04x}");
        let [vendor, device] = [vendor, device].map(|id| u16::try_from(id).unwrap_or_default());
        if !allowed
            .iter()
            .any(|selector| selector.names(address, vendor, device))
        {
            return Err(wanted.refuse(format_args!(
                "function {address} ({model}) is not for pods: the operator allows it by \
                        naming \"{address}\" or \"{model}\" in security.passthrough_devices"
            )));
        }
        let driver = fs::read_link(self.device(address).join("driver")).ok();
        let driver = driver.as_deref().and_then(Path::file_name);
        let driver = driver.map_or("none".into(), std::ffi::OsStr::to_string_lossy);
        if !is_vfio_driver(&driver) {
            return Err(wanted.refuse(format_args!(
                "function {address} ({model}) of this group has the driver {driver}, not \
                        vfio-pci: give every function of the group to vfio-pci (`driverctl \
                        set-override {address} vfio-pci`), or use a slot whose group it has alone"
            )));
        }
        Ok(())
    }
}

/// The remedy for a host without an IOMMU.
const NO_IOMMU: &str = "the host has no IOMMU, or it is off: switch VT-d or AMD-Vi on in the \
    firmware, and with an Intel processor boot the kernel with intel_iommu=on";

/// The IOMMU group of a device's folder.
fn group_at(device: &Path) -> Option<u32> {
    let link = fs::read_link(device.join("iommu_group")).ok()?;
    link.file_name()?.to_str()?.parse().ok()
}

fn no_group(wanted: &Wanted, folder: &Path) -> CallError {
    let any = fs::read_dir(folder).is_ok_and(|mut groups| groups.next().is_some());
    wanted.refuse(if any {
        "the host has no IOMMU group of this number"
    } else {
        NO_IOMMU
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A host with one group of a display function, its sound and the bridge above them.
    fn host(folder: &Path) -> Host {
        let sys = folder.to_owned();
        let group = sys.join("kernel/iommu_groups/7/devices");
        fs::create_dir_all(&group).unwrap();
        for (address, class, driver) in [
            ("0000:3a:00.0", "0x060400", "pcieport"),
            ("0000:3b:00.0", "0x030200", "vfio-pci"),
            ("0000:3b:00.1", "0x040300", "mlx5_vfio_pci"),
        ] {
            let device = sys.join("bus/pci/devices").join(address);
            fs::create_dir_all(&device).unwrap();
            fs::write(device.join("class"), class).unwrap();
            fs::write(device.join("vendor"), "0x10de\n").unwrap();
            fs::write(device.join("device"), "0x2331\n").unwrap();
            symlink(format!("../../drivers/{driver}"), device.join("driver")).unwrap();
            symlink(&device, group.join(address)).unwrap();
        }
        Host { sys }
    }

    fn selectors(texts: &[&str]) -> Vec<PciSelector> {
        let parse = |text: &&str| PciSelector::parse(text).unwrap();
        texts.iter().map(parse).collect()
    }

    #[test]
    fn every_function_of_a_group_comes_along_but_its_bridges() {
        let folder = tempfile::tempdir().unwrap();
        let host = host(folder.path());
        let wanted = Wanted::by_device(7);
        let found = host.functions(&wanted, &selectors(&["10de:2331"])).unwrap();
        let addresses: Vec<_> = found.iter().map(|one| one.address.as_str()).collect();
        assert_eq!(addresses, ["0000:3b:00.0", "0000:3b:00.1"]);
        let both = selectors(&["0000:3b:00.1", "0000:3b:00.0"]);
        assert_eq!(host.functions(&wanted, &both).unwrap(), found);
    }

    #[test]
    fn refusals_name_function_and_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let host = host(folder.path());
        let error = |group, allowed: &[&str]| {
            let refused = host.functions(&Wanted::by_device(group), &selectors(allowed));
            refused.unwrap_err().to_string()
        };
        for (error, words) in [
            (
                error(7, &[]),
                ["0000:3b:00.0 (10de:2331)", "security.passthrough_devices"],
            ),
            (
                error(7, &["0000:3b:00.0"]),
                ["0000:3b:00.1", "security.passthrough_devices"],
            ),
            (
                error(8, &[]),
                ["linux.devices[/dev/vfio/8]", "no IOMMU group"],
            ),
        ] {
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        let driver = folder.path().join("bus/pci/devices/0000:3b:00.1/driver");
        fs::remove_file(&driver).unwrap();
        symlink("../../drivers/snd_hda_intel", driver).unwrap();
        let error = error(7, &["10de:2331"]);
        for word in ["0000:3b:00.1", "snd_hda_intel", "driverctl"] {
            assert!(error.contains(word), "{error}");
        }
        let empty = tempfile::tempdir().unwrap();
        let host = Host {
            sys: empty.path().to_owned(),
        };
        let error = host.functions(&Wanted::by_device(0), &[]).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("intel_iommu=on"), "{error}");
    }

    #[test]
    fn a_function_that_is_named_leads_to_its_group() {
        let folder = tempfile::tempdir().unwrap();
        let host = host(folder.path());
        let group_of = |address| host.group_of(&PciAddress::parse(address).unwrap());
        let device = folder.path().join("bus/pci/devices/0000:3b:00.0");
        let error = group_of("0000:3b:00.0").unwrap_err().to_string();
        assert!(error.contains("intel_iommu=on"), "{error}");
        symlink("../../../kernel/iommu_groups/7", device.join("iommu_group")).unwrap();
        let wanted = group_of("0000:3b:00.0").unwrap();
        assert_eq!(wanted.group, 7);
        let error = host.functions(&wanted, &[]).unwrap_err().to_string();
        assert!(
            error.starts_with("devices.functions[0000:3b:00.0]: "),
            "{error}"
        );
        let error = group_of("0000:3b:00.7").unwrap_err().to_string();
        assert!(error.contains("no PCI function at this address"), "{error}");
    }

    #[test]
    fn a_function_is_known_by_its_own_node_too() {
        let folder = tempfile::tempdir().unwrap();
        let host = host(folder.path());
        let device = folder.path().join("bus/pci/devices/0000:3b:00.0");
        assert_eq!(host.own_node("0000:3b:00.0"), None);
        let own = device.join("vfio-dev/vfio3");
        fs::create_dir_all(&own).unwrap();
        let node = host.own_node("0000:3b:00.0");
        assert_eq!(node.as_deref(), Some(Path::new("/dev/vfio/devices/vfio3")));
        let class = folder.path().join("class/vfio-dev");
        fs::create_dir_all(&class).unwrap();
        symlink(&own, class.join("vfio3")).unwrap();
        symlink(&device, own.join("device")).unwrap();
        symlink("../../../kernel/iommu_groups/7", device.join("iommu_group")).unwrap();
        let wanted = host.wanted(VfioPath::Device(3)).unwrap();
        assert_eq!(wanted.group, 7);
        let error = wanted.refuse("no").to_string();
        assert_eq!(error, "linux.devices[/dev/vfio/devices/vfio3]: no");
        assert!(host.wanted(VfioPath::Device(4)).is_err());
        assert!(host.wanted(VfioPath::Container).is_err());
    }
}
