//! The machine that the guest is: its first mounts and its end, its devices, the limits of its
//! kernel.

pub(crate) mod devices;
pub(crate) mod init;
pub(crate) mod limits;
