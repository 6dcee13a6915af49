//! Pods that ask kubelet for a function of the node: through `pericarp device-plugin`, and by
//! Dynamic Resource Allocation through the small driver of `tests/dra-driver`.

use anyhow::{Context, Result, bail, ensure};
use pericarp_tests::node::deps::component;
use pericarp_tests::node::kubernetes::{KUBECONFIG, NODE_NAME};
use pericarp_tests::node::{
    Builder, Command, Device, Kubernetes, Node, Service, Session, pericarp,
};
use pericarp_tests::pods::leftovers::Leftovers;
use pericarp_tests::pods::passthrough::{Function, allow, locked_kib};
use serde_json::{Value, json};

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

/// The node's disk, which pods may have, with the node's own driver.
fn disk(node: &Node) -> Result<Function> {
    let functions = Function::all(node)?;
    let [disk] = functions.as_slice() else {
        bail!("{functions:?}");
    };
    disk.bind(node, "")?;
    allow(node, &functions)?;
    Ok(disk.clone())
}

/// A line of shell in which `$d` is the disk, for the node.
fn on_host(disk: &Function, line: &str) -> String {
    let folder = format!("/sys/bus/pci/devices/{}", disk.address);
    format!("set -e; d=/dev/$(ls {folder}/virtio*/block); {line}")
}

