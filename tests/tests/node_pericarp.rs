//! Pods in VMs: the scenario of the runc baseline under Pericarp's handler, and `ctr run`.

use pericarp_tests::node::images::BUSYBOX;
use pericarp_tests::node::{Builder, Session, Version, pericarp, session};
use pericarp_tests::pods::leftovers::Leftovers;
use pericarp_tests::pods::scenario::pod_through_crictl;

/// The handler of containerd.
const HANDLER: &str = "pericarp";

/// The node, unless what it needs is not built: then the reason is printed.
fn node(test: &str) -> Option<Session> {
    let missing = pericarp::missing();
    if !missing.is_empty() {
        eprintln!("skipped: not built: {}", missing.join(", "));
        return None;
    }
    let builder = || Builder::default().name("pericarp");
    Some(session(test, builder).expect("the node boots"))
}

#[test]
fn pod_through_crictl_with_containerd_2_3() {
    let Some(node) = node("pericarp-crictl-2.3") else {
        return;
    };
    pod_through_crictl(&node, Version::V23, HANDLER).unwrap();
}

#[test]
fn pod_through_crictl_with_containerd_1_7() {
    let Some(node) = node("pericarp-crictl-1.7") else {
        return;
    };
    pod_through_crictl(&node, Version::V17, HANDLER).unwrap();
}

#[test]
fn a_container_of_ctr_runs_in_a_vm_of_its_own() {
    let Some(node) = node("pericarp-ctr") else {
        return;
    };
    let containerd = node.containerd(Version::V23).unwrap();
    let before = Leftovers::look(&node).unwrap();
    let run = containerd
        .ctr()
        .args(["--namespace", "k8s.io", "run", "--rm"]);
    let run = run.args(["--runtime", "io.containerd.pericarp.v2", BUSYBOX, "single"]);
    let output = node
        .run(&run.args(["sh", "-c", "uname -r; exit 3"]))
        .unwrap();
    assert_eq!(output.exit.status(), 3, "{}", output.stderr);
    let host = node.shell("uname -r").unwrap();
    assert_ne!(
        output.stdout.trim(),
        host.trim(),
        "the container has the host's kernel"
    );
    Leftovers::nothing_since(&node, &before).unwrap();
}
