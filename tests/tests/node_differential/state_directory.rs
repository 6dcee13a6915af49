//! An unprivileged user of the node cannot reach the state of pods.

use anyhow::{Context, Result};
use pericarp_tests::node::images::SET_USER_ID;
use pericarp_tests::node::{Node, Version, probe};
use pericarp_tests::pods::leftovers::Leftovers;
use serde_json::{Value, json};

use crate::side::{Side, WAIT, container, node};
use crate::{PERICARP, SANDBOX};

/// A folder like kubelet's for a Secret: only the mode of the folder protects the files.
const SECRET: &str = "/run/secret-of-the-test";

/// Lists a folder as root and tries to open every path as nobody.
fn walk(node: &Node, folder: &str) -> Result<Value> {
    let text = node.shell(&format!("{} walk {folder}", probe::ON_NODE))?;
    serde_json::from_str(&text).context("the probe printed no JSON")
}

#[test]
fn a_user_of_the_node_reaches_nothing_of_a_pod() {
    let Some(node) = node("state-directory") else {
        return;
    };
    let containerd = node.containerd(Version::V23).unwrap();
    containerd
        .crictl_text(&node, &["pull", SET_USER_ID])
        .unwrap();
    node.shell(&format!(
        "mkdir -p -m 0750 {SECRET}/inner && chmod 0750 {SECRET} && chmod 0755 {SECRET}/inner && \
         echo secret >{SECRET}/inner/token && chmod 0644 {SECRET}/inner/token"
    ))
    .unwrap();
    let before = Leftovers::look(&node).unwrap();
    let mut sides = Vec::new();
    for handler in [PERICARP, SANDBOX] {
        let side = Side::new(&node, handler, "state").unwrap();
        let mut config = container("c", &WAIT);
        config["image"]["image"] = json!(SET_USER_ID);
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"host_path": SECRET, "container_path": "/secret"}));
        mounts.push(json!({"host_path": format!("{SECRET}/inner"), "container_path": "/inner"}));
        side.run(&config).unwrap();
        sides.push(side);
    }
    // The bundles of all handlers are beneath this folder.
    let of_containerd = walk(&node, "/run/containerd/io.containerd.runtime.v2.task").unwrap();
    let found = walk(&node, "/run/pericarp").unwrap();
    for side in sides {
        side.remove().unwrap();
    }
    node.shell(&format!("rm -r {SECRET}")).unwrap();
    Leftovers::nothing_since(&node, &before).unwrap();
    assert!(
        found["paths"].as_u64().unwrap() > 20,
        "little to reach: {found}"
    );
    assert_eq!(of_containerd["reached"], 0, "{of_containerd}");
    assert_eq!(found["executed"], json!([]), "{found}");
    assert_eq!(found["reached"], 0, "{found}");
}
