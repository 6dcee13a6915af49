//! etcd, API server and kubelet in the node, unmodified.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use super::channel::{Command, Service};
use super::containerd::PASSTHROUGH;
use super::deps::component;
use super::{Containerd, Node, paths};

/// Time that each component gets to be ready.
const READY_TIMEOUT_S: u64 = 300;

/// Where its files are.
pub const FOLDER: &str = "/run/kubernetes";

/// The configuration of kubectl and kubelet.
pub const KUBECONFIG: &str = "/run/kubernetes/kubeconfig";

/// Where kubelet looks for static pods.
pub const MANIFESTS: &str = "/etc/kubernetes/manifests";

/// The name of the only node.
pub const NODE_NAME: &str = "node1";

const KUBECONFIG_TEXT: &str = r#"apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:6443", insecure-skip-tls-verify: true}}]
users: [{name: u, user: {token: token}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
"#;

/// A running Kubernetes of one node.
#[derive(Debug, Clone)]
pub struct Kubernetes {}

impl Kubernetes {
    /// Starts everything and waits until the node is Ready.
    pub(super) fn start(node: &Node, containerd: &Containerd) -> Result<Self> {
        component("kubernetes")?.built()?;
        component("etcd")?.built()?;
        node.write(KUBECONFIG, KUBECONFIG_TEXT)?;
        node.write(
            &format!("{FOLDER}/tokens.csv"),
            "token,admin,admin,system:masters\n",
        )?;
        node.shell(&format!(
            "mkdir -p {MANIFESTS}
             # kubelet counts the node's huge pages when it starts.
             echo 16 >/proc/sys/vm/nr_hugepages
             openssl ecparam -name prime256v1 -genkey -noout -out {FOLDER}/sa.key
             openssl ec -in {FOLDER}/sa.key -pubout -out {FOLDER}/sa.pub 2>/dev/null"
        ))?;
        let kubelet = kubelet_config(&containerd.socket());
        node.write(&format!("{FOLDER}/kubelet.yaml"), &kubelet)?;
        start(node, "etcd", etcd(node.has_disk()))?;
        start(node, "kube-apiserver", api_server())?;
        let kubernetes = Self {};
        kubernetes.start_kubelet(node)?;
        for handler in ["runc", "pericarp-sandbox", PASSTHROUGH] {
            kubernetes.apply(node, &runtime_class(handler))?;
        }
        let shipped = paths::checkout().join("deploy/kubernetes/runtimeclass.yaml");
        let shipped = std::fs::read_to_string(&shipped)
            .with_context(|| format!("cannot read {}", shipped.display()))?;
        kubernetes.apply(node, &shipped)?;
        Ok(kubernetes)
    }

    /// Starts kubelet and waits until the node is Ready.
    pub fn start_kubelet(&self, node: &Node) -> Result<()> {
        // Another name each time: the watcher of a dead one may still tell its end.
        static STARTS: AtomicU32 = AtomicU32::new(1);
        let number = STARTS.fetch_add(1, Ordering::Relaxed);
        start(node, &format!("kubelet-{number}"), kubelet_command())?;
        let this_node = format!("node/{NODE_NAME}");
        self.wait(node, &this_node, "create")?;
        self.wait(node, &this_node, "condition=Ready")
    }

    /// Kills kubelet, as a crash would.
    pub fn stop_kubelet(&self, node: &Node) -> Result<()> {
        let line = "pid=$(pgrep -x kubelet); kill -9 $pid; tail -s 0.1 --pid=$pid -f /dev/null";
        node.shell(line).map(drop).context("cannot kill kubelet")
    }

    /// A `kubectl` command.
    #[must_use]
    pub fn kubectl(&self) -> Command {
        Command::new("kubectl").env("KUBECONFIG", KUBECONFIG)
    }

    /// Runs `kubectl`, which must succeed; gives what it printed, trimmed.
    pub fn text(&self, node: &Node, arguments: &[&str]) -> Result<String> {
        let text = node.text(&self.kubectl().args(arguments.iter().copied()))?;
        Ok(text.trim().to_owned())
    }

    /// Applies a manifest.
    pub fn apply(&self, node: &Node, manifest: &str) -> Result<()> {
        let command = self.kubectl().args(["apply", "-f", "-"]);
        let mut bytes = manifest.as_bytes();
        let output = node.run_with(&command, Some(&mut bytes), None)?;
        output.checked("kubectl apply").map(|_| ())
    }

    /// Waits, by a watch, for a condition of an object, such as `condition=Ready` of `pod/p`.
    pub fn wait(&self, node: &Node, object: &str, condition: &str) -> Result<()> {
        let timeout = format!("--timeout={READY_TIMEOUT_S}s");
        let condition = format!("--for={condition}");
        let command = self.kubectl().args(["wait", object, &condition, &timeout]);
        node.text(&command.timeout_s(READY_TIMEOUT_S))
            .map(|_| ())
            .with_context(|| format!("{object} is not {condition}"))
    }
}

fn start(node: &Node, name: &str, command: Command) -> Result<()> {
    node.start(&Service {
        name: name.to_owned(),
        command: command.timeout_s(READY_TIMEOUT_S),
        log: node.results().join(format!("{name}.log")),
        notifies: true,
    })
}

fn etcd(must_sync: bool) -> Command {
    Command::new("etcd").args([
        "--data-dir=/var/lib/etcd/data",
        &format!("--unsafe-no-fsync={}", !must_sync),
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
    ])
}

fn api_server() -> Command {
    Command::new("kube-apiserver")
        .args([
            "--etcd-servers=http://127.0.0.1:2379",
            "--service-cluster-ip-range=10.0.0.0/24,fd00:10::/112",
            // An extension's Service has no other address: a kube-proxy runs in few cases.
            "--enable-aggregator-routing=true",
            // The node's name is the loopback's, which no proxy of the API server goes to.
            "--kubelet-preferred-address-types=InternalIP",
            "--service-account-issuer=https://node",
            "--authorization-mode=AlwaysAllow",
            // No controller runs that would take its finalizers away again.
            "--disable-admission-plugins=ServiceAccount,StorageObjectInUseProtection",
            "--secure-port=6443",
            "--bind-address=127.0.0.1",
            "--advertise-address=10.77.0.1",
            "--enable-priority-and-fairness=false",
            "--allow-privileged=true",
        ])
        .arg(format!("--service-account-key-file={FOLDER}/sa.pub"))
        .arg(format!(
            "--service-account-signing-key-file={FOLDER}/sa.key"
        ))
        .arg(format!("--token-auth-file={FOLDER}/tokens.csv"))
        .arg(format!("--cert-dir={FOLDER}/certs"))
}

fn kubelet_command() -> Command {
    Command::new("kubelet").args([
        &format!("--config={FOLDER}/kubelet.yaml"),
        &format!("--kubeconfig={KUBECONFIG}"),
        &format!("--hostname-override={NODE_NAME}"),
        "--root-dir=/var/lib/kubelet",
        // Not the address of its host name, which is the loopback: the API server asks no such one.
        "--node-ip=10.77.0.1",
    ])
}

fn kubelet_config(socket: &str) -> String {
    format!(
        r#"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}
authorization: {{mode: AlwaysAllow}}
cgroupDriver: cgroupfs
containerRuntimeEndpoint: unix://{socket}
failSwapOn: false
syncFrequency: 10s
evictionHard:
  memory.available: 10Mi
  nodefs.available: 0%
  imagefs.available: 0%
  nodefs.inodesFree: 0%
clusterDNS: ["10.0.0.10"]
enforceNodeAllocatable: ["pods"]
staticPodPath: {MANIFESTS}
"#
    )
}

fn runtime_class(handler: &str) -> String {
    format!(
        "apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {{name: {handler}}}\n\
         handler: {handler}\n"
    )
}
