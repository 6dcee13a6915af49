//! Guest memory: one file, mapped in parts.

use std::{fs::File, os::fd::OwnedFd, sync::Arc};

use pericarp_protocol::machine::{Machine as Description, PageKind};
use pericarp_sys::{
    kvm::MemorySlots,
    mapping::{Backing, GuestPages, map_guest_memory},
};
use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

use crate::{
    arch::layout::Layout,
    devices::virtio::{device::GuestMemory, discard::Discard},
};

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// The file is too small, or no file.
    #[error("Machine.memory: the file has {actual} bytes, not memory_max_bytes = {wanted}")]
    Size {
        /// What it has.
        actual: u64,
        /// What the description says.
        wanted: u64,
    },
    /// A system call failed.
    #[error("Machine.memory: {0}")]
    Io(#[from] std::io::Error),
    /// The parts do not fit together.
    #[error("Machine.memory: {0}")]
    Regions(#[from] vm_memory::GuestRegionCollectionError),
}

/// The memory of a machine.
#[derive(Debug)]
pub(crate) struct Memory {
    /// All of it, pluggable memory included.
    pub(crate) guest: GuestMemory,
    /// What it is made of.
    pub(crate) file: Arc<File>,
    /// Where it lies.
    pub(crate) layout: Layout,
    /// Whether parts of it may be given back.
    pub(crate) discard: Discard,
}

/// Maps the file and shows it to the guest.
pub(crate) fn map(
    description: &Description,
    layout: Layout,
    file: OwnedFd,
    slots: &MemorySlots,
) -> Result<Memory, MemoryError> {
    let file = Arc::new(File::from(file));
    let (actual, wanted) = (file.metadata()?.len(), description.memory_max_bytes);
    if actual < wanted {
        return Err(MemoryError::Size { actual, wanted });
    }
    let alignment = description.pages.alignment_bytes();
    let pages = GuestPages {
        alignment_bytes: usize::try_from(alignment).map_err(std::io::Error::other)?,
        transparent: description.pages == PageKind::Transparent,
    };
    let parts = layout
        .memory
        .iter()
        .chain([&layout.pluggable])
        .filter(|part| !part.is_empty());
    let (mut offset, mut regions) = (0, Vec::new());
    for part in parts {
        let bytes = part.end - part.start;
        let length = usize::try_from(bytes).map_err(std::io::Error::other)?;
        let region: GuestRegionMmap =
            map_guest_memory(Arc::clone(&file), offset, length, part.start, pages)?;
        let region = Arc::new(region);
        slots.add(part.start, Backing::Guest(Arc::clone(&region)))?;
        regions.push(region);
        offset += bytes;
    }
    let guest = Arc::new(GuestMemoryMmap::from_arc_regions(regions)?);
    Ok(Memory {
        guest,
        file,
        layout,
        discard: Discard::default(),
    })
}
