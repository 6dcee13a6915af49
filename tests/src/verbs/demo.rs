//! A pod of two containers in its own VM, step by step.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::node::containerd::Pod;
use crate::node::images::BUSYBOX;
use crate::node::{Containerd, Node};
use crate::pods::leftovers::Leftovers;
use crate::pods::{addresses, container_config, fetch, pod_config, url};

/// The handler of containerd that the pod runs under.
const HANDLER: &str = "pericarp";

/// The pod's name.
const POD: &str = "demo";

/// Port of the pod's web server.
const PORT: u16 = 8080;

/// How many steps a demo has: those of its caller and ours.
const STEPS: usize = 9;

/// What a person must have built before, and how.
const NEEDED: [(&str, &str); 5] = [
    ("/usr/bin/containerd-shim-pericarp-v2", "make build"),
    ("/usr/libexec/pericarp/pericarp-vmm", "make build"),
    ("/usr/libexec/pericarp/virtiofsd", "make node-deps"),
    ("/usr/share/pericarp/vmlinux", "make kernel"),
    ("/usr/share/pericarp/guest.erofs", "make guest-image"),
];

/// Says which step runs and how long it took.
#[derive(Debug)]
pub struct Steps {
    number: usize,
    start: Instant,
}

impl Default for Steps {
    fn default() -> Self {
        Self {
            number: 0,
            start: Instant::now(),
        }
    }
}

impl Steps {
    /// Runs the next step.
    pub fn step<T>(&mut self, what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.number += 1;
        println!("[{}/{STEPS}] {what}", self.number);
        let start = Instant::now();
        let done = work().with_context(|| format!("step {} ({what}) failed", self.number))?;
        println!("      {:.1} s", start.elapsed().as_secs_f64());
        Ok(done)
    }

    /// Says that all is done.
    pub fn end(&self) {
        println!("done in {:.0} s", self.start.elapsed().as_secs_f64());
    }
}

fn say(what: &str, value: &str) {
    println!("      {what:<34} {value}");
}

/// The demo in a node that is up: from the first look to the comparison at the end.
pub fn run(node: &Node, containerd: &Containerd, steps: &mut Steps) -> Result<()> {
    installed(node)?;
    let before = Leftovers::look(node)?;
    let pod = steps.step("start a pod: crictl runp --runtime pericarp", || {
        let pod = containerd.run_pod(node, HANDLER, &pod_config(POD))?;
        say("pod", &pod.id[..13.min(pod.id.len())]);
        Ok(pod)
    })?;
    let containers = steps.step("create and start two containers in it", || {
        start_containers(node, containerd, &pod)
    })?;
    steps.step("whose kernel?", || kernels(node, containerd, &containers))?;
    steps.step("reach the pod from outside its VM", || {
        network(node, containerd, &pod)
    })?;
    steps.step("exec and logs", || {
        exec_and_logs(node, containerd, &containers)
    })?;
    steps.step("remove the pod: crictl rmp -f; what is left?", || {
        containerd.remove_pod(node, &pod)?;
        let after = Leftovers::nothing_since(node, &before)?;
        for kind in ["process", "mount", "cgroup", "interface", "file", "socket"] {
            let counts = format!("{} before, {} now", before.count(kind), after.count(kind));
            say(&format!("{kind} count"), &counts);
        }
        Ok(())
    })
}

fn installed(node: &Node) -> Result<()> {
    for (file, how) in NEEDED {
        let there = node.run(&crate::node::Command::new("test").args(["-e", file]))?;
        ensure!(there.exit.success(), "{file} is not built: run `{how}`");
    }
    Ok(())
}

fn start_containers(node: &Node, containerd: &Containerd, pod: &Pod) -> Result<[String; 2]> {
    let start = |name: &str, line: &str| {
        let mut config = container_config(name, BUSYBOX, line);
        // What kubelet sets and `crictl ps` shows.
        config["labels"] = json!({
            "io.kubernetes.pod.name": POD,
            "io.kubernetes.pod.namespace": "default",
        });
        containerd.run_container(node, pod, &config)
    };
    let page = "mkdir /srv; echo hello from the pod >/srv/index.html; echo web server starts";
    let web = start("web", &format!("{page}; exec httpd -f -p {PORT} -h /srv"))?;
    let other = start("other", "echo second container starts; exec sleep 3600")?;
    let list = containerd.crictl_text(node, &["ps", "--pod", &pod.id])?;
    for line in list.lines() {
        println!("      {line}");
    }
    Ok([web, other])
}

fn kernels(node: &Node, containerd: &Containerd, containers: &[String; 2]) -> Result<()> {
    let host = node.shell("uname -r")?;
    say("uname -r on the host", host.trim());
    for (name, container) in ["web", "other"].iter().zip(containers) {
        let guest = containerd.crictl_text(node, &["exec", container, "uname", "-r"])?;
        say(&format!("uname -r in container {name}"), &guest);
        ensure!(
            guest != host.trim(),
            "container {name} runs on the host's kernel"
        );
    }
    Ok(())
}

fn network(node: &Node, containerd: &Containerd, pod: &Pod) -> Result<()> {
    let addresses = addresses(node, containerd, pod)?;
    ensure!(!addresses.is_empty(), "the pod has no address");
    for address in addresses {
        let url = url(&address, PORT, "");
        let page = fetch(node, &url)?;
        say(&format!("wget {url}"), &page);
        ensure!(page == "hello from the pod", "{url} answered {page:?}");
    }
    Ok(())
}

fn exec_and_logs(node: &Node, containerd: &Containerd, [web, other]: &[String; 2]) -> Result<()> {
    let processes = containerd.crictl_text(node, &["exec", other, "ps", "-o", "pid,args"])?;
    println!("      crictl exec other ps");
    for line in processes.lines() {
        println!("        {line}");
    }
    let status = containerd.crictl_run(node, &["exec", other, "sh", "-c", "exit 7"])?;
    ensure!(
        status.stderr.contains("exit code 7"),
        "exec lost the exit status: {}",
        status.stderr
    );
    say("crictl exec other sh -c 'exit 7'", "exit code 7");
    for (name, container) in [("web", web), ("other", other)] {
        let logs = containerd.crictl_text(node, &["logs", container])?;
        say(&format!("crictl logs {name}"), &logs);
        ensure!(logs.contains("starts"), "the log of {name} is {logs:?}");
    }
    Ok(())
}
