//! The functions of this node that vfio-pci has, as Kubernetes and CDI know them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use pericarp_tests::pods::claims;
use serde_json::{Value, json};

/// Where the driver has a link to each of its functions.
const BOUND: &str = "/sys/bus/pci/drivers/vfio-pci";

/// A function that pods can have.
#[derive(Debug)]
pub(crate) struct Function {
    address: String,
    vendor: String,
    model: String,
    group: String,
}

/// Every function that vfio-pci has now.
pub(crate) fn bound() -> Result<Vec<Function>> {
    let mut functions = Vec::new();
    for entry in fs::read_dir(BOUND).context(BOUND)? {
        let name = entry?.file_name();
        // Beside the links are the driver's own files.
        if let Some(address) = name.to_str().filter(|name| name.contains(':')) {
            functions.push(Function::look(address)?);
        }
    }
    Ok(functions)
}

impl Function {
    fn look(address: &str) -> Result<Self> {
        let folder = Path::new("/sys/bus/pci/devices").join(address);
        let id = |file: &str| -> Result<String> {
            let text = fs::read_to_string(folder.join(file)).context(file.to_owned())?;
            Ok(text.trim().trim_start_matches("0x").to_owned())
        };
        let group = fs::read_link(folder.join("iommu_group")).context("iommu_group")?;
        let group = group.file_name().unwrap_or_default().to_string_lossy();
        Ok(Self {
            vendor: id("vendor")?,
            model: id("device")?,
            group: group.into_owned(),
            address: address.to_owned(),
        })
    }

    /// Its name among the devices of the node.
    pub(crate) fn name(&self) -> String {
        claims::device_name(&self.address)
    }

    /// As a device of a ResourceSlice.
    pub(crate) fn describe(&self) -> Value {
        json!({"name": self.name(), "attributes": {
            "address": {"string": self.address},
            "model": {"string": format!("{}:{}", self.vendor, self.model)},
        }})
    }

    /// As a device of CDI: the node of its group.
    pub(crate) fn edits(&self, name: &str) -> Value {
        let path = format!("/dev/vfio/{}", self.group);
        json!({"name": name, "containerEdits": {"deviceNodes": [{"path": path}]}})
    }
}
