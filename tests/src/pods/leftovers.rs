//! Compares the whole node before and after a pod.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};

use crate::node::{Command, Node};

/// Time that a shim gets to end after its pod's removal was answered.
const SHIM_END_TIMEOUT_S: u64 = 60;

/// Prints everything that a pod may leave, a line each: processes without the kernel's own and the
/// one that asks, mounts, cgroups, interfaces, network namespaces, files, named sockets.
///
/// Not among it is what the first pod of a node makes for all: CNI's bridge, the cgroup of
/// containerd's namespace, the folders in which pods have files, what a new network namespace
/// has, and templates with their cgroup. What a template is made of (`.templates/.work`) must be
/// gone.
const LIST: &str = r"
ps --ppid 2 -p 2 --deselect -o pid=,ppid=,args= |
    awk -v me=$$ '$1 != me && $2 != me { $1 = $2 = ``; print `process` $0 }'
awk '{ print `mount ` $5 ` ` $9 }' /proc/self/mountinfo
find /sys/fs/cgroup -type d ! -name k8s.io ! -name pericarp-templates -printf 'cgroup %p\n'
ls /sys/class/net | grep -vx cni0 | sed 's/^/interface /'
find /run/pericarp /run/pericarp/.users /run/netns /dev/shm /run/containerd*/s \
    /run/containerd*/io.containerd.*/* -mindepth 1 ! -name .users ! -name '.net-defaults-*' \
    ! -path '/run/pericarp/.templates' ! -path '/run/pericarp/.templates/[!.]*' \
    -printf 'file %p\n' 2>/dev/null || true
awk '$8 ~ /pericarp|containerd.s/ { print `socket ` $8 }' /proc/net/unix
";

/// Everything of the node that a pod could have made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftovers(BTreeSet<String>);

impl Leftovers {
    /// Looks at the node.
    pub fn look(node: &Node) -> Result<Self> {
        let text = node.shell(&LIST.replace('`', "\""))?;
        let lines = text.lines().map(|line| line.trim().to_owned());
        Ok(Self(lines.filter(|line| !line.is_empty()).collect()))
    }

    /// How many things of a kind (`process`, `mount`, `cgroup`, `interface`, `file`, `socket`).
    #[must_use]
    pub fn count(&self, kind: &str) -> usize {
        let is_kind = |line: &&String| line.split(' ').next() == Some(kind);
        self.0.iter().filter(is_kind).count()
    }

    /// What is here and was not there before.
    #[must_use]
    pub fn since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }

    /// Fails when the node has anything that it did not have before, once the shims of removed
    /// pods, which end after they have answered, are gone.
    pub fn nothing_since(node: &Node, before: &Self) -> Result<Self> {
        wait_for_shims(node)?;
        let after = Self::look(node)?;
        let left = after.since(before);
        if !left.is_empty() {
            bail!("left over: {}", left.join("; "));
        }
        Ok(after)
    }
}

/// Waits until no shim lives, and no template is being made, which is a shim's program too. Pods
/// that should live on must not be in the node.
fn wait_for_shims(node: &Node) -> Result<()> {
    let line = "for shim in $(pgrep -f '^[^ ]*containerd-shim-[a-z]+-v2 ' || true); do \
                tail -s 0.1 --pid=$shim -f /dev/null; done";
    let output = node.run(&Command::shell(line).timeout_s(SHIM_END_TIMEOUT_S))?;
    output
        .checked("wait for the end of shims")
        .context("a shim still lives after its pod was removed")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(lines: &[&str]) -> Leftovers {
        Leftovers(lines.iter().map(|line| (*line).to_owned()).collect())
    }

    #[test]
    fn only_what_is_new_is_left_over() {
        let before = of(&["process a", "mount /m tmpfs"]);
        let after = of(&["process a", "process b"]);
        assert_eq!(after.since(&before), ["process b"]);
        assert_eq!((after.count("process"), after.count("mount")), (2, 0));
    }
}
