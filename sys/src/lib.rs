//! Safe wrappers over the kernel's interfaces: the only crate of Pericarp with `unsafe` code.
//!
//! Each module wraps what `nix` and the rust-vmm crates do not, is small enough to audit in one
//! sitting, and states at every block which invariant makes it sound and who keeps it.
#![expect(unsafe_code, reason = "this crate exists to hold it")]

pub mod process;

pub mod disk_io;
pub mod fscontext;
pub mod guest;
pub mod guest_io;
pub mod interrupted;
pub mod tap;
pub mod user_namespace;
pub mod vhost_net;

pub mod attributes;
pub mod bpf;
pub mod capabilities;
pub mod children;
pub mod clone;
pub mod descriptors;
pub mod iommufd;
pub mod kvm;
pub mod loopback;
pub mod mapping;
pub mod mount_tree;
pub mod pidfd;
pub mod random;
mod rights;
pub mod seccomp;
pub mod seqpacket;
pub mod signals;
pub mod socket_io;
pub mod terminal;
pub mod vfio;
pub mod vsock;

pub mod memory_file;
pub mod sk_lookup;
pub mod startup;
