//! A vCPU before its first instruction.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

pub(crate) use super::cpuid::{CpuidError, Template, template};
use super::{boot::Entry, machine::KvmError};

/// `IA32_APIC_BASE`: the bootstrap processor, x2APIC mode, enabled; at its usual address.
const APIC_BOOTSTRAP: u64 = 1 << 8;
const APIC_X2: u64 = 1 << 10;
const APIC_ENABLED: u64 = 1 << 11;
const APIC_ADDRESS: u64 = 0xfee0_0000;

/// `IA32_MISC_ENABLE` and its bit for fast string operations.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;

/// `IA32_MTRR_DEF_TYPE`: enabled, write-back for all that no range says otherwise; PAT depends on
/// it in Linux.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// CR0.PE.
const PROTECTED_MODE: u64 = 1;

/// Prepares vCPU `id`. The first one gets `entry`; the others wait for INIT and SIPI.
pub(crate) fn prepare(
    vcpu: &VcpuFd,
    id: u16,
    template: &Template,
    entry: Option<&Entry>,
) -> Result<(), KvmError> {
    vcpu.set_cpuid2(&template.of_vcpu(id)?)
        .map_err(KvmError::at("CPUID"))?;
    set_msrs(vcpu)?;
    let mut system = vcpu.get_sregs().map_err(KvmError::at("system registers"))?;
    // Firmware's duty here: Linux itself would turn x2APIC on only where there is an I/O APIC.
    system.apic_base = APIC_ADDRESS | APIC_ENABLED | APIC_X2;
    if id == 0 {
        system.apic_base |= APIC_BOOTSTRAP;
    }
    if entry.is_some() {
        // Both protocols: 32-bit protected mode, flat segments, no paging.
        system.cs = segment(0x8, CODE);
        for data in [
            &mut system.ds,
            &mut system.es,
            &mut system.fs,
            &mut system.gs,
            &mut system.ss,
        ] {
            *data = segment(0x10, DATA);
        }
        system.tr = kvm_segment {
            limit: 0x67,
            g: 0,
            db: 0,
            s: 0,
            ..segment(0x18, TASK)
        };
        system.cr0 = PROTECTED_MODE;
        system.cr4 = 0;
    }
    vcpu.set_sregs(&system)
        .map_err(KvmError::at("system registers"))?;
    let Some(entry) = entry else { return Ok(()) };
    let registers = kvm_regs {
        rip: entry.instruction,
        rbx: entry.start_info,
        rsi: entry.zero_page,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&registers).map_err(KvmError::at("registers"))
}

/// Types of segment descriptors (Intel SDM volume 3, tables 3-1 and 3-2), all accessed or busy.
const CODE: u8 = 0xb;
const DATA: u8 = 0x3;
const TASK: u8 = 0xb;

fn segment(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    }
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entries = [
        (MSR_MISC_ENABLE, FAST_STRINGS),
        (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).expect("two entries fit");
    let count = vcpu.set_msrs(&msrs).map_err(KvmError::at("MSRs"))?;
    if count != entries.len() {
        return Err(KvmError {
            step: "MSRs",
            source: kvm_ioctls::Error::new(libc::EINVAL),
        });
    }
    Ok(())
}
