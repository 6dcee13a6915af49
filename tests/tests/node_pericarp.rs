//! Pods in VMs: the scenario of the runc baseline under Pericarp's handler, and `ctr run`.

use anyhow::Result;
use pericarp_tests::node::images::BUSYBOX;
use pericarp_tests::node::{Builder, Session, Version, pericarp, session};
use pericarp_tests::pods::leftovers::Leftovers;
use pericarp_tests::pods::scenario::pod_through_crictl;
use pericarp_tests::pods::{container_config, pod_config};
use serde_json::json;

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

/// Ends a process of pod `$id` with SIGKILL, at once, and removes the pod.
fn killed_and_removed(victim: &str, pid_of: &str) -> Result<()> {
    let Some(node) = node(&format!("pericarp-kill-{victim}")) else {
        return Ok(());
    };
    let containerd = node.containerd(Version::V23)?;
    let before = Leftovers::look(&node)?;
    let config = pod_config(&format!("kill-{victim}"));
    let pod = containerd.run_pod(&node, HANDLER, &config)?;
    let container = container_config("c", BUSYBOX, "exec sleep 1000");
    containerd.run_container(&node, &pod, &container)?;
    node.shell(&format!("id={}; kill -9 $({pid_of})", pod.id))?;
    containerd.wait_for_end_of_containers(&node, &pod)?;
    containerd.remove_pod(&node, &pod)?;
    Leftovers::nothing_since(&node, &before)?;
    Ok(())
}

#[test]
fn nothing_is_left_of_a_killed_vmm() {
    let pid = "sed 's/.*\"vmm_pid\":\\([0-9]*\\).*/\\1/' /run/pericarp/$id/state.json";
    killed_and_removed("vmm", pid).unwrap();
}

#[test]
fn nothing_is_left_of_a_killed_shim() {
    let pid = "sed 's/.*\"shim_pid\":\\([0-9]*\\).*/\\1/' /run/pericarp/$id/state.json";
    killed_and_removed("shim", pid).unwrap();
}

#[test]
fn nothing_is_left_of_a_killed_file_system_daemon() {
    killed_and_removed("virtiofsd", "pgrep -f shared-dir=/run/pericarp/$id/").unwrap();
}

/// CRI's `NamespaceMode.NODE`: the pod wants a namespace of the host.
const HOST_NAMESPACE: u32 = 2;

#[test]
fn host_namespaces_are_refused_by_name_before_anything_starts() {
    let Some(node) = node("pericarp-refusals") else {
        return;
    };
    let containerd = node.containerd(Version::V23).unwrap();
    let before = Leftovers::look(&node).unwrap();
    for (namespace, field) in [
        ("network", "hostNetwork"),
        ("pid", "hostPID"),
        ("ipc", "hostIPC"),
    ] {
        let mut config = pod_config(&format!("host-{namespace}"));
        config["linux"] =
            json!({"security_context": {"namespace_options": {namespace: HOST_NAMESPACE}}});
        let error = containerd.run_pod(&node, HANDLER, &config).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(field), "{namespace}: {error}");
    }
    Leftovers::nothing_since(&node, &before).unwrap();
}
