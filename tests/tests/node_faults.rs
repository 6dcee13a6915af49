//! Many pods, and pods whose processes are killed at random moments: nothing may be left of them.
//!
//! `PERICARP_FULL=1` makes the numbers those of SPEC.md; without it they fit a run of CI. The
//! moments of the kills follow from `PERICARP_SEED` (printed; a fixed one unless it is set).

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pericarp_tests::node::containerd::Pod;
use pericarp_tests::node::images::BUSYBOX;
use pericarp_tests::node::{Builder, Containerd, Node, Session, Version, pericarp};
use pericarp_tests::pods::leftovers::Leftovers;
use pericarp_tests::pods::{container_config, pod_config};
use serde_json::json;

/// The handler of containerd.
const HANDLER: &str = "pericarp";

/// Names the moments of the kills.
const SEED_VARIABLE: &str = "PERICARP_SEED";

/// How a line about a bundle of containerd begins.
const BUNDLES: &str = "file /run/containerd/io.containerd.runtime.v2.task/";

/// Where the scripts of this file keep their files in the node.
const FOLDER: &str = "/run/faults";

/// Time that one script in the node gets.
const SCRIPT_TIMEOUT_S: u64 = 3000;

/// Latest moment of a kill after the pod's begin: about when its first container runs in the node.
const KILL_LATEST_MS: u64 = 7_000;

/// Memory that the node may have less of afterwards: noise of its caches, less than one pod.
const MEMORY_SLACK_KIB: u64 = 24 * 1024;

