//! virtio devices (virtio 1.2), each in a folder of the same shape, and what they share.
//!
//! Every folder exports a device struct that implements [`device::VirtioDevice`] and is made by
//! `new`:
//!
//! ```text
//! pub(crate) fn new(name: String, parameters: Parameters, descriptors..) -> Result<Device, Error>
//! ```
//!
//! `Parameters` is a plain struct of the folder; `Error` names the field that is wrong. Descriptors
//! come as `OwnedFd`, `File` or sockets, already open. The machine builder calls these constructors
//! and nothing else does:
//!
//! | kind | beyond its parameters |
//! |---|---|
//! | blk | the file |
//! | net | taps, vhost descriptors (as many, or none) |
//! | fs | the vhost-user socket |
//! | vsock | the listener, and (port, socket) pairs |
//! | pmem | the file; the machine maps [`device::VirtioDevice::region_file`] |
//! | console | the output |
//! | rng | nothing |
//! | balloon | [`discard::Discard`], one for the whole machine |
//! | mem | [`discard::Discard`]; start and size of its region, a part of the guest's memory |

pub(crate) mod balloon;
pub(crate) mod blk;
pub(crate) mod buffers;
pub(crate) mod chain;
pub(crate) mod console;
pub(crate) mod device;
pub(crate) mod discard;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod driver;
pub(crate) mod fs;
pub(crate) mod mem;
pub(crate) mod net;
pub(crate) mod pmem;
pub(crate) mod queue_worker;
pub(crate) mod rate_limiter;
pub(crate) mod rng;
pub(crate) mod saved;
pub(crate) mod segments;
pub(crate) mod transport;
pub(crate) mod used_ring;
pub(crate) mod vsock;
