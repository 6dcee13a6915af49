//! A pod that asks kubelet for a function of the node, through `pericarp device-plugin`.

use anyhow::{Result, ensure};
use pericarp_tests::node::{Builder, Command, Device, Node, Service, Session, pericarp};
use pericarp_tests::pods::passthrough::{Function, allow};

/// Time that the plugin gets to be registered.
const READY_TIMEOUT_S: u64 = 120;

/// What the plugin offers: the class of disks.
const RESOURCES: &str = "[devices]\nresources = ['disk=class:01']\n";

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: asks}
spec:
  nodeName: node1
  runtimeClassName: pericarp
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  restartPolicy: Never
  containers:
  - name: c
    image: docker.io/library/busybox:test
    imagePullPolicy: Never
    command: [sleep, \"1000\"]
    resources: {limits: {pericarp.dev/disk: 1}}
";

fn node(test: &str) -> Option<Session> {
    let builder = || {
        let builder = Builder::default().name("device-plugin").memory_mib(6144);
        builder.device(Device::VirtioBlk)
    };
    pericarp::session(test, builder)
}

fn a_pod_asks(node: &Node) -> Result<()> {
    let kubernetes = node.kubernetes()?;
    let functions = Function::all(node)?;
    ensure!(functions.len() == 1, "{functions:?}");
    let disk = &functions[0];
    let write = format!(
        "echo hello | dd of=/dev/$(ls /sys/bus/pci/devices/{}/virtio*/block) conv=notrunc,fsync",
        disk.address
    );
    node.shell(&write)?;
    node.write("/etc/pericarp/config.d/61-resources.toml", RESOURCES)?;
    allow(node, &functions)?;
    node.start(&Service {
        name: "device-plugin".to_owned(),
        command: Command::new("/usr/bin/pericarp")
            .args(["device-plugin"])
            .timeout_s(READY_TIMEOUT_S),
        log: node.results().join("device-plugin.log"),
        notifies: true,
    })?;
    // Registered while its own driver has the function, then heard of the change.
    disk.bind(node, "vfio-pci")?;
    let offered = "jsonpath={.status.allocatable.pericarp\\.dev/disk}=1";
    kubernetes.wait(node, "node/node1", offered)?;
    kubernetes.apply(node, POD)?;
    kubernetes.wait(node, "pod/asks", "condition=Ready")?;
    let read = ["exec", "asks", "--", "sh", "-c", "head -c 5 /dev/vd*"];
    let read = kubernetes.text(node, &read)?;
    ensure!(read == "hello", "the pod reads {read:?}");
    kubernetes.text(node, &["delete", "pod", "asks", "--wait=true"])?;
    Ok(())
}

#[test]
fn a_pod_asks_kubelet_for_a_function() {
    let Some(node) = node("device-plugin") else {
        return;
    };
    a_pod_asks(&node).unwrap();
}
