//! Pods for tests and verbs: their configurations for crictl, their addresses, what they leave.

pub mod leftovers;
pub mod passthrough;
pub mod scenario;
pub mod slow_disk;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::node::containerd::Pod;
use crate::node::{Containerd, Node};

/// Folder of the pods' logs in the node.
const LOG_FOLDER: &str = "/var/log/pods";

/// Configuration of a pod without limits; its host name is its name.
#[must_use]
pub fn pod_config(name: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default", "uid": name},
        "hostname": name,
        "log_directory": log_folder(name),
        "linux": {},
    })
}

/// Where the logs of the containers of a pod lie.
#[must_use]
pub fn log_folder(pod: &str) -> String {
    format!("{LOG_FOLDER}/{pod}")
}

/// Configuration of a container that runs a line of `sh`.
#[must_use]
pub fn container_config(name: &str, image: &str, line: &str) -> Value {
    json!({
        "metadata": {"name": name},
        "image": {"image": image},
        "command": ["sh", "-c", line],
        "log_path": format!("{name}.log"),
        "linux": {},
    })
}

/// Every address of a pod, the first family first.
pub fn addresses(node: &Node, containerd: &Containerd, pod: &Pod) -> Result<Vec<String>> {
    let text = containerd.crictl_text(node, &["inspectp", &pod.id])?;
    let status: Value = serde_json::from_str(&text).context("crictl inspectp printed no JSON")?;
    let network = &status["status"]["network"];
    let first = network["ip"].as_str().into_iter();
    let others = network["additionalIps"].as_array().into_iter().flatten();
    let others = others.filter_map(|ip| ip["ip"].as_str());
    Ok(first.chain(others).map(str::to_owned).collect())
}

/// The URL of a web server at an address of either family.
#[must_use]
pub fn url(address: &str, port: u16, path: &str) -> String {
    if address.contains(':') {
        format!("http://[{address}]:{port}/{path}")
    } else {
        format!("http://{address}:{port}/{path}")
    }
}

/// Gets a page from outside the pod.
pub fn fetch(node: &Node, url: &str) -> Result<String> {
    let text = node.shell(&format!("timeout 60 busybox wget -q -O - {url}"))?;
    Ok(text.trim().to_owned())
}