/// A pod's life in one line of shell; `$1` is its number.
const LIFE: &str = "
life() {
    crictl runp --runtime pericarp $F/pod-$1.json >$F/pod-$1.id
    crictl create \"$(cat $F/pod-$1.id)\" $F/container.json $F/pod-$1.json >$F/container-$1.id
    crictl start \"$(cat $F/container-$1.id)\"
    crictl exec \"$(cat $F/container-$1.id)\" true
}
end() { crictl rmp -f \"$(cat $F/pod-$1.id)\"; }
";

fn node(test: &str) -> Option<Session> {
    pericarp::session(test, || Builder::default().name("faults").memory_mib(6144))
}

/// Runs bash with [`LIFE`] at hand.
fn script(node: &Node, containerd: &Containerd, text: &str) -> Result<String> {
    let text = format!("F={FOLDER}; {LIFE}\n{text}");
    containerd.script(node, SCRIPT_TIMEOUT_S, &text)
}

/// Writes the configurations of pods of these numbers and of their container.
fn configure(node: &Node, numbers: std::ops::Range<u32>) -> Result<()> {
    for number in numbers {
        let config = pod_config(&format!("faults-{number}"));
        node.write(&format!("{FOLDER}/pod-{number}.json"), &config.to_string())?;
    }
    let container = container_config("c", BUSYBOX, "echo ready; exec sleep 3600");
    node.write(&format!("{FOLDER}/container.json"), &container.to_string())
}

/// Memory that the node could still use, its caches dropped.
fn available_kib(node: &Node) -> Result<u64> {
    let line = "sync; echo 3 >/proc/sys/vm/drop_caches; \
                awk '/^MemAvailable:/ { print $2 }' /proc/meminfo";
    node.shell(line)?.trim().parse().context("MemAvailable")
}

#[test]
fn pods_in_turn_and_at_once_leave_nothing() {
    let Some(node) = node("faults-many") else {
        return;
    };
    let (in_turn, at_once) = if pericarp::full_sizes() {
        (50, 10)
    } else {
        (5, 4)
    };
    let containerd = node.containerd(Version::V23).unwrap();
    configure(&node, 0..in_turn.max(at_once) + 1).unwrap();
    // The first pod of a node fills caches for all.
    script(&node, &containerd, "life 0; end 0").unwrap();
    let before = Leftovers::nothing_since(&node, &Leftovers::look(&node).unwrap()).unwrap();
    let memory = available_kib(&node).unwrap();
    let text = format!("for n in $(seq 1 {in_turn}); do life $n; end $n; done");
    script(&node, &containerd, &text).unwrap();
    Leftovers::nothing_since(&node, &before).unwrap();
    let text = format!(
        "pids=(); for n in $(seq 1 {at_once}); do (life $n; end $n) & pids+=($!); done
         for pid in ${{pids[@]}}; do wait $pid; done"
    );
    script(&node, &containerd, &text).unwrap();
    Leftovers::nothing_since(&node, &before).unwrap();
    let lost = memory.saturating_sub(available_kib(&node).unwrap());
    eprintln!("{in_turn} pods in turn, {at_once} at once; memory lost: {lost} KiB");
    assert!(
        lost < MEMORY_SLACK_KIB,
        "the node lost {lost} KiB of memory"
    );
}

/// A generator of the moments (xorshift64, Marsaglia 2003): repeatable, not secret.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Processes of a pod on the host, by what their command lines begin with or hold.
const VICTIMS: [(&str, &str); 3] = [
    ("shim", "^[^ ]*containerd-shim-pericarp-v2 "),
    ("vmm", "^[^ ]*pericarp-vmm"),
    ("file-system daemon", "^[^ ]*virtiofsd"),
];

/// Runs a pod, kills one of its processes at a moment of its life, and removes what there is.
fn killed(node: &Node, containerd: &Containerd, pattern: &str, after: Duration) -> Result<()> {
    // The moment is the fault: time itself is meant, nothing is waited for.
    let text = format!(
        "rm -f $F/*.id; touch $F/pod-0.id
         (life 0 >/dev/null 2>&1) & life=$!
         read -r -t {} <> <(:) || true
         if pkill -KILL -f '{pattern}'; then echo killed; else echo nobody; fi
         wait $life && echo lived || true
         while [ -n \"$(crictl ps --quiet --state Running)\" ] && ! crictl exec \
             \"$(crictl ps --quiet --state Running)\" true 2>/dev/null; do :; done
         for pod in $(crictl pods --quiet); do crictl rmp -f $pod; done",
        after.as_secs_f32()
    );
    let output = script(node, containerd, &text)?;
    eprintln!(
        "  {}",
        output.split_whitespace().collect::<Vec<_>>().join(" ")
    );
    Ok(())
}

#[test]
fn nothing_is_left_after_kills_at_random_moments() {
    let Some(node) = node("faults-kills") else {
        return;
    };
    let seed = std::env::var(SEED_VARIABLE).ok();
    let seed = seed
        .and_then(|text| text.parse().ok())
        .unwrap_or(20_261_121);
    let rounds = if pericarp::full_sizes() { 30 } else { 3 };
    eprintln!("{SEED_VARIABLE}={seed}, {rounds} rounds");
    let mut random = Random(seed);
    let containerd = node.containerd(Version::V23).unwrap();
    configure(&node, 0..1).unwrap();
    script(&node, &containerd, "life 0; end 0").unwrap();
    let before = Leftovers::nothing_since(&node, &Leftovers::look(&node).unwrap()).unwrap();
    for round in 0..rounds {
        let (victim, pattern) = VICTIMS[round % VICTIMS.len()];
        let after = Duration::from_millis(random.below(KILL_LATEST_MS));
        eprintln!("round {round}: {victim} killed after {after:?}");
        killed(&node, &containerd, pattern, after)
            .with_context(|| format!("round {round}: {victim} killed after {after:?}"))
            .unwrap();
        nothing_left(&node, &containerd, &before)
            .with_context(|| format!("round {round}: {victim} killed after {after:?}"))
            .unwrap();
    }
}

/// Compares the whole node. A shim that dies while a container of its sandbox starts leaves
/// containerd with a task that it forgets, whatever the runtime: no end of a connection is watched
/// for tasks that share a shim (containerd 2.3, `core/runtime/v2/shim_manager.go`). containerd
/// removes the bundle when it starts again, and nothing else may be left.
fn nothing_left(node: &Node, containerd: &Containerd, before: &Leftovers) -> Result<()> {
    let first = Leftovers::nothing_since(node, before);
    let Err(error) = first else {
        return Ok(());
    };
    let text = format!("{error:#}");
    let (_, things) = text.split_once("left over: ").unwrap_or_default();
    let all_bundles = things.split("; ").all(|thing| thing.starts_with(BUNDLES));
    ensure!(all_bundles && !things.is_empty(), "{text}");
    eprintln!("  containerd forgot a bundle, and starts again");
    containerd.restart(node)?;
    Leftovers::nothing_since(node, before).map(|_| ())
}

/// A privileged container makes its kernel panic, and the agent dies with it.
fn panicking(node: &Node, containerd: &Containerd) -> Result<Pod> {
    let mut config = pod_config("faults-panic");
    config["linux"] = json!({"security_context": {"privileged": true}});
    let pod = containerd.run_pod(node, HANDLER, &config)?;
    let line = "mount -o remount,rw /proc/sys; echo 2 >/proc/sys/vm/panic_on_oom; \
                exec tail /dev/zero";
    let mut config = container_config("c", BUSYBOX, line);
    config["linux"] = json!({
        "security_context": {"privileged": true},
        "resources": {"memory_limit_in_bytes": 32 << 20},
    });
    containerd.run_container(node, &pod, &config)?;
    Ok(pod)
}

#[test]
fn nothing_is_left_of_a_guest_whose_agent_died() {
    let Some(node) = node("faults-agent") else {
        return;
    };
    let containerd = node.containerd(Version::V23).unwrap();
    let before = Leftovers::look(&node).unwrap();
    let pod = panicking(&node, &containerd).unwrap();
    containerd.wait_for_end_of_containers(&node, &pod).unwrap();
    let state = containerd
        .crictl_text(&node, &["inspectp", &pod.id])
        .unwrap();
    ensure_not_ready(&state).unwrap();
    containerd.remove_pod(&node, &pod).unwrap();
    Leftovers::nothing_since(&node, &before).unwrap();
}

fn ensure_not_ready(state: &str) -> Result<()> {
    let status: serde_json::Value = serde_json::from_str(state)?;
    let state = &status["status"]["state"];
    ensure!(state == "SANDBOX_NOTREADY", "the pod is {state}");
    Ok(())
}
