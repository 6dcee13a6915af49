//! The baseline: pods with runc in the node, through crictl and CNI, with both containerds.

use anyhow::Result;
use pericarp_tests::node::containerd::Pod;
use pericarp_tests::node::images::BUSYBOX;
use pericarp_tests::node::{Builder, Containerd, Node, Session, Version, session};
use serde_json::{Value, json};

fn node(test: &str) -> Session {
    session(test, || Builder::default().name("runc")).expect("the node boots")
}

fn pod_config(name: &str, version: Version) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default", "uid": name},
        "hostname": name,
        "log_directory": format!("/var/log/pods/{version:?}"),
        "linux": {},
    })
}

fn container_config(image: &str) -> Value {
    json!({
        "metadata": {"name": "c"},
        "image": {"image": image},
        "command": ["sh", "-c", "echo started; mkdir -p /srv; exec httpd -f -p 8080 -h /bin"],
        "log_path": "c.log",
        "linux": {},
    })
}

/// Every process, mount, network namespace and cgroup that pods make.
fn leftovers(node: &Node) -> Result<String> {
    node.shell(
        "ps -eo args= | grep -c '[c]ontainerd-shim' || true
         grep -c -E 'netns|shm|rootfs|sandboxes' /proc/self/mounts || true
         (ls /run/netns 2>/dev/null || true) | sort
         (find /sys/fs/cgroup -path '*k8s.io/*' -type d || true) | wc -l",
    )
}

fn addresses(node: &Node, containerd: &Containerd, pod: &Pod) -> Result<Vec<String>> {
    let text = containerd.crictl_text(node, &["inspectp", &pod.id])?;
    let status: Value = serde_json::from_str(&text)?;
    let network = &status["status"]["network"];
    let additional = network["additionalIps"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let mut all = vec![network["ip"].as_str().unwrap_or_default().to_owned()];
    all.extend(
        additional
            .iter()
            .filter_map(|ip| ip["ip"].as_str().map(str::to_owned)),
    );
    Ok(all)
}

fn pod_through_crictl(node: &Node, version: Version) -> Result<()> {
    let containerd = node.containerd(version)?;
    let before = leftovers(node)?;
    let pod = containerd.run_pod(node, "runc", &pod_config("runc-pod", version))?;
    let container = containerd.run_container(node, &pod, &container_config(BUSYBOX))?;

    let hostname = containerd.crictl_text(node, &["exec", &container, "hostname"])?;
    assert_eq!(hostname, "runc-pod");
    let logs = containerd.crictl_text(node, &["logs", &container])?;
    assert_eq!(logs, "started");
    let status = containerd.crictl_run(node, &["exec", &container, "sh", "-c", "exit 7"])?;
    assert!(!status.exit.success());

    let addresses = addresses(node, &containerd, &pod)?;
    assert_eq!(
        addresses.len(),
        2,
        "one address of each family: {addresses:?}"
    );
    for address in addresses {
        let host = if address.contains(':') {
            format!("[{address}]")
        } else {
            address
        };
        node.shell(&format!(
            "busybox wget -q -O /dev/null http://{host}:8080/busybox"
        ))?;
    }

    containerd.remove_pod(node, &pod)?;
    assert_eq!(leftovers(node)?, before);
    Ok(())
}

#[test]
fn pod_through_crictl_with_containerd_2_3() {
    pod_through_crictl(&node("crictl-2.3"), Version::V23).unwrap();
}

#[test]
fn pod_through_crictl_with_containerd_1_7() {
    pod_through_crictl(&node("crictl-1.7"), Version::V17).unwrap();
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
    use pericarp_tests::node::{Command, Exit};
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
