//! Pods in VMs: the scenario of the runc baseline under Pericarp's handler, and `ctr run`.

use anyhow::Result;
use pericarp_tests::node::images::BUSYBOX;
use pericarp_tests::node::{Builder, Session, Version, pericarp};
use pericarp_tests::pods::leftovers::Leftovers;
use pericarp_tests::pods::scenario::pod_through_crictl;
use pericarp_tests::pods::{container_config, pod_config};
use serde_json::json;

/// The handler of containerd.
const HANDLER: &str = "pericarp";

fn node(test: &str) -> Option<Session> {
    pericarp::session(test, || Builder::default().name("pericarp"))
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

#[test]
fn a_program_of_the_host_takes_the_output() {
    let Some(node) = node("pericarp-logger") else {
        return;
    };
    node.containerd(Version::V23).unwrap();
    let before = Leftovers::look(&node).unwrap();
    // exec 5>&-; cat <&3 >/logged
    let uri = "binary:///bin/sh?-c=exec+5%3e%26-%3b+cat+%3c%263+%3e/logged";
    let run = "ctr -n k8s.io run --rm --runtime io.containerd.pericarp.v2";
    node.shell(&format!(
        "{run} --log-uri '{uri}' {BUSYBOX} logged echo words"
    ))
    .unwrap();
    assert_eq!(node.shell("cat /logged").unwrap(), "words\n");
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

/// The handler whose pods have no pause container.
const SANDBOX_HANDLER: &str = "pericarp-sandbox";

#[test]
fn pods_that_no_vm_can_give_are_refused_by_name_before_anything_starts() {
    let Some(node) = node("pericarp-refusals") else {
        return;
    };
    let containerd = node.containerd(Version::V23).unwrap();
    let before = Leftovers::look(&node).unwrap();
    let of_the_host = |namespace: &str| {
        let options = json!({namespace: HOST_NAMESPACE});
        json!({"linux": {"security_context": {"namespace_options": options}}})
    };
    let annotated = |name: &str| json!({"annotations": {format!("pericarp.dev/{name}"): "1"}});
    let tiny = json!({"linux": {"resources": {"memory_limit_in_bytes": 1 << 20}}});
    let cases = [
        (of_the_host("network"), "hostNetwork"),
        (of_the_host("pid"), "hostPID"),
        (of_the_host("ipc"), "hostIPC"),
        (annotated("vm.default_vcpu"), "pericarp.dev/vm.default_vcpu"),
        (
            annotated("vm.default_vcpus"),
            "security.allowed_annotations",
        ),
        (annotated("vm.max_vcpus"), "vm.max_vcpus"),
        (tiny, "vm.min_memory_mib"),
    ];
    for handler in [HANDLER, SANDBOX_HANDLER] {
        // Both hand the same kind of pod to the same checks: of the second some do.
        let step = if handler == HANDLER { 1 } else { 3 };
        for (index, (change, field)) in cases.iter().enumerate().step_by(step) {
            let mut config = pod_config(&format!("refused-{index}"));
            for (key, value) in change.as_object().unwrap() {
                config[key] = value.clone();
            }
            let error = containerd.run_pod(&node, handler, &config).unwrap_err();
            let error = format!("{error:#}");
            assert!(error.contains(field), "{handler}, {change}: {error}");
        }
    }
    Leftovers::nothing_since(&node, &before).unwrap();
}

#[test]
fn a_device_of_the_host_is_refused_and_leaves_its_pod_alone() {
    let Some(node) = node("pericarp-device") else {
        return;
    };
    let containerd = node.containerd(Version::V23).unwrap();
    let before = Leftovers::look(&node).unwrap();
    let pod = containerd
        .run_pod(&node, HANDLER, &pod_config("device"))
        .unwrap();
    let mut config = container_config("c", BUSYBOX, "exec sleep 1000");
    config["devices"] = json!([
        {"container_path": "/dev/kvm", "host_path": "/dev/kvm", "permissions": "rw"}
    ]);
    let error = containerd.run_container(&node, &pod, &config).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("linux.devices[/dev/kvm]"), "{error}");
    let config = container_config("d", BUSYBOX, "exec sleep 1000");
    containerd.run_container(&node, &pod, &config).unwrap();
    containerd.remove_pod(&node, &pod).unwrap();
    Leftovers::nothing_since(&node, &before).unwrap();
}

/// A VM runs where its containers may, and not where one might that is gone.
fn processors_are_given_back(node: &Session) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let before = Leftovers::look(node)?;
    node.shell("mkdir /sys/fs/cgroup/near; echo +cpuset >/sys/fs/cgroup/cgroup.subtree_control")?;
    let mut config = pod_config("near");
    config["linux"] = json!({"cgroup_parent": "/near"});
    let pod = containerd.run_pod(node, HANDLER, &config)?;
    let mut containers = Vec::new();
    for cpus in ["0", "1"] {
        let mut config = container_config(&format!("on-{cpus}"), BUSYBOX, "exec sleep 1000");
        config["linux"] = json!({"resources": {"cpuset_cpus": cpus}});
        containers.push(containerd.run_container(node, &pod, &config)?);
    }
    let cpus = format!("cat /sys/fs/cgroup/near/{}/cpuset.cpus", pod.id);
    let both = node.shell(&cpus)?;
    containerd.crictl_text(node, &["rm", "--force", &containers[0]])?;
    let seen = [both, node.shell(&cpus)?].map(|text| text.trim().to_owned());
    assert_eq!(seen, ["0-1", "1"]);
    containerd.remove_pod(node, &pod)?;
    node.shell("rmdir /sys/fs/cgroup/near")?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn a_vm_does_not_run_where_a_container_might_that_is_gone() {
    let Some(node) = node("pericarp-near") else {
        return;
    };
    processors_are_given_back(&node).unwrap();
}

/// What containers of a pod with its own names, servers and sysctls see of them.
fn what_a_pod_sees(node: &Session, handler: &str) -> Result<String> {
    let containerd = node.containerd(Version::V23)?;
    let before = Leftovers::look(node)?;
    let mut config = pod_config("sees");
    config["hostname"] = json!("of-the-pod");
    config["dns_config"] = json!({
        "servers": ["10.1.2.3", "10.1.2.4"], "searches": ["one.example"], "options": ["ndots:3"]
    });
    config["linux"] = json!({"sysctls": {"net.ipv4.ip_local_port_range": "2000 3000"}});
    let pod = containerd.run_pod(node, handler, &config)?;
    let see = "hostname; cat /etc/hostname /etc/resolv.conf /etc/hosts; cd /proc/sys/net/ipv4; \
        cat ip_local_port_range ip_unprivileged_port_start ping_group_range; \
        df -k /dev/shm | tail -n 1; echo shared > /dev/shm/file";
    let first = container_config("first", BUSYBOX, "exec sleep 1000");
    let first = containerd.run_container(node, &pod, &first)?;
    let mut seen = containerd.crictl_text(node, &["exec", &first, "sh", "-c", see])?;
    let mut second = container_config("second", BUSYBOX, "exec sleep 1000");
    second["linux"] = json!({"security_context": {"readonly_rootfs": true}});
    let second = containerd.run_container(node, &pod, &second)?;
    let look = "cat /dev/shm/file; (echo x >> /etc/hosts) 2>&1; ipcs -s | wc -l";
    seen += &containerd.crictl_text(node, &["exec", &second, "sh", "-c", look])?;
    containerd.remove_pod(node, &pod)?;
    Leftovers::nothing_since(node, &before)?;
    Ok(seen)
}

#[test]
fn a_pod_of_the_sandbox_service_sees_what_every_pod_sees() {
    let Some(node) = node("pericarp-sandbox-files") else {
        return;
    };
    let usual = what_a_pod_sees(&node, HANDLER).unwrap();
    for expected in [
        "of-the-pod",
        "nameserver 10.1.2.4",
        "ndots:3",
        "2000",
        "shared",
        "Read-only",
    ] {
        assert!(usual.contains(expected), "{expected}: {usual}");
    }
    assert_eq!(what_a_pod_sees(&node, SANDBOX_HANDLER).unwrap(), usual);
}
