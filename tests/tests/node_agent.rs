//! The agent under the real VMM: `agent/examples/host.rs` plays the host for one, and containerd
//! asks another what every runtime must answer.
//!
//! `PERICARP_FULL=1` takes the sizes of the promise (2 GiB through stdin, 200 containers) in place
//! of those that fit a test run.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Context, Result, ensure};
use pericarp_tests::node::pericarp::{self, guest_files};
use pericarp_tests::node::{Builder, Command, Node, Session, paths, session};

/// Time that a check of one guest gets in emulation on a busy computer.
const GUEST_TIMEOUT_S: u64 = 400;

/// The same with the sizes of the promise.
const FULL_TIMEOUT_S: u64 = 3600;

/// Sizes of the promise.
const FULL: &str = "stdin_mib=2048 containers=200";

/// Sizes of a test run.
const SHORT: &str = "stdin_mib=16 containers=20";

/// What the agent may have resident, in KiB.
const RESIDENT_KIB_MAX: u64 = 4096;

/// The agent's share of the time until its hello, in percent.
const READY_PERCENT_MAX: u64 = 15;

/// The node, and the programs that play host and shim, unless something is not built.
fn node(test: &str) -> Option<(Session, Programs)> {
    let programs = Programs::find().expect("the running build is known");
    let mut missing = pericarp::missing();
    if !programs.host.exists() || !programs.launch.exists() {
        missing.push("examples (`cargo build --workspace --examples`)".to_owned());
    }
    if !missing.is_empty() {
        eprintln!("skipped: not built: {}", missing.join(", "));
        return None;
    }
    let node = session(test, || Builder::default().name("agent")).expect("the node boots");
    Some((node, programs))
}

/// Examples of the running build.
struct Programs {
    host: PathBuf,
    launch: PathBuf,
}

impl Programs {
    fn find() -> Result<Self> {
        let examples = paths::profile()?.join("examples");
        Ok(Self {
            host: examples.join("host"),
            launch: examples.join("launch"),
        })
    }

    /// Boots a guest with a disk of busybox and checks it; what the host and the guest printed.
    fn check(&self, node: &Node, options: &str, timeout_s: u64) -> Result<String> {
        let guest = guest_files();
        let kernel = guest.kernel.context("no guest kernel")?.canonicalize()?;
        let image = guest.image.context("no guest image")?.canonicalize()?;
        let script = format!(
            r#"
            work=$(mktemp -d)
            trap 'rm -rf $work' EXIT
            cd $work
            mkdir -p root/bin root/proc root/dev root/sys root/tmp root/etc
            cp /usr/bin/busybox root/bin
            busybox --list | grep -vx busybox | xargs -I{{}} ln -s busybox root/bin/{{}}
            truncate -s 64M disk && mkfs.ext4 -q -d root disk
            {host} $work "exec {launch} {vmm} {kernel} cpu=-xsave memory=192 \
                cmdline='init=/sbin/pericarp-agent loglevel=6' pmem={image} \
                disk=$work/disk agent=$work/agent.sock vsock=$work/vsock.sock seconds={timeout_s}" \
                {options}
            "#,
            host = self.host.display(),
            launch = self.launch.display(),
            vmm = pericarp::build_folder()?.join("pericarp-vmm").display(),
            kernel = kernel.display(),
            image = image.display(),
        );
        let output = node.run(&Command::shell(script).timeout_s(timeout_s))?;
        ensure!(
            output.exit.success(),
            "{}\n{}",
            output.stdout,
            output.stderr
        );
        Ok(output.stdout)
    }
}

/// The figures that the host printed.
fn figures(text: &str) -> BTreeMap<&str, u64> {
    let pairs = text.lines().filter_map(|line| line.trim().split_once('='));
    let numbers = pairs.filter_map(|(name, value)| Some((name, value.parse().ok()?)));
    numbers.collect()
}

#[test]
#[expect(clippy::print_stdout, reason = "the figures are a result of the test")]
fn an_agent_in_a_vm_does_what_the_host_asks_and_keeps_nothing() {
    let Some((node, programs)) = node("agent-in-a-vm") else {
        return;
    };
    let full = std::env::var_os("PERICARP_FULL").is_some();
    let (options, timeout_s) = match full {
        true => (FULL, FULL_TIMEOUT_S),
        false => (SHORT, GUEST_TIMEOUT_S),
    };
    let text = programs.check(&node, options, timeout_s).unwrap();
    println!("{text}");
    let figures = figures(&text);
    let (started, ready) = (figures["agent_started_us"], figures["agent_ready_us"]);
    assert!(
        (ready - started) * 100 <= ready * READY_PERCENT_MAX,
        "the agent took {} us of {ready} us",
        ready - started
    );
    for when in ["fresh", "after"] {
        let resident = figures[format!("{when}.VmRSS").as_str()];
        assert!(
            resident <= RESIDENT_KIB_MAX,
            "{when}: {resident} KiB are resident"
        );
    }
}

#[test]
fn a_panic_of_the_guest_reaches_the_host_with_its_text() {
    let Some((node, programs)) = node("agent-panic") else {
        return;
    };
    let text = programs.check(&node, "panic=1", GUEST_TIMEOUT_S).unwrap();
    assert!(
        text.contains("Kernel panic - not syncing: Out of memory"),
        "{text}"
    );
}
