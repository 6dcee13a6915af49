//! Addresses of PCI functions.

use std::path::{Path, PathBuf};

/// Domain, bus, device and function, as sysfs writes them. Holding one proves the form, not that
/// the function exists.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PciAddress(String);

impl PciAddress {
    /// Parses "0000:00:05.0".
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        let well_formed = bytes.len() == 12
            && bytes.iter().enumerate().all(|(index, byte)| match index {
                4 | 7 => *byte == b':',
                10 => *byte == b'.',
                11 => (b'0'..=b'7').contains(byte),
                _ => byte.is_ascii_digit() || (b'a'..=b'f').contains(byte),
            });
        well_formed.then(|| Self(text.to_owned()))
    }

    /// Where sysfs has the function.
    pub(crate) fn directory(&self) -> PathBuf {
        Path::new("/sys/bus/pci/devices").join(&self.0)
    }
}

impl AsRef<str> for PciAddress {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for PciAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_form_of_sysfs_is_an_address() {
        assert!(PciAddress::parse("0000:00:1f.7").is_some());
        for text in [
            "",
            "00:05.0",
            "0000:00:05.8",
            "0000:00:05.0/",
            "../../../etc",
            "0000:00:0G.0",
        ] {
            assert!(PciAddress::parse(text).is_none(), "{text:?}");
        }
    }
}
