//! Processes of containers as the host sees them: their ends and their streams.

mod forward;
mod process;
pub(crate) mod reaper;
pub(crate) mod stdio;
pub(crate) mod streams;

pub(crate) use process::Process;
