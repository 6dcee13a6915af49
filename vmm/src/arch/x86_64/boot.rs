//! The kernel in memory and what it is told, by the PVH boot protocol (Xen's
//! `docs/misc/pvh.pandoc`, `start_info.h`).
//!
//! The kernel image comes from the host's own files, the command line from the shim; nothing here
//! is the guest's.

use std::{fs::File, io::Seek};

use linux_loader::loader::{
    Elf, KernelLoader,
    elf::PvhBootCapability,
    elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{
    acpi::{self, AcpiError},
    layout::{self, Layout},
};

/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336e_c578;
/// Version 1 has a memory map.
const START_VERSION: u32 = 1;
/// `XEN_HVM_MEMMAP_TYPE_RAM`.
const TYPE_RAM: u32 = 1;
/// `XEN_HVM_MEMMAP_TYPE_RESERVED`.
const TYPE_RESERVED: u32 = 2;
/// `XEN_HVM_MEMMAP_TYPE_ACPI`.
const TYPE_ACPI: u32 = 3;

/// The initramfs starts at a multiple of this, as the boot protocols ask.
const PAGE_BYTES: u64 = 4096;

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// Not an ELF, or it does not fit memory.
    #[error("Machine.kernel: {0}")]
    Kernel(#[from] linux_loader::loader::Error),
    /// An ELF without the note of the PVH entry.
    #[error("Machine.kernel: this ELF has no PVH entry (CONFIG_PVH)")]
    NoEntry,
    /// The initramfs cannot be read or does not fit between the kernel and the end of low memory.
    #[error("Machine.initramfs: {0}")]
    Initramfs(String),
    /// Tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// No memory where the boot structures go.
    #[error("Machine.memory_bytes: boot structures do not fit: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What the first vCPU starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its instruction pointer, in 32-bit protected mode.
    pub(crate) instruction: u64,
    /// What `ebx` points at.
    pub(crate) start_info: u64,
    /// End of the kernel, for the pages worth mapping beforehand.
    pub(crate) kernel_end: u64,
}

/// Loads the kernel and the initramfs, and writes tables, command line and start info.
pub(crate) fn load(
    memory: &GuestMemoryMmap,
    layout: &Layout,
    vcpus: u16,
    kernel: &mut File,
    initramfs: Option<&mut File>,
    command_line: &str,
) -> Result<Entry, BootError> {
    let image = Elf::load(
        memory,
        None,
        kernel,
        Some(GuestAddress(layout::HIGH_MEMORY)),
    )?;
    let PvhBootCapability::PvhEntryPresent(instruction) = image.pvh_boot_cap else {
        return Err(BootError::NoEntry);
    };
    let module = initramfs
        .map(|file| load_initramfs(memory, layout, image.kernel_end, file))
        .transpose()?;
    let tables = acpi::write(memory, layout, vcpus)?;
    let mut text = command_line.as_bytes().to_vec();
    text.push(0);
    memory.write_slice(&text, GuestAddress(layout::COMMAND_LINE))?;
    let map = memory_map(layout, tables.end);
    write_start_info(memory, tables.rsdp, module, &map)?;
    Ok(Entry {
        instruction: instruction.0,
        start_info: layout::START_INFO,
        kernel_end: image.kernel_end,
    })
}

/// Puts the initramfs at the end of low memory.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    layout: &Layout,
    kernel_end: u64,
    file: &mut File,
) -> Result<hvm_modlist_entry, BootError> {
    let refuse = |reason: std::io::Error| BootError::Initramfs(reason.to_string());
    let size = file.metadata().map_err(refuse)?.len();
    let top = layout.memory.first().map_or(0, |part| part.end);
    let address = top
        .checked_sub(size)
        .map(|address| address / PAGE_BYTES * PAGE_BYTES)
        .filter(|address| *address >= kernel_end)
        .ok_or_else(|| BootError::Initramfs(format!("{size} bytes do not fit memory")))?;
    file.rewind().map_err(refuse)?;
    let length = usize::try_from(size).expect("it fits memory");
    memory.read_exact_volatile_from(GuestAddress(address), file, length)?;
    Ok(hvm_modlist_entry {
        paddr: address,
        size,
        ..Default::default()
    })
}

