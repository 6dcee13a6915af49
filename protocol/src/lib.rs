//! What crosses a process boundary of Pericarp: pure types, parsers and bounds, and no I/O.
//!
//! - [`guest`] and [`guest_ttrpc`]: shim and agent, over vsock (`guest.proto`).
//! - [`cri`]: the options of a pod that comes by containerd's sandbox service (`cri.proto`).
//! - [`stream`]: the header line of a process stream or a forwarded port.
//! - [`machine`]: shim and VMM, over one SEQPACKET socket.
//! - [`limits`]: the bound of every message and table.

pub mod limits;
pub mod machine;
pub mod stream;

/// Messages of `guest.proto`, generated.
#[allow(
    warnings,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
pub mod guest {
    include!(concat!(env!("OUT_DIR"), "/guest.rs"));
}

/// Messages of `cri.proto`, generated: what containerd's CRI says about a pod.
#[allow(
    warnings,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
pub mod cri {
    include!(concat!(env!("OUT_DIR"), "/cri.rs"));
}

/// Client and server of `guest.proto`, generated.
#[allow(
    warnings,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
pub mod guest_ttrpc {
    use super::guest;
    include!(concat!(env!("OUT_DIR"), "/guest_ttrpc.rs"));
}

/// Major version of the guest protocol: a peer with another one is refused.
pub const GUEST_PROTOCOL_MAJOR: u32 = 1;
/// Minor version of the guest protocol: grows with every compatible addition.
pub const GUEST_PROTOCOL_MINOR: u32 = 0;

/// vsock port of the host (CID 2) that the agent dials once.
pub const AGENT_PORT: u32 = 1024;
/// vsock port of the guest on which the agent accepts streams.
pub const STREAM_PORT: u32 = 1025;
/// vsock context id of every guest: each VM has a vsock device of its own, so the number need not
/// be unique on the host.
pub const GUEST_CID: u64 = 3;
