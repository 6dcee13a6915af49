//! What the node boots: a stock kernel and an initramfs made here.

pub(crate) mod cpio;
pub mod initramfs;

pub use initramfs::{BootFiles, prepare};
