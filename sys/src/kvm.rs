//! What `kvm-ioctls` leaves `unsafe` or leaves out.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd, IntoRawFd, OwnedFd},
    ptr::NonNull,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
};

use kvm_bindings::{KVM_MEM_READONLY, kvm_run, kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::mapping::Backing;

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

/// The memory slots of a virtual machine: which guest addresses show which memory. Each slot holds
/// what backs it until the slot is gone.
#[derive(Debug)]
pub struct MemorySlots {
    vm: Arc<VmFd>,
    used: Mutex<BTreeMap<u32, (u64, Backing)>>,
}

impl MemorySlots {
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

impl Drop for MemorySlots {
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

/// Creates a virtual machine.
///
/// # Errors
/// The kernel's. `EINTR` is retried: the kernel gives up on the locks of the address space when any
/// signal or stop is pending.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result,
        }
    }
}

/// The `immediate_exit` flag of one vCPU: while it is set, `KVM_RUN` returns `EINTR` before it
/// enters the guest. Other threads set it, so the flag has a mapping of its own.
#[derive(Debug)]
pub struct ImmediateExit {
    run: NonNull<kvm_run>,
}

// SAFETY: the mapping belongs to this value, and only its flag is accessed, atomically.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Maps the flag of `vcpu`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new mapping at an address that the kernel chooses; it replaces nothing.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<kvm_run>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let run = NonNull::new(mapped.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { run })
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: the mapping covers the structure and lives as long as `self`; through it the flag
        // is accessed in no other way.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.run.as_ptr()).immediate_exit) }
    }

    /// Makes this and every later `KVM_RUN` return, until [`Self::take`]. A vCPU that is in the
    /// guest needs a signal as well.
    pub fn set(&self) {
        self.flag().store(1, Ordering::SeqCst);
    }

    /// Clears the flag, and returns whether it was set.
    pub fn take(&self) -> bool {
        self.flag().swap(0, Ordering::SeqCst) != 0
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: `new` mapped exactly this range, and no reference to it outlives `self`.
        unsafe { libc::munmap(self.run.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}

/// Installs a handler for `signal` that does nothing, so that the signal makes `KVM_RUN` return.
/// Other system calls go on after it.
///
/// # Errors
/// The kernel's.
pub fn handle_interrupt(signal: Signal) -> io::Result<()> {
    extern "C" fn nothing(_signal: libc::c_int) {}
    let handler = SigHandler::Handler(nothing);
    let action = SigAction::new(handler, SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler touches nothing, so it may run at any point of any thread.
    unsafe { sigaction(signal, &action) }?;
    Ok(())
}

/// Sets the extended state of a vCPU.
///
/// # Errors
/// The kernel's; `E2BIG` where this process may show its guests state that the structure has no
/// room for.
pub fn set_xsave(vm: &VmFd, vcpu: &VcpuFd, state: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    let size = vm.check_extension_int(Cap::Xsave2);
    if usize::try_from(size).unwrap_or(0) > size_of::<kvm_xsave>() {
        return Err(kvm_ioctls::Error::new(libc::E2BIG));
    }
    // SAFETY: the kernel reads as many bytes as the capability says, which `state` has.
    unsafe { vcpu.set_xsave(state) }
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

#[cfg(test)]
mod tests {
    use std::{
        os::unix::thread::JoinHandleExt,
        sync::atomic::AtomicBool,
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    fn kvm() -> Option<Kvm> {
        match Kvm::new() {
            Ok(kvm) => Some(kvm),
            Err(error) => {
                println!("skipped: /dev/kvm: {error}");
                None
            }
        }
    }

    #[test]
    fn the_flag_ends_a_run_until_it_is_taken() {
        let Some(kvm) = kvm() else { return };
        let vm = create_vm(&kvm).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let exit = ImmediateExit::new(&vcpu).unwrap();
        assert!(!exit.take());
        exit.set();
        for _ in 0..2 {
            assert_eq!(vcpu.run().unwrap_err().errno(), libc::EINTR);
        }
        assert!(exit.take());
        assert!(!exit.take());
        // Without memory the first instruction exits or fails, but not by a signal.
        assert!(!matches!(vcpu.run(), Err(error) if error.errno() == libc::EINTR));
    }

    #[test]
    fn signals_do_not_keep_a_vm_from_being_created() {
        let Some(kvm) = kvm() else { return };
        handle_interrupt(Signal::SIGUSR1).unwrap();
        let done = Arc::new(AtomicBool::new(false));
        let finished = Arc::clone(&done);
        let creator = thread::spawn(move || {
            let deadline = Instant::now() + Duration::from_secs(2);
            while Instant::now() < deadline {
                create_vm(&kvm).unwrap();
            }
            finished.store(true, Ordering::SeqCst);
        });
        while !done.load(Ordering::SeqCst) && !creator.is_finished() {
            // SAFETY: the thread was not joined yet, so its handle is valid.
            unsafe { libc::pthread_kill(creator.as_pthread_t(), libc::SIGUSR1) };
        }
        creator.join().unwrap();
    }
}
