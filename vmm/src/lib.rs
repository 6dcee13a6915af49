//! `pericarp-vmm`: the virtual machine monitor of one pod.
//!
//! A process of its own for one machine. It is started without arguments by the shim, as the first
//! process of a PID namespace, with its control socket as descriptor 3, and opens nothing: whatever
//! it works with comes over that socket (`pericarp_protocol::machine`). Standard error is its log,
//! which is empty unless something of its own fails.
//!
//! | module | what it does |
//! |---|---|
//! | [`session`] | the life of the process: assemble, boot, serve, end |
//! | [`control`] | the socket |
//! | [`machine`] | memory, vCPUs, devices as one thing that obeys requests |
//! | [`arch`] | what differs between architectures |
//! | [`pci`] | the bus |
//! | [`devices`] | the devices |
//! | [`event_loop`] | what one thread waits for |
//! | [`jail`], [`filters`] | what the process gives up before the first guest instruction |
//!
//! It is a library only for the fuzz targets: [`main`] is all that the program uses.

mod arch;
mod control;
mod devices;
mod event_loop;
mod filters;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod jail;
mod machine;
mod pci;
mod session;

use std::{io, process::ExitCode};

use pericarp_protocol::machine::CONTROL_DESCRIPTOR;
use pericarp_sys::startup;

use self::{control::Control, session::Session};

/// The program.
pub fn main() -> ExitCode {
    let result = startup::take_only(CONTROL_DESCRIPTOR)
        .map_err(|error| format!("descriptor {CONTROL_DESCRIPTOR}, the control socket: {error}"))
        .and_then(|socket| live(Control::new(socket)).map_err(|error| error.to_string()));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use io::Write;
            // Nobody is left to be told when this fails.
            let _ = writeln!(io::stderr(), "pericarp-vmm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn live(control: Control) -> Result<(), session::SessionError> {
    Session::new(control)?.run()
}
