//! What a person or kubelet does with a pod through crictl, beyond the scenario that runc shares:
//! terminals, attach, much input, many lines of log, restarts, and a containerd that restarts.
//!
//! `PERICARP_FULL=1` makes the sizes those of SPEC.md; without it they fit a run of CI.

use anyhow::{Context, Result, ensure};
use pericarp_tests::node::containerd::Pod;
use pericarp_tests::node::images::BUSYBOX;
use pericarp_tests::node::{Builder, Containerd, Node, Session, Version, pericarp};
use pericarp_tests::pods::leftovers::Leftovers;
use pericarp_tests::pods::{container_config, pod_config};
use serde_json::{Value, json};

/// The handler of containerd.
const HANDLER: &str = "pericarp";

/// What runs in a terminal of the node.
const TERMINAL_FILE: &str = "/run/terminal.sh";

/// Time that one script in the node gets.
const SCRIPT_TIMEOUT_S: u64 = 1500;

fn node(test: &str) -> Option<Session> {
    pericarp::session(test, || Builder::default().name("crictl"))
}

fn script(node: &Node, containerd: &Containerd, text: &str) -> Result<String> {
    let said = containerd.script(node, SCRIPT_TIMEOUT_S, text)?;
    Ok(said.trim().to_owned())
}

/// Runs a pod for a test, and checks that nothing is left of it.
fn with_pod(test: &str, work: impl FnOnce(&Node, &Containerd, &Pod) -> Result<()>) -> Result<()> {
    let Some(node) = node(test) else {
        return Ok(());
    };
    let worked = in_pod(&node, test, work);
    if worked.is_err() {
        node.failed();
    }
    worked
}

