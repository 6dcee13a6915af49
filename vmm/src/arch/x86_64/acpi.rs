//! ACPI tables of a hardware-reduced machine (ACPI 6.5 §4.1): RSDP, XSDT, FADT, MADT, MCFG and a
//! small DSDT.
//!
//! There is no I/O APIC, no PIC, no PIT and no RTC: every interrupt is a message, and x2APIC is on
//! from the start.

use acpi_tables::{
    Aml, AmlSink, aml,
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    mcfg::MCFG,
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::layout::{self, Layout};

const OEM: [u8; 6] = *b"PERICP";
const TABLE: [u8; 8] = *b"PERICARP";
const REVISION: u32 = 1;

/// FADT, `IAPC_BOOT_ARCH` (ACPI 6.5 table 5.11): no VGA, no CMOS RTC.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 5;

/// `SLP_TYP` value for off; any value would do.
const SLEEP_TYPE_OFF: u8 = 5;

/// `_STA` of a device that is present, enabled, shown and working (§6.3.7).
const PRESENT: u8 = 0xf;

/// Where the guest finds the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tables {
    /// Address of the RSDP.
    pub(crate) rsdp: u64,
    /// End of the last table.
    pub(crate) end: u64,
}

/// Guest memory refused a table.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AcpiError {
    /// No memory there.
    #[error("ACPI tables do not fit guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

struct Writer<'a> {
    memory: &'a GuestMemoryMmap,
    next: u64,
}

struct Sink(Vec<u8>);

impl AmlSink for Sink {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut sink = Sink(Vec::new());
    table.to_aml_bytes(&mut sink);
    sink.0
}

impl Writer<'_> {
    fn write(&mut self, table: &dyn Aml) -> Result<u64, AcpiError> {
        self.write_bytes(&bytes_of(table))
    }

    fn write_bytes(&mut self, bytes: &[u8]) -> Result<u64, AcpiError> {
        let address = self.next.next_multiple_of(64);
        self.next = address + bytes.len() as u64;
        assert!(self.next <= layout::ACPI.end, "the tables of 256 vCPUs fit");
        self.memory.write_slice(bytes, GuestAddress(address))?;
        Ok(address)
    }
}

/// Writes all tables for a machine of `vcpus`.
pub(crate) fn write(
    memory: &GuestMemoryMmap,
    layout: &Layout,
    vcpus: u16,
) -> Result<Tables, AcpiError> {
    let mut writer = Writer {
        memory,
        next: layout::ACPI.start,
    };
    let dsdt = writer.write_bytes(dsdt(layout).as_slice())?;
    let fadt = writer.write(&fadt(dsdt))?;
    let madt = writer.write_bytes(madt(vcpus).as_slice())?;
    let mcfg = writer.write(&mcfg())?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = writer.write(&xsdt)?;
    let rsdp = writer.write(&Rsdp::new(OEM, xsdt))?;
    Ok(Tables {
        rsdp,
        end: writer.next,
    })
}

fn port_register(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(port),
    )
}

fn fadt(dsdt: u64) -> impl Aml {
    // Without an I/O APIC the kernel learns from nothing else that message interrupts need physical
    // destinations.
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::ForceApicPhysicalDestinationMode);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port_register(layout::PORT_RESET);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port_register(layout::PORT_SLEEP_CONTROL);
    fadt.sleep_status_reg = port_register(layout::PORT_SLEEP_STATUS);
    fadt.finalize()
}

/// MADT (§5.2.12): local APICs with ids below 255, and x2APICs from there on.
fn madt(vcpus: u16) -> Sdt {
    const ENABLED: u32 = 1;
    const LOCAL_APIC: u32 = 0xfee0_0000;
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM, TABLE, REVISION);
    madt.append_slice(&LOCAL_APIC.to_le_bytes());
    madt.append_slice(&0_u32.to_le_bytes()); // no PC-AT compatible 8259s
    for id in 0..vcpus {
        match u8::try_from(id) {
            Ok(short) if short < u8::MAX => {
                madt.append_slice(&[0, 8, short, short]);
                madt.append_slice(&ENABLED.to_le_bytes());
            }
            _ => {
                madt.append_slice(&[9, 16, 0, 0]);
                madt.append_slice(&u32::from(id).to_le_bytes());
                madt.append_slice(&ENABLED.to_le_bytes());
                madt.append_slice(&u32::from(id).to_le_bytes());
            }
        }
    }
    madt.update_checksum();
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, 0);
    mcfg
}

