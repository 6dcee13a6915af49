//! `pericarp`, the node operator's command: says whether the node can run pods, checks the
//! configuration, lists pods, offers devices to the kubelet, looks after templates.
//!
//! It changes nothing but templates. Exit status: 0 all right, 1 something has to be done, 2 wrong
//! usage.

mod check;
mod cli;
mod config_command;
mod device_plugin;
mod elf;
mod pods;
mod templates;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut out = io::stdout().lock();
    let result = match cli.command {
        Command::Check(arguments) => check::run(&arguments, &mut out),
        Command::Config(arguments) => config_command::run(&arguments, &mut out),
        Command::DevicePlugin(arguments) => {
            device_plugin::run(&arguments, &mut out).map(|()| ExitCode::SUCCESS)
        }
        Command::List(arguments) => pods::run(&arguments, &mut out).map(|()| ExitCode::SUCCESS),
        Command::Template(arguments) => templates::run(&arguments, &mut out),
        Command::Version => writeln!(out, "pericarp {}", env!("CARGO_PKG_VERSION"))
            .map_err(Into::into)
            .map(|()| ExitCode::SUCCESS),
    };
    match result {
        Ok(status) => status,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to tell it to when standard error is gone too.
            let _ = writeln!(io::stderr(), "pericarp: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// `pericarp list | head` ends early on purpose.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
