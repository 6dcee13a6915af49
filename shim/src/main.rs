//! `containerd-shim-pericarp-v2`: containerd's shim for pods in virtual machines.
//!
//! containerd runs `start` in a bundle; that launches the daemon of the sandbox ([`daemon`]), one
//! per pod, which owns every resource of the pod on the host. `delete` removes what a dead daemon
//! left. See ARCHITECTURE.md for the map.

mod agent_client;
mod args;
mod block_io;
mod bootstrap;
mod bundle;
mod cgroup;
mod child;
mod cleanup;
mod container;
mod cri;
mod daemon;
mod disk;
mod drivers;
mod errors;
mod events;
mod guest_panic;
mod huge_pages;
mod id_map;
mod info;
mod journal;
mod launch;
mod log;
mod logger;
mod machine_client;
mod memory_volumes;
mod network;
mod options;
mod passthrough;
mod pod;
mod port_forward;
mod process;
mod qos;
mod resize;
mod rootfs;
mod sandbox_service;
mod scope;
mod share;
mod spec;
mod stand_in;
mod stats;
mod stdio;
mod task_service;

use std::{env, error::Error, process::ExitCode};

use args::{Action, Args};

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
    }
}
