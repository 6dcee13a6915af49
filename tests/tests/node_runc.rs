//! The baseline: pods with runc in the node, through crictl and CNI, with both containerds.

use pericarp_tests::node::{Builder, Command, Exit, Session, Version, session};
use pericarp_tests::pods::scenario::pod_through_crictl;

/// The handler of containerd.
const HANDLER: &str = "runc";

fn node(test: &str) -> Session {
    session(test, || Builder::default().name("runc")).expect("the node boots")
}

#[test]
fn pod_through_crictl_with_containerd_2_3() {
    pod_through_crictl(&node("crictl-2.3"), Version::V23, HANDLER).unwrap();
}

#[test]
fn pod_through_crictl_with_containerd_1_7() {
    pod_through_crictl(&node("crictl-1.7"), Version::V17, HANDLER).unwrap();
}

#[test]
fn any_registry_name_is_served_inside_the_node() {
    let node = node("registry");
    let containerd = node.containerd(Version::V23).unwrap();
    for name in [
        "registry.k8s.io/e2e-test-images/busybox:1.29-2",
        "docker.io/library/nginx:1.14-2",
        "gcr.io/k8s-staging-cri-tools/test-image-user-uid",
        "quay.io/some/where/else/pause:9",
    ] {
        containerd.crictl_text(&node, &["pull", name]).unwrap();
    }
    let unknown = containerd
        .crictl_run(&node, &["pull", "docker.io/library/unknown:1"])
        .unwrap();
    assert!(!unknown.exit.success());
}

#[test]
fn output_status_and_input_of_a_command_come_through() {
    let node = node("commands");
    let output = node
        .run(&Command::shell("echo out; echo err >&2; exit 5"))
        .unwrap();
    assert_eq!(output.exit, Exit::Code(5));
    assert_eq!(
        (output.stdout.as_str(), output.stderr.as_str()),
        ("out\n", "err\n")
    );

    let input = vec![b'x'; 8 * 1024 * 1024];
    let command = Command::new("wc").arg("-c");
    let output = node
        .run_with(&command, Some(&mut input.as_slice()), None)
        .unwrap();
    assert_eq!(output.stdout.trim(), input.len().to_string());

    let slow = node
        .run(&Command::new("sleep").arg("1000").timeout_s(1))
        .unwrap();
    assert_eq!(slow.exit, Exit::TimedOut);
    let missing = node.run(&Command::new("no-such-program")).unwrap();
    assert!(matches!(missing.exit, Exit::Failed(why) if why.contains("no-such-program")));

    // The results folder is the same on both sides.
    let file = node.results().join("from-inside");
    node.shell(&format!("echo here >{}", file.display()))
        .unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "here\n");
}
