//! What the VMM alone must show in a real guest, in the test node with nested KVM: each device with
//! data that is checked byte for byte, and figures beside QEMU. Scenarios:
//! [`pericarp_tests::bars`].
//!
//! `PERICARP_BARS_MIB` is what a transfer moves each way: 1024 is what SPEC.md promises, the
//! default is enough for CI.

use anyhow::Result;
use pericarp_tests::node::{Builder, Command, Session, session};

/// Bytes each way of a transfer, in MiB.
const MIB_VARIABLE: &str = "PERICARP_BARS_MIB";
const MIB_DEFAULT: &str = "16";

/// Time of one scenario in emulation, with a gibibyte each way on a busy computer.
const SCENARIO_TIMEOUT_S: u64 = 3000;

fn node(test: &str) -> Session {
    let builder = || Builder::default().name("vmm").memory_mib(3072);
    session(test, builder).expect("the node boots")
}

#[expect(clippy::print_stdout, reason = "the figures are a result of the test")]
fn show(test: &str, scenario: &str) -> Result<()> {
    let node = node(test);
    let program = env!("CARGO_BIN_EXE_vmm-bars");
    let mib = std::env::var(MIB_VARIABLE).unwrap_or_else(|_| MIB_DEFAULT.to_owned());
    // QEMU 7.2 does not emulate XSETBV in nested guests.
    let line = format!("{program} --cpu-features=-xsave --mib {mib} {scenario}");
    let command = Command::shell(line).timeout_s(SCENARIO_TIMEOUT_S);
    println!("{}", node.text(&command)?);
    Ok(())
}

#[test]
fn a_distributions_kernel_boots() -> Result<()> {
    show("bzimage", "bzimage")
}

#[test]
fn disks_keep_what_was_flushed() -> Result<()> {
    show("disks", "blk")
}

#[test]
fn packets_arrive_both_ways_by_vhost() -> Result<()> {
    show("packets-vhost", "net-vhost")
}

#[test]
fn packets_arrive_both_ways_in_process() -> Result<()> {
    show("packets", "net net-plain")
}

#[test]
fn a_thousand_connections_lose_nothing() -> Result<()> {
    show("connections", "vsock")
}

#[test]
fn memory_grows_and_shrinks() -> Result<()> {
    show("memory", "memory")
}

#[test]
fn shared_folders_are_the_same_on_both_sides() -> Result<()> {
    show("folders", "fs")
}
