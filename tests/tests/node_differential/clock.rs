//! The clock of a container is the node's, also after somebody set that.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pericarp_tests::node::{Node, Version};
use pericarp_tests::pods::leftovers::Leftovers;

use crate::side::{Side, WAIT, container, node};
use crate::{PERICARP, RUNC, SANDBOX};

/// How far the node's clock is set, in seconds.
const STEP_S: i64 = 90;

/// How far two readings, one after the other, may be apart.
const APART_S: i64 = 1;

/// How long a container may take to follow, with the time that the emulated node takes to ask it.
const FOLLOWS: Duration = Duration::from_secs(15);

/// Whether the container's clock lies between two readings of the node's.
fn is_the_nodes(side: &Side<'_>, id: &str) -> Result<bool> {
    let now = |node: &Node| -> Result<i64> { Ok(node.shell("date +%s")?.trim().parse()?) };
    let before = now(side.node)?;
    let inside: i64 = side.exec(id, &["date", "+%s"])?.trim().parse()?;
    let after = now(side.node)?;
    Ok((before - APART_S..=after + APART_S).contains(&inside))
}

fn follows(side: &Side<'_>, id: &str, step_s: i64) -> Result<()> {
    side.node
        .shell(&format!("date -s @$(($(date +%s) + {step_s})) >&2"))?;
    let start = Instant::now();
    while !is_the_nodes(side, id)? {
        ensure!(
            start.elapsed() < FOLLOWS,
            "{}: the clock did not follow a step of {step_s} s",
            side.handler
        );
    }
    Ok(())
}

#[test]
fn a_container_follows_the_nodes_clock() {
    let Some(node) = node("clock") else {
        return;
    };
    node.containerd(Version::V23).unwrap();
    let before = Leftovers::look(&node).unwrap();
    let mut sides = Vec::new();
    for handler in [RUNC, PERICARP, SANDBOX] {
        let side = Side::new(&node, handler, "clock").unwrap();
        let id = side.run(&container("c", &WAIT)).unwrap();
        assert!(
            is_the_nodes(&side, &id).unwrap(),
            "{handler}: from the start"
        );
        sides.push((side, id));
    }
    for step_s in [STEP_S, -STEP_S] {
        for (side, id) in &sides {
            // Each step is seen by all; each side is asked after one of its own.
            follows(side, id, step_s).unwrap();
            follows(side, id, -step_s).unwrap();
        }
    }
    for (side, _) in sides {
        side.remove().unwrap();
    }
    Leftovers::nothing_since(&node, &before).unwrap();
}
