//! Rules about the folders of each crate: which folder may use which, and no cycles between them.
//!
//! Folders are floors: each uses only lower ones, so a folder can be read and tested without those
//! above it. To print all edges of a crate (`all`: of every crate) while moving files:
//! `FLOORS_LIST=shim cargo test -p pericarp-tests --test tidy floors -- --nocapture`

mod tests;
mod tree;

use std::env;

use self::tree::{Tree, position};
use crate::{edges::members, files, judge};

/// A floor, and the titles of the floors that it may use.
///
/// The first string names a folder directly in `src`, or a file there without its `.rs`. Several
/// of them share a floor behind a title, as in `ground: files log`. Files directly in `src` that
/// no line names are on the floor `.`.
type Floor = (&'static str, &'static str);

/// Crate, and its floors from the top down. A floor may use only floors below it.
const FLOORS: &[(&str, &[Floor])] = &[
    ("protocol", &[(".", ""), ("machine", "")]),
    ("sys", &[(".", "")]),
    ("runtime-config", &[(".", "")]),
    (
        "vmm",
        &[
            ("fuzzing", "machine devices event_loop arch pci"),
            (".", "control machine devices event_loop"),
            ("control", "machine"),
            ("machine", "devices event_loop arch pci"),
            ("devices", "event_loop pci"),
            ("event_loop", "pci"),
            ("arch", ""),
            ("pci", ""),
        ],
    ),
    (
        "agent",
        &[
            ("fuzzing", "container drivers ground"),
            (".", "rpc pod container machine ground"),
            (
                "rpc",
                "pod processes container drivers storage network machine ground",
            ),
            ("pod", "processes container drivers storage machine ground"),
            ("processes", "container ground"),
            ("container", "ground"),
            ("drivers", "machine ground"),
            ("storage", "machine ground"),
            ("network", "ground"),
            ("machine", "ground"),
            ("ground", ""),
        ],
    ),
    (
        "shim",
        &[
            ("main", "containerd machine"),
            (
                "containerd",
                "pod storage passthrough machine network guest host errors",
            ),
            (
                "pod",
                "storage passthrough machine network guest host errors",
            ),
            ("storage", "machine guest host errors"),
            ("passthrough", "machine guest host errors"),
            ("machine", "network guest host errors"),
            ("network", "guest host errors"),
            ("guest", "host errors"),
            ("host", "errors"),
            ("errors", ""),
        ],
    ),
    (
        "ctl",
        &[
            (".", "check device_plugin cli elf"),
            ("check", "cli elf"),
            ("device_plugin", "cli"),
            ("cli", ""),
            ("elf", ""),
        ],
    ),
    (
        "tests",
        &[
            (".", ""),
            ("bin", "verbs pods bars node"),
            ("verbs", "pods node"),
            ("pods", "node"),
            ("bars", "node"),
            ("node", ""),
        ],
    ),
    ("tests/fuzz", &[(".", "")]),
];

/// Reads every crate of the workspace, without its test code.
fn crates() -> Vec<(Tree, &'static [Floor])> {
    let files = files(&[".rs"]);
    FLOORS
        .iter()
        .map(|(member, floors)| {
            let folder = format!("{member}/src/");
            let sources = files
                .iter()
                .filter(|file| !file.is_test())
                .filter_map(|file| {
                    let path = file.path.strip_prefix(&folder)?;
                    Some((path.to_owned(), file.text.clone()))
                })
                .collect();
            (Tree::new(member, sources), *floors)
        })
        .collect()
}

#[test]
fn folder_edges() {
    let violations = crates()
        .iter()
        .flat_map(|(tree, floors)| tree.floor_violations(floors))
        .collect();
    judge("folder-edges", violations);
}

#[test]
fn no_cycles() {
    let violations = crates()
        .iter()
        .flat_map(|(tree, _)| tree.cycle_violations())
        .collect();
    judge("no-cycles", violations);
}

#[test]
fn every_member_has_floors() {
    let mut known: Vec<&str> = FLOORS.iter().map(|(member, _)| *member).collect();
    known.sort_unstable();
    assert_eq!(
        members(),
        known,
        "FLOORS names each member of the workspace"
    );
}

#[test]
fn floors_use_lower_ones() {
    for (member, floors) in FLOORS {
        for (index, (floor, allowed)) in floors.iter().enumerate() {
            for used in allowed.split_whitespace() {
                let is_below = position(floors, used).is_some_and(|other| other > index);
                assert!(
                    is_below,
                    "FLOORS of {member}: no line `{used}` below `{floor}`"
                );
            }
        }
    }
}

#[test]
fn listing() {
    let Ok(wanted) = env::var("FLOORS_LIST") else {
        return;
    };
    for (tree, floors) in crates() {
        if wanted == "all" || wanted == tree.member() {
            println!("{}", tree.listing(floors));
        }
    }
}
