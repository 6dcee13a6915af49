//! What the verbs of `node` do beyond running a command: shown, measured and judged in the node.

#![expect(clippy::print_stdout, reason = "a verb's result is what it prints")]

pub mod bench;
pub mod critest;
pub mod demo;
pub mod kubernetes;
