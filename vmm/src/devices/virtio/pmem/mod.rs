//! virtio-pmem (virtio 1.2 §5.19): the guest image as memory. Guest and host share the pages of one
//! read-only file, so one copy in the host's page cache serves every pod (with
//! `rootflags=dax=always` in the guest).
//!
//! - Thread: the event loop, for flush requests; page accesses never leave the guest.
//! - Descriptors held: the file.
//! - Limits: [`device::REQUESTS_PER_TURN_MAX`] requests before other devices have their turn; the
//!   region is the file rounded up to [`device::REGION_ALIGNMENT_BYTES`].
//! - Hostile guest: it can read what is in the file and nothing else. The machine maps the region
//!   read-only, so a flush has nothing to write and is answered at once. Malformed chains break the
//!   device.
//!
//! The machine maps [`super::device::VirtioDevice::region_file`] over a reservation of
//! [`super::device::VirtioDevice::region_size`] bytes: what lies past the file's last page must be
//! anonymous zeroes, since an access there would otherwise raise SIGBUS.

mod device;
mod request;
#[cfg(test)]
mod tests;

pub(crate) use device::Pmem;
