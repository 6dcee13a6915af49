//! A VM runs on after its VMM was stopped or frozen.

use anyhow::{Context, Result};
use pericarp_tests::node::{Session, Version};
use pericarp_tests::pods::leftovers::Leftovers;

use crate::PERICARP;
use crate::side::{Side, WAIT, container, node, wait_until};

/// Deadline of an exec.
const EXEC_S: u64 = 60;

/// Time in which the kernel stops a process or freezes a cgroup.
const STOP_S: u64 = 20;

/// Number of interruptions.
const ROUNDS: usize = 3;

/// Directory of the VMM's cgroup.
pub(crate) fn cgroup(side: &Side<'_>) -> Result<String> {
    let vmm = side.state("vmm_pid")?;
    let text = side.node.read(&format!("/proc/{vmm}/cgroup"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(format!(
        "/sys/fs/cgroup{}",
        path.context("no cgroup of version 2")?
    ))
}

/// Stops a process and waits until it is stopped.
pub(crate) fn stop_process(side: &Side<'_>, pid: u64) -> Result<()> {
    side.node.shell(&format!("kill -STOP {pid}"))?;
    wait_until(
        side.node,
        STOP_S,
        &format!("grep -q '^State:.T' /proc/{pid}/status"),
    )
}

/// Freezes the cgroup of the VMM and waits until it is frozen.
pub(crate) fn freeze(side: &Side<'_>) -> Result<()> {
    let cgroup = cgroup(side)?;
    side.node
        .shell(&format!("echo 1 >{cgroup}/cgroup.freeze"))?;
    wait_until(
        side.node,
        STOP_S,
        &format!("grep -q 'frozen 1' {cgroup}/cgroup.events"),
    )
}

/// Thaws the cgroup of the VMM.
pub(crate) fn thaw(side: &Side<'_>) -> Result<()> {
    let cgroup = cgroup(side)?;
    side.node
        .shell(&format!("echo 0 >{cgroup}/cgroup.freeze"))
        .map(drop)
}

/// Whether an exec succeeds.
fn answers(side: &Side<'_>, id: &str) -> Result<bool> {
    let output = side.crictl_within(EXEC_S, &["exec", id, "echo", "alive"])?;
    Ok(output.stdout.trim() == "alive")
}

/// Interrupts a VMM several times. Returns whether an exec succeeded after each time.
fn goes_on(
    node: &Session,
    test: &str,
    interrupt: impl Fn(&Side<'_>) -> Result<()>,
) -> Result<Vec<bool>> {
    node.containerd(Version::V23)?;
    let before = Leftovers::look(node)?;
    let side = Side::new(node, PERICARP, test)?;
    let id = side.run(&container("c", &WAIT))?;
    let mut answered = Vec::new();
    for _ in 0..ROUNDS {
        interrupt(&side)?;
        answered.push(answers(&side, &id)?);
        if answered.contains(&false) {
            // The removal of a stuck VM has a test of its own.
            let vmm = side.state("vmm_pid")?;
            node.shell(&format!("kill -KILL {vmm}"))?;
            side.containerd
                .wait_for_end_of_containers(node, &side.pod)?;
            break;
        }
    }
    side.remove()?;
    Leftovers::nothing_since(node, &before)?;
    Ok(answered)
}

#[test]
fn a_vm_goes_on_after_its_vmm_was_stopped() {
    let Some(node) = node("stopped") else {
        return;
    };
    let answered = goes_on(&node, "stopped", |side| {
        let vmm = side.state("vmm_pid")?;
        stop_process(side, vmm)?;
        side.node.shell(&format!("kill -CONT {vmm}")).map(drop)
    });
    assert_eq!(
        answered.unwrap(),
        [true; ROUNDS],
        "whether an exec was answered, in turn"
    );
}

#[test]
fn a_vm_goes_on_after_its_cgroup_was_frozen() {
    let Some(node) = node("frozen") else {
        return;
    };
    let answered = goes_on(&node, "frozen", |side| {
        freeze(side)?;
        thaw(side)
    });
    assert_eq!(
        answered.unwrap(),
        [true; ROUNDS],
        "whether an exec was answered, in turn"
    );
}
