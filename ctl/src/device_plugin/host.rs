//! The functions of this host that a resource means, and whether a pod can have each now.

use std::fs;
use std::path::{Path, PathBuf};

use pericarp_runtime_config::{DeviceResource, PciSelector, is_vfio_driver};

/// Functions of a host: four segments full of them.
const FUNCTIONS_MAX: usize = 4 * 65536;

/// A function that is offered. With it go all of its IOMMU group, so a group is offered once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Offer {
    /// "0000:3b:00.0".
    pub(crate) address: String,
    /// Its IOMMU group.
    pub(crate) group: Option<u32>,
    /// Its NUMA node, where the firmware tells.
    pub(crate) numa_node: Option<u32>,
    /// A pod can have it.
    pub(crate) healthy: bool,
}

/// Looks at the host beneath `sys`. `allowed` is what the operator lets pods have.
pub(crate) fn offers(
    sys: &Path,
    resource: &DeviceResource,
    allowed: &[PciSelector],
) -> std::io::Result<Vec<Offer>> {
    let folder = sys.join("bus/pci/devices");
    let mut addresses: Vec<String> = fs::read_dir(&folder)?
        .take(FUNCTIONS_MAX)
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    addresses.sort();
    let mut offers: Vec<Offer> = Vec::new();
    for address in addresses {
        let Some(offer) = offer(&folder.join(&address), address, resource, allowed) else {
            continue;
        };
        let known = |other: &Offer| other.group.is_some() && other.group == offer.group;
        if !offers.iter().any(known) {
            offers.push(offer);
        }
    }
    Ok(offers)
}

fn offer(
    device: &Path,
    address: String,
    resource: &DeviceResource,
    allowed: &[PciSelector],
) -> Option<Offer> {
    let number = |file: &str| {
        let text = fs::read_to_string(device.join(file)).ok()?;
        u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
    };
    let id = |file: &str| u16::try_from(number(file)?).ok();
    let (vendor, model) = (id("vendor")?, id("device")?);
    let class = u16::try_from(number("class")? >> 8).ok()?;
    if !resource.names(&address, class, vendor, model) {
        return None;
    }
    let name_of = |link: &str| {
        let target = fs::read_link(device.join(link)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    };
    let group = name_of("iommu_group").and_then(|name| name.parse().ok());
    let numa_node = fs::read_to_string(device.join("numa_node")).ok();
    let driver = name_of("driver").unwrap_or_default();
    let ready = is_vfio_driver(&driver);
    let is_allowed = |selector: &PciSelector| selector.names(&address, vendor, model);
    Some(Offer {
        group,
        // -1 where the firmware does not tell.
        numa_node: numa_node.and_then(|text| text.trim().parse().ok()),
        healthy: ready && group.is_some() && allowed.iter().any(is_allowed),
        address,
    })
}

/// The node of a group.
pub(crate) fn node(group: u32) -> PathBuf {
    Path::new("/dev/vfio").join(group.to_string())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn add(sys: &Path, address: &str, class: &str, driver: &str, group: u32) {
        let device = sys.join("bus/pci/devices").join(address);
        fs::create_dir_all(&device).unwrap();
        for (file, text) in [
            ("class", class),
            ("vendor", "0x10de\n"),
            ("device", "0x2331\n"),
            ("numa_node", "1\n"),
        ] {
            fs::write(device.join(file), text).unwrap();
        }
        symlink(format!("../../drivers/{driver}"), device.join("driver")).unwrap();
        let group = format!("../../../kernel/iommu_groups/{group}");
        symlink(group, device.join("iommu_group")).unwrap();
    }

    #[test]
    fn each_group_is_offered_once_and_healthy_when_a_pod_can_have_it() {
        let folder = tempfile::tempdir().unwrap();
        let sys = folder.path();
        add(sys, "0000:3b:00.0", "0x030200\n", "vfio-pci", 7);
        add(sys, "0000:3b:00.1", "0x030000\n", "vfio-pci", 7);
        add(sys, "0000:5e:00.0", "0x030200\n", "nvidia", 9);
        add(sys, "0000:af:00.0", "0x010802\n", "vfio-pci", 11);
        let resource = DeviceResource::parse("gpu=class:03").unwrap();
        let allowed = [PciSelector::parse("10de:2331").unwrap()];
        let found = offers(sys, &resource, &allowed).unwrap();
        let seen: Vec<_> = found
            .iter()
            .map(|offer| (offer.address.as_str(), offer.group, offer.healthy))
            .collect();
        assert_eq!(
            seen,
            [
                ("0000:3b:00.0", Some(7), true),
                ("0000:5e:00.0", Some(9), false)
            ]
        );
        assert_eq!(found[0].numa_node, Some(1));
        let found = offers(sys, &resource, &[]).unwrap();
        assert!(found.iter().all(|offer| !offer.healthy), "nothing allowed");
    }
}
