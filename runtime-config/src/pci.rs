//! PCI functions of the host as the configuration names them.

/// Host PCI devices that pods may be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PciSelector {
    /// One function by its place: domain, bus, device, function.
    Address {
        /// PCI segment.
        domain: u16,
        /// Bus number.
        bus: u8,
        /// Device number, below 32.
        device: u8,
        /// Function number, below 8.
        function: u8,
    },
    /// Every function of a model.
    Model {
        /// Vendor id.
        vendor: u16,
        /// Device id.
        device: u16,
    },
}

/// Whether a driver of the host, by its name, is there to pass its functions through. Vendors have
/// their own beside vfio-pci: mlx5_vfio_pci, nvgrace_gpu_vfio_pci.
#[must_use]
pub fn is_vfio_driver(name: &str) -> bool {
    name.replace('_', "-").ends_with("vfio-pci")
}

impl PciSelector {
    /// Reads `0000:3b:00.0` or `10de:2331` (lower-case hexadecimal, all digits written).
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split([':', '.']).collect();
        match (text.len(), parts.as_slice()) {
            (12, [domain, bus, device, function]) if text.as_bytes()[10] == b'.' => {
                let device = u8::try_from(hex(device, 2)?)
                    .ok()
                    .filter(|number| *number < 32)?;
                let function = u8::try_from(hex(function, 1)?)
                    .ok()
                    .filter(|number| *number < 8)?;
                let bus = u8::try_from(hex(bus, 2)?).ok()?;
                Some(Self::Address {
                    domain: hex(domain, 4)?,
                    bus,
                    device,
                    function,
                })
            }
            (9, [vendor, device]) if text.as_bytes()[4] == b':' => Some(Self::Model {
                vendor: hex(vendor, 4)?,
                device: hex(device, 4)?,
            }),
            _ => None,
        }
    }
}

impl PciSelector {
    /// Whether it means the function at `address` ("0000:3b:00.0") of this model.
    #[must_use]
    pub fn names(&self, address: &str, vendor: u16, device: u16) -> bool {
        match self {
            Self::Address { .. } => Self::parse(address) == Some(*self),
            Self::Model {
                vendor: its_vendor,
                device: its_device,
            } => (*its_vendor, *its_device) == (vendor, device),
        }
    }
}

/// The address of one function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciAddress(String);

impl PciAddress {
    /// Reads `0000:3b:00.0`, as [`PciSelector::parse`] does.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let is_address = matches!(PciSelector::parse(text), Some(PciSelector::Address { .. }));
        is_address.then(|| Self(text.to_owned()))
    }

    /// As sysfs writes it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Functions of the host that are alike to those who ask for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceSelector {
    /// Every function of a class: its base class, or base class and subclass.
    Class {
        /// The class in the highest of its digits.
        class: u16,
        /// Two or four of them count.
        digits: usize,
    },
    /// Every function of a vendor.
    Vendor(u16),
    /// A model, or one function.
    Pci(PciSelector),
}

/// What the device plugin offers under one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceResource {
    /// The name behind `pericarp.dev/`.
    pub name: String,
    /// Which functions.
    pub selector: DeviceSelector,
}

/// Longest name of a resource: that of a label of Kubernetes.
const NAME_BYTES_MAX: usize = 63;

impl DeviceResource {
    /// Reads `name=class:03`, `name=class:0302`, `name=vendor:10de` or `name=` and what
    /// [`PciSelector::parse`] takes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (name, selector) = text.split_once('=')?;
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let well_formed = (1..=NAME_BYTES_MAX).contains(&name.len())
            && name.bytes().all(inner)
            && !name.starts_with('-')
            && !name.ends_with('-');
        if !well_formed {
            return None;
        }
        let selector = match selector.split_once(':') {
            Some(("class", digits)) if digits.len() == 2 => DeviceSelector::Class {
                class: hex(digits, 2)? << 8,
                digits: 2,
            },
            Some(("class", digits)) => DeviceSelector::Class {
                class: hex(digits, 4)?,
                digits: 4,
            },
            Some(("vendor", digits)) => DeviceSelector::Vendor(hex(digits, 4)?),
            _ => DeviceSelector::Pci(PciSelector::parse(selector)?),
        };
        Some(Self {
            name: name.to_owned(),
            selector,
        })
    }

    /// Whether it means the function at `address` of this model; `class` is base class and
    /// subclass.
    #[must_use]
    pub fn names(&self, address: &str, class: u16, vendor: u16, device: u16) -> bool {
        match self.selector {
            DeviceSelector::Class {
                class: wanted,
                digits,
            } => class >> (16 - 4 * digits) == wanted >> (16 - 4 * digits),
            DeviceSelector::Vendor(wanted) => vendor == wanted,
            DeviceSelector::Pci(selector) => selector.names(address, vendor, device),
        }
    }
}

fn hex(text: &str, digits: usize) -> Option<u16> {
    let good = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (text.len() == digits && text.bytes().all(good))
        .then(|| u16::from_str_radix(text, 16).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_one_function() {
        assert_eq!(
            PciAddress::parse("0000:3b:00.0").unwrap().as_str(),
            "0000:3b:00.0"
        );
        for text in ["10de:2331", "3b:00.0", "0000:3b:20.0", "../0000:00.0", ""] {
            assert!(PciAddress::parse(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn resources_name_functions_in_five_ways() {
        let gpu = ("0000:3b:00.0", 0x0302, 0x10de, 0x2331);
        let disk = ("0000:3c:00.0", 0x0108, 0x144d, 0xa80a);
        for (text, is_gpu, is_disk) in [
            ("gpu=class:03", true, false),
            ("gpu=class:0302", true, false),
            ("gpu=class:0300", false, false),
            ("fast-disk=class:0108", false, true),
            ("a=vendor:10de", true, false),
            ("a=144d:a80a", false, true),
            ("a=0000:3b:00.0", true, false),
        ] {
            let resource = DeviceResource::parse(text).unwrap();
            let names = |one: (&str, u16, u16, u16)| resource.names(one.0, one.1, one.2, one.3);
            assert_eq!((names(gpu), names(disk)), (is_gpu, is_disk), "{text}");
        }
        for text in [
            "",
            "gpu",
            "=class:03",
            "gpu=",
            "gpu=class:3",
            "gpu=class:03000",
            "Gpu=class:03",
            "-a=class:03",
            "a-=class:03",
            "a/b=class:03",
            "gpu=vendor:10dg",
            "gpu=10de",
        ] {
            assert!(DeviceResource::parse(text).is_none(), "{text:?}");
        }
    }
}
