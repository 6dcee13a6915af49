//! Rules about the crates: who may know whom, and what may be linked at all.

use std::fs;

use toml::{Table, Value};

use crate::{PRODUCT_CRATES, judge, root};

/// Crate, and the crates of the workspace that it may use. No other edge exists.
const EDGES: &[(&str, &[&str])] = &[
    ("protocol", &[]),
    ("sys", &[]),
    ("runtime-config", &[]),
    ("vmm", &["protocol", "sys"]),
    ("agent", &["protocol", "sys"]),
    ("shim", &["protocol", "runtime-config", "sys"]),
    ("ctl", &["protocol", "runtime-config"]),
    ("tests", &["protocol", "runtime-config", "sys"]),
    ("tests/fuzz", &["agent", "protocol", "vmm"]),
];

/// Crates that parse what the VMM must not parse, or that would give it a runtime it does not need.
const BANNED_IN_VMM: &[&str] = &[
    "protobuf",
    "serde_json",
    "tokio",
    "toml",
    "tracing",
    "ttrpc",
];

const DEPENDENCY_TABLES: &[&str] = &["dependencies", "dev-dependencies", "build-dependencies"];

fn manifest(folder: &str) -> Table {
    let path = root().join(folder).join("Cargo.toml");
    fs::read_to_string(&path)
        .expect("a member has a Cargo.toml")
        .parse()
        .expect("cargo has read it before")
}

/// Dependency, its table and its value, of one member.
fn dependencies(folder: &str) -> Vec<(String, &'static str, Value)> {
    let manifest = manifest(folder);
    DEPENDENCY_TABLES
        .iter()
        .filter_map(|table| Some((*table, manifest.get(*table)?.as_table()?.clone())))
        .flat_map(|(table, entries)| {
            entries
                .into_iter()
                .map(move |(name, value)| (name, table, value))
        })
        .collect()
}

#[test]
fn crate_edges() {
    let mut violations = Vec::new();
    for (folder, allowed) in EDGES {
        let path = format!("{folder}/Cargo.toml");
        for (name, table, value) in dependencies(folder) {
            let is_inherited = value
                .get("workspace")
                .and_then(Value::as_bool)
                .unwrap_or(false);
            if !is_inherited {
                let what = format!("{name}: write `workspace = true`, versions stand in the root");
                violations.push((path.clone(), 0, what));
            }
            let peer = name.strip_prefix("pericarp-");
            if let Some(peer) = peer.filter(|peer| !allowed.contains(peer)) {
                let what = format!("{table}: {folder} -> {peer} is no edge of ARCHITECTURE.md");
                violations.push((path.clone(), 0, what));
            }
            let is_linked = table == "dependencies";
            if *folder == "vmm" && is_linked && BANNED_IN_VMM.contains(&name.as_str()) {
                let what = format!("{name}: the VMM parses only fixed-size messages");
                violations.push((path.clone(), 0, what));
            }
        }
    }
    judge("crate-edges", violations);
}

/// The folders of all crates of the workspace, in order.
pub(crate) fn members() -> Vec<String> {
    let members = manifest("")["workspace"]["members"].clone();
    let mut members: Vec<String> = members
        .as_array()
        .expect("members are a list")
        .iter()
        .filter_map(|member| member.as_str().map(str::to_owned))
        .collect();
    members.sort();
    members
}

#[test]
fn every_member_has_edges() {
    let mut known: Vec<&str> = EDGES.iter().map(|edge| edge.0).collect();
    known.sort_unstable();
    assert_eq!(members(), known, "EDGES names each member of the workspace");
    assert!(PRODUCT_CRATES.iter().all(|name| known.contains(name)));
}

#[test]
fn reasoned_dependencies() {
    let text = fs::read_to_string(root().join("Cargo.toml")).expect("the root has a Cargo.toml");
    let mut violations = Vec::new();
    let mut previous = "";
    let mut is_in_table = false;
    for (index, line) in text.lines().enumerate() {
        if line.starts_with('[') {
            is_in_table = line == "[workspace.dependencies]";
        } else if is_in_table && line.contains(" = ") && !line.contains("path =") {
            let is_entry = line.starts_with(|c: char| c.is_ascii_alphabetic());
            if is_entry && !previous.starts_with("# ") {
                let what = "a dependency without a reason: write one on the line above";
                violations.push(("Cargo.toml".to_owned(), index + 1, what.to_owned()));
            }
        }
        previous = line;
    }
    judge("reasoned-dependencies", violations);
}

#[test]
fn lints_are_inherited() {
    let violations = EDGES
        .iter()
        .filter(|(folder, _)| {
            manifest(folder)
                .get("lints")
                .and_then(|lints| lints.get("workspace"))
                .and_then(Value::as_bool)
                != Some(true)
        })
        .map(|(folder, _)| {
            let what = "no `[lints] workspace = true`".to_owned();
            (format!("{folder}/Cargo.toml"), 0, what)
        })
        .collect();
    judge("lints-are-inherited", violations);
}
