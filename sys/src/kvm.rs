//! What `kvm-ioctls` leaves `unsafe` or leaves out.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd, IntoRawFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::mapping::Backing;

/// `KVM_SET_SIGNAL_MASK`: `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`, whose fixed part is 4 bytes.
const KVM_SET_SIGNAL_MASK: libc::Ioctl = 0x4004_ae8b;

/// `KVM_PRE_FAULT_MEMORY`: `_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)` of 64 bytes.
const KVM_PRE_FAULT_MEMORY: libc::Ioctl = 0xc040_aed5;

/// `KVM_CAP_PRE_FAULT_MEMORY` of uapi/linux/kvm.h.
pub const CAP_PRE_FAULT_MEMORY: u64 = 236;

/// Takes over an open `/dev/kvm`.
#[must_use]
pub fn from_descriptor(descriptor: OwnedFd) -> Kvm {
    let raw = descriptor.into_raw_fd();
    // SAFETY: the descriptor is open and its ownership moves in. On a file that is not /dev/kvm the
    // ioctls fail.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(raw) }
}

/// The memory map of a virtual machine. Each slot holds what backs it until the slot is gone.
#[derive(Debug)]
pub struct Slots {
    vm: Arc<VmFd>,
    used: Mutex<BTreeMap<u32, (u64, Backing)>>,
}

impl Slots {
    /// The map of `vm`; nobody else may set its slots.
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            used: Mutex::new(BTreeMap::new()),
        }
    }

    /// Shows `backing` to the guest at `guest_address`, and returns the number of the slot.
    ///
    /// # Errors
    /// The kernel's: `EEXIST` for an overlap, `EINVAL` for a bad alignment.
    pub fn add(&self, guest_address: u64, backing: Backing) -> io::Result<u32> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = (0..u32::MAX)
            .find(|slot| !used.contains_key(slot))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        let (start, length) = backing.range();
        let region = kvm_userspace_memory_region {
            slot,
            flags: if backing.read_only() {
                KVM_MEM_READONLY
            } else {
                0
            },
            guest_phys_addr: guest_address,
            memory_size: length as u64,
            userspace_addr: start.addr().get() as u64,
        };
        // SAFETY: the range is mapped and stays so while `used` holds `backing`, which is until the
        // slot is deleted; other owners of the memory access it as memory shared with a guest.
        unsafe { self.vm.set_user_memory_region(region) }?;
        used.insert(slot, (guest_address, backing));
        Ok(slot)
    }

    /// Takes a slot away.
    ///
    /// # Errors
    /// The kernel's; the backing is then kept.
    pub fn remove(&self, slot: u32) -> io::Result<()> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((guest_address, _)) = used.get(&slot) else {
            return Ok(());
        };
        self.clear(slot, *guest_address)?;
        used.remove(&slot);
        Ok(())
    }

    fn clear(&self, slot: u32, guest_address: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: guest_address,
            memory_size: 0,
            userspace_addr: 0,
        };
        // SAFETY: size 0 deletes the slot and maps nothing.
        Ok(unsafe { self.vm.set_user_memory_region(region) }?)
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        let used = std::mem::take(self.used.get_mut().unwrap_or_else(PoisonError::into_inner));
        for (slot, (guest_address, backing)) in used {
            if self.clear(slot, guest_address).is_err() {
                // The machine may still look at it: leave it mapped.
                std::mem::forget(backing);
            }
        }
    }
}

/// Makes the vCPU's run end for `signal` although the thread blocks it, with no moment at which it
/// could be missed.
///
/// # Errors
/// The kernel's.
pub fn interrupt_run_by(vcpu: &VcpuFd, signal: i32) -> io::Result<()> {
    #[repr(C)]
    struct Mask {
        length: u32,
        blocked: [u8; 8],
    }
    let bit = u32::try_from(signal - 1).map_err(io::Error::other)?;
    let blocked = !1_u64.checked_shl(bit).unwrap_or(0);
    let mask = Mask {
        length: 8,
        blocked: blocked.to_ne_bytes(),
    };
    // SAFETY: `mask` is a `struct kvm_signal_mask` with its 8 bytes of signals, read by the kernel
    // only.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const mask) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Has the kernel enter `length` bytes of guest memory from `guest_address` into the vCPU's page
/// tables, so that their first access does not fault. Stops at what it cannot do.
///
/// # Errors
/// The kernel's; `ENOTTY` or `EOPNOTSUPP` before Linux 6.11 and without two-dimensional paging.
pub fn pre_fault(vcpu: &VcpuFd, guest_address: u64, length: u64) -> io::Result<()> {
    #[repr(C)]
    struct PreFault {
        guest_address: u64,
        length: u64,
        flags: u64,
        padding: [u64; 5],
    }
    let mut range = PreFault {
        guest_address,
        length,
        flags: 0,
        padding: [0; 5],
    };
    while range.length > 0 {
        // SAFETY: `range` is a `struct kvm_pre_fault_memory`; the kernel updates it in place.
        let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY, &raw mut range) };
        if result < 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EINTR) {
                return Err(error);
            }
        }
    }
    Ok(())
}
