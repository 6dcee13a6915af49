//! The conformance tests of the CRI under Pericarp, beside the same tests under runc.
//!
//! critest's report is ginkgo's:
//! <https://onsi.github.io/ginkgo/#generating-machine-readable-reports>.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::node::channel::Kind;
use crate::node::{Command, Containerd, Node};

/// The control comes first.
const CONTROL: &str = "runc";

/// How many specs may fail that pass under the control.
pub const REGRESSIONS_MAX: usize = 10;

/// Time beyond the limit in which critest ends by itself and writes its report.
const GRACE_S: u64 = 180;

/// Longest part of a failure's message that is printed; the report has all of it.
const MESSAGE_CHARS_MAX: usize = 600;

/// What is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Handlers of containerd, in this order.
    pub handlers: Vec<String>,
    /// Only specs that match one of these.
    pub focus: Vec<String>,
    /// No specs that match one of these.
    pub skip: Vec<String>,
    /// After that long, what has not run under a handler is not run.
    pub limit_s: u64,
}

/// Ginkgo's report of a suite.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    spec_reports: Option<Vec<Spec>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    #[serde(default)]
    failure: Failure,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Failure {
    message: String,
}

/// How a spec ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed(String),
    Skipped,
}

impl Verdict {
    fn word(&self) -> &'static str {
        match self {
            Self::Passed => "pass",
            Self::Failed(_) => "FAIL",
            Self::Skipped => "skip",
        }
    }
}

type Report = BTreeMap<String, Verdict>;

/// Runs critest under each handler and prints both side by side. Whether the bar holds.
pub fn run(node: &Node, containerd: &Containerd, options: &Options) -> Result<bool> {
    ensure!(!options.handlers.is_empty(), "no handler is named");
    let mut reports = Vec::new();
    for handler in &options.handlers {
        let file = under(node, containerd, handler, options)
            .with_context(|| format!("critest under {handler}"))?;
        reports.push((handler.clone(), read(&file)?));
    }
    print!("{}", side_by_side(&reports));
    let regressions = regressions(&reports);
    for (spec, message) in &regressions {
        println!("\nfails under Pericarp and passes under runc: {spec}\n{message}");
    }
    println!("\n{}", summary(&reports, regressions.len()));
    Ok(regressions.len() <= REGRESSIONS_MAX)
}

fn under(
    node: &Node,
    containerd: &Containerd,
    handler: &str,
    options: &Options,
) -> Result<PathBuf> {
    let report = node.results().join(format!("critest-{handler}.json"));
    let junit = node.results().join(format!("critest-{handler}.xml"));
    let log = node.results().join(format!("critest-{handler}.log"));
    let endpoint = format!("unix://{}", containerd.socket());
    let mut command = Command::new("critest")
        .args([
            "--runtime-endpoint",
            &endpoint,
            "--image-endpoint",
            &endpoint,
        ])
        .args(["--runtime-handler", handler])
        // critest's own limit for one call of the runtime is for real processors.
        .args([
            "--runtime-service-timeout",
            "300s",
            "--image-service-timeout",
            "300s",
        ])
        .args(["--ginkgo.v", "--ginkgo.no-color", "--ginkgo.seed", "1"])
        .arg(format!("--ginkgo.timeout={}s", options.limit_s))
        .arg(format!("--ginkgo.json-report={}", report.display()))
        .arg(format!("--ginkgo.junit-report={}", junit.display()));
    for focus in &options.focus {
        command = command.arg(format!("--ginkgo.focus={focus}"));
    }
    for skip in &options.skip {
        command = command.arg(format!("--ginkgo.skip={skip}"));
    }
    let mut file = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
    let mut progress = Progress::new(handler);
    let sink = move |_: Kind, bytes: &[u8]| {
        // A full disk ends the run elsewhere; the report is what counts.
        let _disk_full = file.write_all(bytes);
        progress.feed(bytes);
    };
    let command = command.timeout_s(options.limit_s + GRACE_S);
    let output = node.run_with(&command, None, Some(Box::new(sink)))?;
    let removal = containerd.crictl().args(["rmp", "-f", "-a"]);
    let _nothing_to_remove = node.run(&removal)?;
    ensure!(
        report.exists(),
        "critest left no report ({}): read {}",
        output.exit,
        log.display()
    );
    Ok(report)
}

/// Tells how far critest is: a line whenever a spec has ended.
struct Progress {
    handler: String,
    line: Vec<u8>,
    done: usize,
    failed: usize,
}

impl Progress {
    fn new(handler: &str) -> Self {
        Self {
            handler: handler.to_owned(),
            line: Vec::new(),
            done: 0,
            failed: 0,
        }
    }

    /// Ginkgo marks the end of a spec by a bullet; the line says `[FAILED]` if it failed.
    fn feed(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte != b'\n' {
                self.line.push(*byte);
                continue;
            }
            let line = String::from_utf8_lossy(&self.line).into_owned();
            self.line.clear();
            if line.starts_with('•') {
                self.done += 1;
                self.failed += usize::from(line.contains("[FAILED]"));
                let Self {
                    handler,
                    done,
                    failed,
                    ..
                } = self;
                eprintln!("node critest: {handler}: {done} specs done, {failed} failed {line}");
            }
        }
    }
}

