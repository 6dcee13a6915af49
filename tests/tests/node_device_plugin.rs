//! Pods that ask kubelet for a function of the node: through `pericarp device-plugin`, and by
//! Dynamic Resource Allocation through the small driver of `tests/dra-driver`.

use anyhow::{Context, Result, ensure};
use pericarp_tests::node::containerd::PASSTHROUGH;
use pericarp_tests::node::deps::component;
use pericarp_tests::node::images::BUSYBOX;
use pericarp_tests::node::kubernetes::{KUBECONFIG, NODE_NAME};
use pericarp_tests::node::{
    Builder, Command, Device, Kubernetes, Node, Service, Session, pericarp,
};
use pericarp_tests::pods::leftovers::Leftovers;
use pericarp_tests::pods::passthrough::{
    Function, VFIO, allow, draw, fill, interrupts, locked_kib, sum,
};
use serde_json::{Value, json};

/// Time that the plugin gets to be registered.
const READY_TIMEOUT_S: u64 = 120;

/// Time of a line that moves the whole of what SPEC.md says, by emulated processors.
const LONG_TIMEOUT_S: u64 = 1800;

/// What the plugin offers, and the name of the container that asks for it.
const RESOURCES: &str = "[devices]
resources = ['disk=class:0100', 'nvme=class:0108', 'display=class:03']
";
const NAMES: [&str; 3] = ["disk", "nvme", "display"];

fn node(test: &str) -> Option<Session> {
    let builder = || {
        let builder = Builder::default().name("device-plugin").memory_mib(6144);
        [Device::VirtioBlk, Device::Nvme, Device::VirtioGpu]
            .into_iter()
            .fold(builder, Builder::device)
    };
    pericarp::session(test, builder)
}

/// The node's functions that pods may have, by their names: those that the kernel of the
/// RuntimeClass drives.
struct Given {
    class: &'static str,
    functions: Vec<(&'static str, Function)>,
}

impl Given {
    fn new(node: &Node) -> Result<Self> {
        let all = Function::all(node)?;
        ensure!(all.len() == NAMES.len(), "{all:?}");
        allow(node, &all)?;
        let mut functions: Vec<_> = NAMES.into_iter().zip(all).collect();
        let mut class = PASSTHROUGH;
        if pericarp::passthrough_kernel().is_none() {
            eprintln!(
                "skipped: NVMe disk and display: no kernel (make kernel FLAVOUR=passthrough)"
            );
            class = "pericarp";
            functions.truncate(1);
        }
        Ok(Self { class, functions })
    }

    fn disks(&self) -> impl Iterator<Item = &(&'static str, Function)> {
        self.functions.iter().filter(|(name, _)| *name != "display")
    }

    /// Gives the functions to pods, the disks with something on them: the sum of each.
    fn bind(&self, node: &Node) -> Result<Vec<String>> {
        let write = format!(
            "dd if=/dev/urandom of=$d bs=1M count=1 2>/dev/null; {}",
            sum(1)
        );
        let sums = self.disks().map(|(_, disk)| disk.on_host(node, &write));
        let sums = sums.collect::<Result<_>>()?;
        for (_, function) in &self.functions {
            function.bind(node, VFIO)?;
        }
        Ok(sums)
    }

