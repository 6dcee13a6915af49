//! Builds the static program that tests run in containers (`tests/src/bin/probe`).
//!
//! Cargo cannot link one program of a package statically in an ordinary build, so this module calls
//! `cargo rustc` for it. The crates of the running build are reused.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

use super::{Node, paths, tools};

/// Name of the program.
const NAME: &str = "probe";

/// Folder of the program in the node, which containers mount.
pub const FOLDER: &str = "/run/probe";

/// Path of the program in the node.
pub const ON_NODE: &str = "/run/probe/probe";

/// Path of the program in a container, see [`mount()`].
pub const IN_CONTAINER: &str = "/probe/probe";

/// Path of the program after its build.
static BUILT: OnceLock<PathBuf> = OnceLock::new();

/// Builds the program and copies it into the node.
pub fn install(node: &Node) -> Result<()> {
    let program = match BUILT.get() {
        Some(program) => program,
        None => {
            let built = build()?;
            BUILT.get_or_init(|| built)
        }
    };
    node.shell(&format!(
        "install -D -m 755 {} {ON_NODE}",
        program.display()
    ))
    .map(drop)
}

/// Mount of the program, for the configuration of a container.
#[must_use]
pub fn mount() -> serde_json::Value {
    serde_json::json!({"host_path": FOLDER, "container_path": "/probe", "readonly": true})
}

fn build() -> Result<PathBuf> {
    let profile = paths::profile()?;
    let folder = profile
        .parent()
        .context("a profile lies in a target folder")?;
    let name = profile
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let name = if name == "debug" {
        "dev".to_owned()
    } else {
        name
    };
    let cargo = std::env::var_os("CARGO").map_or_else(|| tools::find("cargo"), |c| Some(c.into()));
    let mut command = Command::new(cargo.context("cargo is missing: run the tests by it")?);
    command
        .current_dir(paths::checkout())
        .arg("rustc")
        .arg("--target-dir")
        .arg(folder);
    command.args([
        "--quiet",
        "--locked",
        "--package",
        "pericarp-tests",
        "--bin",
        NAME,
    ]);
    command.args(["--profile", &name, "--", "-C", "target-feature=+crt-static"]);
    command.args(["-C", "strip=symbols"]);
    let output = command.output().context("cannot run cargo")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "the probe does not compile: {errors}"
    );
    let program = profile.join(NAME);
    ensure!(
        is_static(&program)?,
        "{} is not static: build it again",
        program.display()
    );
    Ok(program)
}

/// Whether an ELF file lacks a program interpreter. Its path would be in the first page.
fn is_static(program: &Path) -> Result<bool> {
    let bytes = std::fs::read(program);
    let bytes = bytes.with_context(|| format!("cannot read {}", program.display()))?;
    let start = &bytes[..bytes.len().min(4096)];
    Ok(!start.windows(8).any(|window| window == b"ld-linux"))
}
