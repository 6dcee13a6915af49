//! etcd, API server and kubelet in the node, unmodified.

use anyhow::{Context, Result};

use super::channel::{Command, Service};
use super::deps::component;
use super::{Containerd, Node};

/// Time that each component gets to be ready.
const READY_TIMEOUT_S: u64 = 300;

/// Where its files are.
const FOLDER: &str = "/run/kubernetes";

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
             openssl ecparam -name prime256v1 -genkey -noout -out {FOLDER}/sa.key
             openssl ec -in {FOLDER}/sa.key -pubout -out {FOLDER}/sa.pub 2>/dev/null"
        ))?;
        let kubelet = kubelet_config(&containerd.socket());
        node.write(&format!("{FOLDER}/kubelet.yaml"), &kubelet)?;
        start(node, "etcd", etcd())?;
        start(node, "kube-apiserver", api_server())?;
        start(node, "kubelet", kubelet_command())?;
        let kubernetes = Self {};
        let this_node = format!("node/{NODE_NAME}");
        kubernetes.wait(node, &this_node, "create")?;
        kubernetes.wait(node, &this_node, "condition=Ready")?;
        for handler in ["runc", "pericarp", "pericarp-sandbox"] {
            kubernetes.apply(node, &runtime_class(handler))?;
        }
        Ok(kubernetes)
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

fn etcd() -> Command {
    Command::new("etcd").args([
        "--data-dir=/var/lib/etcd/data",
        "--unsafe-no-fsync",
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
    ])
}

fn api_server() -> Command {
    Command::new("kube-apiserver")
        .args([
            "--etcd-servers=http://127.0.0.1:2379",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://node",
            "--authorization-mode=AlwaysAllow",
            "--disable-admission-plugins=ServiceAccount",
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