fn write_start_info(
    memory: &GuestMemoryMmap,
    rsdp: u64,
    module: Option<hvm_modlist_entry>,
    map: &[hvm_memmap_table_entry],
) -> Result<(), BootError> {
    let modules = layout::START_INFO + size_of::<hvm_start_info>() as u64;
    let start = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: u32::from(module.is_some()),
        modlist_paddr: if module.is_some() { modules } else { 0 },
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).expect("a handful of entries"),
        ..Default::default()
    };
    memory.write_obj(start, GuestAddress(layout::START_INFO))?;
    if let Some(module) = module {
        memory.write_obj(module, GuestAddress(modules))?;
    }
    let mut address = layout::MEMORY_MAP;
    for entry in map {
        memory.write_obj(*entry, GuestAddress(address))?;
        address += size_of::<hvm_memmap_table_entry>() as u64;
    }
    Ok(())
}

/// Boot memory without the tables; pluggable memory is not in the map, its driver finds it.
fn memory_map(layout: &Layout, tables_end: u64) -> Vec<hvm_memmap_table_entry> {
    let entry = |start: u64, end: u64, type_: u32| hvm_memmap_table_entry {
        addr: start,
        size: end - start,
        type_,
        ..Default::default()
    };
    let tables_end = tables_end.next_multiple_of(PAGE_BYTES);
    let mut map = vec![
        entry(0, layout::CONVENTIONAL_END, TYPE_RAM),
        entry(layout::ACPI.start, tables_end, TYPE_ACPI),
        entry(layout::ECAM.start, layout::ECAM.end, TYPE_RESERVED),
    ];
    for part in &layout.memory {
        map.push(entry(
            part.start.max(layout::HIGH_MEMORY),
            part.end,
            TYPE_RAM,
        ));
    }
    map.sort_by_key(|entry| entry.addr);
    map
}

const _: () = assert!(layout::START_INFO + 56 + 32 <= layout::MEMORY_MAP);

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap()
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn what_is_no_kernel_is_refused_by_name() {
        let layout = layout::plan(64 << 20, 64 << 20, 40).unwrap();
        for bytes in [&b""[..], b"#!/bin/sh\n", &[0x7f; 4096]] {
            let error = load(&memory(), &layout, 1, &mut file(bytes), None, "").unwrap_err();
            assert!(error.to_string().starts_with("Machine.kernel: "), "{error}");
        }
    }

    #[test]
    fn an_initramfs_goes_to_the_top_or_is_refused() {
        let (memory, layout) = (memory(), layout::plan(64 << 20, 64 << 20, 40).unwrap());
        let module = load_initramfs(&memory, &layout, 0, &mut file(b"cpio")).unwrap();
        assert_eq!((module.paddr, module.size), ((64 << 20) - PAGE_BYTES, 4));
        let error = load_initramfs(&memory, &layout, 64 << 20, &mut file(b"cpio")).unwrap_err();
        assert!(
            error.to_string().starts_with("Machine.initramfs: "),
            "{error}"
        );
    }

    #[test]
    fn the_map_is_sorted_and_has_no_overlap() {
        let layout = layout::plan(5 << 30, 5 << 30, 40).unwrap();
        let map = memory_map(&layout, layout::ACPI.start + 5000);
        for pair in map.windows(2) {
            assert!(pair[0].addr + pair[0].size <= pair[1].addr);
        }
        let ram: u64 = map
            .iter()
            .filter(|e| e.type_ == TYPE_RAM)
            .map(|e| e.size)
            .sum();
        assert_eq!(
            ram,
            (5 << 30) - (layout::HIGH_MEMORY - layout::CONVENTIONAL_END)
        );
    }
}
