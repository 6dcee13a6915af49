//! This computer as the node, for computers whose `/dev/kvm` boots a stock kernel.
//!
//! The node's server runs here in namespaces of its own (mounts, network, processes, cgroups), so
//! that containerd and pods of a test do not meet those of the computer, and all of it goes when
//! the first process of the PID namespace is killed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Kept, Machine, POWER_OFF_TIMEOUT, Started};
use crate::node::boot::BootFiles;
use crate::node::{paths, tools};

/// How long the kernel that is tried has to reach its init.
const PROBE_SECONDS: &str = "60";

/// What the initramfs prints first.
const PROBE_MARK: &str = "node: modules not loaded:";

const LOG: &str = "host.log";

struct Host {
    kept: Arc<Kept>,
    results: PathBuf,
}

impl Machine for Host {
    fn logs(&self) -> Vec<PathBuf> {
        vec![self.results.join(LOG)]
    }

    fn end(&self, timeout: Duration) {
        if self.kept.wait(timeout).is_none() {
            self.kept.kill();
        }
    }

    fn kill(&self) {
        self.kept.kill();
        self.kept.wait(POWER_OFF_TIMEOUT);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kept.kill();
    }
}

/// Starts the node's server on this computer.
pub fn start(boot: &BootFiles, results: &Path) -> Result<Started> {
    if let Err(error) = boots_stock_kernel(boot) {
        bail!("this computer cannot be the node ({error:#}): leave out --host");
    }
    let mut command = tools::child("unshare", "KILL");
    command.args([
        "--mount", "--net", "--uts", "--ipc", "--cgroup", "--pid", "--fork",
    ]);
    command
        .args(["--kill-child", "--mount-proc"])
        .arg(paths::node_program()?);
    command.args(["inside", "init-here"]);
    let log = File::create(results.join(LOG)).context("cannot make the node's log")?;
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log);
    let (kept, pipes) = Kept::start(command)?;
    let kept = Arc::new(kept);
    let watched = Arc::clone(&kept);
    let log = results.join(LOG);
    let ended = Box::new(move || {
        let status = watched
            .wait(Duration::from_secs(5))
            .map(|status| status.to_string());
        let status = status.unwrap_or_else(|| "its channel closed".to_owned());
        format!("the node's server ended ({status}): see {}", log.display())
    });
    Ok(Started {
        machine: Arc::new(Host {
            kept,
            results: results.to_path_buf(),
        }),
        reader: Box::new(pipes.stdout),
        writer: Box::new(pipes.stdin),
        ended,
    })
}

/// Boots the stock kernel under this computer's own KVM as far as its init: a `/dev/kvm` that
/// exists, and even one that runs code, may not be able to.
pub fn boots_stock_kernel(boot: &BootFiles) -> Result<()> {
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        bail!("/dev/kvm cannot be opened: {error}");
    }
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", PROBE_SECONDS]);
    command.arg(tools::find("qemu-system-x86_64").context("qemu-system-x86_64 is missing")?);
    command.args([
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-m",
        "512M",
        "-nodefaults",
        "-no-reboot",
    ]);
    command
        .args(["-display", "none", "-serial", "stdio", "-kernel"])
        .arg(&boot.kernel);
    command.arg("-initrd").arg(&boot.initramfs);
    command.args(["-append", "console=ttyS0 panic=-1 quiet"]);
    let output = command
        .stdin(Stdio::null())
        .output()
        .context("cannot run QEMU")?;
    if !String::from_utf8_lossy(&output.stdout).contains(PROBE_MARK) {
        bail!(
            "its KVM did not boot {} within {PROBE_SECONDS} s",
            boot.kernel.display()
        );
    }
    Ok(())
}
