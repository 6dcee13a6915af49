//! `pericarp template`: the saved machines from which pods start.
//!
//! ```text
//! <run_dir>/.templates/<key>/memory, state, seal.json     one template
//! ```
//!
//! Shims make and check them (`shim/src/machine/template.rs`); here they are listed, made in
//! advance and removed. Running pods do not need their template any more.

use std::fs::{self, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use pericarp_runtime_config::Config;
use serde::Serialize;

use crate::cli::{TemplateArguments, TemplateCommand};

/// The shim's program, which stands beside this one.
const SHIM: &str = "containerd-shim-pericarp-v2";

/// One template.
#[derive(Debug, Serialize)]
struct Template {
    /// Its name: the hash of what it was made from.
    key: String,
    /// Memory of the machine.
    memory_bytes: u64,
    /// Memory that the template occupies on the node, shared by all its pods.
    resident_bytes: u64,
    /// Seconds since a pod last started from it.
    unused_s: u64,
}

pub(crate) fn run(arguments: &TemplateArguments, out: &mut impl Write) -> Result<ExitCode> {
    let config = Config::load(arguments.config.as_deref(), true)?;
    let directory = config.settings.paths.run_dir.join(".templates");
    match &arguments.command {
        TemplateCommand::List { json } => list(&directory, *json, out)?,
        TemplateCommand::Build { flavour } => {
            return build(arguments.config.as_deref(), flavour.as_deref());
        }
        TemplateCommand::Rm { keys, all } => remove(&directory, keys, *all, out)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn list(directory: &Path, json: bool, out: &mut impl Write) -> Result<()> {
    let templates =
        read(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    if json {
        serde_json::to_writer_pretty(&mut *out, &templates)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(
        out,
        "{:<32}  {:>10}  {:>10}  LAST USED",
        "TEMPLATE", "MEMORY", "RESIDENT"
    )?;
    for template in templates {
        let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
        writeln!(
            out,
            "{:<32}  {:>10}  {:>10}  {} s ago",
            template.key,
            mib(template.memory_bytes),
            mib(template.resident_bytes),
            template.unused_s
        )?;
    }
    Ok(())
}

fn read(directory: &Path) -> io::Result<Vec<Template>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        // None has been made since the node started.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut templates = Vec::new();
    for entry in entries {
        let entry = entry?;
        let (memory, seal) = (entry.path().join("memory"), entry.path().join("seal.json"));
        // Skips the log and the working directory.
        let (Ok(memory), Ok(seal)) = (fs::metadata(memory), fs::metadata(seal)) else {
            continue;
        };
        templates.push(describe(
            entry.file_name().to_string_lossy().into_owned(),
            &memory,
            &seal,
        ));
    }
    templates.sort_by_key(|template| template.unused_s);
    Ok(templates)
}

fn describe(key: String, memory: &Metadata, seal: &Metadata) -> Template {
    // stat(2): blocks are of 512 bytes.
    const BLOCK_BYTES: u64 = 512;
    let used = seal.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    Template {
        key,
        memory_bytes: memory.len(),
        resident_bytes: memory.blocks() * BLOCK_BYTES,
        unused_s: used.elapsed().unwrap_or(Duration::ZERO).as_secs(),
    }
}

/// Has the shim make the template of a pod that asks for nothing.
fn build(config: Option<&Path>, flavour: Option<&str>) -> Result<ExitCode> {
    let order = serde_json::json!({"config": config, "flavour": flavour});
    let program = shim();
    let mut shim = Command::new(&program)
        .arg("template")
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))?;
    if let Some(mut input) = shim.stdin.take() {
        input.write_all(order.to_string().as_bytes())?;
    }
    let status = shim.wait()?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn shim() -> PathBuf {
    std::env::current_exe()
        .map(|own| own.with_file_name(SHIM))
        .ok()
        .filter(|beside| beside.exists())
        // Found through PATH.
        .unwrap_or_else(|| SHIM.into())
}

fn remove(directory: &Path, keys: &[String], all: bool, out: &mut impl Write) -> Result<()> {
    let there = read(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let known = |key: &String| there.iter().any(|template| template.key == *key);
    if let Some(unknown) = keys.iter().find(|key| !known(key)) {
        bail!("there is no template {unknown}: `pericarp template list` shows those that are");
    }
    let wanted = there
        .iter()
        .filter(|template| all || keys.contains(&template.key));
    for template in wanted {
        let path = directory.join(&template.key);
        fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        writeln!(out, "{}", template.key)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(directory: &Path, key: &str) {
        let template = directory.join(key);
        fs::create_dir(&template).unwrap();
        fs::write(template.join("memory"), vec![1; 1 << 20]).unwrap();
        fs::write(template.join("seal.json"), "{}").unwrap();
    }

    #[test]
    fn templates_are_listed_and_removed_by_name() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read(&folder.path().join("none")).unwrap().is_empty());
        make(folder.path(), "a1");
        make(folder.path(), "b2");
        fs::create_dir(folder.path().join(".work")).unwrap();
        let mut out = Vec::new();
        list(folder.path(), false, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.lines().count(), 3);
        assert!(text.contains("a1") && text.contains("1 MiB"), "{text}");

        let names = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect::<Vec<_>>();
        let mut out = Vec::new();
        let wrong = remove(folder.path(), &names(&["a1", "c3"]), false, &mut out);
        assert!(wrong.unwrap_err().to_string().contains("c3"));
        assert!(out.is_empty(), "nothing is removed then");
        remove(folder.path(), &names(&["b2"]), false, &mut out).unwrap();
        assert_eq!(out, b"b2\n");
        remove(folder.path(), &[], true, &mut out).unwrap();
        assert_eq!(out, b"b2\na1\n");
        assert!(folder.path().join(".work").exists());
    }
}
