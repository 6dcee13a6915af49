//! Containers by field of the OCI runtime specification: each test looks at the result from inside
//! a container.
//!
//! Needs root, a cgroup v2 hierarchy (with whatever controllers), and a static busybox. The builder
//! is compiled into this test and uses the agent's binary as its helper.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests, not tests themselves"
)]

#[expect(dead_code, reason = "the helper's half runs in the agent's binary")]
#[path = "../../src/container/mod.rs"]
mod container;

mod cgroups;
mod ground;
mod harness;
mod identity;
mod lifecycle;
mod mounts;
mod namespaces;
mod seccomp;
mod terminal;
