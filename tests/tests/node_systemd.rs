//! A pod in a node whose cgroups systemd manages.

use std::collections::BTreeMap;

use pericarp_tests::node::builder::Kind;
use pericarp_tests::node::images::BUSYBOX;
use pericarp_tests::node::{Builder, Version, pericarp};
use pericarp_tests::pods::{container_config, pod_config};

/// Starts systemd and the pod, and tells what became of it.
const SCRIPT: &str = include_str!("systemd.sh");

/// systemd, containerd and a pod, on a busy computer.
const TIMEOUT_S: u64 = 400;

#[test]
fn a_pod_of_the_systemd_driver_is_a_scope_that_systemd_knows() {
    let builder = || Builder::default().name("systemd").kind(Kind::Qemu);
    let Some(node) = pericarp::session("systemd-scope", builder) else {
        return;
    };
    let containerd = node.containerd(Version::V23).unwrap();
    let slice = "kubepods-pod1.slice";
    let mut pod = pod_config("scope");
    pod["linux"]["cgroup_parent"] = format!("/kubepods.slice/{slice}").into();
    let container = container_config("c", BUSYBOX, "exec sleep 1000");
    for (path, text) in [("pod", &pod), ("container", &container)] {
        let path = format!("/run/scope/{path}.json");
        node.write(&path, &text.to_string()).unwrap();
    }
    let log = node.results().join("systemd.log");
    let variables = format!(
        "export POD=/run/scope/pod.json CONTAINER=/run/scope/container.json SLICE={slice} LOG={}\n",
        log.display()
    );
    let text = containerd
        .script(&node, TIMEOUT_S, &(variables + SCRIPT))
        .unwrap();
    let told: BTreeMap<_, _> = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .collect();
    assert_eq!(told["state"], "active", "{text}");
    assert_eq!(told["slice"], slice, "{text}");
    assert_eq!(told["unit_cgroup"], told["vmm_cgroup"], "{text}");
    // Delegated: they are there also when systemd has arranged the slice anew.
    for controller in ["cpu", "memory", "pids"] {
        assert!(told["controllers"].contains(controller), "{text}");
    }
    assert_eq!(told["said"], "alive", "{text}");
    assert_eq!(told["after"], "not-found", "{text}");
    assert!(!told.contains_key("left"), "{text}");
}
