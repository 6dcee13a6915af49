//! Guest-physical address space of x86-64.
//!
//! ```text
//! 0x0000_0000  memory, up to 3 GiB            boot structures in the first megabyte, see below
//! 0xc000_0000  window of 32-bit BARs, 512 MiB
//! 0xe000_0000  ECAM of bus 0, 1 MiB
//! 0xfee0_0000  local APICs (KVM)
//! 0xfffb_c000  pages that KVM needs on Intel
//! 0x1_0000_0000  memory beyond 3 GiB               to its size
//!   next 1 GiB  pluggable memory                   to its size
//!   next 1 GiB  regions of devices (virtio-pmem)
//! upper half   window of 64-bit BARs               half of what the CPU can address
//! ```

use std::ops::Range;

/// Start of the hole below 4 GiB.
const HOLE_START: u64 = 0xc000_0000;

/// End of the hole.
const HOLE_END: u64 = 1 << 32;

/// Window of 32-bit BARs, for passed-through functions that know no others.
pub(crate) const WINDOW_32: Range<u64> = 0xc000_0000..0xe000_0000;

/// Enhanced configuration space of bus 0 (PCI Express base specification §7.2.2): 4 KiB each of 256
/// functions.
pub(crate) const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;

/// Page of KVM's identity map for Intel CPUs without unrestricted guests.
pub(crate) const IDENTITY_MAP: u64 = 0xfffb_c000;

/// Three pages of KVM's task state segment, as above.
pub(crate) const TASK_STATE: u64 = 0xfffb_d000;

/// `hvm_start_info` of the PVH boot protocol, followed by its module list.
pub(crate) const START_INFO: u64 = 0x6000;

/// Memory map of the PVH boot protocol.
pub(crate) const MEMORY_MAP: u64 = 0x7000;

/// `struct boot_params` of Linux' own boot protocol.
pub(crate) const ZERO_PAGE: u64 = 0x8000;

/// Kernel command line.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;

/// End of conventional memory; what lies between here and 1 MiB is no memory to the guest.
pub(crate) const CONVENTIONAL_END: u64 = 0x9_fc00;

/// ACPI tables: 256 KiB below 1 MiB. 256 vCPUs need 4 KiB of MADT, all else is less than 1 KiB a
/// table.
pub(crate) const ACPI: Range<u64> = 0xc_0000..0x10_0000;

/// Where memory for the kernel begins.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;

/// Alignment of what comes after memory: a memory block of Linux is 128 MiB or, above 64 GiB of
/// memory, up to 2 GiB.
const PART_ALIGNMENT: u64 = 1 << 30;

/// Least room for regions of devices.
const REGIONS_BYTES_MIN: u64 = 64 << 30;

/// Ports of our power device: sleep control and status (ACPI 6.5 §4.8.3.7), and reset.
pub(crate) const PORT_SLEEP_CONTROL: u16 = 0x600;
/// Sleep status.
pub(crate) const PORT_SLEEP_STATUS: u16 = 0x601;
/// Reset (§4.8.3.6).
pub(crate) const PORT_RESET: u16 = 0x602;
/// What is written to it.
pub(crate) const RESET_VALUE: u8 = 1;
/// Port of pvpanic (`QEMU0001`).
pub(crate) const PORT_PANIC: u16 = 0x505;

/// The parts of a machine's address space that depend on its size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Boot memory: start and size of each part, without gaps in the memory's file.
    pub(crate) memory: Vec<Range<u64>>,
    /// Pluggable memory; empty when there is none. It comes after boot memory in the file.
    pub(crate) pluggable: Range<u64>,
    /// Where regions of devices go.
    pub(crate) regions: Range<u64>,
    /// Window of 64-bit BARs.
    pub(crate) window_64: Range<u64>,
}

/// The machine does not fit the CPU's address space.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "Machine.memory_max_bytes: {bytes} do not fit the {bits} address bits of this host's guests"
)]
pub(crate) struct LayoutError {
    bytes: u64,
    bits: u32,
}

/// Lays a machine out. Sizes have been checked to be aligned
/// ([`pericarp_protocol::machine::Machine::check`]).
pub(crate) fn plan(memory: u64, memory_max: u64, address_bits: u32) -> Result<Layout, LayoutError> {
    let mut parts = Vec::with_capacity(2);
    parts.push(0..memory.min(HOLE_START));
    if memory > HOLE_START {
        parts.push(HOLE_END..HOLE_END + (memory - HOLE_START));
    }
    let end = parts.last().map_or(0, |part| part.end).max(HOLE_END);
    let plug_start = end.next_multiple_of(PART_ALIGNMENT);
    let pluggable = plug_start..plug_start + (memory_max - memory);
    let regions_start = pluggable.end.next_multiple_of(PART_ALIGNMENT);
    let top = 1_u64 << address_bits.min(52);
    let window_64 = top / 2..top;
    if regions_start + REGIONS_BYTES_MIN > window_64.start {
        return Err(LayoutError {
            bytes: memory_max,
            bits: address_bits,
        });
    }
    Ok(Layout {
        memory: parts,
        pluggable,
        regions: regions_start..window_64.start,
        window_64,
    })
}

const _: () = assert!(WINDOW_32.start == HOLE_START && WINDOW_32.end == ECAM.start);
const _: () = assert!(ACPI.start > CONVENTIONAL_END && ACPI.end == HIGH_MEMORY);

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn small_memory_lies_below_the_hole() {
        let layout = plan(128 << 20, 128 << 20, 40).unwrap();
        assert_eq!(layout.memory.len(), 1);
        assert_eq!(layout.memory[0], 0..128 << 20);
        assert!(layout.pluggable.is_empty());
        assert_eq!(layout.regions, 4 * GIB..512 * GIB);
        assert_eq!(layout.window_64, 512 * GIB..1024 * GIB);
    }

    #[test]
    fn large_memory_goes_around_the_hole() {
        let layout = plan(5 * GIB, 9 * GIB, 46).unwrap();
        assert_eq!(layout.memory, [0..3 * GIB, 4 * GIB..6 * GIB]);
        assert_eq!(layout.pluggable, 6 * GIB..10 * GIB);
        assert_eq!(layout.regions.start, 10 * GIB);
    }

    #[test]
    fn too_large_memory_names_the_field() {
        let error = plan(GIB, 1024 * GIB, 40).unwrap_err();
        assert!(
            error.to_string().starts_with("Machine.memory_max_bytes: "),
            "{error}"
        );
    }
}
