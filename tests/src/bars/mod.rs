//! What a VMM must show in a real guest: `vmm-bars` is one program for both sides. In the test node
//! it plays the shim for one machine ([`host`], [`machine`]); in the guest, as the initramfs' init,
//! it obeys the host line by line over vsock ([`payload`]).
//!
//! ```text
//! node                                              guest
//!  vmm-bars SCENARIO ──control socket──> pericarp-vmm ══> vmm-bars (PID 1)
//!      │ "blk write 7\n" ───────── vsock port 1024 ─────────> │
//!      │ <──────────────────────── "ok 64 writes\n" ───────── │
//! ```
//!
//! Data is checked byte for byte on both sides ([`pattern`]).

pub mod disk;
pub mod duplex;
pub mod host;
mod initramfs;
pub mod machine;
pub mod pattern;
pub mod payload;

/// Port of the host that the guest dials for its orders.
pub const ORDERS_PORT: u32 = 1024;

/// Port of the guest on which it takes connections of test data.
pub const DATA_PORT: u32 = 5000;

/// TCP and UDP port of the node on its end of the tap.
pub const NET_PORT: u16 = 6000;

/// Addresses of the two ends of the tap.
pub const NODE_ADDRESS: &str = "10.9.0.1";
/// The guest's.
pub const GUEST_ADDRESS: &str = "10.9.0.2";

/// Tag of the shared folder, and where the guest has it.
pub const TAG: &str = "shared";
