//! Programs that the computer itself must have, and how each is installed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// A program or file of the computer and the Debian package that brings it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tool {
    /// Program name, or an absolute path.
    pub name: &'static str,
    /// Debian package.
    pub package: &'static str,
}

const fn tool(name: &'static str, package: &'static str) -> Tool {
    Tool { name, package }
}

/// Needed to boot a node and inside it, where the computer's own root is visible.
pub const BOOT: &[Tool] = &[
    tool("qemu-system-x86_64", "qemu-system-x86"),
    tool("busybox", "busybox-static"),
    tool("setpriv", "util-linux"),
    tool("script", "bsdutils"),
    tool("modprobe", "kmod"),
    tool("xz", "xz-utils"),
    tool("ip", "iproute2"),
    tool("iptables", "iptables"),
    tool("openssl", "openssl"),
    tool("socat", "socat"),
    tool("mkfs.ext4", "e2fsprogs"),
];

/// Needed to build the components.
pub const BUILD: &[Tool] = &[
    tool("go", "golang"),
    tool("cargo", "cargo"),
    tool("gcc", "gcc"),
    tool("pkg-config", "pkg-config"),
    tool("/usr/include/seccomp.h", "libseccomp-dev"),
    tool("/usr/include/cap-ng.h", "libcap-ng-dev"),
];

/// Debian package of the node's kernel: idmapped tmpfs, which user namespaces for pods need, is
/// in kernel 6.3 and later.
pub const KERNEL_PACKAGE: &str = "linux-image-6.12-amd64";

/// What the release of the node's kernel starts with.
pub const KERNEL_RELEASE_PREFIX: &str = "6.12.";

/// Folders searched after PATH: an unprivileged PATH often lacks them.
const SYSTEM_FOLDERS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Finds a program.
#[must_use]
pub fn find(name: &str) -> Option<PathBuf> {
    if name.starts_with('/') {
        return Path::new(name).exists().then(|| PathBuf::from(name));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SYSTEM_FOLDERS.iter().map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// The tools of a list that this computer lacks.
#[must_use]
pub fn missing(tools: &[Tool]) -> Vec<Tool> {
    let lacks = |tool: &&Tool| find(tool.name).is_none();
    tools.iter().filter(lacks).copied().collect()
}

/// Fails with one line when a tool is missing.
pub fn require(tools: &[Tool]) -> Result<()> {
    let Some(first) = missing(tools).first().copied() else {
        return Ok(());
    };
    bail!(
        "{} is missing on this computer: run `make node-deps` as root or install the package {}",
        first.name,
        first.package
    )
}

/// Release of the newest installed kernel that the node can boot.
pub fn kernel_release() -> Result<String> {
    kernel_release_in(Path::new("/boot"))
}

fn kernel_release_in(boot: &Path) -> Result<String> {
    let entries = std::fs::read_dir(boot).into_iter().flatten().flatten();
    let mut releases: Vec<String> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some(name.strip_prefix("vmlinuz-")?.to_owned())
        })
        .filter(|release| release.starts_with(KERNEL_RELEASE_PREFIX))
        .collect();
    releases.sort();
    releases.pop().with_context(|| {
        format!(
            "no kernel {KERNEL_RELEASE_PREFIX}x in {}: run `make node-deps` as root or install \
             the package {KERNEL_PACKAGE}",
            boot.display()
        )
    })
}

/// Installs the packages of what is missing, where this is a Debian computer and we are root.
pub fn install_missing() -> Result<()> {
    let mut packages: Vec<&str> = missing(BOOT).iter().map(|tool| tool.package).collect();
    packages.extend(missing(BUILD).iter().map(|tool| tool.package));
    if kernel_release().is_err() {
        packages.push(KERNEL_PACKAGE);
    }
    if packages.is_empty() {
        return Ok(());
    }
    packages.sort_unstable();
    packages.dedup();
    let list = packages.join(" ");
    if find("apt-get").is_none() || !nix::unistd::geteuid().is_root() {
        bail!("these packages are missing on this computer, install them as root: {list}");
    }
    eprintln!("node deps: installing {list}");
    for arguments in [vec!["update", "-q"], install_arguments(&packages)] {
        let mut command = child("apt-get", "TERM");
        command
            .args(&arguments)
            .env("DEBIAN_FRONTEND", "noninteractive");
        let status = command.stdout(Stdio::null()).status();
        if !status.context("cannot run apt-get")?.success() {
            bail!(
                "apt-get {} failed: install by hand: {list}",
                arguments.join(" ")
            );
        }
    }
    Ok(())
}

fn install_arguments<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["install", "-y", "-q", "--no-install-recommends"];
    arguments.extend_from_slice(packages);
    arguments
}

/// A command that is sent `signal` when the calling thread ends, however it ends: nothing that we
/// started outlives us.
#[must_use]
pub fn child(program: &str, signal: &str) -> Command {
    let program = find(program).unwrap_or_else(|| PathBuf::from(program));
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", signal, "--"]).arg(program);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_is_one_line_that_says_what_to_install() {
        let error = require(&[tool("no-such-program", "some-package")]).unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("no-such-program") && text.contains("some-package"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn a_missing_kernel_is_one_line_that_names_the_package() {
        let empty = tempfile::tempdir().unwrap();
        let text = format!("{:#}", kernel_release_in(empty.path()).unwrap_err());
        assert!(text.contains(KERNEL_PACKAGE), "{text}");
        std::fs::write(empty.path().join("vmlinuz-6.12.9"), "").unwrap();
        std::fs::write(empty.path().join("vmlinuz-6.1.0"), "").unwrap();
        assert_eq!(kernel_release_in(empty.path()).unwrap(), "6.12.9");
    }
}