fn a_pod_asks(node: &Node) -> Result<()> {
    let kubernetes = node.kubernetes()?;
    let disk = disk(node)?;
    let write = "echo hello | dd of=$d conv=notrunc,fsync";
    node.shell(&on_host(&disk, write))?;
    node.write("/etc/pericarp/config.d/61-resources.toml", RESOURCES)?;
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

/// The driver, which is its class of devices' name too.
const DRIVER: &str = "functions.tests.pericarp.dev";

/// The log of the driver among the node's results.
const DRIVER_LOG: &str = "dra-driver.log";

/// The class of functions, as whoever installs a driver makes it, and a claim of one.
const CLAIM: &str = r#"
apiVersion: resource.k8s.io/v1
kind: DeviceClass
metadata: {name: DRIVER}
spec:
  selectors:
  - cel: {expression: 'device.driver == "DRIVER"'}
---
apiVersion: resource.k8s.io/v1
kind: ResourceClaim
metadata: {name: disk}
spec:
  devices:
    requests:
    - name: function
      exactly: {deviceClassName: DRIVER}
"#;

/// A pod with that claim for one of its two containers. It names no node, so that nothing starts
/// before the claim is its.
const CLAIMING: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec:
  runtimeClassName: pericarp
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  restartPolicy: Never
  resourceClaims:
  - {name: function, resourceClaimName: disk}
  containers:
  - name: claims
    image: docker.io/library/busybox:test
    imagePullPolicy: Never
    command: [sleep, "1000"]
    resources: {claims: [{name: function}]}
  - name: other
    image: docker.io/library/busybox:test
    imagePullPolicy: Never
    command: [sleep, "1000"]
"#;

/// What the pods write to the disk, and read from it.
const WRITE: &str = "dd if=/dev/urandom of=/tmp/x bs=1M count=4 2>/dev/null
    dd if=/tmp/x of=$d bs=1M conv=notrunc,fsync 2>/dev/null; md5sum </tmp/x; rm /tmp/x";
const READ: &str = "dd if=$d bs=1M count=4 2>/dev/null | md5sum";

/// Starts the driver; it is there when the kubelet has taken it.
fn start_driver(node: &Node) -> Result<()> {
    component("dra-driver")?.built()?;
    node.start(&Service {
        name: "dra-driver".to_owned(),
        command: Command::new("dra-driver")
            .args(["--node", NODE_NAME])
            .env("KUBECONFIG", KUBECONFIG)
            .timeout_s(READY_TIMEOUT_S),
        log: node.results().join(DRIVER_LOG),
        notifies: true,
    })
}

/// What the driver has done so far, and for how many devices.
fn done(node: &Node) -> Result<Vec<String>> {
    let log = std::fs::read_to_string(node.results().join(DRIVER_LOG)).context(DRIVER_LOG)?;
    let lines = log.lines().filter(|line| line.contains("prepared "));
    Ok(lines.map(str::to_owned).collect())
}

/// What an object says at a path.
fn field(node: &Node, kubernetes: &Kubernetes, object: &str, path: &str) -> Result<String> {
    let output = format!("jsonpath={{{path}}}");
    kubernetes.text(node, &["get", object, "--output", &output])
}

/// Makes a pod with the claim and does what the scheduler does, which the node has none of: picks
/// the function that the driver offers, writes into the claim's status that it is allocated and who
/// may use it, and binds the pod to the node.
fn schedule(node: &Node, kubernetes: &Kubernetes, pod: &str, disk: &Function) -> Result<()> {
    kubernetes.apply(node, &CLAIMING.replace("NAME", pod))?;
    let slices = kubernetes.text(node, &["get", "resourceslices", "--output=json"])?;
    let slices: Value = serde_json::from_str(&slices)?;
    let slices = slices["items"].as_array().context("no list of slices")?;
    let ours = slices
        .iter()
        .find(|slice| slice["spec"]["driver"] == DRIVER);
    let offer = &ours.context("the driver offers nothing")?["spec"];
    let device = &offer["devices"][0];
    let address = &device["attributes"]["resource.kubernetes.io/pciBusID"]["string"];
    ensure!(*address == *disk.address, "the driver offers {address}");
    let device = json!({
        "request": "function", "driver": DRIVER, "pool": offer["pool"]["name"],
        "device": device["name"],
    });
    let uid = field(node, kubernetes, &format!("pod/{pod}"), ".metadata.uid")?;
    let status = json!({"status": {
        "allocation": {"devices": {"results": [device]}},
        "reservedFor": [{"resource": "pods", "name": pod, "uid": uid}],
    }});
    let patch = ["patch", "resourceclaim", "disk", "--subresource=status"];
    let patch = kubernetes.kubectl().args(patch).arg("--type=merge");
    node.text(&patch.arg("--patch").arg(status.to_string()))?;
    let binding = json!({
        "apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod},
        "target": {"apiVersion": "v1", "kind": "Node", "name": NODE_NAME},
    });
    let place = format!("/api/v1/namespaces/default/pods/{pod}/binding");
    let bind = ["create", "--raw", &place, "-f", "-"];
    let bind = kubernetes.kubectl().args(bind);
    let output = node.run_with(&bind, Some(&mut binding.to_string().as_bytes()), None)?;
    output.checked("binding").map(drop)
}

/// Deletes a pod with the claim. After that its function is nobody's, and nothing is left.
fn unclaim(node: &Node, kubernetes: &Kubernetes, pod: &str, before: &Leftovers) -> Result<()> {
    kubernetes.text(node, &["delete", "pod", pod, "--wait=true"])?;
    let described = node.shell("ls /var/run/cdi")?;
    ensure!(described.is_empty(), "{described} is left");
    let locked = locked_kib(node)?;
    ensure!(locked == 0, "{locked} KiB are pinned without a pod");
    // The kubelet leaves a stopped sandbox for minutes.
    node.remove_pods()?;
    Leftovers::nothing_since(node, before).map(drop)
}

/// One container of a pod has the disk, finds on it what `sum` is of and writes something else,
/// whose sum is the answer. The other container has nothing.
fn use_disk(node: &Node, kubernetes: &Kubernetes, pod: &str, sum: &str) -> Result<String> {
    let exec = |container: &str, line: &str| {
        let line = format!("cd /dev; d=$(ls -d vd* vfio 2>/dev/null); {line}");
        let exec = ["exec", pod, "-c", container, "--", "sh", "-c", &line];
        kubernetes.text(node, &exec)
    };
    kubernetes.wait(node, &format!("pod/{pod}"), "condition=Ready")?;
    ensure!(locked_kib(node)? > 0, "no memory is pinned");
    let other = exec("other", "echo $d")?;
    ensure!(
        other.is_empty(),
        "the container without a claim has {other}"
    );
    let said = exec("claims", &format!("echo $d; {READ}; {WRITE}"))?;
    let [has, read, written] = said.lines().collect::<Vec<_>>()[..] else {
        bail!("the container with the claim says {said:?}");
    };
    ensure!(
        has.starts_with("vd") && !has.contains("vfio"),
        "the container with the claim has {has}"
    );
    ensure!(read == sum, "the pod reads {read} instead of {sum}");
    Ok(written.to_owned())
}

fn pods_claim(node: &Node) -> Result<()> {
    let kubernetes = node.kubernetes()?;
    let disk = disk(node)?;
    let sum = node.shell(&on_host(&disk, WRITE))?;
    disk.bind(node, "vfio-pci")?;
    start_driver(node)?;
    kubernetes.apply(node, &CLAIM.replace("DRIVER", DRIVER))?;
    let before = Leftovers::look(node)?;
    schedule(node, &kubernetes, "claims", &disk)?;
    let sum = use_disk(node, &kubernetes, "claims", sum.trim())?;
    let described = node.shell("cat /var/run/cdi/*")?;
    let group = format!("/dev/vfio/{}\"", disk.group);
    ensure!(described.contains(&group), "the driver says {described}");
    unclaim(node, &kubernetes, "claims", &before)?;
    disk.bind(node, "")?;
    let read = node.shell(&on_host(&disk, READ))?;
    ensure!(read.trim() == sum, "the host reads {read} instead of {sum}");
    disk.bind(node, "vfio-pci")?;
    // A function that the operator does not allow, whatever a driver gives away.
    allow(node, &[])?;
    schedule(node, &kubernetes, "denied", &disk)?;
    let message = ".status.containerStatuses[0].state.terminated.message";
    kubernetes.wait(node, "pod/denied", &format!("jsonpath={{{message}}}"))?;
    let message = field(node, &kubernetes, "pod/denied", message)?;
    let names = [disk.address.as_str(), "security.passthrough_devices"];
    ensure!(names.iter().all(|name| message.contains(name)), "{message}");
    unclaim(node, &kubernetes, "denied", &before)?;
    let expected = ["prepared disk 1 <nil>", "unprepared disk <nil>"].repeat(2);
    let done = done(node)?;
    ensure!(done == expected, "the driver has {done:?}");
    kubernetes.text(node, &["delete", "resourceclaim/disk"])?;
    kubernetes.text(node, &["delete", "deviceclass", DRIVER])?;
    Ok(())
}

#[test]
fn pods_claim_a_function() {
    let Some(node) = node("dra") else {
        return;
    };
    pods_claim(&node).unwrap();
}
