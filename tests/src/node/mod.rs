//! The test node: a machine of its own in which real containerd, runc, kubelet and Pericarp run.
//!
//! ```text
//! test or `node` command                      node (QEMU, or this machine with PERICARP_NODE=host)
//!   deps     pinned components, cached          inside::init    PID 1: reaps, powers off
//!   images   OCI image set                      inside::serve   commands, services, output
//!   boot     initramfs of a stock kernel        images::registry  answers for every registry name
//!   machine  starts it, ends it    ── frames ──>
//!   control  requests and answers  (channel.rs, one virtio-serial port)
//! ```
//!
//! * [`Node`] is a booted node: [`Node::run`] runs a command in it, [`Node::containerd`] starts a
//!   containerd, [`Node::kubernetes`] a kubelet with its API server.
//! * [`session()`] gives a test the node that its test binary shares, and leaves a folder of logs
//!   when the test fails.
//!
//! Nothing here waits by sleeping: the node says hello, services report READY=1, and the end of a
//! process or of the machine ends every wait for it.

pub mod boot;
pub mod builder;
pub mod channel;
pub mod containerd;
pub mod control;
pub mod deps;
pub mod images;
pub mod inside;
pub mod kubernetes;
pub mod machine;
pub mod paths;
pub mod pericarp;
pub mod probe;
pub mod running;
pub mod session;
mod start;
pub mod tools;

pub use builder::{Builder, Device};
pub use channel::{Command, Exit, Service};
pub use containerd::{Containerd, Version};
pub use control::Output;
pub use kubernetes::Kubernetes;
pub use running::Node;
pub use session::{Session, session};

/// Builds the components and images of the given groups that are missing.
pub fn ensure(groups: &[deps::Group]) -> anyhow::Result<()> {
    deps::ensure(groups)?;
    images::ensure(groups)?;
    Ok(())
}