    /// A pod with a container for each function, which asks by `resources`, and one without.
    fn pod(&self, name: &str, resources: impl Fn(&str) -> Value) -> Value {
        let container = |name: &str, resources: Value| {
            json!({
                "name": name, "image": BUSYBOX, "imagePullPolicy": "Never",
                "command": ["sleep", "100000"], "resources": resources,
                "volumeMounts": [{"name": "usr", "mountPath": "/host/usr", "readOnly": true}],
            })
        };
        let names = self.functions.iter().map(|(name, _)| *name);
        let mut containers: Vec<Value> =
            names.map(|name| container(name, resources(name))).collect();
        containers.push(container("other", json!({})));
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {
                "runtimeClassName": self.class, "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 1, "restartPolicy": "Never",
                "volumes": [{"name": "usr", "hostPath": {"path": "/usr"}}],
                "containers": containers,
            },
        })
    }

    /// Uses the functions that a pod was given, each in its container and in no other. Finds on
    /// the disks what `sums` are of, and writes something else, whose sums it gives.
    fn used(&self, node: &Node, pod: &str, sums: &[String]) -> Result<Vec<String>> {
        let kubernetes = node.kubernetes()?;
        kubernetes.wait(node, &format!("pod/{pod}"), "condition=Ready")?;
        ensure!(locked_kib(node)? > 0, "no memory is pinned");
        let exec = |container: &str, line: &str| -> Result<String> {
            let exec = ["exec", pod, "-c", container, "--", "sh", "-c", line];
            let exec = kubernetes.kubectl().args(exec).timeout_s(LONG_TIMEOUT_S);
            Ok(node.text(&exec)?.trim().to_owned())
        };
        let nodes = "cd /dev; ls -d vd* nvme*n* dri/card* vfio 2>/dev/null; true";
        let has = exec("other", nodes)?;
        ensure!(
            has.is_empty(),
            "the container that asked for none has {has}"
        );
        let (mut before, mut written) = (sums.iter(), Vec::new());
        for (name, _) in &self.functions {
            let has = exec(name, nodes)?;
            let (node, handler) = match *name {
                "disk" => ("vd", "virtio.*-req"),
                "nvme" => ("nvme0n1", "nvme0q"),
                _ => ("dri/card0", ""),
            };
            let is_one = has.starts_with(node) && !has.contains(char::is_whitespace);
            ensure!(is_one, "the container {name} has {has:?}");
            if handler.is_empty() {
                let drawn = exec(name, &draw())?;
                ensure!(drawn.starts_with("drawn "), "{drawn}");
                continue;
            }
            let in_container = |line: &str| exec(name, &format!("d=/dev/{has}\n{line}"));
            let read = in_container(&sum(1))?;
            ensure!(Some(&read) == before.next(), "{name} reads {read}");
            written.push(in_container(&fill(mib()))?);
            exec(name, &interrupts(handler))?;
        }
        Ok(written)
    }

    /// The host reads what the pod has written, once its functions are the host's again.
    fn compare(&self, node: &Node, written: &[String]) -> Result<()> {
        for ((name, disk), written) in self.disks().zip(written) {
            let read = disk.sum(node, mib())?;
            ensure!(
                read == *written,
                "the host reads {read} from {name}, not {written}"
            );
        }
        Ok(())
    }
}

/// How much the pods write.
fn mib() -> u32 {
    if pericarp::full_sizes() { 256 } else { 8 }
}

/// Deletes a pod. After that its functions are nobody's, and nothing is left.
fn delete(node: &Node, pod: &str, before: &Leftovers) -> Result<()> {
    let delete = ["delete", "pod", pod, "--wait=true"];
    node.kubernetes()?.text(node, &delete)?;
    let locked = locked_kib(node)?;
    ensure!(locked == 0, "{locked} KiB are pinned without a pod");
    // The kubelet leaves a stopped sandbox for minutes.
    node.remove_pods()?;
    Leftovers::nothing_since(node, before).map(drop)
}

fn a_pod_asks(node: &Node) -> Result<()> {
    let kubernetes = node.kubernetes()?;
    let given = Given::new(node)?;
    for (_, function) in &given.functions {
        function.bind(node, "")?;
    }
    node.write("/etc/pericarp/config.d/61-resources.toml", RESOURCES)?;
    node.start(&Service {
        name: "device-plugin".to_owned(),
        command: Command::new("/usr/bin/pericarp")
            .args(["device-plugin"])
            .timeout_s(READY_TIMEOUT_S),
        log: node.results().join("device-plugin.log"),
        notifies: true,
    })?;
    // Registered while their own drivers have the functions, then heard of the change.
    let sums = given.bind(node)?;
    for (name, _) in &given.functions {
        let offered = format!("jsonpath={{.status.allocatable.pericarp\\.dev/{name}}}=1");
        kubernetes.wait(node, "node/node1", &offered)?;
    }
    let before = Leftovers::look(node)?;
    let limits = |name: &str| json!({"limits": {format!("pericarp.dev/{name}"): 1}});
    let mut pod = given.pod("asks", limits);
    pod["spec"]["nodeName"] = json!(NODE_NAME);
    kubernetes.apply(node, &pod.to_string())?;
    let written = given.used(node, "asks", &sums)?;
    delete(node, "asks", &before)?;
    given.compare(node, &written)
}

#[test]
fn a_pod_asks_kubelet_for_functions() {
    let Some(node) = node("device-plugin") else {
        return;
    };
    a_pod_asks(&node).unwrap();
}

/// The driver, which is its class of devices' name too.
const DRIVER: &str = "functions.tests.pericarp.dev";

/// The log of the driver among the node's results.
const DRIVER_LOG: &str = "dra-driver.log";

/// The class of functions, as whoever installs a driver makes it.
const CLASS: &str = r#"
apiVersion: resource.k8s.io/v1
kind: DeviceClass
metadata: {name: DRIVER}
spec:
  selectors:
  - cel: {expression: 'device.driver == "DRIVER"'}
"#;