/// The name space: a host bridge with its windows, the motherboard resource that vouches for ECAM,
/// and pvpanic.
fn dsdt(layout: &Layout) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    dsdt.append_slice(&host_bridge(layout));
    dsdt.append_slice(&motherboard());
    dsdt.append_slice(&panic_device());
    // SLP_TYP of \_S5 (§7.4.2): the power device takes any type as "off".
    let s5 = aml::Package::new(vec![&SLEEP_TYPE_OFF, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    dsdt.append_slice(&bytes_of(&aml::Name::new("_S5_".into(), &s5)));
    dsdt.update_checksum();
    dsdt
}

fn host_bridge(layout: &Layout) -> Vec<u8> {
    let uncached = aml::AddressSpaceCacheable::NotCacheable;
    let (low, high) = (&layout::WINDOW_32, &layout.window_64);
    let bus = aml::AddressSpace::new_bus_number(0_u16, 0_u16);
    let (start, last) = (below_4g(low.start), below_4g(low.end - 1));
    let low = aml::AddressSpace::new_memory(uncached, true, start, last, None);
    let uncached = aml::AddressSpaceCacheable::NotCacheable;
    let high = aml::AddressSpace::new_memory(uncached, true, high.start, high.end - 1, None);
    let resources = aml::ResourceTemplate::new(vec![&bus, &low, &high]);
    let hid = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A08"));
    let cid = aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03"));
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let crs = aml::Name::new("_CRS".into(), &resources);
    bytes_of(&aml::Device::new(
        "_SB_.PCI0".into(),
        vec![&hid, &cid, &uid, &crs],
    ))
}

/// Linux believes an MCFG only when a motherboard device holds the range (PCI firmware
/// specification 3.3 §4.1.2).
fn motherboard() -> Vec<u8> {
    let size = below_4g(layout::ECAM.end - layout::ECAM.start);
    let ecam = aml::Memory32Fixed::new(true, below_4g(layout::ECAM.start), size);
    let resources = aml::ResourceTemplate::new(vec![&ecam]);
    let hid = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02"));
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let crs = aml::Name::new("_CRS".into(), &resources);
    bytes_of(&aml::Device::new(
        "_SB_.MBRD".into(),
        vec![&hid, &uid, &crs],
    ))
}

/// pvpanic, whose driver tells us about a panic of the kernel.
fn panic_device() -> Vec<u8> {
    let port = aml::IO::new(layout::PORT_PANIC, layout::PORT_PANIC, 1, 1);
    let resources = aml::ResourceTemplate::new(vec![&port]);
    let hid = aml::Name::new("_HID".into(), &"QEMU0001");
    let status = aml::Name::new("_STA".into(), &PRESENT);
    let crs = aml::Name::new("_CRS".into(), &resources);
    bytes_of(&aml::Device::new(
        "_SB_.PEVT".into(),
        vec![&hid, &status, &crs],
    ))
}

fn below_4g(address: u64) -> u32 {
    u32::try_from(address).expect("the layout's constants below 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
    }

    fn read(memory: &GuestMemoryMmap, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    fn table(memory: &GuestMemoryMmap, address: u64) -> Vec<u8> {
        let head = read(memory, address, 36);
        let length = u32::from_le_bytes(head[4..8].try_into().unwrap());
        let bytes = read(memory, address, usize::try_from(length).unwrap());
        let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(
            sum,
            0,
            "checksum of {:?}",
            String::from_utf8_lossy(&head[..4])
        );
        bytes
    }

    #[test]
    fn every_table_is_reached_and_sums_to_zero() {
        let memory = memory();
        let layout = layout::plan(128 << 20, 128 << 20, 40).unwrap();
        let tables = write(&memory, &layout, 256).unwrap();
        assert!(tables.end <= layout::ACPI.end);
        let rsdp = read(&memory, tables.rsdp, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let xsdt = table(
            &memory,
            u64::from_le_bytes(rsdp[24..32].try_into().unwrap()),
        );
        let mut found = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let bytes = table(&memory, u64::from_le_bytes(entry.try_into().unwrap()));
            if &bytes[..4] == b"FACP" {
                let dsdt = u64::from_le_bytes(bytes[140..148].try_into().unwrap());
                assert_eq!(&table(&memory, dsdt)[..4], b"DSDT");
            }
            found.push(bytes[..4].to_vec());
        }
        assert_eq!(found, [b"FACP", b"APIC", b"MCFG"]);
    }

    #[test]
    fn madt_names_every_vcpu_once() {
        let madt = madt(256);
        let entries = &madt.as_slice()[44..];
        assert_eq!(entries.len(), 255 * 8 + 16);
        assert_eq!(entries[255 * 8..][..8], [9, 16, 0, 0, 255, 0, 0, 0]);
    }
}
