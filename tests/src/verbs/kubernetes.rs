//! What a pod may ask of Kubernetes, under runc and under Pericarp: one table.
//!
//! A case is a file of `tests/kubernetes/`: a manifest, below a head of comments that says what is
//! asked, what to wait for, and what to check.
//!
//! ```text
//! # item: what the table calls it
//! # before: a line of bash before the manifest is applied
//! # applied: a line of bash once it is
//! # wait: what `kubectl wait --for` gets
//! # check: a line of bash that must succeed while the pod is there
//! # after: a line of bash that must succeed once it is deleted
//! ```
//!
//! In the manifest `$NAME` is the pod's name and `$CLASS` its RuntimeClass; in bash they are
//! variables.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::node::{Command, Kubernetes, Node, paths};

/// The control and what is tested, as RuntimeClasses.
const CLASSES: [&str; 2] = ["runc", "pericarp"];

/// Time that a pod gets to be what its case waits for.
const WAIT_S: u64 = 300;

/// Time that one line of a case gets.
const LINE_TIMEOUT_S: u64 = 360;

/// Longest reason in the table.
const REASON_CHARS_MAX: usize = 200;

/// Cases that a pod in a VM is refused by design, with what says so.
const REFUSED: [(&str, &str); 3] = [
    ("host-network", "hostNetwork"),
    ("host-pid", "hostPID"),
    ("bidirectional", "Bidirectional"),
];

/// A case, as its file says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Case {
    name: String,
    item: String,
    before: Vec<String>,
    applied: Vec<String>,
    wait: String,
    checks: Vec<String>,
    after: Vec<String>,
    manifest: String,
}

/// How a case ended under one class.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Passed,
    /// Refused with the words that its design gives.
    Refused,
    Failed(String),
}

impl Verdict {
    fn cell(&self) -> String {
        match self {
            Self::Passed => "pass".to_owned(),
            Self::Refused => "refused by name".to_owned(),
            Self::Failed(reason) => format!("FAIL: {}", reason.replace('|', "/")),
        }
    }
}

/// Runs every case whose name holds one of `only` (all when it is empty), prints the table, and
/// writes it to `file` when one is given. Whether all that passes under runc passes under Pericarp.
pub fn run(
    node: &Node,
    kubernetes: &Kubernetes,
    only: &[String],
    file: Option<&Path>,
) -> Result<bool> {
    let mut rows = Vec::new();
    for case in cases()? {
        if !only.is_empty() && !only.iter().any(|part| case.name.contains(part.as_str())) {
            continue;
        }
        let verdicts = CLASSES.map(|class| {
            let verdict = judge(node, kubernetes, &case, class);
            eprintln!(
                "kubernetes: {} under {class}: {}",
                case.name,
                verdict.cell()
            );
            verdict
        });
        rows.push((case.item, verdicts));
    }
    ensure!(!rows.is_empty(), "no case is called {}", only.join(" or "));
    let table = table(&rows);
    print!("{table}");
    if let Some(file) = file {
        std::fs::write(file, page(&table))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(rows.iter().all(|(_, [control, ours])| holds(control, ours)))
}

fn holds(control: &Verdict, ours: &Verdict) -> bool {
    *control != Verdict::Passed || !matches!(ours, Verdict::Failed(_))
}

/// Every case, by name.
fn cases() -> Result<Vec<Case>> {
    let folder = paths::checkout().join("tests/kubernetes");
    let entries =
        std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut cases = Vec::new();
    for entry in entries {
        let path = entry.context("cannot read a folder of cases")?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        cases.push(parse(&name, &text).with_context(|| format!("{}", path.display()))?);
    }
    cases.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(cases)
}

fn parse(name: &str, text: &str) -> Result<Case> {
    let mut case = Case {
        name: name.to_owned(),
        ..Case::default()
    };
    for line in text.lines() {
        let Some(head) = line.strip_prefix("# ") else {
            case.manifest.push_str(line);
            case.manifest.push('\n');
            continue;
        };
        let Some((key, value)) = head.split_once(": ") else {
            bail!("a line of the head without a key: {line}");
        };
        let value = value.to_owned();
        match key {
            "item" => case.item = value,
            "wait" => case.wait = value,
            "before" => case.before.push(value),
            "applied" => case.applied.push(value),
            "check" => case.checks.push(value),
            "after" => case.after.push(value),
            _ => bail!("an unknown key of the head: {key}"),
        }
    }
    ensure!(
        !case.item.is_empty() && !case.wait.is_empty(),
        "the head names no item or nothing to wait for"
    );
    Ok(case)
}

/// Runs one case and removes what it made, whatever its end.
fn judge(node: &Node, kubernetes: &Kubernetes, case: &Case, class: &str) -> Verdict {
    let name = format!("{}-{class}", case.name);
    let manifest = case
        .manifest
        .replace("$NAME", &name)
        .replace("$CLASS", class);
    let line = |line: &String| {
        let mut command = Command::shell(format!("set -o pipefail; {line}"));
        command.env = kubernetes.kubectl().env;
        let command = command.env("NAME", &name).env("CLASS", class);
        let command = command.timeout_s(LINE_TIMEOUT_S);
        node.text(&command)
            .map(|_| ())
            .with_context(|| line.clone())
    };
    let lines = |all: &[String]| all.iter().try_for_each(line);
    let mut shown = lines(&case.before)
        .and_then(|()| kubernetes.apply(node, &manifest))
        .and_then(|()| lines(&case.applied))
        .and_then(|()| waited(node, kubernetes, &name, &case.wait))
        .and_then(|()| lines(&case.checks));
    let refused = shown.is_err() && refused(node, kubernetes, case, &name);
    let deleted = deleted(node, kubernetes, &manifest);
    if shown.is_ok() {
        shown = deleted.and_then(|()| lines(&case.after));
    }
    match shown {
        Ok(()) => Verdict::Passed,
        Err(_) if refused && class != CLASSES[0] => Verdict::Refused,
        Err(error) => {
            let reason = format!("{error:#}").replace('\n', " ");
            Verdict::Failed(reason.chars().take(REASON_CHARS_MAX).collect())
        }
    }
}

/// Waits for what the case waits for; a pod that cannot become it any more fails at once.
fn waited(node: &Node, kubernetes: &Kubernetes, name: &str, wait: &str) -> Result<()> {
    let line = format!(
        "kubectl wait pod/{name} --for='{wait}' --timeout={WAIT_S}s & waiter=$!
         kubectl wait pod/{name} --for='jsonpath={{.status.phase}}=Failed' --timeout={WAIT_S}s \
             >/dev/null 2>&1 & failure=$!
         wait -n $waiter $failure; wanted='{wait}'
         case $wanted in *=Failed) wait $waiter; exit;; esac
         kill $failure 2>/dev/null
         if kill $waiter 2>/dev/null; then exit 1; fi
         wait $waiter"
    );
    let mut command = Command::shell(line).timeout_s(WAIT_S + 60);
    command.env = kubernetes.kubectl().env;
    let waited = node.run(&command)?;
    if waited.exit.success() {
        return Ok(());
    }
    bail!("not {wait}: {}", last_words(node, kubernetes, name))
}

