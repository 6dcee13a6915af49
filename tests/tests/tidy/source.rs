//! Rules about Rust sources: budgets, headers, `unsafe`, and words that do not belong in them.

use crate::{SourceFile, code, files, judge};

/// Most lines of a file outside its tests.
const FILE_LINES_MAX: usize = 800;
/// Most lines of a function, signature and closing brace included.
const FUNCTION_LINES_MAX: usize = 70;
/// Widest line in characters.
const COLUMNS_MAX: usize = 100;
/// Longest file without a `//!` header.
const LINES_WITHOUT_HEADER_MAX: usize = 50;

/// How unsafe code begins, after rustfmt.
const UNSAFE_OPENINGS: &[&str] = &[
    "unsafe {",
    "unsafe fn",
    "unsafe impl",
    "unsafe extern",
    "unsafe trait",
    "#[unsafe(",
];

/// Applies `check` to each production line of each Rust file that `wanted` accepts.
fn forbid(
    rule: &str,
    wanted: impl Fn(&SourceFile) -> bool,
    check: impl Fn(&str) -> Option<&'static str>,
) {
    let mut violations = Vec::new();
    for file in files(&[".rs"]).iter().filter(|file| wanted(file)) {
        for (number, line) in file.production_lines() {
            if let Some(what) = check(line) {
                violations.push((file.path.clone(), number, what.to_owned()));
            }
        }
    }
    judge(rule, violations);
}

#[test]
fn unsafe_in_sys_only() {
    let mut violations = Vec::new();
    for file in files(&[".rs"]) {
        if file.path.starts_with("sys/") || file.path.starts_with("tests/tests/tidy/") {
            continue;
        }
        for (number, line) in file.lines() {
            if UNSAFE_OPENINGS
                .iter()
                .any(|opening| code(line).contains(opening))
            {
                let what = "unsafe code: give it a safe wrapper in a module of `sys`";
                violations.push((file.path.clone(), number, what.to_owned()));
            }
        }
    }
    judge("unsafe-in-sys-only", violations);
}

#[test]
fn short_files() {
    let mut violations = Vec::new();
    for file in files(&[".rs"]) {
        let count = file.production_lines().len();
        if count > FILE_LINES_MAX {
            let what = format!(
                "{count} lines, at most {FILE_LINES_MAX}: split it by duty, move tests to \
                    `tests.rs`"
            );
            violations.push((file.path, count, what));
        }
    }
    judge("short-files", violations);
}

#[test]
fn short_functions() {
    let mut violations = Vec::new();
    for file in files(&[".rs"]) {
        for (number, name, count) in functions(&file.production_lines()) {
            if count > FUNCTION_LINES_MAX {
                let what = format!(
                    "`{name}` has {count} lines, at most {FUNCTION_LINES_MAX}: name its steps"
                );
                violations.push((file.path.clone(), number, what));
            }
        }
    }
    judge("short-functions", violations);
}

/// Line, name and length of each function. Relies on rustfmt: a body ends with a brace at the
/// indentation of its signature.
fn functions<'a>(lines: &[(usize, &'a str)]) -> Vec<(usize, &'a str, usize)> {
    let mut found = Vec::new();
    for (index, (number, line)) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else {
            continue;
        };
        if line.ends_with('}') || line.ends_with(';') {
            continue;
        }
        let indentation = &line[..line.len() - line.trim_start().len()];
        let end = lines[index + 1..].iter().position(|(_, line)| {
            line.strip_prefix(indentation)
                .is_some_and(|rest| rest == "}" || (rest.starts_with(')') && rest.ends_with(';')))
        });
        if let Some(end) = end {
            found.push((*number, name, end + 2));
        }
    }
    found
}

/// The name of the function whose signature starts on this line.
fn function_name(line: &str) -> Option<&str> {
    let mut rest = line.trim_start();
    loop {
        if let Some(tail) = rest.strip_prefix("fn ") {
            return tail.split(['(', '<']).next();
        }
        let (word, tail) = rest.split_once(' ')?;
        let is_qualifier = word.starts_with("pub")
            || word.ends_with(')')
            || matches!(word, "async" | "const" | "unsafe" | "extern" | "\"C\"");
        if !is_qualifier {
            return None;
        }
        rest = tail;
    }
}

#[test]
fn narrow_lines() {
    let mut violations = Vec::new();
    for file in files(&[".rs", ".proto", "Cargo.toml"]) {
        for (number, line) in file.lines() {
            let columns = line.chars().count();
            if columns > COLUMNS_MAX {
                let what = format!("{columns} columns, at most {COLUMNS_MAX}: break the line");
                violations.push((file.path.clone(), number, what));
            }
        }
    }
    judge("narrow-lines", violations);
}

#[test]
fn module_headers() {
    let mut violations = Vec::new();
    for file in files(&[".rs"]) {
        let count = file.text.lines().count();
        if count > LINES_WITHOUT_HEADER_MAX && !file.text.starts_with("//!") {
            let what = "no `//!` header: say what the file is for, its limits and its peers";
            violations.push((file.path, 1, what.to_owned()));
        }
    }
    judge("module-headers", violations);
}

#[test]
fn expect_not_allow() {
    let mut violations = Vec::new();
    for file in files(&[".rs"]) {
        if file.path.starts_with("tests/tests/tidy/") {
            continue;
        }
        for (number, line) in file.lines() {
            if line.contains("#[allow") || line.contains("#![allow") {
                let what = "an allowed lint: use `#[expect(lint, reason = \"..\")]`";
                violations.push((file.path.clone(), number, what.to_owned()));
            }
        }
    }
    judge("expect-not-allow", violations);
}

#[test]
fn wait_for_events() {
    forbid("wait-for-events", SourceFile::is_of_product, |line| {
        (code(line).contains("sleep(") && !code(line).contains("fn "))
            .then_some("a sleep: wait for the event itself, with a deadline")
    });
}

#[test]
fn bounded_queues() {
    forbid("bounded-queues", SourceFile::is_of_product, |line| {
        let code = code(line);
        (code.contains("unbounded") || code.contains("mpsc::channel()"))
            .then_some("an unbounded queue: name its bound")
    });
}

#[test]
fn one_arch_switch() {
    let wanted = |file: &SourceFile| {
        file.is_of_product() && !file.path.contains("/arch/") && !file.path.contains("/arch.rs")
    };
    forbid("one-arch-switch", wanted, |line| {
        code(line)
            .contains("target_arch")
            .then_some("the architecture in common code: put it behind `arch`")
    });
}

#[test]
fn functions_are_measured() {
    let text = "fn a() {\n    if b {\n    }\n}\n\nimpl C {\n    pub(crate) async fn d(\n        \
                e: u8,\n    ) -> u8 {\n        e\n    }\n    fn f() {}\n}\n";
    let file = SourceFile {
        path: "x.rs".to_owned(),
        text: text.to_owned(),
    };
    let found = functions(&file.production_lines());
    assert_eq!(found, [(1, "a", 4), (7, "d", 5)]);
}
