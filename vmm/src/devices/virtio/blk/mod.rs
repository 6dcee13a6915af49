//! virtio-blk (virtio 1.2 §5.2): a disk on a raw file or a block device.
//!
//! - Thread: the event loop; the kernel's io_uring workers move the data.
//! - Descriptors held: the file, an io_uring, its eventfd, a timerfd for the limiter.
//! - Limits: [`request::QUEUES_MAX`] queues, [`device::IN_FLIGHT_MAX`] requests in flight over all
//!   of them: further ones stay in the guest's queues.
//! - State that a snapshot needs: the negotiated features and the queues' indices, once nothing is
//!   in flight.
//!
//! What a hostile guest can do: read and write any sector of its own disk, in any order. Every
//! request is checked against the disk's size and its own segments before the kernel sees it; one
//! that is wrong gets an error status, one that cannot even be answered breaks the device. It can
//! keep [`device::IN_FLIGHT_MAX`] requests in flight and no more memory than those.
//!
//! ```text
//!            queue_kicked                begin            io_uring
//!   driver --------------> parse, check --------> DiskIo ----------> file
//!          <-------------- status, used <------- eventfd (descriptor_ready)
//! ```

mod device;
mod open;
pub(crate) mod request;

#[cfg(test)]
mod tests;

pub(crate) use device::Blk;
pub(crate) use open::{Cache, Parameters};
