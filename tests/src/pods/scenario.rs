//! What every handler must do alike, through crictl, with every containerd.

use anyhow::{Context, Result, ensure};

use super::leftovers::Leftovers;
use super::{addresses, container_config, fetch, pod_config, url};
use crate::node::containerd::Pod;
use crate::node::images::BUSYBOX;
use crate::node::{Containerd, Node, Version};

/// Port of the pod's web server that listens on every address.
const OPEN_PORT: u16 = 8080;

/// Port of the pod's web server that listens on the pod's loopback only.
const LOOPBACK_PORT: u16 = 8081;

/// Port of the node that is forwarded to it.
const FORWARDED_PORT: u16 = 18081;

/// A pod of two containers from start to removal: host name, exec and its status, logs, both
/// addresses, a forwarded port, and nothing left.
pub fn pod_through_crictl(node: &Node, version: Version, handler: &str) -> Result<()> {
    let containerd = node.containerd(version)?;
    let before = Leftovers::look(node)?;
    // Logs of one name would be appended to.
    let name = format!("{handler}-{version:?}").to_lowercase();
    let pod = containerd.run_pod(node, handler, &pod_config(&name))?;
    let first = first_container(node, &containerd, &pod, &name).context("first container")?;
    network(node, &containerd, &pod).context("network")?;
    second_container(node, &containerd, &pod, &first).context("second container")?;
    containerd.remove_pod(node, &pod)?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

fn first_container(node: &Node, containerd: &Containerd, pod: &Pod, name: &str) -> Result<String> {
    let line = format!(
        "mkdir -p /srv; echo page >/srv/page; httpd -p {OPEN_PORT} -h /srv; echo started; \
         exec httpd -f -p 127.0.0.1:{LOOPBACK_PORT} -h /srv"
    );
    let config = container_config("web", BUSYBOX, &line);
    let container = containerd.run_container(node, pod, &config)?;
    let hostname = containerd.crictl_text(node, &["exec", &container, "hostname"])?;
    ensure!(hostname == name, "the host name is {hostname}");
    let failing = ["exec", &container, "sh", "-c", "echo to-stderr >&2; exit 7"];
    let output = containerd.crictl_run(node, &failing)?;
    ensure!(!output.exit.success(), "exec of `exit 7` succeeded");
    ensure!(
        output.stderr.contains("to-stderr") && output.stderr.contains("exit code 7"),
        "exec lost standard error or the exit status: {}",
        output.stderr
    );
    let logs = containerd.crictl_text(node, &["logs", &container])?;
    ensure!(logs == "started", "the log is {logs:?}");
    Ok(container)
}

fn network(node: &Node, containerd: &Containerd, pod: &Pod) -> Result<()> {
    let addresses = addresses(node, containerd, pod)?;
    ensure!(
        addresses.len() == 2,
        "one address of each family, not {addresses:?}"
    );
    for address in &addresses {
        let page = fetch(node, &url(address, OPEN_PORT, "page"))?;
        ensure!(page == "page", "{address} answered {page:?}");
    }
    let page = through_port_forward(node, containerd, pod).context("port-forward")?;
    ensure!(page == "page", "the forwarded port answered {page:?}");
    Ok(())
}

/// Forwards a port of the node to the pod's loopback; crictl's first line says that it listens.
fn through_port_forward(node: &Node, containerd: &Containerd, pod: &Pod) -> Result<String> {
    let line = format!(
        "coproc crictl port-forward {pod} {FORWARDED_PORT}:{LOOPBACK_PORT}
         trap 'kill $COPROC_PID' EXIT
         read -r forwarding <&${{COPROC[0]}}
         timeout 60 busybox wget -q -O - http://127.0.0.1:{FORWARDED_PORT}/page",
        pod = pod.id
    );
    let mut command = crate::node::Command::shell(line);
    command.env = containerd.crictl().env;
    Ok(node.text(&command)?.trim().to_owned())
}

/// A second container shares the pod's network and is stopped and removed while the first lives.
fn second_container(node: &Node, containerd: &Containerd, pod: &Pod, first: &str) -> Result<()> {
    let config = container_config("second", BUSYBOX, "exec sleep 1000");
    let second = containerd.run_container(node, pod, &config)?;
    let url = url("127.0.0.1", LOOPBACK_PORT, "page");
    let page = containerd.crictl_text(node, &["exec", &second, "wget", "-q", "-O", "-", &url])?;
    ensure!(page == "page", "the other container answered {page:?}");
    containerd.crictl_text(node, &["stop", "--timeout", "0", &second])?;
    containerd.crictl_text(node, &["rm", &second])?;
    containerd.crictl_text(node, &["exec", first, "true"])?;
    Ok(())
}
