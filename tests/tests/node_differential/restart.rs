//! Pods of every handler survive a restart of containerd.

use anyhow::{Context, Result};
use pericarp_tests::node::{Session, Version};
use pericarp_tests::pods::leftovers::Leftovers;
use serde_json::{Value, json};

use crate::side::{Side, WAIT, container, node};
use crate::{PERICARP, RUNC, SANDBOX};

/// Deadline of a command after the restart.
const COMMAND_S: u64 = 60;

/// State of a pod and its container, from crictl.
fn look(side: &Side<'_>, id: &str) -> Result<Value> {
    let text = side
        .containerd
        .crictl_text(side.node, &["inspectp", &side.pod.id])?;
    let of_pod: Value = serde_json::from_str(&text).context("crictl inspectp printed no JSON")?;
    let of_container = side.inspect(id)?;
    let exec = side.crictl_within(COMMAND_S, &["exec", id, "echo", "alive"])?;
    Ok(json!({
        "pod": of_pod["status"]["state"],
        "pod_pid": of_pod["info"]["pid"],
        "container": of_container["status"]["state"],
        "container_id": of_container["status"]["id"],
        "container_pid": of_container["info"]["pid"],
        "exec": exec.stdout.trim(),
    }))
}

/// Restarts containerd by a signal. Returns handler, state before and state after of each pod.
fn around_a_restart(node: &Session, signal: &str) -> Result<Vec<(&'static str, Value, Value)>> {
    let mut sides = Vec::new();
    for handler in [RUNC, PERICARP, SANDBOX] {
        let side = Side::new(node, handler, &format!("restart-{}", signal.to_lowercase()))?;
        let id = side.run(&container("c", &WAIT))?;
        let before = look(&side, &id)?;
        sides.push((side, id, before));
    }
    sides[0].0.containerd.restart_by(node, signal)?;
    let mut found = Vec::new();
    for (side, id, before) in sides {
        let handler = side.handler;
        let after = look(&side, &id).unwrap_or_else(|error| json!(format!("{error:#}")));
        let removed = side.crictl_within(COMMAND_S, &["rmp", "-f", &side.pod.id])?;
        let with_removal = |pod: Value, how: bool| json!({"pod": pod, "is_removed": how});
        let after = with_removal(after, removed.exit.success());
        found.push((handler, with_removal(before, true), after));
    }
    Ok(found)
}

/// Leftovers of the pods. The containerd process itself is a new one.
fn left(node: &Session, before: &Leftovers) -> Vec<String> {
    let after = Leftovers::nothing_since(node, before);
    let error = after
        .err()
        .map(|error| format!("{error:#}"))
        .unwrap_or_default();
    let lines = error.trim_start_matches("left over: ").split("; ");
    let ours = lines.filter(|line| !line.is_empty() && !line.contains("containerd --config"));
    ours.map(str::to_owned).collect()
}

#[test]
fn pods_outlive_a_containerd_that_ends() {
    let Some(node) = node("restart") else {
        return;
    };
    node.containerd(Version::V23).unwrap();
    for signal in ["TERM", "KILL"] {
        let leftovers = Leftovers::look(&node).unwrap();
        let found = around_a_restart(&node, signal).unwrap();
        let left = left(&node, &leftovers);
        for (handler, before, after) in found {
            assert_eq!(
                after, before,
                "{handler}: after (left) and before (right) SIG{signal}"
            );
            assert_eq!(after["pod"]["pod"], "SANDBOX_READY", "{handler}");
            assert_eq!(after["pod"]["exec"], "alive", "{handler}");
        }
        assert_eq!(left, Vec::<String>::new(), "after SIG{signal}");
    }
}
