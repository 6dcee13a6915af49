//! Builds programs from a Go module at a pinned version and checksum, or from sources of ours.
//!
//! `go install package@version` ignores the module's own `replace` lines and asks for the list of
//! all versions; a module of our own that requires exactly one version needs neither.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::table::{GoRecipe, OwnGoRecipe};
use super::{build_log, step};
use crate::node::tools;

/// Language version of the requiring module: at least that of the newest component.
const GO_LANGUAGE: &str = "1.26.2";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Download {
    #[serde(default)]
    dir: PathBuf,
    #[serde(default)]
    sum: String,
    #[serde(default)]
    error: String,
}

/// Builds the programs of a recipe into a folder.
pub(super) fn build(name: &str, recipe: &GoRecipe, into: &Path) -> Result<()> {
    tools::require(tools::BUILD)?;
    let log = build_log(name)?;
    let work = tempfile::Builder::new().prefix("pericarp-go-").tempdir();
    let work = work.context("cannot make a build folder")?;
    let module = Module {
        recipe,
        folder: work.path(),
        log: &log,
    };
    module.write_go_mod(&[])?;
    let source = module.download()?;
    if let Some(version) = recipe.staging {
        let go_mod = source.join("go.mod");
        let text = std::fs::read_to_string(&go_mod)
            .with_context(|| format!("cannot read {}", go_mod.display()))?;
        module.write_go_mod(&staging_replacements(&text, version))?;
    }
    module.write_imports()?;
    // -e: test-only imports of dependencies may be unreachable and are not needed.
    step(module.go().args(["mod", "tidy", "-e"]), "go mod tidy", &log)?;
    if !recipe.programs.is_empty() {
        module.build_programs(into)?;
    }
    for (package, program) in recipe.tests {
        let mut command = module.go();
        command.args(["test", "-mod=mod", "-c", "-trimpath", "-o"]);
        command.arg(into.join(program)).arg(recipe.package(package));
        step(&mut command, "go test -c", &log)?;
    }
    Ok(())
}

/// Builds a program of ours into a folder, under the name of its component.
pub(super) fn build_own(name: &str, recipe: &OwnGoRecipe, into: &Path) -> Result<()> {
    tools::require(tools::BUILD)?;
    let log = build_log(name)?;
    let work = tempfile::Builder::new().prefix("pericarp-go-").tempdir();
    let work = work.context("cannot make a build folder")?;
    let files = [
        ("go.mod", recipe.go_mod),
        ("go.sum", recipe.go_sum),
        ("main.go", recipe.main),
    ];
    for (file, text) in files {
        let path = work.path().join(file);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let mut command = go(work.path(), false);
    command.args(["build", "-mod=readonly", "-trimpath", "-buildvcs=false"]);
    command
        .args(["-ldflags", "-s -w", "-o"])
        .arg(into.join(name));
    step(&mut command, "go build", &log)
}

/// The `go` command in a folder.
fn go(folder: &Path, cgo: bool) -> Command {
    let mut command = tools::child("go", "TERM");
    command.current_dir(folder);
    command.env("CGO_ENABLED", if cgo { "1" } else { "0" });
    command
}

struct Module<'a> {
    recipe: &'a GoRecipe,
    folder: &'a Path,
    log: &'a Path,
}

impl GoRecipe {
    fn package(&self, below: &str) -> String {
        if below.is_empty() {
            self.module.to_owned()
        } else {
            format!("{}/{below}", self.module)
        }
    }
}

