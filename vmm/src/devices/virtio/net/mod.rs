//! virtio-net (virtio 1.2 §5.1): an Ethernet device on a tap.
//!
//! - Thread: the event loop; with vhost-net the kernel's worker moves the packets and the event
//!   loop only serves the control queue.
//! - Descriptors held: one tap queue per queue pair, one vhost-net per queue pair when given, one
//!   timerfd per direction. All tap settings are ioctls on the tap descriptor, so nothing of its
//!   network namespace is needed.
//! - Limits: [`request::PAIRS_MAX`] queue pairs, [`request::PACKET_BYTES_MAX`] bytes a packet,
//!   [`receive::BATCH_MAX`] and [`transmit::BATCH_MAX`] packets a turn, one packet held per receive
//!   queue.
//! - State that a snapshot needs: the negotiated features, the number of active pairs, and the
//!   queues' indices.
//!
//! What a hostile guest can do: send any bytes, which the host's network sees as from any machine
//! on a wire; name any offload in a packet's header, which the kernel's tap checks; leave its
//! receive queue empty, which stops reading from the tap and so fills the tap's own bounded queue.
//! It cannot make the device hold more than one packet per queue.
//!
//! ```text
//!           queue_kicked(odd)                    writev
//!   driver ------------------> transmit::Sender --------> tap
//!           used + interrupt                     readv
//!   driver <------------------ receive::Receiver <------- tap (descriptor_ready)
//! ```

mod device;
mod open;
mod receive;
pub(crate) mod request;
mod transmit;
mod vhost;

#[cfg(test)]
mod tests;

pub(crate) use device::Net;
pub(crate) use open::{Parameters, QUEUE_SIZE};
