//! `containerd-shim-pericarp-v2`: containerd's shim for pods in virtual machines.
//!
//! containerd runs `start` in a bundle. That launches the sandbox's daemon
//! ([`containerd::daemon`]), one per pod, which owns every resource of the pod on the host.
//! `delete` removes what a dead daemon left. See ARCHITECTURE.md for the map.

mod containerd;
mod errors;
mod guest;
mod host;
mod machine;
mod network;
mod passthrough;
mod pod;
mod storage;

use std::{env, error::Error, process::ExitCode};

use containerd::{
    args::{Action, Args},
    bootstrap, cleanup, daemon, info,
};
use machine::template_maker;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd shows what a failed call wrote.
            eprintln!("containerd-shim-pericarp-v2: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse(env::args().skip(1))?;
    match args.action {
        Action::Start => Ok(bootstrap::start(&args)?),
        Action::Delete => Ok(cleanup::delete(&args)?),
        Action::Daemon => Ok(daemon::run(&args)?),
        Action::Version => Ok(info::version()?),
        Action::Info => Ok(info::runtime_info()?),
        Action::Template => Ok(template_maker::run()?),
    }
}
