//! Pods that ask kubelet for a function of the node: through `pericarp device-plugin`, and by
//! Dynamic Resource Allocation through the small driver of `src/bin/dra_driver`.

use anyhow::{Context, Result, ensure};
use pericarp_tests::node::kubernetes::{KUBECONFIG, NODE_NAME};
use pericarp_tests::node::{
    Builder, Command, Device, Kubernetes, Node, Service, Session, pericarp,
};
use pericarp_tests::pods::claims::{self, DRIVER};
use pericarp_tests::pods::passthrough::{Function, allow, locked_kib};
use serde_json::json;

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

/// The node's disk, with its own driver and allowed, after the node has written a word to it.
fn disk_with(node: &Node, word: &str) -> Result<Function> {
    let functions = Function::all(node)?;
    let [disk] = functions.as_slice() else {
        anyhow::bail!("{functions:?}");
    };
    disk.bind(node, "")?;
    let write = format!(
        "echo {word} | dd of=/dev/$(ls /sys/bus/pci/devices/{}/virtio*/block) conv=notrunc,fsync",
        disk.address
    );
    node.shell(&write)?;
    allow(node, &functions)?;
    Ok(disk.clone())
}

fn a_pod_asks(node: &Node) -> Result<()> {
    let kubernetes = node.kubernetes()?;
    let disk = disk_with(node, "hello")?;
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

/// A pod with that claim. It names no node, so that nothing starts before the claim is its.
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
  - name: c
    image: docker.io/library/busybox:test
    imagePullPolicy: Never
    command: [sleep, "1000"]
    resources: {claims: [{name: function}]}
"#;

/// Time that the kubelet gets to tell of a failure.
const EVENT_TIMEOUT_S: u64 = 120;

/// What an object says at a path.
fn field(node: &Node, kubernetes: &Kubernetes, object: &str, path: &str) -> Result<String> {
    let output = format!("jsonpath={{{path}}}");
    kubernetes.text(node, &["get", object, "--output", &output])
}

/// Makes a pod with the claim and does what the scheduler does, which the node has none of: picks a
/// device of those that the driver offers, writes into the claim's status that it is allocated and
/// who may use it, and binds the pod to the node.
fn schedule(node: &Node, kubernetes: &Kubernetes, pod: &str) -> Result<()> {
    kubernetes.apply(node, &CLAIMING.replace("NAME", pod))?;
    let slice = format!("resourceslice/{NODE_NAME}-{DRIVER}");
    kubernetes.wait(node, &slice, "create")?;
    let device = field(node, kubernetes, &slice, ".spec.devices[0].name")?;
    let uid = field(node, kubernetes, &format!("pod/{pod}"), ".metadata.uid")?;
    let device = json!({
        "request": "function", "driver": DRIVER, "pool": NODE_NAME, "device": device,
    });
    let status = json!({"status": {
        "allocation": {"devices": {"results": [device]}},
        "reservedFor": [{"resource": "pods", "name": pod, "uid": uid}],
    }});
    let status = status.to_string();
    let patch = ["patch", "resourceclaim", "disk", "--subresource=status"];
    let patch = kubernetes.kubectl().args(patch);
    node.text(&patch.args(["--type=merge", "--patch", &status]))?;
    let binding = json!({
        "apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod},
        "target": {"apiVersion": "v1", "kind": "Node", "name": NODE_NAME},
    });
    let place = format!("/api/v1/namespaces/default/pods/{pod}/binding");
    let bind = kubernetes
        .kubectl()
        .args(["create", "--raw", &place, "-f", "-"]);
    let output = node.run_with(&bind, Some(&mut binding.to_string().as_bytes()), None)?;
    output.checked("binding").map(drop)
}

/// Deletes a pod with the claim. After that its function is nobody's.
fn unclaim(node: &Node, kubernetes: &Kubernetes, pod: &str, cdi: &str) -> Result<()> {
    kubernetes.text(node, &["delete", "pod", pod, "--wait=true"])?;
    let left = node.shell(&format!("ls {cdi} 2>/dev/null || true"))?;
    ensure!(left.is_empty(), "{left} is left");
    let locked = locked_kib(node)?;
    ensure!(locked == 0, "{locked} KiB are pinned without a pod");
    Ok(())
}

/// What the driver has done so far, a word each.
fn done(node: &Node) -> Result<Vec<String>> {
    let log = std::fs::read_to_string(node.results().join(DRIVER_LOG)).context(DRIVER_LOG)?;
    let words = log.lines().filter_map(|line| line.split_once(" disk"));
    Ok(words.map(|(word, _)| word.to_owned()).collect())
}

/// The log of the driver among the node's results.
const DRIVER_LOG: &str = "dra-driver.log";

fn pods_claim(node: &Node) -> Result<()> {
    let kubernetes = node.kubernetes()?;
    let disk = disk_with(node, "first")?;
    disk.bind(node, "vfio-pci")?;
    node.start(&Service {
        name: "dra-driver".to_owned(),
        command: Command::new(env!("CARGO_BIN_EXE_dra-driver"))
            .args(["--node", NODE_NAME])
            .env("KUBECONFIG", KUBECONFIG)
            .timeout_s(READY_TIMEOUT_S),
        log: node.results().join(DRIVER_LOG),
        notifies: true,
    })?;
    kubernetes.apply(node, &CLAIM.replace("DRIVER", DRIVER))?;
    let claim = field(node, &kubernetes, "resourceclaim/disk", ".metadata.uid")?;
    let cdi = claims::cdi_file(&claim).display().to_string();
    // The second finds what the first has written: one function, from pod to pod.
    for (pod, [before, after]) in [("one", ["first", "other"]), ("two", ["other", "third"])] {
        schedule(node, &kubernetes, pod)?;
        kubernetes.wait(node, &format!("pod/{pod}"), "condition=Ready")?;
        ensure!(node.read(&cdi)?.contains("/dev/vfio/"), "{cdi}");
        ensure!(locked_kib(node)? > 0, "nothing is pinned");
        let line = format!("head -c 5 /dev/vd*; echo {after} | dd of=$(ls /dev/vd*) conv=fsync");
        let read = kubernetes.text(node, &["exec", pod, "--", "sh", "-c", &line])?;
        ensure!(read == before, "pod {pod} reads {read:?}");
        unclaim(node, &kubernetes, pod, &cdi)?;
    }
    disk.bind(node, "")?;
    let read = format!(
        "head -c 5 /dev/$(ls /sys/bus/pci/devices/{}/virtio*/block)",
        disk.address
    );
    let read = node.shell(&read)?;
    ensure!(read == "third", "the host reads {read:?}");
    disk.bind(node, "vfio-pci")?;
    // A function that the operator does not allow, whatever a driver gives away.
    allow(node, &[])?;
    schedule(node, &kubernetes, "denied")?;
    let event = refusal(node, "denied")?;
    let names = [disk.address.as_str(), "security.passthrough_devices"];
    ensure!(names.iter().all(|name| event.contains(name)), "{event}");
    unclaim(node, &kubernetes, "denied", &cdi)?;
    let did = done(node)?;
    ensure!(
        did == ["prepared", "unprepared"].repeat(3),
        "the driver {did:?}"
    );
    kubernetes.text(node, &["delete", "resourceclaim", "disk"])?;
    Ok(())
}

/// The event of a pod that failed.
fn refusal(node: &Node, pod: &str) -> Result<String> {
    let select = format!("--field-selector=involvedObject.name={pod},reason=Failed");
    let line = format!(
        "until kubectl get events {select} -o jsonpath='{{.items[*].message}}' | grep .; do
             sleep 1
         done"
    );
    let command = Command::shell(&line).env("KUBECONFIG", KUBECONFIG);
    let told = node.text(&command.timeout_s(EVENT_TIMEOUT_S));
    told.with_context(|| format!("pod {pod} has no event of a failure"))
}

#[test]
fn pods_claim_a_function() {
    let Some(node) = node("dra") else {
        return;
    };
    pods_claim(&node).unwrap();
}
