//! PID 1 of the node: starts the server, reaps what nobody waits for, powers off at the end.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, wait};

/// Where the kernel shows virtio-serial ports.
const PORTS: &str = "/sys/class/virtio-ports";

/// Name of the control channel's port, as QEMU is told.
pub const PORT_NAME: &str = "pericarp.node";

/// Runs until the server ends, then powers the machine off. Returns only on an error.
pub fn run() -> Result<()> {
    let result = serve();
    if let Err(error) = &result {
        eprintln!("node: {error:#}");
    }
    nix::unistd::sync();
    std::fs::write("/proc/sysrq-trigger", "o").context("cannot power off")?;
    loop {
        nix::unistd::pause();
    }
}

/// PID 1 of a PID namespace of this computer: the control channel is its own input and output.
pub fn run_here() -> Result<()> {
    supervise(Stdio::inherit(), Stdio::inherit())
}

fn serve() -> Result<()> {
    let port = std::fs::File::options()
        .read(true)
        .write(true)
        .open(find_port()?);
    let port = port.context("cannot open the control channel")?;
    let input = port
        .try_clone()
        .context("cannot share the control channel")?;
    supervise(Stdio::from(input), Stdio::from(port))
}

/// Starts the server and reaps until it ends.
fn supervise(input: Stdio, output: Stdio) -> Result<()> {
    let program = std::env::current_exe().context("cannot find the node program")?;
    // Of its own process group, so that a signal to the server's group does not reach PID 1.
    let mut server = Command::new(program);
    server.args(["inside", "serve"]).process_group(0);
    server.stdin(input).stdout(output);
    let server = server.spawn().context("cannot start the node's server")?;
    let server = i32::try_from(server.id()).context("a process id that is none")?;
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, 0)) if pid.as_raw() == server => return Ok(()),
            Ok(WaitStatus::Exited(pid, status)) if pid.as_raw() == server => {
                bail!("the node's server ended with status {status}")
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid.as_raw() == server => {
                bail!("the node's server was killed by {signal}")
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("cannot wait for the node's server"),
        }
    }
}

fn find_port() -> Result<std::path::PathBuf> {
    let entries = std::fs::read_dir(PORTS).with_context(|| format!("cannot read {PORTS}"))?;
    for entry in entries.flatten() {
        let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == PORT_NAME {
            return Ok(std::path::Path::new("/dev").join(entry.file_name()));
        }
    }
    bail!("there is no virtio-serial port {PORT_NAME} in {PORTS}")
}
