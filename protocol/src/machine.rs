//! Shim and VMM: fixed-size messages on one `AF_UNIX` `SOCK_SEQPACKET` socket, with file
//! descriptors (`SCM_RIGHTS`) from shim to VMM only. The socket is descriptor
//! [`CONTROL_DESCRIPTOR`] of the VMM, which takes no arguments.
//!
//! ```text
//! shim                                                     VMM
//!  Start (machine; kvm, memory, kernel, initramfs)   ---->
//!  AddDevice (one device; its descriptors)  * n      ---->   devices are attached in this order
//!  Run                                               ---->   jail, boot
//!                                                    <----   Reply for each, in order
//!                                                    <----   Event::Started
//!  Pause, Resume, AddDevice, RemoveDevice, ...       ---->
//!                                                    <----   Reply, Event
//!  Shutdown                                          ---->   Reply; the process ends, status 0
//! ```
//!
//! The shim need not wait for a reply before the next request: it may send Start, every AddDevice
//! and Run at once. After a request before Run has failed every later one fails too, and nothing of
//! the guest has run. A request names its descriptors by their position in the same message; a
//! descriptor that nothing names is closed.
//!
//! The end of the socket is the end of the VMM, and the end of the VMM is the end of the socket.

mod device;
mod reply;
mod request;
pub mod wire;

#[cfg(test)]
mod tests;

pub use device::*;
pub use reply::*;
pub use request::*;
pub use wire::{FieldError, List, Text};

use wire::{Wire, larger};

/// Version of these messages; both sides come from one build, so only equality is accepted.
pub const VERSION: u16 = 1;

/// Descriptor on which the VMM finds its control socket.
pub const CONTROL_DESCRIPTOR: i32 = 3;

/// Descriptors in one message: a network interface with all its queue pairs needs 32 (the kernel
/// allows 253).
pub const DESCRIPTORS_MAX: usize = 64;

/// Sizes of memory are multiples of this: guest memory is mapped in pages of 2 MiB wherever the
/// host has them.
pub const ALIGNMENT_BYTES: u64 = 2 << 20;

/// First bytes of every message: version and request number.
const HEADER_BYTES: usize = 2 + 4;

/// Size of every request in bytes.
pub const REQUEST_BYTES: usize = HEADER_BYTES + <Request as Wire>::SIZE;

/// Size of every message from the VMM in bytes.
pub const MESSAGE_BYTES: usize = HEADER_BYTES + <Message as Wire>::SIZE;

// One datagram of a unix socket is never split, but it must fit the default send buffer of 208 KiB
// several times over.
const _: () = assert!(larger(REQUEST_BYTES, MESSAGE_BYTES) <= 8192);
const _: () = assert!(QUEUES_MAX as usize * 2 <= DESCRIPTORS_MAX);
const _: () = assert!(VSOCK_PORTS_MAX < DESCRIPTORS_MAX);

fn encode<T: Wire>(number: u32, body: &T) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES + T::SIZE);
    VERSION.put(&mut out);
    number.put(&mut out);
    body.put(&mut out);
    out
}

fn decode<T: Wire>(bytes: &[u8]) -> Result<(u32, T), FieldError> {
    let mut input = bytes;
    let version = u16::get(&mut input, "version")?;
    if version != VERSION {
        let reason = format!("{version} is not {VERSION}: shim and VMM are of different builds");
        return Err(FieldError::new("version", reason));
    }
    let number = u32::get(&mut input, "number")?;
    if bytes.len() != HEADER_BYTES + T::SIZE {
        let reason = format!("{} is not {}", bytes.len(), HEADER_BYTES + T::SIZE);
        return Err(FieldError::new("length", reason));
    }
    Ok((number, T::get(&mut input, "kind")?))
}

/// Encodes a request; `number` comes back in its reply.
#[must_use]
pub fn encode_request(number: u32, request: &Request) -> Vec<u8> {
    encode(number, request)
}

/// Decodes and checks a request.
///
/// # Errors
/// Names the field that is wrong.
pub fn decode_request(bytes: &[u8]) -> Result<(u32, Request), FieldError> {
    let (number, request) = decode::<Request>(bytes)?;
    request.check()?;
    Ok((number, request))
}

/// Encodes a reply to request `number`, or an event (whose number is 0).
#[must_use]
pub fn encode_message(number: u32, message: &Message) -> Vec<u8> {
    encode(number, message)
}

/// Decodes a message of the VMM.
///
/// # Errors
/// Names the field that is wrong.
pub fn decode_message(bytes: &[u8]) -> Result<(u32, Message), FieldError> {
    decode(bytes)
}
