//! What a pod may ask of Kubernetes, under runc and under Pericarp: one table.
//!
//! A case is a file of `tests/kubernetes/`: a manifest, below a head of comments that says what is
//! asked, what to wait for, and what to check.
//!
//! ```text
//! # item: what the table calls it
//! # before: a line of bash before the manifest is applied
//! # applied: a line of bash once it is
//! # wait: what `kubectl wait --for` gets; without it nothing is waited for
//! # only: the RuntimeClass that alone is asked
//! # alone: why no other case may run beside it
//! # check: a line of bash that must succeed while the pod is there
//! # after: a line of bash that must succeed once it is deleted, and is run in any case
//! ```
//!
//! In the manifest `$NAME` is the pod's name and `$CLASS` its RuntimeClass; in bash they are
//! variables.

mod scenarios;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};

use crate::node::{Command, Containerd, Kubernetes, Node, paths};
use scenarios::{Place, SCENARIOS, Scenario, Setting};

/// The control and what is tested, as RuntimeClasses.
const CLASSES: [&str; 2] = ["runc", "pericarp"];

/// Time that a pod gets to be what its case waits for.
const WAIT_S: u64 = 300;

/// Time that one line of a case gets.
const LINE_TIMEOUT_S: u64 = 360;

/// Cases at once: they wait for kubelet most of the time.
const AT_ONCE: usize = 4;

/// Longest reason in the table.
const REASON_CHARS_MAX: usize = 200;

/// Cases that a pod in a VM is refused by design, with what says so.
const REFUSED: [(&str, &str); 4] = [
    ("host-network", "hostNetwork"),
    ("host-pid", "hostPID"),
    ("bidirectional", "Bidirectional"),
    ("host-path-block", "volumeDevices"),
];

/// A case, as its file says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Case {
    name: String,
    item: String,
    before: Vec<String>,
    applied: Vec<String>,
    wait: String,
    only: String,
    alone: bool,
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
    /// Not asked for of this class.
    NotAsked,
    /// Asked for, and not answered yet: what an interrupted run leaves.
    NotRun,
}

impl Verdict {
    fn failed(error: &anyhow::Error) -> Self {
        let reason = format!("{error:#}").replace('\n', " ");
        // The end has the reason, the beginning the step, a command's line first of all.
        let reason = reason.rsplit(" in the node: ").next().unwrap_or(&reason);
        let chars: Vec<char> = reason.chars().collect();
        let skipped = chars.len().saturating_sub(REASON_CHARS_MAX);
        Self::Failed(chars.into_iter().skip(skipped).collect())
    }

    fn cell(&self) -> String {
        match self {
            Self::Passed => "pass".to_owned(),
            Self::Refused => "refused by name".to_owned(),
            Self::NotAsked => "–".to_owned(),
            Self::NotRun => "not run".to_owned(),
            Self::Failed(reason) => format!("FAIL: {}", reason.replace('|', "/")),
        }
    }
}

/// What a run asks for, and what it knows of it.
#[derive(Debug)]
pub struct Run<'a> {
    cases: Vec<Case>,
    scenarios: Vec<&'static Scenario>,
    report: Report<'a>,
}

impl<'a> Run<'a> {
    /// Every case whose name holds one of `only`, all when it is empty. Verdicts are noted in the
    /// table of `file` when one is given.
    pub fn new(only: &[String], file: Option<&'a Path>) -> Result<Self> {
        let wanted =
            |name: &str| only.is_empty() || only.iter().any(|part| name.contains(part.as_str()));
        let mut cases = cases()?;
        let mut scenarios: Vec<_> = SCENARIOS.iter().collect();
        let before = file.map(std::fs::read_to_string).and_then(Result::ok);
        let others = known(&rows(&cases, &scenarios), &before.unwrap_or_default());
        cases.retain(|case| wanted(&case.name));
        scenarios.retain(|scenario| wanted(scenario.name));
        let rows = rows(&cases, &scenarios);
        ensure!(!rows.is_empty(), "no case is called {}", only.join(" or "));
        let report = Report {
            rows: Mutex::new(rows),
            others,
            file,
        };
        Ok(Self {
            cases,
            scenarios,
            report,
        })
    }

    /// Whether anything happens in the node of all cases.
    #[must_use]
    pub fn needs_node(&self) -> bool {
        let shared = |scenario: &&Scenario| matches!(scenario.run, Place::Shared(_));
        !self.cases.is_empty() || self.scenarios.iter().any(shared)
    }

    /// Runs what happens in the node of all cases.
    pub fn in_node(&self, node: &Node, (containerd, kubernetes): (&Containerd, &Kubernetes)) {
        judge_all(node, kubernetes, &self.cases, &self.report);
        self.judge_scenarios(|place, class| match place {
            Place::Own(_) => None,
            Place::Shared(run) => Some(run(&Setting {
                node,
                kubernetes,
                containerd,
                class,
            })),
        });
    }

