//! The kernel in memory and what it is told: an ELF by the PVH boot protocol (Xen's
//! `docs/misc/pvh.pandoc`, `start_info.h`), a bzImage by the 32-bit boot protocol of Linux
//! (`Documentation/arch/x86/boot.rst`), which begins with the processor in the same state and tells
//! the same things in another form.
//!
//! The kernel image comes from the host's own files, the command line from the shim; nothing here
//! is the guest's.

use std::{
    fs::File,
    io::{Read, Seek},
};

use linux_loader::{
    bootparam::{boot_e820_entry, boot_params},
    loader::{
        BzImage, Elf, KernelLoader,
        elf::PvhBootCapability,
        elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
    },
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

/// First bytes of an ELF.
const ELF_MAGIC: &[u8] = b"\x7fELF";

/// The initramfs starts at a multiple of this, as the boot protocols ask.
const PAGE_BYTES: u64 = 4096;

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// Neither an ELF nor a bzImage, or it does not fit memory.
    #[error("Machine.kernel: as {as_what}: {source}")]
    Kernel {
        /// What its first bytes say that it is.
        as_what: &'static str,
        /// What is wrong with it.
        source: linux_loader::loader::Error,
    },
    /// The file cannot be read.
    #[error("Machine.kernel: {0}")]
    Read(std::io::Error),
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
    /// What `ebx` points at: the start info of PVH.
    pub(crate) start_info: u64,
    /// What `esi` points at: the zero page of Linux' own protocol.
    pub(crate) zero_page: u64,
}

/// A kernel in memory.
struct Image {
    instruction: u64,
    /// First byte behind all that it needs until it knows its memory map.
    end: u64,
    /// The header of a bzImage, to be given back to it.
    header: Option<linux_loader::bootparam::setup_header>,
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
    let image = load_kernel(memory, kernel)?;
    let module = initramfs
        .map(|file| load_initramfs(memory, layout, image.end, file))
        .transpose()?;
    let tables = acpi::write(memory, layout, vcpus)?;
    let mut text = command_line.as_bytes().to_vec();
    text.push(0);
    memory.write_slice(&text, GuestAddress(layout::COMMAND_LINE))?;
    let map = memory_map(layout, tables.end);
    let (mut start_info, mut zero_page) = (0, 0);
    if let Some(header) = image.header {
        zero_page = layout::ZERO_PAGE;
        write_zero_page(memory, header, tables.rsdp, module, &map)?;
    } else {
        start_info = layout::START_INFO;
        write_start_info(memory, tables.rsdp, module, &map)?;
    }
    Ok(Entry {
        instruction: image.instruction,
        start_info,
        zero_page,
    })
}

fn load_kernel(memory: &GuestMemoryMmap, kernel: &mut File) -> Result<Image, BootError> {
    let high = Some(GuestAddress(layout::HIGH_MEMORY));
    let mut magic = Vec::new();
    kernel.rewind().map_err(BootError::Read)?;
    let begin = kernel.take(ELF_MAGIC.len() as u64).read_to_end(&mut magic);
    begin.map_err(BootError::Read)?;
    if magic == ELF_MAGIC {
        let image = Elf::load(memory, None, kernel, high).map_err(|source| BootError::Kernel {
            as_what: "an ELF",
            source,
        })?;
        let PvhBootCapability::PvhEntryPresent(instruction) = image.pvh_boot_cap else {
            return Err(BootError::NoEntry);
        };
        return Ok(Image {
            instruction: instruction.0,
            end: image.kernel_end,
            header: None,
        });
    }
    let image = BzImage::load(memory, None, kernel, high).map_err(|source| BootError::Kernel {
        as_what: "a bzImage",
        source,
    })?;
    let header = image.setup_header.unwrap_or_default();
    // It unpacks itself to its preferred address and needs this much there.
    let unpacked = header
        .pref_address
        .saturating_add(u64::from(header.init_size));
    Ok(Image {
        instruction: image.kernel_load.0,
        end: image.kernel_end.max(unpacked),
        header: Some(header),
    })
}

/// Fills `struct boot_params` as a boot loader does.
fn write_zero_page(
    memory: &GuestMemoryMmap,
    header: linux_loader::bootparam::setup_header,
    rsdp: u64,
    module: Option<hvm_modlist_entry>,
    map: &[hvm_memmap_table_entry],
) -> Result<(), BootError> {
    /// `type_of_loader`: none that has a number.
    const LOADER_UNDEFINED: u8 = 0xff;
    let below_4_gib = |value: u64| u32::try_from(value).expect("boot structures lie low");
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = below_4_gib(layout::COMMAND_LINE);
    if let Some(module) = module {
        params.hdr.ramdisk_image = below_4_gib(module.paddr);
        params.hdr.ramdisk_size = below_4_gib(module.size);
    }
    params.e820_entries = u8::try_from(map.len()).expect("a handful of entries");
    for (to, from) in params.e820_table.iter_mut().zip(map) {
        // The types have the same numbers in both protocols.
        *to = boot_e820_entry {
            addr: from.addr,
            size: from.size,
            r#type: from.type_,
        };
    }
    Ok(memory.write_obj(params, GuestAddress(layout::ZERO_PAGE))?)
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
const _: () = assert!(layout::ZERO_PAGE + 4096 <= layout::COMMAND_LINE);

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
    fn a_bzimage_gets_its_own_header_back() {
        let (memory, layout) = (memory(), layout::plan(64 << 20, 64 << 20, 40).unwrap());
        // One sector of set-up code and one of kernel.
        let mut bytes = vec![0; 3 * 512];
        bytes[0x1f1] = 1;
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        bytes[0x211] = 1;
        bytes[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        bytes[1024..].fill(0x90);
        let mut initramfs = file(b"cpio");
        let kernel = &mut file(&bytes);
        let entry = load(&memory, &layout, 1, kernel, Some(&mut initramfs), "quiet").unwrap();
        assert_eq!(
            (entry.instruction, entry.start_info),
            (layout::HIGH_MEMORY, 0)
        );
        let code: u8 = memory.read_obj(GuestAddress(entry.instruction)).unwrap();
        assert_eq!(code, 0x90, "the kernel without its set-up code");
        let at = |offset: u64| -> u32 {
            memory
                .read_obj(GuestAddress(entry.zero_page + offset))
                .unwrap()
        };
        assert_eq!(at(0x202), 0x5372_6448, "HdrS");
        assert_eq!(u64::from(at(0x228)), layout::COMMAND_LINE);
        assert_eq!((at(0x218), at(0x21c)), ((64 << 20) - 4096, 4), "initramfs");
        assert_eq!(at(0x1e8) & 0xff, 4, "entries of the memory map");
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
