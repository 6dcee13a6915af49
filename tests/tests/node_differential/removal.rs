//! `crictl rmp -f` removes a pod in any state of guest, agent, VMM and file-system daemon.
//!
//! A removal must end within 10 s beyond the grace period. An emulated node is many times slower
//! than a processor, so the deadline here is longer. The time is printed.

use anyhow::{Result, ensure};
use pericarp_tests::node::Version;
use pericarp_tests::pods::leftovers::Leftovers;
use serde_json::{Value, json};

use crate::PERICARP;
use crate::side::{Side, WAIT, container, merge, node};
use crate::stopped::{freeze, stop_process, thaw};

/// Deadline of a removal.
const REMOVAL_S: u64 = 40;

/// Deadline of a removal after the processes of the pod were killed.
const CLEAN_UP_S: u64 = 120;

/// Deadline of a call that a broken guest may leave unanswered.
const HARM_S: u64 = 15;

/// Runs a real-time task (sched(7), SCHED_FIFO) on each processor of the guest. Linux 6.12 leaves
/// 5 % of the time to the agent. The image lacks chrt, so the task uses the node's and its
/// libraries.
const SPIN: &str = "mount -o remount,rw /proc/sys; \
    echo -1 >/proc/sys/kernel/sched_rt_runtime_us; libraries=/node/lib/x86_64-linux-gnu; \
    for cpu in $(seq $(nproc)); do \
        $libraries/ld-linux-x86-64.so.2 --library-path $libraries /node/bin/chrt -f 99 \
            sh -c 'while :; do :; done' & \
    done; wait";

/// Makes the guest's kernel panic when a container exceeds its memory limit.
const PANIC: &str = "mount -o remount,rw /proc/sys; echo 2 >/proc/sys/vm/panic_on_oom; \
    exec tail /dev/zero";

/// PIDs of the pod's file-system daemon.
fn daemons(side: &Side<'_>) -> Result<Vec<u64>> {
    let line = format!("pgrep -f '^[^ ]*virtiofsd .*{}' || true", side.pod.id);
    let text = side.node.shell(&line)?;
    let daemons: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
    ensure!(
        !daemons.is_empty(),
        "no file-system daemon of pod {}",
        side.pod.id
    );
    Ok(daemons)
}

/// Kills processes. The end of one may end another before its turn, so a missing one is no error.
fn kill(side: &Side<'_>, pids: &[u64]) -> Result<()> {
    let line = |pid: &u64| format!("kill -KILL {pid} 2>/dev/null || test ! -e /proc/{pid}");
    let lines: Vec<String> = pids.iter().map(line).collect();
    side.node.shell(&lines.join("\n")).map(drop)
}

/// Runs a privileged container, whose start may stay unanswered.
fn privileged(side: &Side<'_>, line: &str) -> Result<()> {
    let mut config = container("privileged", &["sh", "-c", line]);
    let linux = json!({
        "security_context": {"privileged": true},
        "resources": {"memory_limit_in_bytes": 32 << 20},
    });
    merge(&mut config, &json!({"linux": linux}));
    let mount = json!({"host_path": "/usr", "container_path": "/node", "readonly": true});
    config["mounts"].as_array_mut().expect("a list").push(mount);
    let id = side.create(&config)?;
    let started = side.crictl_within(HARM_S, &["start", &id])?;
    eprintln!(
        "  crictl start of what harms: {} after {:.1?}",
        started.exit, started.elapsed
    );
    Ok(())
}

/// Starves the agent, and prints whether it still answers.
fn hang(side: &Side<'_>, id: &str) -> Result<()> {
    privileged(side, SPIN)?;
    let output = side.crictl_within(HARM_S, &["exec", id, "true"])?;
    eprintln!(
        "  crictl exec: {} after {:.1?}",
        output.exit, output.elapsed
    );
    Ok(())
}

/// Breaks a pod before its removal.
type Harm = fn(&Side<'_>, &str) -> Result<()>;

/// Names of the states and how to reach them.
const STATES: [(&str, Harm); 8] = [
    ("healthy", |_, _| Ok(())),
    ("vmm-stopped", |side, _| {
        stop_process(side, side.state("vmm_pid")?)
    }),
    ("cgroup-frozen", |side, _| freeze(side)),
    ("guest-hung", hang),
    ("guest-panicked", |side, _| privileged(side, PANIC)),
    ("vmm-killed", |side, _| {
        kill(side, &[side.state("vmm_pid")?])
    }),
    ("daemon-stopped", |side, _| {
        daemons(side)?
            .into_iter()
            .try_for_each(|daemon| stop_process(side, daemon))
    }),
    ("daemon-killed", |side, _| kill(side, &daemons(side)?)),
];

/// Breaks a pod and removes it.
fn removed(side: &Side<'_>, harm: Harm) -> Result<()> {
    let mut config = container("c", &WAIT);
    // A share of the node's that the file-system daemon serves.
    let mount = json!({"host_path": "/run/pods", "container_path": "/pods", "readonly": true});
    config["mounts"].as_array_mut().expect("a list").push(mount);
    let id = side.run(&config)?;
    // A second process that must be killed with the container.
    side.exec(&id, &["sh", "-c", "sleep 3600 >/dev/null 2>&1 &"])?;
    harm(side, &id)?;
    let removal = side.crictl_within(REMOVAL_S, &["rmp", "-f", &side.pod.id])?;
    eprintln!(
        "  crictl rmp -f: {} after {:.1?}",
        removal.exit, removal.elapsed
    );
    let why = removal.stderr.lines().last().unwrap_or_default();
    ensure!(
        removal.exit.success(),
        "crictl rmp -f: {}: {why}",
        removal.exit
    );
    Ok(())
}

/// Cleans up after a failed removal, so that the next state is tested alone.
fn clean_up(side: &Side<'_>) -> Result<()> {
    let _may_be_gone = thaw(side);
    for process in ["vmm_pid", "shim_pid"] {
        let _may_be_gone = side.state(process).and_then(|pid| kill(side, &[pid]));
    }
    kill(side, &daemons(side).unwrap_or_default())?;
    side.containerd
        .wait_for_end_of_containers(side.node, &side.pod)?;
    side.crictl_within(CLEAN_UP_S, &["rmp", "-f", &side.pod.id])
        .map(drop)
}

#[test]
fn a_pod_is_removed_whatever_its_state() {
    let Some(node) = node("removal") else {
        return;
    };
    node.containerd(Version::V23).unwrap();
    let mut wrong = Vec::new();
    for (state, harm) in STATES {
        eprintln!("{state}:");
        let before = Leftovers::look(&node).unwrap();
        // CRI allows privileged containers in privileged pods only.
        let privileged = json!({"security_context": {"privileged": true}});
        let pod: Value = json!({"hostname": state, "linux": privileged});
        let side = Side::with(&node, PERICARP, &format!("removal-{state}"), &pod).unwrap();
        let done = removed(&side, harm).and_then(|()| {
            Leftovers::nothing_since(&node, &before)?;
            Ok(())
        });
        if let Err(error) = done {
            wrong.push(format!("{state}: {error:#}"));
            clean_up(&side).unwrap();
        }
    }
    assert!(
        wrong.is_empty(),
        "{} states:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}
