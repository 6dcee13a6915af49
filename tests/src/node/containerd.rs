//! containerd in the node: configuration of both versions, and its command line tools.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use super::channel::{Command, Service};
use super::deps::component;
use super::images::{self, PAUSE, registry};
use super::{Node, Output};

/// Time that containerd gets to be ready.
const READY_TIMEOUT_S: u64 = 240;

/// Time that containerd gets to see the end of the containers of a dead shim.
const END_TIMEOUT_S: u64 = 120;

/// What crictl waits for an answer; its own default of 2 s is less than a pod takes here.
const CRICTL_TIMEOUT: &str = "120s";

/// crictl's defaults in the node, for commands that a person types.
const CRICTL_CONFIG: &str = "/etc/crictl.yaml";

/// Where CNI's configuration is.
const CNI_FOLDER: &str = "/etc/cni/net.d";

/// containerd's folder of registry settings.
const CERTS_FOLDER: &str = "/etc/containerd/certs.d";

/// The bridge that pods are on. CNI's conformance wants both families on one interface.
const CNI_CONFIG: &str = r#"{"cniVersion": "1.0.0", "name": "node", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local",
            "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd00:88::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}},
  {"type": "bandwidth", "capabilities": {"bandwidth": true}}]}
"#;

/// The handler whose guests have the kernel with drivers of devices.
pub const PASSTHROUGH: &str = "pericarp-passthrough";

/// The versions of containerd that the node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// 2.3
    V23,
    /// 1.7
    V17,
}

impl Version {
    fn component(self) -> &'static str {
        match self {
            Self::V23 => "containerd",
            Self::V17 => "containerd-1.7",
        }
    }

    /// Its folder below /run and /var/lib, and the name of its log.
    fn name(self) -> &'static str {
        self.component()
    }
}

/// A running containerd.
#[derive(Debug, Clone)]
pub struct Containerd {
    version: Version,
}

/// A pod to run through crictl.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// File with its configuration in the node.
    pub config: String,
}