    /// Runs what has nodes of its own, when that of all cases takes nothing from them any more.
    pub fn in_own_nodes(&self) {
        self.judge_scenarios(|place, class| match place {
            Place::Own(run) => Some(run(class)),
            Place::Shared(_) => None,
        });
    }

    fn judge_scenarios(&self, run: impl Fn(Place, &'static str) -> Option<Result<()>>) {
        for (number, scenario) in self.scenarios.iter().enumerate() {
            for (column, class) in CLASSES.into_iter().enumerate() {
                if class == CLASSES[0] && !scenario.controlled {
                    continue;
                }
                let Some(result) = run(scenario.run, class) else {
                    continue;
                };
                let verdict = match result {
                    Ok(()) => Verdict::Passed,
                    Err(error) => Verdict::failed(&error),
                };
                let place = (self.cases.len() + number, column);
                self.report.note(scenario.name, place, verdict);
            }
        }
    }

    /// Prints the table. Whether all that passes under runc passes under Pericarp.
    #[must_use]
    pub fn end(self) -> bool {
        let rows = self.report.rows.into_inner();
        let rows = rows.unwrap_or_else(PoisonError::into_inner);
        print!("{}", table(&rows));
        rows.iter().all(|(_, [control, ours])| holds(control, ours))
    }
}

fn holds(control: &Verdict, ours: &Verdict) -> bool {
    let must = matches!(control, Verdict::Passed | Verdict::NotAsked);
    !must || !matches!(ours, Verdict::Failed(_))
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
            "only" => case.only = value,
            "alone" => case.alone = true,
            "before" => case.before.push(value),
            "applied" => case.applied.push(value),
            "check" => case.checks.push(value),
            "after" => case.after.push(value),
            _ => bail!("an unknown key of the head: {key}"),
        }
    }
    ensure!(
        !(case.item.is_empty() || case.wait.is_empty() && case.checks.is_empty()),
        "the head names no item, or nothing to wait for or to check"
    );
    Ok(case)
}

type Row = (String, [Verdict; 2]);

/// The rows of cases and scenarios that nothing is known of yet.
fn rows(cases: &[Case], scenarios: &[&Scenario]) -> Vec<Row> {
    let asked = cases
        .iter()
        .map(|case| (case.item.clone(), asked_of(&case.only)));
    let around = scenarios.iter().map(|scenario| {
        let only = if scenario.controlled { "" } else { CLASSES[1] };
        (scenario.item.to_owned(), asked_of(only))
    });
    asked.chain(around).collect()
}

/// The lines of all rows that there are, by their items: as the page has them, if it does.
fn known(rows: &[Row], page: &str) -> BTreeMap<String, String> {
    let mut lines = others(&table(rows));
    for (item, line) in others(page) {
        lines.entry(item).and_modify(|place| *place = line);
    }
    lines
}

/// What is not known yet of a case that is asked of one class alone, or of both.
fn asked_of(only: &str) -> [Verdict; 2] {
    CLASSES.map(|class| {
        if only.is_empty() || only == class {
            Verdict::NotRun
        } else {
            Verdict::NotAsked
        }
    })
}

/// The table as far as it is known; its file is written with every verdict, so that a run which is
/// cut off leaves what it found.
#[derive(Debug)]
struct Report<'a> {
    rows: Mutex<Vec<Row>>,
    /// Lines of all rows, by their item: those that this run does not ask for stay.
    others: BTreeMap<String, String>,
    file: Option<&'a Path>,
}

fn others(page: &str) -> BTreeMap<String, String> {
    let lines = page.lines().filter(|line| line.starts_with("| ")).skip(1);
    let item = |line: &str| {
        line.split(" | ")
            .next()
            .map(|item| item.trim_start_matches("| ").to_owned())
    };
    lines
        .filter_map(|line| Some((item(line)?, line.to_owned())))
        .collect()
}

impl Report<'_> {
    fn note(&self, name: &str, (row, column): (usize, usize), verdict: Verdict) {
        let class = CLASSES[column];
        eprintln!("kubernetes: {name} under {class}: {}", verdict.cell());
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        rows[row].1[column] = verdict;
        let Some(file) = self.file else { return };
        let mut lines = self.others.clone();
        for line in table(&rows).lines().skip(2) {
            lines.extend(others(&format!("| head\n{line}\n")));
        }
        let mut text = table(&[]);
        for line in lines.values() {
            text.push_str(line);
            text.push('\n');
        }
        if let Err(error) = std::fs::write(file, page(&text)) {
            eprintln!("kubernetes: cannot write {}: {error}", file.display());
        }
    }

    fn is_asked(&self, (row, column): (usize, usize)) -> bool {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        rows[row].1[column] != Verdict::NotAsked
    }
}

