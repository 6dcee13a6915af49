//! What a virtual machine of x86-64 needs before its first vCPU.

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VmFd};

use super::layout;

/// A system call of KVM failed.
#[derive(Debug, thiserror::Error)]
#[error("kvm: {step}: {source}")]
pub(crate) struct KvmError {
    /// Which one.
    pub(crate) step: &'static str,
    /// Why.
    #[source]
    pub(crate) source: kvm_ioctls::Error,
}

impl KvmError {
    /// For `map_err`.
    pub(crate) fn at(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self { step, source }
    }
}

/// Sets interrupt controllers and pages up. Local APICs are KVM's; there is no other controller, so
/// nothing but messages interrupts the guest and KVM's device emulation beyond the APIC is out of
/// its reach.
pub(crate) fn set_up(vm: &VmFd) -> Result<(), KvmError> {
    let task_state = usize::try_from(layout::TASK_STATE).expect("below 4 GiB");
    vm.set_tss_address(task_state)
        .map_err(KvmError::at("task state"))?;
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(KvmError::at("identity map"))?;
    let split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    vm.enable_cap(&split)
        .map_err(KvmError::at("split interrupt controller"))?;
    let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    let x2apic = kvm_enable_cap {
        cap: KVM_CAP_X2APIC_API,
        args: [u64::from(flags), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&x2apic).map_err(KvmError::at("x2APIC ids"))
}

/// How many bits of physical address a guest has on this host.
pub(crate) fn address_bits(kvm: &Kvm) -> Result<u32, KvmError> {
    const ADDRESS_SIZES: u32 = 0x8000_0008;
    /// Without the leaf (Intel SDM volume 2, CPUID).
    const BITS_DEFAULT: u32 = 36;
    let cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::at("supported CPUID"))?;
    let leaf = cpuid
        .as_slice()
        .iter()
        .find(|entry| entry.function == ADDRESS_SIZES);
    Ok(leaf.map_or(BITS_DEFAULT, |entry| entry.eax & 0xff))
}
