//! Environment, limits, identity, signals and descriptors of a process.
//!
//! All of it is read from `/proc/<pid>`, so that the probe can inspect other processes. Rust's
//! runtime ignores SIGPIPE before `main`, so signals are reported for other processes only.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Lines of `/proc/<pid>/status` (proc_pid_status(5)) that a process inherits.
const STATUS: [&str; 12] = [
    "CapAmb",
    "CapBnd",
    "CapEff",
    "CapInh",
    "CapPrm",
    "Gid",
    "Groups",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "Uid",
    "Umask",
];

/// The lines about signals.
const SIGNALS: [&str; 3] = ["SigBlk", "SigCgt", "SigIgn"];

/// Mask of signals 1 to 31. Real-time signals can be ignored by whatever started containerd.
const STANDARD_SIGNALS: u64 = 0x7fff_ffff;

/// Inspects a process of this PID namespace: a PID, or `self`.
pub(crate) fn look(process: &str) -> Result<Value> {
    let folder = Path::new("/proc").join(process);
    let read = |name: &str| {
        let file = folder.join(name);
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
    };
    let status = status(&read("status")?);
    let of_status = STATUS.map(|name| (name, status.get(name)));
    let of_status = BTreeMap::from(of_status);
    let is_other = process != "self";
    let processors = status.get("Cpus_allowed_list").map(|list| processors(list));
    Ok(json!({
        "environment": words(&read("environ")?),
        "arguments": words(&read("cmdline")?),
        "limits": limits(&read("limits")?),
        "status": of_status,
        "signals": is_other.then(|| signals(&status)),
        "stat": stat(&read("stat")?)?,
        "processors": processors,
        "oom_score_adj": read("oom_score_adj")?.trim(),
        "working_directory": fs::read_link(folder.join("cwd"))?,
        "root": fs::read_link(folder.join("root"))?,
        "descriptors": descriptors(&folder.join("fd"))?,
        "hostname": nix::unistd::gethostname()?.to_string_lossy(),
    }))
}

/// Splits strings that end with a zero byte, and keeps their order.
fn words(text: &str) -> Vec<&str> {
    text.split_terminator('\0').collect()
}

fn status(text: &str) -> BTreeMap<String, String> {
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    let spaced = |value: &str| value.split_whitespace().collect::<Vec<_>>().join(" ");
    pairs
        .map(|(name, value)| (name.to_owned(), spaced(value)))
        .collect()
}

/// Soft and hard limit by name. The columns are padded to 25 and 20 places
/// (`proc_pid_limits` in Linux `fs/proc/base.c`).
fn limits(text: &str) -> BTreeMap<&str, [&str; 2]> {
    let rows = text.lines().skip(1);
    let columns = rows.filter_map(|row| Some((row.get(..25)?, row.get(26..46)?, row.get(47..67)?)));
    columns
        .map(|(name, soft, hard)| (name.trim(), [soft.trim(), hard.trim()]))
        .collect()
}

/// The masks of standard signals.
fn signals(status: &BTreeMap<String, String>) -> BTreeMap<&'static str, Option<u64>> {
    let mask = |name| u64::from_str_radix(status.get(name)?, 16).ok();
    let masks = SIGNALS.map(|name| (name, mask(name).map(|mask| mask & STANDARD_SIGNALS)));
    BTreeMap::from(masks)
}

/// Group, session, terminal and scheduling, by proc_pid_stat(5).
fn stat(text: &str) -> Result<Value> {
    let (before, after) = text.rsplit_once(')').context("no name in stat")?;
    let pid = before.split(' ').next().unwrap_or_default();
    // The first one is field 3.
    let fields: Vec<&str> = after.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).copied().context("stat is short");
    Ok(json!({
        "leads_group": field(5)? == pid,
        "leads_session": field(6)? == pid,
        "terminal": field(7)?,
        "terminal_group": field(8)? == pid,
        "nice": field(19)?,
        "real_time_priority": field(40)?,
        "policy": field(41)?,
    }))
}

/// Number of processors in a list such as `0-3,8`.
fn processors(list: &str) -> u64 {
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let numbers = first.parse::<u64>().ok().zip(last.parse::<u64>().ok());
        numbers.map_or(0, |(first, last)| last - first + 1)
    };
    list.split(',').map(count).sum()
}

/// Number and kind of each open descriptor, except the one that lists them.
fn descriptors(folder: &Path) -> Result<BTreeMap<u32, String>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let number = entry.file_name().to_string_lossy().parse()?;
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let target = target.to_string_lossy().into_owned();
        if target.starts_with("/proc/") {
            continue;
        }
        // Inode and terminal numbers differ from run to run.
        let kind = target.split(":[").next().unwrap_or_default();
        found.insert(
            number,
            kind.trim_end_matches(|c: char| c.is_ascii_digit())
                .to_owned(),
        );
    }
    Ok(found)
}