fn in_pod(
    node: &Node,
    name: &str,
    work: impl FnOnce(&Node, &Containerd, &Pod) -> Result<()>,
) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let before = Leftovers::look(node)?;
    let pod = containerd.run_pod(node, HANDLER, &pod_config(name))?;
    work(node, &containerd, &pod)?;
    containerd.remove_pod(node, &pod)?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn terminals_and_attach() {
    with_pod("crictl-terminal", |node, containerd, pod| {
        let mut config = container_config("echo", BUSYBOX, "echo ready; exec cat");
        config["stdin"] = json!(true);
        let container = containerd.run_container(node, pod, &config)?;
        // A terminal of 33 rows and 111 columns on this side. crictl tells the size once the
        // process runs, whatever the runtime: what is asked is whether it arrives.
        let line = format!(
            "crictl exec -i -t {container} sh -c 'test -t 0 && test -t 1 && \
             until [ \"$(stty size)\" = \"33 111\" ]; do :; done 2>/dev/null && echo sized'"
        );
        node.write(TERMINAL_FILE, &format!("stty rows 33 cols 111; {line}\n"))?;
        let text = script(
            node,
            containerd,
            &format!(
                "timeout 120 script -qec 'bash {TERMINAL_FILE}' /dev/null </dev/null | tr -d '\\r'"
            ),
        )?;
        ensure!(text.ends_with("sized"), "the terminal says {text:?}");
        let text = script(
            node,
            containerd,
            &format!(
                "coproc crictl attach -i {container}
                 echo through-attach >&${{COPROC[1]}}
                 read -r line <&${{COPROC[0]}}
                 kill $COPROC_PID
                 echo \"$line\""
            ),
        )?;
        ensure!(text == "through-attach", "attach gave {text:?}");
        let logs = containerd.crictl_text(node, &["logs", &container])?;
        ensure!(logs == "ready\nthrough-attach", "the log is {logs:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn much_input_arrives_whole() {
    with_pod("crictl-stdin", |node, containerd, pod| {
        let mebibytes = if pericarp::full_sizes() { 1024 } else { 24 };
        let config = container_config("c", BUSYBOX, "exec sleep 3600");
        let container = containerd.run_container(node, pod, &config)?;
        let text = script(
            node,
            containerd,
            &format!(
                "blocks() {{ openssl enc -aes-128-ctr -nosalt -K 00 -iv 00 </dev/zero 2>/dev/null |
                     head -c {mebibytes}M; }}
                 (set +o pipefail; blocks | md5sum)
                 (set +o pipefail; blocks | crictl exec -i {container} md5sum)"
            ),
        )?;
        let sums: Vec<&str> = text.lines().collect();
        ensure!(
            sums.len() == 2 && sums[0] == sums[1],
            "{mebibytes} MiB: {sums:?}"
        );
        eprintln!("{mebibytes} MiB of input: {}", sums[0]);
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_thousand_lines_a_second_stay_in_order() {
    with_pod("crictl-logs", |node, containerd, pod| {
        let seconds = 5;
        let line = format!(
            "for second in $(seq 1 {seconds}); do seq $((second * 1000 - 999)) $((second * 1000)); \
             sleep 1; done"
        );
        let container =
            containerd.run_container(node, pod, &container_config("c", BUSYBOX, &line))?;
        ended(node, containerd, &container)?;
        let logs = containerd.crictl_text(node, &["logs", &container])?;
        let lines: Vec<&str> = logs.lines().collect();
        ensure!(lines.len() == seconds * 1000, "{} lines", lines.len());
        for (index, line) in lines.iter().enumerate() {
            ensure!(
                *line == (index + 1).to_string(),
                "line {} is {line}",
                index + 1
            );
        }
        Ok(())
    })
    .unwrap();
}

/// Processes that a container sees.
fn processes(node: &Node, containerd: &Containerd, container: &str) -> Result<String> {
    containerd.crictl_text(node, &["exec", container, "ps", "-o", "args"])
}

#[test]
fn a_container_sees_the_processes_of_its_target_alone() {
    // NamespaceMode of the CRI.
    const CONTAINER: u32 = 1;
    const TARGET: u32 = 3;
    with_pod("crictl-target", |node, containerd, pod| {
        let run = |name: &str, seconds: u32, target: Option<&str>| {
            let line = format!("sleep {seconds}; true");
            let mut config = container_config(name, BUSYBOX, &line);
            let options = match target {
                Some(id) => json!({"pid": TARGET, "target_id": id}),
                None => json!({"pid": CONTAINER}),
            };
            config["linux"] = json!({"security_context": {"namespace_options": options}});
            containerd.run_container(node, pod, &config)
        };
        let target = run("target", 1001, None)?;
        let other = run("other", 1002, None)?;
        let debugger = run("debugger", 1003, Some(&target))?;
        let seen = processes(node, containerd, &debugger)?;
        ensure!(
            seen.contains("sleep 1001") && seen.contains("sleep 1003"),
            "the debugger sees {seen}"
        );
        ensure!(!seen.contains("sleep 1002"), "the debugger sees {seen}");
        let seen = processes(node, containerd, &other)?;
        ensure!(!seen.contains("sleep 1003"), "the other sees {seen}");
        // cAdvisor reads a pod's network counters by its PID.
        let network = "cat /proc/$(crictl inspectp -o go-template --template '{{.info.pid}}' \
                       $POD)/net/dev";
        let counters = script(node, containerd, &network.replace("$POD", &pod.id))?;
        ensure!(counters.contains("eth0:"), "{counters}");
        Ok(())
    })
    .unwrap();
}

/// Waits for the end of a container and gives its status.
fn ended(node: &Node, containerd: &Containerd, container: &str) -> Result<Value> {
    let text = script(
        node,
        containerd,
        &format!(
            "while [ -z \"$(crictl ps -a --quiet --state Exited --id {container})\" ]; do :; done
             crictl inspect {container}"
        ),
    )?;
    let status: Value = serde_json::from_str(&text).context("crictl inspect printed no JSON")?;
    Ok(status["status"].clone())
}

#[test]
fn containers_end_and_start_again_in_a_living_pod() {
    with_pod("crictl-restarts", |node, containerd, pod| {
        // As kubelet does: an init container to its end, then the same container three times.
        let init =
            containerd.run_container(node, pod, &container_config("init", BUSYBOX, "exit 0"))?;
        let status = ended(node, containerd, &init)?;
        ensure!(
            status["reason"] == "Completed",
            "the init container: {status}"
        );
        for attempt in 0..3 {
            let mut config = container_config("c", BUSYBOX, &format!("exit {}", attempt + 3));
            config["metadata"]["attempt"] = json!(attempt);
            config["log_path"] = json!(format!("c-{attempt}.log"));
            let container = containerd.run_container(node, pod, &config)?;
            let status = ended(node, containerd, &container)?;
            ensure!(
                status["exitCode"] == attempt + 3,
                "attempt {attempt}: {status}"
            );
            ensure!(status["reason"] == "Error", "attempt {attempt}: {status}");
        }
        let line = "exec tail /dev/zero";
        let mut config = container_config("greedy", BUSYBOX, line);
        config["linux"] = json!({"resources": {"memory_limit_in_bytes": 32 << 20}});
        let greedy = containerd.run_container(node, pod, &config)?;
        let status = ended(node, containerd, &greedy)?;
        ensure!(status["exitCode"] == 137, "out of memory: {status}");
        ensure!(status["reason"] == "OOMKilled", "out of memory: {status}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn pods_outlive_containerd() {
    with_pod("crictl-restart", |node, containerd, pod| {
        let config = container_config("c", BUSYBOX, "echo before; exec sleep 3600");
        let container = containerd.run_container(node, pod, &config)?;
        containerd.restart(node)?;
        let state = containerd.crictl_text(node, &["ps", "--quiet", "--state", "Running"])?;
        ensure!(
            container.starts_with(&state) || state == container,
            "running: {state:?}"
        );
        let text = containerd.crictl_text(node, &["exec", &container, "echo", "after"])?;
        ensure!(text == "after", "exec gave {text:?}");
        let second = container_config("second", BUSYBOX, "exec sleep 3600");
        containerd.run_container(node, pod, &second)?;
        containerd.crictl_text(node, &["stop", "--timeout", "0", &container])?;
        let status = ended(node, containerd, &container)?;
        ensure!(status["exitCode"] == 137, "stopped: {status}");
        Ok(())
    })
    .unwrap();
}