impl Containerd {
    /// Which version this is.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> String {
        format!("/run/{0}/{0}.sock", self.version.name())
    }

    /// A `crictl` command for this containerd.
    #[must_use]
    pub fn crictl(&self) -> Command {
        let endpoint = format!("unix://{}", self.socket());
        Command::new("crictl")
            .args(["--timeout", CRICTL_TIMEOUT])
            .env("CONTAINER_RUNTIME_ENDPOINT", &endpoint)
            .env("IMAGE_SERVICE_ENDPOINT", endpoint)
    }

    /// A `ctr` command for this containerd.
    #[must_use]
    pub fn ctr(&self) -> Command {
        let program = component(self.version.component())
            .and_then(|component| component.folder())
            .map_or_else(
                |_| "ctr".to_owned(),
                |f| f.join("ctr").to_string_lossy().into_owned(),
            );
        Command::new(program).args(["--address", &self.socket()])
    }

    /// Its configuration in the node.
    #[must_use]
    pub fn config_file(&self) -> String {
        format!("/etc/{}/config.toml", self.version.name())
    }

    fn service(&self, node: &Node, name: &str) -> Result<Service> {
        // Its own shim for runc comes first in its PATH.
        let folder = component(self.version.component())?.built()?;
        let path = format!("{}:{}", folder.display(), node.search_path());
        Ok(Service {
            name: name.to_owned(),
            command: Command::new(folder.join("containerd").to_string_lossy())
                .args(["--config", &self.config_file()])
                .env("PATH", path)
                .timeout_s(READY_TIMEOUT_S),
            log: node.results().join(format!("{}.log", self.version.name())),
            notifies: true,
        })
    }

    /// Kills containerd with SIGKILL and starts it again; pods should live on.
    pub fn restart(&self, node: &Node) -> Result<()> {
        self.restart_by(node, "KILL")
    }

    /// Ends containerd with a signal and starts it again; pods should live on.
    pub fn restart_by(&self, node: &Node, signal: &str) -> Result<()> {
        let line = format!(
            "pid=$(pgrep -f '^[^ ]*containerd --config {}'); kill -{signal} $pid; \
             tail -s 0.1 --pid=$pid -f /dev/null",
            self.config_file()
        );
        node.shell(&line).context("cannot kill containerd")?;
        // Another name each time: the watcher of the dead one may still tell its end.
        static RESTARTS: AtomicU32 = AtomicU32::new(1);
        let number = RESTARTS.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}", self.version.name());
        node.start(&self.service(node, &name)?)
    }

    /// Starts containerd with its configuration, and imports the images.
    pub(super) fn start(node: &Node, version: Version) -> Result<Self> {
        let containerd = Self { version };
        let cni = component("cni")?.built()?;
        let name = version.name();
        let config = match version {
            Version::V23 => config_2(&containerd.socket(), name, &cni.to_string_lossy()),
            Version::V17 => config_1(&containerd.socket(), name, &cni.to_string_lossy()),
        };
        node.write(&containerd.config_file(), &config)?;
        node.write(&format!("{CNI_FOLDER}/10-node.conflist"), CNI_CONFIG)?;
        let hosts = format!(
            "server = 'http://{0}'\n[host.'http://{0}']\ncapabilities = ['pull', 'resolve']\n",
            registry::ADDRESS
        );
        node.write(&format!("{CERTS_FOLDER}/_default/hosts.toml"), &hosts)?;
        let crictl = format!(
            "runtime-endpoint: unix://{}\ntimeout: 120\n",
            containerd.socket()
        );
        node.write(CRICTL_CONFIG, &crictl)?;
        node.start(&containerd.service(node, name)?)?;
        let archive = images::best()?.archive();
        let import = containerd
            .ctr()
            .args(["--namespace", "k8s.io", "images", "import"]);
        node.text(&import.arg(archive.to_string_lossy()))?;
        Ok(containerd)
    }

    /// Runs `crictl` with arguments, whatever its end.
    pub fn crictl_run(&self, node: &Node, arguments: &[&str]) -> Result<Output> {
        node.run(&self.crictl().args(arguments.iter().copied()))
    }

    /// Runs `crictl` with arguments; it must succeed. Gives what it printed, trimmed.
    pub fn crictl_text(&self, node: &Node, arguments: &[&str]) -> Result<String> {
        let text = node.text(&self.crictl().args(arguments.iter().copied()))?;
        Ok(text.trim().to_owned())
    }

    /// Runs a pod sandbox under a handler; `config` is the pod's configuration as JSON.
    pub fn run_pod(&self, node: &Node, handler: &str, config: &serde_json::Value) -> Result<Pod> {
        let name = config["metadata"]["name"].as_str().unwrap_or("pod");
        let path = format!("/run/pods/{}/{name}.json", self.version.name());
        node.write(&path, &config.to_string())?;
        let id = self.crictl_text(node, &["runp", "--runtime", handler, &path])?;
        Ok(Pod { id, config: path })
    }

    /// Creates and starts a container in a pod; gives its id.
    pub fn run_container(
        &self,
        node: &Node,
        pod: &Pod,
        config: &serde_json::Value,
    ) -> Result<String> {
        let name = config["metadata"]["name"].as_str().unwrap_or("container");
        let path = format!("{}.{name}.json", pod.config);
        node.write(&path, &config.to_string())?;
        let id = self.crictl_text(node, &["create", &pod.id, &path, &pod.config])?;
        self.crictl_text(node, &["start", &id])?;
        Ok(id)
    }

    /// Runs a line of shell in a container, and returns what it printed.
    pub fn exec_shell(&self, node: &Node, container: &str, line: &str) -> Result<String> {
        self.crictl_text(node, &["exec", container, "sh", "-c", line])
    }

    /// Runs bash with crictl's environment, and returns what it printed.
    pub fn script(&self, node: &Node, timeout_s: u64, text: &str) -> Result<String> {
        let mut command = Command::shell(text).timeout_s(timeout_s);
        command.env = self.crictl().env;
        node.text(&command)
    }

    /// Waits until containerd has seen the end of every container of a pod.
    ///
    /// When a shim dies, containerd forgets its tasks at once and marks their containers as exited
    /// later, by an event. A removal in between is refused by containerd itself ("container is
    /// still running, to stop first"), whatever the runtime; kubelet asks again.
    pub fn wait_for_end_of_containers(&self, node: &Node, pod: &Pod) -> Result<()> {
        let line = format!(
            "while [ -n \"$(crictl ps --quiet --state Running --pod {})\" ]; do :; done",
            pod.id
        );
        self.script(node, END_TIMEOUT_S, &line)
            .map(|_| ())
            .context("containerd did not see the end of the pod's containers")
    }

    /// Removes a pod with its containers.
    pub fn remove_pod(&self, node: &Node, pod: &Pod) -> Result<()> {
        self.crictl_text(node, &["rmp", "-f", &pod.id]).map(|_| ())
    }
}

