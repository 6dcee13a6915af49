//! The state of a vCPU and of KVM's clock as plain data, and back.
//!
//! The order in which a vCPU is set matters, because KVM checks one part against another: CPUID
//! first, which says what is there; the local APIC after the system registers, which turn its mode
//! on, and before the MSRs, whose deadline of the timer needs the timer's mode; events last,
//! because some of the others inject.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_clock_data,
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use pericarp_sys::kvm;
use serde::{Deserialize, Serialize};

use super::machine::KvmError;

/// `IA32_TIME_STAMP_COUNTER`: first, because the timer's deadline is compared with it.
const MSR_TSC: u32 = 0x10;
/// `IA32_TSC_DEADLINE`: last.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// `IA32_MISC_ENABLE` and `IA32_MTRR_DEF_TYPE`, which we set ourselves and KVM's list may lack.
const OURS: [u32; 2] = [0x1a0, 0x2ff];
/// MSRs of Hyper-V, which our guests do not have, and which do things when they are set.
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_0fff;

/// Everything of one vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    registers: kvm_regs,
    system: kvm_sregs,
    extended: kvm_xsave,
    extended_control: kvm_xcrs,
    debug: kvm_debugregs,
    apic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// The MSRs of a vCPU that are worth saving, in the order in which they are set.
pub(crate) fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let list = kvm.get_msr_index_list().map_err(KvmError::at("MSR list"))?;
    let mut indices = list.as_slice().to_vec();
    indices.extend(OURS);
    indices
        .retain(|index| !HYPER_V.contains(index) && ![MSR_TSC, MSR_TSC_DEADLINE].contains(index));
    indices.sort_unstable();
    indices.dedup();
    indices.insert(0, MSR_TSC);
    indices.push(MSR_TSC_DEADLINE);
    Ok(indices)
}

impl VcpuState {
    /// That of a vCPU that does not run.
    pub(crate) fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, KvmError> {
        // Some states are only settled by reading this one.
        let mp_state = vcpu.get_mp_state().map_err(KvmError::at("run state"))?;
        let cpuid = vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::at("CPUID"))?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            registers: vcpu.get_regs().map_err(KvmError::at("registers"))?,
            system: vcpu.get_sregs().map_err(KvmError::at("system registers"))?,
            extended: vcpu.get_xsave().map_err(KvmError::at("extended state"))?,
            extended_control: vcpu.get_xcrs().map_err(KvmError::at("control of it"))?,
            debug: vcpu
                .get_debug_regs()
                .map_err(KvmError::at("debug registers"))?,
            apic: vcpu.get_lapic().map_err(KvmError::at("local APIC"))?,
            msrs: save_msrs(vcpu, msrs, mp_state)?,
            events: vcpu.get_vcpu_events().map_err(KvmError::at("events"))?,
            mp_state,
        })
    }

    /// Makes a fresh vCPU go on from here.
    pub(crate) fn restore(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| KvmError {
            step: "CPUID entries",
            source: kvm_ioctls::Error::new(libc::E2BIG),
        })?;
        vcpu.set_cpuid2(&cpuid).map_err(KvmError::at("CPUID"))?;
        vcpu.set_mp_state(self.mp_state)
            .map_err(KvmError::at("run state"))?;
        vcpu.set_regs(&self.registers)
            .map_err(KvmError::at("registers"))?;
        vcpu.set_sregs(&self.system)
            .map_err(KvmError::at("system registers"))?;
        kvm::set_xsave(vm, vcpu, &self.extended).map_err(KvmError::at("extended state"))?;
        if self.extended_control.nr_xcrs > 0 {
            vcpu.set_xcrs(&self.extended_control)
                .map_err(KvmError::at("control of extended state"))?;
        }
        vcpu.set_debug_regs(&self.debug)
            .map_err(KvmError::at("debug registers"))?;
        vcpu.set_lapic(&self.apic)
            .map_err(KvmError::at("local APIC"))?;
        for msr in &self.msrs {
            restore_msr(vcpu, *msr)?;
        }
        vcpu.set_vcpu_events(&self.events)
            .map_err(KvmError::at("events"))?;
        // Time stood still: the guest's watchdogs are told so, where it has KVM's clock.
        let _ = vcpu.kvmclock_ctrl();
        Ok(())
    }
}

/// One at a time: which of them a vCPU has depends on its CPUID.
fn save_msrs(
    vcpu: &VcpuFd,
    indices: &[u32],
    mp_state: kvm_mp_state,
) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut saved: Vec<kvm_msr_entry> = Vec::new();
    for index in indices {
        let Some(mut entry) = read_msr(vcpu, *index)? else {
            continue;
        };
        let started = mp_state.mp_state != KVM_MP_STATE_UNINITIALIZED;
        if *index == MSR_TSC_DEADLINE && entry.data == 0 && started {
            // Zero may also say that it has just passed. Then its interrupt is lost with the timer,
            // so it passes once more: one interrupt too many does no harm.
            let tsc = saved.first().filter(|first| first.index == MSR_TSC);
            entry.data = tsc.map_or(0, |tsc| tsc.data);
        }
        saved.push(entry);
    }
    Ok(saved)
}

fn read_msr(vcpu: &VcpuFd, index: u32) -> Result<Option<kvm_msr_entry>, KvmError> {
    let mut msrs = one_msr(kvm_msr_entry {
        index,
        ..Default::default()
    });
    let read = vcpu.get_msrs(&mut msrs).map_err(KvmError::at("MSRs"))?;
    Ok(msrs.as_slice().first().copied().filter(|_| read == 1))
}

fn restore_msr(vcpu: &VcpuFd, entry: kvm_msr_entry) -> Result<(), KvmError> {
    let set = vcpu
        .set_msrs(&one_msr(entry))
        .map_err(KvmError::at("MSRs"))?;
    // Some may only be read, and have the right value.
    if set == 1 || read_msr(vcpu, entry.index)?.is_some_and(|now| now.data == entry.data) {
        return Ok(());
    }
    Err(KvmError {
        step: "an MSR that this host does not take",
        source: kvm_ioctls::Error::new(libc::EINVAL),
    })
}

fn one_msr(entry: kvm_msr_entry) -> Msrs {
    Msrs::from_entries(&[entry]).expect("one entry fits")
}

/// Nanoseconds of KVM's clock.
pub(crate) fn clock_ns(vm: &VmFd) -> Result<u64, KvmError> {
    Ok(vm.get_clock().map_err(KvmError::at("clock"))?.clock)
}

/// Has KVM's clock go on from `clock_ns`.
pub(crate) fn set_clock_ns(vm: &VmFd, clock_ns: u64) -> Result<(), KvmError> {
    let clock = kvm_clock_data {
        clock: clock_ns,
        ..Default::default()
    };
    vm.set_clock(&clock).map_err(KvmError::at("clock"))
}
