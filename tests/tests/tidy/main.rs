//! The rules of CONTRIBUTING.md that a program can check, one test each.
//!
//! A failure names the place, what is wrong and what to do. Exceptions stand by name, with a
//! reason, in `EXCEPTIONS`; one that no longer excuses anything is itself a failure. Needs no git
//! and no root.

mod edges;
mod floors;
mod references;
mod source;
mod text;
mod tokens;

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A rule's short name (as in CONTRIBUTING.md), the file it may be broken in, and why.
const EXCEPTIONS: &[(&str, &str, &str)] = &[(
    "expect-not-allow",
    "protocol/src/lib.rs",
    "the lints that generated code breaks change with its generator, so an expectation would too",
)];

/// Folders that hold nothing of ours.
const FOREIGN_FOLDERS: &[&str] = &["target", ".git", "out", "fuzz/target", "fuzz/corpus"];

/// Crates that run on a node, as opposed to the tests.
const PRODUCT_CRATES: &[&str] = &[
    "protocol",
    "sys",
    "runtime-config",
    "vmm",
    "agent",
    "shim",
    "ctl",
];

/// One text file of the repository.
#[derive(Debug)]
struct SourceFile {
    /// Relative to the repository's root.
    path: String,
    text: String,
}

impl SourceFile {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    fn is_of_product(&self) -> bool {
        PRODUCT_CRATES
            .iter()
            .any(|name| self.path.starts_with(&format!("{name}/")))
    }

    /// Whether the whole file is test code.
    fn is_test(&self) -> bool {
        self.path.ends_with("tests.rs") || self.path.contains("/tests/")
    }

    /// Numbered lines up to the test module that ends the file, none if the file is test code.
    fn production_lines(&self) -> Vec<(usize, &str)> {
        if self.is_test() {
            return Vec::new();
        }
        let lines: Vec<&str> = self.text.lines().collect();
        let end = lines
            .windows(2)
            .position(|pair| {
                pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod ") && pair[1].ends_with('{')
            })
            .unwrap_or(lines.len());
        numbered(lines.into_iter().take(end))
    }

    /// All lines, numbered.
    fn lines(&self) -> Vec<(usize, &str)> {
        numbered(self.text.lines())
    }
}

fn numbered<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<(usize, &'a str)> {
    lines.enumerate().map(|(i, line)| (i + 1, line)).collect()
}

/// A line without its comment; strings that hold `//` lose their end, which no rule minds.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or("")
}

/// The checkout whose tests run: not that of the build, which may be another's in a shared cache.
fn root() -> PathBuf {
    let tests = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs the tests");
    Path::new(&tests)
        .parent()
        .expect("the tests are a folder of the workspace")
        .to_path_buf()
}

/// Every text file of the repository whose name ends as one of `endings`.
fn files(endings: &[&str]) -> Vec<SourceFile> {
    let root = root();
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the repository is readable") {
            let path = entry.expect("an entry is readable").path();
            let name = path
                .strip_prefix(&root)
                .expect("found beneath the root")
                .to_string_lossy()
                .into_owned();
            if path.is_symlink() || FOREIGN_FOLDERS.iter().any(|foreign| name == *foreign) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                // Others may be writing while this reads: what vanished is not ours to judge.
                if let Ok(text) = fs::read_to_string(&path) {
                    found.push(SourceFile { path: name, text });
                }
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// Fails with every violation that no exception excuses, and with every exception that excuses
/// nothing.
#[track_caller]
fn judge(rule: &str, violations: Vec<(String, usize, String)>) {
    let excuses: Vec<&str> = EXCEPTIONS
        .iter()
        .filter(|exception| exception.0 == rule)
        .map(|exception| exception.1)
        .collect();
    let mut problems: Vec<String> = violations
        .iter()
        .filter(|(path, _, _)| !excuses.contains(&path.as_str()))
        .map(|(path, line, what)| format!("{path}:{line}: {what}"))
        .collect();
    problems.extend(
        excuses
            .iter()
            .filter(|excused| !violations.iter().any(|(path, _, _)| path == *excused))
            .map(|path| format!("{path}:0: needs no exception from {rule} any more: remove it")),
    );
    assert!(
        problems.is_empty(),
        "{} violations of {rule}:\n{}",
        problems.len(),
        problems.join("\n")
    );
}
