//! `pericarp-agent`: the first process of the guest, and the only program of Pericarp in there.
//!
//! It dials the host, says hello, and serves the requests of `protocol/guest.proto` on that one
//! connection.
//!
//! ```text
//! main ─ machine::init (mounts) ─ rpc::connection (dial, hello) ─ ttrpc ─ rpc/*
//! ```
//!
//! Its parts are folders, each of which uses only those named beside it:
//!
//! ```text
//! rpc        requests of the host            pod, processes, container, storage, network,
//!                                            drivers, machine, ground
//! pod        what requests share             processes, container, storage, drivers, machine,
//!                                            ground
//! processes  exits and streams               container, ground
//! container  builder of containers           ground
//! storage    mounts for containers           machine, ground
//! drivers    driver image                    machine, ground
//! machine    devices, limits, init's work    ground
//! network    interfaces, routes, neighbours  -
//! ground     files, log, ids, errors         -
//! ```
//!
//! Runs as something else when told so by its first argument: `container-init` builds one container
//! in a process of its own, `pod-init` is the first process of a PID namespace that the containers
//! of a pod share.
//!
//! On a developer's machine `--socket PATH --streams PATH` put unix sockets in place of vsock, and
//! nothing of the machine is set up.
//!
//! It is a library only for the fuzz targets: [`main`] is all that the program uses.

use std::{env, io, process::ExitCode};

mod container;
mod drivers;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod ground;
mod machine;
mod network;
mod pod;
mod processes;
mod rpc;
mod storage;

use ground::{clock, log};
use machine::init;
use pod::pod_init;
use rpc::connection;

/// Why the agent cannot begin or go on.
#[derive(Debug, thiserror::Error)]
enum MainError {
    /// The machine could not be set up.
    #[error(transparent)]
    Init(#[from] init::InitError),
    /// The runtime could not be made.
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    /// The host could not be reached or spoken to.
    #[error(transparent)]
    Connection(#[from] connection::ConnectionError),
}

/// The program.
pub fn main() -> ExitCode {
    let started_us = clock::boot_time_us();
    // All that the agent starts would ignore what its own starter ignored.
    if let Err(error) = pericarp_sys::signals::reset_inherited() {
        log::warn(format_args!("cannot reset inherited signals: {error}"));
    }
    let mut arguments = env::args_os().skip(1);
    let first = arguments.next();
    match first.as_deref().and_then(|word| word.to_str()) {
        Some("container-init") => container::init_main(),
        Some(pod_init::COMMAND) => pod_init::main(),
        _ => {}
    }
    let options = init::Options::parse(env::args_os().skip(1)).map_err(MainError::from);
    match options.and_then(|options| run(options, started_us)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error(format_args!("{}", log::chain(&error)));
            ExitCode::FAILURE
        }
    }
}

fn run(options: init::Options, started_us: u64) -> Result<(), MainError> {
    pericarp_sys::guest::use_one_arena();
    init::mount_early(&options)?;
    // One thread serves everything; what blocks in the kernel (mounts, building containers) goes to
    // threads that end again. Their number bounds how many blocked mounts the guest bears at once.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(init::BLOCKING_THREADS_MAX)
        .thread_keep_alive(init::BLOCKING_THREAD_KEEP_ALIVE)
        .build()
        .map_err(MainError::Runtime)?;
    runtime.block_on(connection::serve(options, started_us))?;
    Ok(())
}
