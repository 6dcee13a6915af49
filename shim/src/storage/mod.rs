//! Files and disks of a pod: what the guest gets of them, and how.

pub(crate) mod disk;
pub(crate) mod driver_image;
pub(crate) mod huge_pages;
pub(crate) mod kubelet;
pub(crate) mod memory_volumes;
mod mountinfo;
pub(crate) mod rootfs;
pub(crate) mod share;
mod volumes;
