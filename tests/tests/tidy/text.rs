//! Rules about every text of the repository: references, paths, and kernel options.

use crate::{files, judge};

/// What a text of ours may be called.
const TEXTS: &[&str] = &[
    ".rs",
    ".proto",
    ".toml",
    ".md",
    ".sh",
    ".yaml",
    ".yml",
    ".config",
    "Makefile",
    "/build",
    "/check-config",
    ".ci/run",
];

/// Where files of a person or of one build machine lie; `/home/` stands in Rust as test data.
const PRIVATE_PLACES: &[&str] = &["/work/", "/workspace/", "/builds/", "/home/", "/Users/"];

#[test]
fn tracked_todos() {
    let mut violations = Vec::new();
    for file in files(TEXTS) {
        if file.path.starts_with("tests/tests/tidy/") || file.path == "CONTRIBUTING.md" {
            continue;
        }
        for (number, line) in file.lines() {
            for word in ["TODO", "FIXME", "XXX", "HACK"] {
                let Some((_, after)) = line.split_once(word) else {
                    continue;
                };
                // mktemp's pattern is no remark.
                let is_remark = !after.starts_with(|c: char| c.is_alphanumeric());
                if is_remark && !after.starts_with(" (#") && !after.starts_with("(#") {
                    let what = format!("{word} without a reference: write `{word} (#<issue>)`");
                    violations.push((file.path.clone(), number, what));
                }
            }
        }
    }
    judge("tracked-todos", violations);
}

#[test]
fn no_private_places() {
    let mut violations = Vec::new();
    for file in files(TEXTS) {
        if file.path.starts_with("tests/tests/tidy/") {
            continue;
        }
        for (number, line) in file.lines() {
            for place in PRIVATE_PLACES {
                let is_there = line.match_indices(place).any(|(start, _)| {
                    let before = line[..start].chars().next_back();
                    !before.is_some_and(|c| c.is_alphanumeric() || "./_}*-".contains(c))
                });
                if is_there && !(file.is_rust() && *place == "/home/") {
                    let what = format!("`{place}`: a path of one machine; take it from outside");
                    violations.push((file.path.clone(), number, what));
                }
            }
        }
    }
    judge("no-private-places", violations);
}

#[test]
fn reasoned_kernel_options() {
    let mut violations = Vec::new();
    for file in files(&[".config"]) {
        for (number, line) in file.lines() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let is_option = line.starts_with("CONFIG_") && line.contains('=');
            let has_reason = line
                .split_once(" # ")
                .is_some_and(|(_, reason)| !reason.trim().is_empty());
            if !is_option || !has_reason {
                let what = "not `CONFIG_X=value # reason`: say why the guest needs it";
                violations.push((file.path.clone(), number, what.to_owned()));
            }
        }
    }
    judge("reasoned-kernel-options", violations);
}