/// Runs all cases: those that may stand beside others at once, then the rest one after another.
fn judge_all(node: &Node, kubernetes: &Kubernetes, cases: &[Case], report: &Report<'_>) {
    let run = |job: (usize, usize)| {
        let (case, class) = (&cases[job.0], CLASSES[job.1]);
        report.note(&case.name, job, judge(node, kubernetes, case, class));
    };
    let jobs = (0..cases.len()).flat_map(|row| [(row, 0), (row, 1)]);
    let jobs = jobs.filter(|job| report.is_asked(*job));
    let (alone, beside): (Vec<_>, Vec<_>) = jobs.partition(|(row, _)| cases[*row].alone);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(job) = beside.get(next.fetch_add(1, Ordering::Relaxed)) {
                    run(*job);
                }
            });
        }
    });
    alone.into_iter().for_each(run);
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
        let output = node.run(&command)?.checked(&command.line());
        let output = output.with_context(|| line.clone())?;
        // What measures says what it found there.
        if case.alone && !output.stderr.trim().is_empty() {
            eprintln!("kubernetes: {name}: {}", output.stderr.trim());
        }
        Ok(())
    };
    let lines = |all: &[String]| all.iter().try_for_each(line);
    let refusal = words_of_refusal(case).filter(|_| class != CLASSES[0]);
    let mut shown = lines(&case.before)
        .and_then(|()| kubernetes.apply(node, &manifest))
        .and_then(|()| lines(&case.applied))
        .and_then(|()| match refusal {
            Some(words) => told(node, kubernetes, &name, words),
            None => waited(node, kubernetes, &name, &case.wait).and_then(|()| lines(&case.checks)),
        });
    let deleted = deleted(node, kubernetes, &manifest);
    // Whatever the end: what the case made for itself goes.
    let after = lines(&case.after);
    if shown.is_ok() {
        shown = deleted.and(after);
    }
    match shown {
        Ok(()) if refusal.is_some() => Verdict::Refused,
        Ok(()) => Verdict::Passed,
        Err(error) => {
            eprintln!("kubernetes: {name}: {error:#}");
            Verdict::failed(&error)
        }
    }
}

/// Waits for what the case waits for; a pod that cannot become it any more fails at once.
fn waited(node: &Node, kubernetes: &Kubernetes, name: &str, wait: &str) -> Result<()> {
    if wait.is_empty() {
        return Ok(());
    }
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
             -o jsonpath='{{range .items[*]}} {{.message}}{{end}}' | tail -c 600
         kubectl logs {name} --all-containers --tail=3 2>&1 | tail -c 300"
    );
    let mut command = Command::shell(line);
    command.env = kubernetes.kubectl().env;
    let output = node.run(&command).map(|output| output.stdout);
    output.unwrap_or_default().replace('\n', " ")
}

/// What the events of a pod say that is refused by design.
fn words_of_refusal(case: &Case) -> Option<&'static str> {
    let found = REFUSED.iter().find(|(name, _)| *name == case.name);
    found.map(|(_, words)| *words)
}

/// Waits until an event of the pod says `words`.
fn told(node: &Node, kubernetes: &Kubernetes, name: &str, words: &str) -> Result<()> {
    let line = format!(
        "timeout {WAIT_S} sh -c 'until kubectl get events --field-selector \
         involvedObject.name={name} -o jsonpath={{.items[*].message}} | grep -q {words}; \
         do sleep 1; done'"
    );
    let mut command = Command::shell(line).timeout_s(LINE_TIMEOUT_S);
    command.env = kubernetes.kubectl().env;
    let told = node.text(&command).map(|_| ());
    told.with_context(|| last_words(node, kubernetes, name))
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

fn table(rows: &[Row]) -> String {
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
        what no VM can give: the pod's event\nnames the field. *Not run* is what no run \
        has come to yet.\n\n";
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
    fn a_failure_is_told_without_the_line_that_found_it() {
        let error = anyhow::anyhow!("`sh -c x` in the node: exit status 1: 7 s").context("x");
        assert_eq!(Verdict::failed(&error).cell(), "FAIL: exit status 1: 7 s");
    }

    #[test]
    fn only_what_passes_under_the_control_must_pass() {
        let failed = || Verdict::Failed("a|b".to_owned());
        assert!(holds(&failed(), &failed()));
        assert!(holds(&Verdict::Passed, &Verdict::Refused));
        assert!(!holds(&Verdict::Passed, &failed()));
        let table = table(&[("x".to_owned(), [Verdict::Passed, failed()])]);
        assert!(table.ends_with("| x | pass | FAIL: a/b |\n"), "{table}");
        // Of the page stays what there is still a case for.
        let there = [("x", asked_of("")), ("y", asked_of("pericarp"))];
        let there = there.map(|(item, verdicts)| (item.to_owned(), verdicts));
        let page = format!("{}| gone | pass | pass |\n", page(&table));
        let lines: Vec<_> = known(&there, &page).into_values().collect();
        assert_eq!(lines, ["| x | pass | FAIL: a/b |", "| y | – | not run |"]);
    }
}