/// What the pod's own events and states say.
fn last_words(node: &Node, kubernetes: &Kubernetes, name: &str) -> String {
    let line = format!(
        "kubectl get pod {name} -o jsonpath='{{.status.phase}} {{.status.reason}} \
         {{.status.containerStatuses[*].state}}' | cut -c1-300
         kubectl get events --field-selector involvedObject.name={name},type=Warning \
             -o jsonpath='{{range .items[*]}} {{.message}}{{end}}' | tail -c 600"
    );
    let mut command = Command::shell(line);
    command.env = kubernetes.kubectl().env;
    let output = node.run(&command).map(|output| output.stdout);
    output.unwrap_or_default().replace('\n', " ")
}

/// Whether the pod was refused with the words of its design.
fn refused(node: &Node, kubernetes: &Kubernetes, case: &Case, name: &str) -> bool {
    let words = REFUSED.iter().find(|(refused, _)| *refused == case.name);
    words.is_some_and(|(_, words)| last_words(node, kubernetes, name).contains(words))
}

fn deleted(node: &Node, kubernetes: &Kubernetes, manifest: &str) -> Result<()> {
    let command = kubernetes.kubectl().args([
        "delete",
        "--ignore-not-found",
        "--wait=true",
        "--timeout=300s",
        "-f",
        "-",
    ]);
    let mut bytes = manifest.as_bytes();
    let output = node.run_with(&command.timeout_s(LINE_TIMEOUT_S), Some(&mut bytes), None)?;
    output.checked("kubectl delete").map(|_| ())
}

fn table(rows: &[(String, [Verdict; 2])]) -> String {
    let mut text = String::from("| what a pod asks for | runc | pericarp |\n|---|---|---|\n");
    for (item, [control, ours]) in rows {
        let _infallible = writeln!(text, "| {item} | {} | {} |", control.cell(), ours.cell());
    }
    text
}

fn page(table: &str) -> String {
    let head = "# Kubernetes\n\n\
        What a pod may ask of an unmodified kubelet, under runc and under Pericarp. \
        `make kubernetes` makes\nthis page: a pod for each line, in a test node with etcd, API \
        server, kubelet and containerd\n(`tests/kubernetes/` has the pods). *Refused by name* is \
        what no VM can give: the pod's event\nnames the field.\n\n";
    format!("{head}{table}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_of_the_folder_is_well_formed() {
        let cases = cases().unwrap();
        assert!(cases.len() > 30, "{} cases", cases.len());
        for (refused, _) in REFUSED {
            assert!(cases.iter().any(|case| case.name == refused), "{refused}");
        }
    }

    #[test]
    fn a_head_is_read_and_mistakes_are_named() {
        let text = "# item: i\n# wait: condition=Ready\n# check: true\nkind: Pod\n";
        let case = parse("n", text).unwrap();
        assert_eq!(
            (case.item.as_str(), case.wait.as_str()),
            ("i", "condition=Ready")
        );
        assert_eq!(
            (case.checks.len(), case.manifest.as_str()),
            (1, "kind: Pod\n")
        );
        assert!(parse("n", "kind: Pod\n").is_err());
        assert!(parse("n", "# itme: x\n").is_err());
    }

    #[test]
    fn only_what_passes_under_the_control_must_pass() {
        let failed = || Verdict::Failed("a|b".to_owned());
        assert!(holds(&failed(), &failed()));
        assert!(holds(&Verdict::Passed, &Verdict::Refused));
        assert!(!holds(&Verdict::Passed, &failed()));
        let table = table(&[("x".to_owned(), [Verdict::Passed, failed()])]);
        assert!(table.ends_with("| x | pass | FAIL: a/b |\n"), "{table}");
    }
}
