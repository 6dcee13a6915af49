//! Functions of the node that are given to pods.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::node::Node;

/// Drop-in of the configuration that allows functions.
const DROP_IN: &str = "/etc/pericarp/config.d/60-passthrough.toml";

/// Prints every function behind a root port: address, class, group, driver.
const LIST: &str = "
cd /sys/bus/pci/devices
for function in *; do
    case $(basename $(dirname $(readlink -f $function))) in 0000:*) ;; *) continue ;; esac
    driver=none
    [ ! -e $function/driver ] || driver=$(basename $(readlink $function/driver))
    echo $function $(cat $function/class) $(basename $(readlink $function/iommu_group)) $driver
done";

/// A function of the node behind the IOMMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Its address in the node.
    pub address: String,
    /// Its class, as sysfs writes it.
    pub class: String,
    /// Its IOMMU group.
    pub group: u32,
    /// Its driver in the node, or "none".
    pub driver: String,
}

impl Function {
    /// Every function that the node was given, in the order of their ports.
    pub fn all(node: &Node) -> Result<Vec<Self>> {
        let text = node.shell(LIST)?;
        text.lines().map(Self::parse).collect()
    }

    fn parse(line: &str) -> Result<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [address, class, group, driver] = words.as_slice() else {
            anyhow::bail!("{line:?} is no function");
        };
        Ok(Self {
            address: (*address).to_owned(),
            class: (*class).to_owned(),
            group: group.parse().context("group")?,
            driver: (*driver).to_owned(),
        })
    }

    /// Gives it to a driver, which must take it; an empty name leaves it to the one that fits.
    pub fn bind(&self, node: &Node, driver: &str) -> Result<()> {
        let address = &self.address;
        let line = format!(
            "cd /sys/bus/pci/devices/{address}
             [ ! -e driver ] || echo {address} >driver/unbind
             echo '{driver}' >driver_override
             echo {address} >/sys/bus/pci/drivers_probe
             basename $(readlink driver)"
        );
        let bound = node.shell(&line)?;
        ensure!(
            driver.is_empty() || bound.trim() == driver,
            "{address} is bound to {bound}"
        );
        Ok(())
    }

    /// Has a container's configuration ask for it by its group.
    pub fn ask(&self, config: &mut Value) {
        let path = format!("/dev/vfio/{}", self.group);
        let device = json!({"container_path": path, "host_path": path, "permissions": "rwm"});
        match config["devices"].as_array_mut() {
            Some(devices) => devices.push(device),
            None => config["devices"] = json!([device]),
        }
    }
}

/// Lets pods have these functions and no others.
pub fn allow(node: &Node, functions: &[Function]) -> Result<()> {
    let addresses = functions.iter().map(|function| &function.address);
    let addresses: Vec<_> = addresses.collect();
    let text = format!("[security]\npassthrough_devices = {addresses:?}\n");
    node.write(DROP_IN, &text)
}

/// Memory that the VMMs of the node have locked or, by iommufd, pinned.
pub fn locked_kib(node: &Node) -> Result<u64> {
    let line = "for pid in $(pgrep -f '^[^ ]*pericarp-vmm'); do
            grep -E 'Vm(Lck|Pin)' /proc/$pid/status; done |
        awk '{ sum += $2 } END { print sum + 0 }'";
    node.shell(line)?.trim().parse().context("VmLck, VmPin")
}
