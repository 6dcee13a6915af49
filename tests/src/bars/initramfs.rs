//! The guest's initramfs: this very program as its init, the libraries that it is linked with, and
//! busybox.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::node::boot::cpio::Cpio;

/// Folders of the guest, parents first.
const FOLDERS: [&str; 11] = [
    "bin",
    "lib",
    "lib64",
    "usr",
    "usr/lib",
    "lib/x86_64-linux-gnu",
    "proc",
    "sys",
    "dev",
    "tmp",
    "mnt",
];

/// Makes the archive in memory.
pub(super) fn build() -> Result<Vec<u8>> {
    let program = std::env::current_exe()?;
    let mut cpio = Cpio::default();
    for folder in FOLDERS {
        cpio.folder(folder);
    }
    for library in libraries(&program)? {
        let bytes = read(&library)?;
        cpio.file(library.trim_start_matches('/'), 0o755, &bytes);
    }
    cpio.file("bin/busybox", 0o755, &read("/bin/busybox")?);
    cpio.file("init", 0o755, &stripped(&program)?);
    Ok(cpio.finish())
}

fn read(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    let path = path.as_ref();
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Without debugging information, which a guest's memory has no room for.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let file = tempfile::NamedTempFile::new()?;
    let status = Command::new("strip")
        .arg("-o")
        .arg(file.path())
        .arg(program)
        .status()
        .context("cannot run strip (package binutils)")?;
    if !status.success() {
        bail!("strip cannot strip {}", program.display());
    }
    read(file.path())
}

/// Loader and libraries, as the loader of this computer finds them.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(program).output();
    let output = output.context("cannot run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = text.split_whitespace();
    let found: Vec<String> = words
        .filter(|word| word.starts_with('/'))
        .map(str::to_owned)
        .collect();
    if found.is_empty() {
        bail!("ldd names no library of {}", program.display());
    }
    Ok(found)
}
