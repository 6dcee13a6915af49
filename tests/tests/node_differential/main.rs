//! Runs the same containers under runc and under Pericarp in one node and compares them.
//!
//! Containers run `probe` (`tests/src/bin/probe`), which is not a shell. A difference is a defect.
//! Attributes that may differ are removed before the comparison, each with its reason.
//!
//! One file per topic: clock, inherited attributes, devices, the state directory, programs that
//! cannot start, restarts of containerd, hooks, networks, stopped VMMs, removal of broken pods,
//! shared volumes.

mod clock;
mod devices;
mod hooks;
mod inherits;
mod network;
mod removal;
mod restart;
mod side;
mod starts;
mod state_directory;
mod stopped;
mod volumes;

/// The reference handler.
const RUNC: &str = "runc";

/// The handler under test.
const PERICARP: &str = "pericarp";

/// The handler whose pods have no pause container.
const SANDBOX: &str = "pericarp-sandbox";
