//! Guest memory: a file for what there is at boot and one for what can be plugged, mapped in parts.

use std::{fs::File, ops::Range, os::fd::OwnedFd, sync::Arc};

use pericarp_protocol::machine::{Machine as Description, PageKind};
use pericarp_sys::{
    kvm::MemorySlots,
    mapping::{Backing, GuestPages, map_guest_memory, map_private_memory},
};
use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

use crate::{
    arch::layout::Layout,
    devices::virtio::{device::GuestMemory, discard::Discard},
};

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// A file is too small, or no file.
    #[error("{field}: the file has {actual} bytes, not {wanted}")]
    Size {
        /// Which file.
        field: &'static str,
        /// What it has.
        actual: u64,
        /// What it must have.
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
    pub(crate) files: Vec<Arc<File>>,
    /// Where it lies.
    pub(crate) layout: Layout,
    /// Whether parts of it may be given back.
    pub(crate) discard: Discard,
}

/// The files of a machine's memory.
#[derive(Debug)]
pub(crate) struct Files {
    /// What there is at boot.
    pub(crate) boot: OwnedFd,
    /// That file is a saved machine's, which stays as it is.
    pub(crate) private: bool,
    /// What can be plugged.
    pub(crate) pluggable: Option<OwnedFd>,
}

/// Maps the files and shows them to the guest.
pub(crate) fn map(
    description: &Description,
    layout: Layout,
    files: Files,
    slots: &MemorySlots,
) -> Result<Memory, MemoryError> {
    let alignment = description.pages.alignment_bytes();
    let pages = GuestPages {
        alignment_bytes: usize::try_from(alignment).map_err(std::io::Error::other)?,
        transparent: description.pages == PageKind::Transparent,
    };
    let mut regions = Vec::new();
    let mut map_parts = |field, file: OwnedFd, private: bool, parts: &[Range<u64>]| {
        let file = Arc::new(File::from(file));
        let actual = file.metadata()?.len();
        let wanted = parts.iter().map(|part| part.end - part.start).sum();
        if actual < wanted {
            return Err(MemoryError::Size {
                field,
                actual,
                wanted,
            });
        }
        let mut offset = 0;
        for part in parts {
            let bytes = part.end - part.start;
            let length = usize::try_from(bytes).map_err(std::io::Error::other)?;
            let region: GuestRegionMmap = if private {
                map_private_memory(&file, offset, length, part.start)?
            } else {
                map_guest_memory(Arc::clone(&file), offset, length, part.start, pages)?
            };
            let region = Arc::new(region);
            slots.add(part.start, Backing::Guest(Arc::clone(&region)))?;
            regions.push(region);
            offset += bytes;
        }
        Ok(file)
    };
    let boot = map_parts("Machine.memory", files.boot, files.private, &layout.memory)?;
    let mut kept = vec![boot];
    if let Some(file) = files.pluggable {
        let part = std::slice::from_ref(&layout.pluggable);
        kept.push(map_parts("Machine.pluggable", file, false, part)?);
    }
    let guest = Arc::new(GuestMemoryMmap::from_arc_regions(regions)?);
    Ok(Memory {
        guest,
        files: kept,
        layout,
        discard: Discard::default(),
    })
}
