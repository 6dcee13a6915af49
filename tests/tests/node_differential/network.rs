//! What CNI's plugins set in a pod's network namespace holds for its containers.

use anyhow::Result;
use pericarp_tests::node::{Node, Version};
use pericarp_tests::pods::leftovers::Leftovers;

use crate::side::{Side, WAIT, container, node};
use crate::{PERICARP, RUNC, SANDBOX};

/// The node's CNI configuration.
const CONFIGURATION: &str = "/etc/cni/net.d/10-node.conflist";

/// Sysctls that the plugin `tuning` sets: of the namespace, of all interfaces and of one.
const SET: [(&str, &str); 4] = [
    ("net.ipv4.tcp_keepalive_time", "611"),
    ("net.ipv4.ip_local_port_range", "20000\t30000"),
    ("net.ipv4.conf.all.rp_filter", "2"),
    ("net.ipv4.conf.eth0.arp_ignore", "1"),
];

/// Sysctls that nobody sets.
const OTHERS: [&str; 2] = [
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.conf.eth0.proxy_arp",
];

/// Writes another configuration, and waits until containerd has read it.
fn configure(node: &Node, change: &str, tunes: bool) -> Result<()> {
    let count = i32::from(!tunes);
    node.shell(&format!(
        "{change} && mv {CONFIGURATION}.new {CONFIGURATION}
         until crictl info >/run/cni.info && c=0 &&
             {{ grep -q '\"tuning\"' /run/cni.info || c=$?; }} && [ $c = {count} ]; do :; done"
    ))
    .map(drop)
}

#[test]
fn sysctls_of_the_pods_network_are_those_that_cni_set() {
    let Some(node) = node("network") else {
        return;
    };
    node.containerd(Version::V23).unwrap();
    let before = Leftovers::look(&node).unwrap();
    let values: serde_json::Map<_, _> = SET
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).into()))
        .collect();
    let plugin = serde_json::json!({"type": "tuning", "sysctl": values});
    let add = format!(
        "cp {CONFIGURATION} /run/cni.kept
         jq --argjson p '{plugin}' '.plugins += [$p]' {CONFIGURATION} >{CONFIGURATION}.new"
    );
    configure(&node, &add, true).unwrap();
    let mut found = Vec::new();
    for handler in [RUNC, PERICARP, SANDBOX] {
        let side = Side::new(&node, handler, "network").unwrap();
        let id = side.run(&container("c", &WAIT)).unwrap();
        let names = SET.iter().map(|(name, _)| *name).chain(OTHERS);
        let read: Vec<String> = names
            .map(|name| {
                let path = format!("/proc/sys/{}", name.replace('.', "/"));
                side.exec(&id, &["cat", &path]).unwrap()
            })
            .collect();
        side.remove().unwrap();
        found.push(read);
    }
    let restore = format!("cp /run/cni.kept {CONFIGURATION}.new && rm /run/cni.kept");
    configure(&node, &restore, false).unwrap();
    for ((name, value), read) in SET.iter().zip(&found[0]) {
        assert_eq!(read.trim(), *value, "{name} under runc");
    }
    assert_eq!(found[0], found[1]);
    assert_eq!(found[0], found[2]);
    Leftovers::nothing_since(&node, &before).unwrap();
}
