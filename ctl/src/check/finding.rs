//! What a check found, and its two spellings.

use std::io::{self, Write};

use serde::Serialize;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// Pods run, but something is missing or slower.
    Warn,
    /// Pods do not run.
    Fail,
}

impl Level {
    const fn word(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        }
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    pub(crate) level: Level,
    /// What was looked at, such as `kvm.device`.
    pub(crate) check: &'static str,
    /// What was found.
    pub(crate) found: String,
    /// What to do; empty when nothing is.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) action: String,
}

/// All findings, in the order in which they were made.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) findings: Vec<Finding>,
}

#[derive(Serialize)]
struct Document<'a> {
    ok: bool,
    version: &'static str,
    findings: &'a [Finding],
}

impl Report {
    pub(crate) fn ok(&mut self, check: &'static str, found: impl Into<String>) {
        self.add(Level::Ok, check, found, "");
    }

    pub(crate) fn warn(
        &mut self,
        check: &'static str,
        found: impl Into<String>,
        action: impl Into<String>,
    ) {
        self.add(Level::Warn, check, found, action);
    }

    pub(crate) fn fail(
        &mut self,
        check: &'static str,
        found: impl Into<String>,
        action: impl Into<String>,
    ) {
        self.add(Level::Fail, check, found, action);
    }

    pub(crate) fn add(
        &mut self,
        level: Level,
        check: &'static str,
        found: impl Into<String>,
        action: impl Into<String>,
    ) {
        // One line each: texts of files and programs may hold newlines.
        let line = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let (found, action) = (line(found.into()), line(action.into()));
        self.findings.push(Finding {
            level,
            check,
            found,
            action,
        });
    }

    /// Can the node run pods?
    pub(crate) fn is_ok(&self) -> bool {
        self.findings
            .iter()
            .all(|finding| finding.level != Level::Fail)
    }

    pub(crate) fn write_lines(&self, out: &mut impl Write) -> io::Result<()> {
        let widest = self
            .findings
            .iter()
            .map(|finding| finding.check.len())
            .max()
            .unwrap_or(0);
        for Finding {
            level,
            check,
            found,
            action,
        } in &self.findings
        {
            write!(out, "{:<4}  {check:<widest$}  {found}", level.word())?;
            if !action.is_empty() {
                write!(out, " -> {action}")?;
            }
            writeln!(out)?;
        }
        let count = |level| {
            self.findings
                .iter()
                .filter(|finding| finding.level == level)
                .count()
        };
        let (failed, warned) = (count(Level::Fail), count(Level::Warn));
        if self.is_ok() {
            writeln!(out, "this node can run pods ({warned} warnings)")
        } else {
            writeln!(
                out,
                "this node cannot run pods yet ({failed} failures, {warned} warnings)"
            )
        }
    }

    pub(crate) fn write_json(&self, out: &mut impl Write) -> io::Result<()> {
        let version = env!("CARGO_PKG_VERSION");
        let document = Document {
            ok: self.is_ok(),
            version,
            findings: &self.findings,
        };
        serde_json::to_writer_pretty(&mut *out, &document)?;
        writeln!(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        report.ok("kvm.device", "there");
        report.warn("a", "two\nlines", "do this");
        report
    }

    #[test]
    fn lines_are_aligned_and_one_each() {
        let mut out = Vec::new();
        report().write_lines(&mut out).unwrap();
        let expected = "OK    kvm.device  there\nWARN  a           two lines -> do this\n\
                        this node can run pods (1 warnings)\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn json_says_whether_it_is_all_right() {
        let mut report = report();
        report.fail("b", "gone", "bring it back");
        let mut out = Vec::new();
        report.write_json(&mut out).unwrap();
        let document: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(document["ok"], false);
        assert_eq!(document["findings"][2]["level"], "fail");
        assert_eq!(document["findings"][2]["action"], "bring it back");
        assert!(document["findings"][0].get("action").is_none());
    }
}
