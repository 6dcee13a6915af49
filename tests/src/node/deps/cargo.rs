//! Builds a program from a published crate at a pinned version, with the crate's own lock file.

use std::path::Path;

use anyhow::{Context, Result};

use super::table::CargoRecipe;
use super::{build_log, step};
use crate::node::tools;

/// Builds the program of a recipe into a folder.
pub(super) fn build(recipe: &CargoRecipe, into: &Path) -> Result<()> {
    tools::require(tools::BUILD)?;
    let log = build_log(recipe.package)?;
    let work = tempfile::Builder::new().prefix("pericarp-cargo-").tempdir();
    let work = work.context("cannot make a build folder")?;
    let mut command = tools::child("cargo", "TERM");
    command.args([
        "install",
        "--locked",
        "--no-track",
        "--version",
        recipe.version,
    ]);
    command.arg("--root").arg(work.path()).arg(recipe.package);
    // The workspace's own settings must not change what this program is built with.
    for variable in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET"] {
        command.env_remove(variable);
    }
    command.env("CARGO_TARGET_DIR", work.path().join("target"));
    command.current_dir(work.path());
    step(&mut command, "cargo install", &log)?;
    let built = work.path().join("bin").join(recipe.program);
    std::fs::copy(&built, into.join(recipe.program))
        .with_context(|| format!("cargo install made no {}", built.display()))?;
    Ok(())
}
