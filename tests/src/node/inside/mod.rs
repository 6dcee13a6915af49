//! The part that runs inside the node: `node inside init` as PID 1, `node inside serve` under it.

pub mod init;
mod own_root;
mod process;
pub mod serve;
mod setup;