impl Module<'_> {
    fn go(&self) -> Command {
        go(self.folder, self.recipe.cgo)
    }

    fn write_go_mod(&self, replacements: &[String]) -> Result<()> {
        let GoRecipe {
            module, version, ..
        } = self.recipe;
        let mut text = format!("module node\ngo {GO_LANGUAGE}\nrequire {module} {version}\n");
        for line in replacements {
            text.push_str(&format!("replace {line}\n"));
        }
        let file = self.folder.join("go.mod");
        std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
    }

    fn write_imports(&self) -> Result<()> {
        let GoRecipe {
            programs,
            imports,
            tests,
            ..
        } = self.recipe;
        let tested = tests.iter().map(|(package, _)| package);
        let mut text = String::from("//go:build tools\n\npackage tools\n\nimport (\n");
        for below in programs.iter().chain(imports.iter()).chain(tested) {
            text.push_str(&format!("\t_ \"{}\"\n", self.recipe.package(below)));
        }
        text.push_str(")\n");
        let file = self.folder.join("tools.go");
        std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
    }

    /// Fetches the module and compares its checksum with the pinned one.
    fn download(&self) -> Result<PathBuf> {
        let GoRecipe {
            module,
            version,
            sum,
            ..
        } = self.recipe;
        let name = format!("{module}@{version}");
        let output = self.go().args(["mod", "download", "-json", &name]).output();
        let output = output.context("cannot start go")?;
        let answer: Download = serde_json::from_slice(&output.stdout).with_context(|| {
            let errors = String::from_utf8_lossy(&output.stderr).replace('\n', " ");
            format!("go mod download {name} gave no answer: {errors}")
        })?;
        if !answer.error.is_empty() {
            let reason = answer.error.replace('\n', " ");
            bail!("go cannot download {name}: {reason}: check GOPROXY and the network");
        }
        verify_sum(&name, sum, &answer.sum)?;
        Ok(answer.dir)
    }

    fn build_programs(&self, into: &Path) -> Result<()> {
        let recipe = self.recipe;
        let mut command = self.go();
        command.args([
            "build",
            "-mod=mod",
            "-trimpath",
            "-buildvcs=false",
            "-ldflags",
        ]);
        command.arg(format!("-s -w {}", recipe.linker).trim_end());
        if !recipe.tags.is_empty() {
            command.args(["-tags", recipe.tags]);
        }
        command.arg("-o");
        // The program of a module's root would be named after its major version.
        match recipe.programs {
            [""] => command.arg(into.join(program_name(recipe.module))),
            _ => command.arg(format!("{}/", into.display())),
        };
        command.args(recipe.programs.iter().map(|below| recipe.package(below)));
        step(&mut command, "go build", self.log)
    }
}

/// Compares the checksum of what was downloaded with the pinned one.
fn verify_sum(name: &str, pinned: &str, got: &str) -> Result<()> {
    if pinned == got {
        return Ok(());
    }
    bail!(
        "{name} has the checksum {got}, but {pinned} is pinned in \
         tests/src/node/deps/table.rs: do not use it; find out which of the two is wrong"
    )
}

/// The name of the program in a module's root: its last part that is no major version, and no
/// `server`, which is etcd's.
fn program_name(module: &str) -> &str {
    let is_version = |part: &str| {
        part.strip_prefix('v')
            .is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit()))
    };
    let mut parts = module
        .rsplit('/')
        .filter(|part| !is_version(part) && *part != "server");
    parts.next().unwrap_or(module)
}

/// Turns the folder replacements of Kubernetes' go.mod into its published modules.
fn staging_replacements(go_mod: &str, version: &str) -> Vec<String> {
    let lines = go_mod.lines().filter_map(|line| line.split_once("=>"));
    lines
        .filter(|(_, target)| target.trim().starts_with("./staging/"))
        .map(|(module, _)| module.trim().trim_start_matches("replace ").to_owned())
        .map(|module| format!("{module} => {module} {version}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_checksum_is_one_line_with_both_values() {
        let error = verify_sum("example/m@v1", "h1:pinned", "h1:got").unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("h1:pinned") && text.contains("h1:got"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1);
        assert!(verify_sum("example/m@v1", "h1:a", "h1:a").is_ok());
    }

    #[test]
    fn programs_of_a_root_are_named_after_the_module() {
        assert_eq!(program_name("github.com/opencontainers/runc"), "runc");
        assert_eq!(program_name("go.etcd.io/etcd/server/v3"), "etcd");
    }

    #[test]
    fn staging_folders_become_published_modules() {
        let go_mod = "module k\nreplace (\n\tk8s.io/api => ./staging/src/k8s.io/api\n)\n";
        let expected = ["k8s.io/api => k8s.io/api v0.36.0"];
        assert_eq!(staging_replacements(go_mod, "v0.36.0"), expected);
    }
}