/// A claim of all functions, a request for each.
fn claim(given: &Given) -> Value {
    let request = |(name, _): &(&str, Function)| {
        let exactly = json!({"deviceClassName": DRIVER});
        json!({"name": name, "exactly": exactly})
    };
    let requests: Vec<Value> = given.functions.iter().map(request).collect();
    json!({
        "apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim",
        "metadata": {"name": "functions"}, "spec": {"devices": {"requests": requests}},
    })
}

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

/// Makes a pod with the claim, of which each container has a request, and does what the scheduler
/// does, which the node has none of: picks the functions that the driver offers, writes into the
/// claim's status that they are allocated and who may use them, and binds the pod to the node.
fn schedule(node: &Node, kubernetes: &Kubernetes, pod: &str, given: &Given) -> Result<()> {
    let request = |name: &str| json!({"claims": [{"name": "claim", "request": name}]});
    let mut manifest = given.pod(pod, request);
    manifest["spec"]["resourceClaims"] =
        json!([{"name": "claim", "resourceClaimName": "functions"}]);
    kubernetes.apply(node, &manifest.to_string())?;
    let slices = kubernetes.text(node, &["get", "resourceslices", "--output=json"])?;
    let slices: Value = serde_json::from_str(&slices)?;
    let slices = slices["items"].as_array().context("no list of slices")?;
    let ours = slices
        .iter()
        .find(|slice| slice["spec"]["driver"] == DRIVER);
    let offer = &ours.context("the driver offers nothing")?["spec"];
    let offered = offer["devices"].as_array().context("no devices")?;
    let result = |(name, function): &(&str, Function)| -> Result<Value> {
        let address = "/attributes/resource.kubernetes.io~1pciBusID/string";
        let is_it = |device: &&Value| device.pointer(address) == Some(&json!(function.address));
        let device = offered.iter().find(is_it);
        let device = &device.with_context(|| format!("{name} is not in {offered:?}"))?["name"];
        let pool = &offer["pool"]["name"];
        Ok(json!({"request": name, "driver": DRIVER, "pool": pool, "device": device}))
    };
    let results = given.functions.iter().map(result);
    let results = results.collect::<Result<Vec<Value>>>()?;
    let uid = field(node, kubernetes, &format!("pod/{pod}"), ".metadata.uid")?;
    let status = json!({"status": {
        "allocation": {"devices": {"results": results}},
        "reservedFor": [{"resource": "pods", "name": pod, "uid": uid}],
    }});
    let patch = [
        "patch",
        "resourceclaim",
        "functions",
        "--subresource=status",
    ];
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

/// Deletes a pod with the claim, of which nothing is left.
fn unclaim(node: &Node, pod: &str, before: &Leftovers) -> Result<()> {
    delete(node, pod, before)?;
    let described = node.shell("ls /var/run/cdi")?;
    ensure!(described.is_empty(), "{described} is left");
    Ok(())
}

fn pods_claim(node: &Node) -> Result<()> {
    let kubernetes = node.kubernetes()?;
    let given = Given::new(node)?;
    let sums = given.bind(node)?;
    start_driver(node)?;
    kubernetes.apply(node, &CLASS.replace("DRIVER", DRIVER))?;
    kubernetes.apply(node, &claim(&given).to_string())?;
    let before = Leftovers::look(node)?;
    schedule(node, &kubernetes, "claims", &given)?;
    let written = given.used(node, "claims", &sums)?;
    let described = node.shell("cat /var/run/cdi/*")?;
    for (name, function) in &given.functions {
        let group = format!("/dev/vfio/{}\"", function.group);
        ensure!(described.contains(&group), "no {name} in {described}");
    }
    unclaim(node, "claims", &before)?;
    given.compare(node, &written)?;
    // Functions that the operator does not allow, whatever a driver gives away.
    allow(node, &[])?;
    schedule(node, &kubernetes, "denied", &given)?;
    let message = ".status.containerStatuses[?(@.name==\"disk\")].state.terminated.message";
    kubernetes.wait(node, "pod/denied", &format!("jsonpath={{{message}}}"))?;
    let message = field(node, &kubernetes, "pod/denied", message)?;
    let address = given.functions[0].1.address.as_str();
    let names = [address, "security.passthrough_devices"];
    ensure!(names.iter().all(|name| message.contains(name)), "{message}");
    unclaim(node, "denied", &before)?;
    let count = given.functions.len();
    let prepared = format!("prepared functions {count} <nil>");
    let expected = [prepared.as_str(), "unprepared functions <nil>"].repeat(2);
    let done = done(node)?;
    ensure!(done == expected, "the driver has {done:?}");
    kubernetes.text(node, &["delete", "resourceclaim/functions"])?;
    kubernetes.text(node, &["delete", "deviceclass", DRIVER])?;
    Ok(())
}

#[test]
fn pods_claim_functions() {
    let Some(node) = node("dra") else {
        return;
    };
    pods_claim(&node).unwrap();
}
