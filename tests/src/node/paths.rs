//! Where things lie: the checkout, the cache outside it, build outputs, results.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The checkout this program was built from.
#[must_use]
pub fn checkout() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_path_buf()
}

/// The cache of everything that is built once: `$PERICARP_CACHE`, else `~/.cache/pericarp`.
pub fn cache() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("PERICARP_CACHE") {
        return Ok(PathBuf::from(folder));
    }
    let home = std::env::var_os("HOME").context("HOME is not set: set it or PERICARP_CACHE")?;
    Ok(PathBuf::from(home).join(".cache/pericarp"))
}

/// The node's part of the cache.
pub fn node_cache() -> Result<PathBuf> {
    let folder = cache()?.join("node");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make the cache folder {}", folder.display()))?;
    Ok(folder)
}

/// Where logs and results go: `$PERICARP_RESULTS`, else `out/node` in the checkout.
#[must_use]
pub fn results() -> PathBuf {
    std::env::var_os("PERICARP_RESULTS").map_or_else(|| checkout().join("out/node"), PathBuf::from)
}

/// The folder that holds the binaries of the running build (`target/<profile>`).
pub fn profile() -> Result<PathBuf> {
    let program = std::env::current_exe().context("cannot find the running program")?;
    let folder = program.parent().unwrap_or(Path::new("/"));
    let is_test = folder.ends_with("deps");
    let folder = if is_test {
        folder.parent().unwrap_or(folder)
    } else {
        folder
    };
    Ok(folder.to_path_buf())
}

/// The `node` program, which also runs inside the node.
pub fn node_program() -> Result<PathBuf> {
    let program = profile()?.join("node");
    if !program.exists() {
        anyhow::bail!(
            "{} is not built: run `cargo build -p pericarp-tests --bin node`",
            program.display()
        );
    }
    Ok(program)
}

/// Makes an empty folder for the logs of one node or one test.
pub fn fresh_results(name: &str) -> Result<PathBuf> {
    let folder = results().join(name);
    if folder.exists() {
        std::fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot empty the results folder {}", folder.display()))?;
    }
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make the results folder {}", folder.display()))?;
    folder
        .canonicalize()
        .with_context(|| format!("cannot find the results folder {}", folder.display()))
}
