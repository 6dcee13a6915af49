//! `vmm-bars`: shows in the test node what a VMM must do in a real guest; see
//! [`pericarp_tests::bars`]. In a guest it is the init.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Parser;
use pericarp_tests::bars::{host, payload};

/// Plays scenarios against one VMM.
#[derive(Debug, Parser)]
#[command(name = "vmm-bars")]
struct Cli {
    /// The VMM.
    #[arg(long, default_value = "/usr/libexec/pericarp/pericarp-vmm")]
    vmm: PathBuf,
    /// The guest's kernel.
    #[arg(long, default_value = "/usr/share/pericarp/vmlinux")]
    kernel: PathBuf,
    /// The guest image.
    #[arg(long, default_value = "/usr/share/pericarp/guest.erofs")]
    image: PathBuf,
    /// virtiofsd.
    #[arg(long, default_value = "/usr/libexec/pericarp/virtiofsd")]
    daemon: PathBuf,
    /// MiB that a transfer moves each way.
    #[arg(long, default_value_t = 16)]
    mib: u64,
    /// CPU features to add or take away.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    cpu_features: String,
    /// What to show.
    #[arg(required = true)]
    scenarios: Vec<String>,
}

fn main() -> Result<()> {
    if payload::is_guest() {
        return payload::main();
    }
    let cli = Cli::parse();
    let setting = host::Setting {
        vmm: cli.vmm,
        kernel: cli.kernel,
        image: cli.image,
        daemon: cli.daemon,
        mib: cli.mib,
        cpu_features: cli.cpu_features,
    };
    for name in &cli.scenarios {
        let Some((_, show)) = host::SCENARIOS.iter().find(|known| known.0 == name) else {
            let names: Vec<&str> = host::SCENARIOS.iter().map(|known| known.0).collect();
            bail!("{name} is no scenario: give some of {}", names.join(", "));
        };
        show(&setting)?;
    }
    Ok(())
}
