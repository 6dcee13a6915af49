//! virtio-vsock (virtio 1.2 §5.10): stream sockets between guest and host, joined to unix sockets
//! here in the VMM, so that no other process of the host can dial the guest.
//!
//! ```text
//!  guest driver             this folder                                     shim
//!  tx queue ──> device ──> packet ──> muxer ──> connection (pure) ──> connected unix stream
//!  rx queue <── device <── muxer <── ready list, round robin     <── accepted unix stream
//! ```
//!
//! - Thread: the event loop.
//! - Descriptors held: the listening unix socket, the pre-connected streams by host port, one
//!   stream per connection, a timerfd.
//! - Limits: [`table::SLOTS_MAX`] connections and handshakes; per connection the guest may have
//!   [`table::room_bytes`] bytes in flight, which is also all that is ever buffered, and only while
//!   the unix socket is full; [`muxer::REPLIES_MAX`] answers to packets of no connection, after
//!   which the transmit queue waits; a handshake line of [`handshake::LINE_BYTES_MAX`] bytes;
//!   [`device::PACKETS_PER_TURN_MAX`] packets each way before other devices have their turn;
//!   deadlines in [`muxer`].
//! - Towards the guest nothing is buffered: data is read from the unix socket straight into the
//!   guest's buffer, and a guest that gives no buffer or no credit leaves it in the socket, where
//!   its writer feels it.
//! - Hostile guest: malformed chains and headers break the device; a packet against the rules of
//!   its connection (more data than its credit, a second request) resets that connection; a packet
//!   of no connection is answered with RST. A guest can dial only the ports that it was given
//!   sockets for, each as often as sockets were given.

mod buffer;
mod connection;
mod device;
mod handshake;
mod muxer;
mod packet;
mod table;
#[cfg(test)]
mod tests;

pub(crate) use device::{Parameters, Vsock};
pub(crate) use table::SLOTS_MAX as CONNECTIONS_MAX;
