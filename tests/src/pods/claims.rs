//! Functions of the node that pods ask for by Dynamic Resource Allocation: the names that the
//! driver (`src/bin/dra_driver`) and its test agree on.

use std::path::PathBuf;

/// The driver's name, which is that of its class of devices too.
pub const DRIVER: &str = "functions.tests.pericarp.dev";

/// Vendor and class of the CDI devices that it makes.
pub const CDI_KIND: &str = "tests.pericarp.dev/claim";

/// Where it describes them: of containerd's two folders the one that is gone after a boot.
const CDI_FOLDER: &str = "/var/run/cdi";

/// The description of what a claim has, by the claim's UID.
#[must_use]
pub fn cdi_file(uid: &str) -> PathBuf {
    PathBuf::from(format!("{CDI_FOLDER}/tests.pericarp.dev-{uid}.json"))
}

/// What the function at an address is called among the devices of its node: letters, digits and
/// hyphens.
#[must_use]
pub fn device_name(address: &str) -> String {
    format!("pci-{}", address.replace([':', '.'], "-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_kubernetes_lets_them() {
        assert_eq!(device_name("0000:3b:00.1"), "pci-0000-3b-00-1");
    }
}