/// Configuration of containerd 2.x (docs/cri/config.md, version 3).
fn config_2(socket: &str, name: &str, cni: &str) -> String {
    let runtime = "plugins.'io.containerd.cri.v1.runtime'";
    let images = "plugins.'io.containerd.cri.v1.images'";
    let handlers = handlers(&format!("{runtime}.containerd.runtimes"), true);
    format!(
        "version = 3
root = '/var/lib/{name}'
state = '/run/{name}'
[grpc]
address = '{socket}'
[{images}.pinned_images]
sandbox = '{PAUSE}'
[{images}.registry]
config_path = '{CERTS_FOLDER}'
[{runtime}.cni]
bin_dirs = ['{cni}']
conf_dir = '{CNI_FOLDER}'
{handlers}"
    )
}

/// Configuration of containerd 1.7 (version 2).
fn config_1(socket: &str, name: &str, cni: &str) -> String {
    let cri = "plugins.'io.containerd.grpc.v1.cri'";
    let handlers = handlers(&format!("{cri}.containerd.runtimes"), false);
    format!(
        "version = 2
root = '/var/lib/{name}'
state = '/run/{name}'
[grpc]
address = '{socket}'
[{cri}]
sandbox_image = '{PAUSE}'
[{cri}.registry]
config_path = '{CERTS_FOLDER}'
[{cri}.cni]
bin_dir = '{cni}'
conf_dir = '{CNI_FOLDER}'
{handlers}"
    )
}

fn handlers(runtimes: &str, has_sandbox_api: bool) -> String {
    let mut text = format!("[{runtimes}.runc]\nruntime_type = 'io.containerd.runc.v2'\n");
    let mut pericarp = vec![
        ("pericarp", "podsandbox", None),
        (PASSTHROUGH, "podsandbox", Some("passthrough")),
    ];
    if has_sandbox_api {
        pericarp.push(("pericarp-sandbox", "shim", None));
    }
    for (handler, sandboxer, flavour) in pericarp {
        text.push_str(&format!(
            "[{runtimes}.{handler}]\nruntime_type = 'io.containerd.pericarp.v2'\n\
             privileged_without_host_devices = true\npod_annotations = ['pericarp.dev/*']\n\
             container_annotations = ['pericarp.dev/*']\n"
        ));
        if has_sandbox_api {
            text.push_str(&format!("sandboxer = '{sandboxer}'\n"));
        }
        if let Some(flavour) = flavour {
            text.push_str(&format!(
                "[{runtimes}.{handler}.options]\nFlavour = '{flavour}'\n"
            ));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_configurations_name_every_handler_that_their_version_knows() {
        let new = config_2("/s", "n", "/cni");
        assert!(new.contains("runtimes.pericarp-sandbox]") && new.contains("sandboxer = 'shim'"));
        let old = config_1("/s", "n", "/cni");
        assert!(old.contains("runtimes.pericarp]") && !old.contains("sandboxer"));
    }

    #[test]
    fn the_network_configuration_is_json() {
        let parsed: serde_json::Value = serde_json::from_str(CNI_CONFIG).unwrap();
        assert_eq!(parsed["plugins"][0]["type"], "bridge");
    }
}
