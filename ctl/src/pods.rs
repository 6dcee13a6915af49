//! `pericarp list`: the pods in VMs on this node, from what their shims wrote down.
//!
//! Each pod has a directory beneath the run-time directory, named by its sandbox id, with a
//! `state.json` of its shim's. All fields are optional here: a shim of another version, or one that
//! has just begun, still shows as a line.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pericarp_runtime_config::Config;
use serde::{Deserialize, Serialize};

use crate::cli::ListArguments;

/// Largest state file that is read.
const STATE_BYTES_MAX: u64 = 64 << 10;
/// Most pods listed; the kubelet's own limit is some hundreds.
const PODS_MAX: usize = 16_384;

/// One pod. `state.json` has these fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Pod {
    /// Sandbox id: the directory's name.
    id: String,
    /// Kubernetes' namespace.
    namespace: Option<String>,
    /// Kubernetes' name.
    name: Option<String>,
    /// Such as "running".
    state: Option<String>,
    vcpus: Option<u32>,
    memory_bytes: Option<u64>,
    shim_pid: Option<u32>,
    vmm_pid: Option<u32>,
    /// Name of the template that it went on from, if it did.
    template: Option<String>,
}

pub(crate) fn run(arguments: &ListArguments, out: &mut impl Write) -> Result<()> {
    let run_dir = match &arguments.run_dir {
        Some(path) => path.clone(),
        // A broken configuration must not hide the pods that run.
        None => {
            Config::load(None, true)
                .unwrap_or_default()
                .settings
                .paths
                .run_dir
        }
    };
    let pods = read(&run_dir).with_context(|| format!("cannot read {}", run_dir.display()))?;
    if arguments.json {
        serde_json::to_writer_pretty(&mut *out, &pods)?;
        writeln!(out)?;
    } else {
        write_table(&pods, out)?;
    }
    Ok(())
}

fn read(run_dir: &Path) -> io::Result<Vec<Pod>> {
    let entries = match std::fs::read_dir(run_dir) {
        Ok(entries) => entries,
        // No pod has run since the node started.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut pods = Vec::new();
    for entry in entries.take(PODS_MAX) {
        let entry = entry?;
        let id = entry.file_name().to_string_lossy().into_owned();
        // Names with a dot are the runtime's own, such as the pool of user ids.
        if id.starts_with('.') || !entry.file_type()?.is_dir() {
            continue;
        }
        let state = state(entry.path().join("state.json")).unwrap_or_default();
        pods.push(Pod { id, ..state });
    }
    pods.sort_by(|left, right| left.id.cmp(&right.id));
    Ok(pods)
}

/// The state that a shim wrote; `None` while there is none or it is another version's.
fn state(path: PathBuf) -> Option<Pod> {
    let mut text = String::new();
    File::open(path)
        .ok()?
        .take(STATE_BYTES_MAX)
        .read_to_string(&mut text)
        .ok()?;
    serde_json::from_str(&text).ok()
}

fn write_table(pods: &[Pod], out: &mut impl Write) -> io::Result<()> {
    const HEAD: [&str; 9] = [
        "SANDBOX",
        "NAMESPACE",
        "POD",
        "STATE",
        "VCPUS",
        "MEMORY",
        "SHIM",
        "VMM",
        "TEMPLATE",
    ];
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(pods.iter().map(row));
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    for row in &rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        writeln!(out, "{}", cells.join("  ").trim_end())?;
    }
    Ok(())
}

fn row(pod: &Pod) -> [String; 9] {
    let text = |value: &Option<String>| value.clone().map_or("-".to_owned(), |text| plain(&text));
    let number = |value: Option<u32>| value.map_or("-".to_owned(), |number| number.to_string());
    [
        // As long as crictl shows it.
        plain(&pod.id).chars().take(13).collect(),
        text(&pod.namespace),
        text(&pod.name),
        text(&pod.state),
        number(pod.vcpus),
        pod.memory_bytes
            .map_or("-".to_owned(), |bytes| format!("{} MiB", bytes >> 20)),
        number(pod.shim_pid),
        number(pod.vmm_pid),
        text(&pod.template).chars().take(8).collect(),
    ]
}

/// A pod's name cannot steer the terminal.
fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_listed_with_and_without_state() {
        let folder = tempfile::tempdir().unwrap();
        let write = |id: &str, text: Option<&str>| {
            std::fs::create_dir(folder.path().join(id)).unwrap();
            if let Some(text) = text {
                std::fs::write(folder.path().join(id).join("state.json"), text).unwrap();
            }
        };
        write(
            "aaaaaaaaaaaaaaaaaaaa",
            Some(
                r#"{"id":"other","namespace":"default","name":"web\u001b[2J","state":"running",
                   "vcpus":2,"memory_bytes":603979776,"vmm_pid":7,
                   "template":"0123456789abcdef","later":[1]}"#,
            ),
        );
        write("bbb", Some("{\"vcpus\": \"many\"}"));
        write("ccc", None);
        write(".users", None);
        std::fs::write(folder.path().join("file"), "").unwrap();
        let pods = read(folder.path()).unwrap();
        assert_eq!(
            pods.iter().map(|pod| pod.id.as_str()).collect::<Vec<_>>(),
            ["aaaaaaaaaaaaaaaaaaaa", "bbb", "ccc"]
        );
        let mut out = Vec::new();
        write_table(&pods, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let words: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        let first = [
            "aaaaaaaaaaaaa",
            "default",
            "web?[2J",
            "running",
            "2",
            "576",
            "MiB",
            "-",
            "7",
            "01234567",
        ];
        assert_eq!(words[1], first);
        assert_eq!(words[3], ["ccc", "-", "-", "-", "-", "-", "-", "-", "-"]);
        let column = |line: usize, word: &str| text.lines().nth(line).unwrap().find(word);
        assert_eq!(column(0, "STATE"), column(1, "running"));
        assert_eq!(read(&folder.path().join("none")).unwrap(), []);
    }
}