fn read(file: &Path) -> Result<Report> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    parse(&text).with_context(|| format!("{} is no report of ginkgo", file.display()))
}

fn parse(text: &str) -> Result<Report> {
    let suites: Vec<Suite> = serde_json::from_str(text)?;
    let specs = suites
        .into_iter()
        .flat_map(|suite| suite.spec_reports.unwrap_or_default());
    let specs = specs.filter(|spec| spec.leaf_node_type == "It");
    Ok(specs.map(|spec| (name(&spec), verdict(spec))).collect())
}

fn name(spec: &Spec) -> String {
    let containers = spec.container_hierarchy_texts.iter().flatten();
    let parts = containers.chain(std::iter::once(&spec.leaf_node_text));
    parts.map(String::as_str).collect::<Vec<_>>().join(" ")
}

fn verdict(spec: Spec) -> Verdict {
    match spec.state.as_str() {
        "passed" => Verdict::Passed,
        "skipped" | "pending" => Verdict::Skipped,
        other => {
            let message = spec.failure.message.trim();
            let shown: String = message.chars().take(MESSAGE_CHARS_MAX).collect();
            Verdict::Failed(format!("{other}: {shown}"))
        }
    }
}

/// A line per spec that ran under any handler.
fn side_by_side(reports: &[(String, Report)]) -> String {
    let mut text = String::new();
    for (handler, _) in reports {
        text.push_str(&format!("{handler:<10}"));
    }
    text.push_str("spec\n");
    let mut specs: Vec<&String> = reports
        .iter()
        .flat_map(|(_, report)| report.keys())
        .collect();
    specs.sort();
    specs.dedup();
    for spec in specs {
        let verdicts = reports.iter().map(|(_, report)| report.get(spec));
        let verdicts: Vec<Option<&Verdict>> = verdicts.collect();
        if verdicts
            .iter()
            .flatten()
            .all(|verdict| **verdict == Verdict::Skipped)
        {
            continue;
        }
        for verdict in verdicts {
            text.push_str(&format!("{:<10}", verdict.map_or("-", Verdict::word)));
        }
        text.push_str(&format!("{spec}\n"));
    }
    text
}

/// Specs that pass under the control and fail under another handler, with the reason.
fn regressions(reports: &[(String, Report)]) -> Vec<(String, String)> {
    let Some((_, control)) = reports.iter().find(|(handler, _)| handler == CONTROL) else {
        return Vec::new();
    };
    let others = reports.iter().filter(|(handler, _)| handler != CONTROL);
    let failed = others.flat_map(|(_, report)| report.iter());
    let failed = failed.filter_map(|(spec, verdict)| match verdict {
        Verdict::Failed(message) if control.get(spec) == Some(&Verdict::Passed) => {
            Some((spec.clone(), message.clone()))
        }
        _ => None,
    });
    failed.collect()
}

fn summary(reports: &[(String, Report)], regressions: usize) -> String {
    let mut parts = Vec::new();
    for (handler, report) in reports {
        let count = |word: &str| report.values().filter(|v| v.word() == word).count();
        parts.push(format!(
            "{handler} {} passed, {} failed, {} skipped",
            count("pass"),
            count("FAIL"),
            count("skip")
        ));
    }
    format!(
        "critest: {}; {regressions} fail that pass under {CONTROL} (at most {REGRESSIONS_MAX})",
        parts.join("; ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(state: &str) -> Report {
        let text = format!(
            r#"[{{"SpecReports": [
            {{"ContainerHierarchyTexts": null, "LeafNodeType": "BeforeSuite",
              "LeafNodeText": "", "State": "passed"}},
            {{"ContainerHierarchyTexts": ["[k8s.io] Pod", "runtime"], "LeafNodeType": "It",
              "LeafNodeText": "should start", "State": "{state}",
              "Failure": {{"Message": "no\nVM"}}}}]}}]"#
        );
        parse(&text).unwrap()
    }

    #[test]
    fn what_only_fails_here_is_a_regression_with_its_message() {
        let reports = [
            ("runc".to_owned(), report("passed")),
            ("pericarp".to_owned(), report("timedout")),
        ];
        let expected = (
            "[k8s.io] Pod runtime should start".to_owned(),
            "timedout: no\nVM".to_owned(),
        );
        assert_eq!(regressions(&reports), [expected]);
        let text = side_by_side(&reports);
        assert!(
            text.contains("pass      FAIL      [k8s.io] Pod runtime should start"),
            "{text}"
        );
        let summary = summary(&reports, 1);
        assert!(summary.contains("pericarp 0 passed, 1 failed"), "{summary}");
    }

    #[test]
    fn what_fails_under_the_control_too_is_none() {
        let reports = [
            ("runc".to_owned(), report("failed")),
            ("pericarp".to_owned(), report("failed")),
        ];
        assert!(regressions(&reports).is_empty());
    }
}
