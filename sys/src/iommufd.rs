//! iommufd (Documentation/userspace-api/iommufd.rst, uapi/linux/iommufd.h): a view of memory for
//! functions that were opened by their own device nodes, without groups and containers.
//!
//! The shim opens `/dev/iommu` and the functions; the VMM gets them as descriptors, makes an
//! address space in the first and puts the others into it.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use vm_memory::GuestMemoryMmap;

use crate::{
    mapping::DeviceMapping,
    vfio::{address_of, address_of_memory, ioctl, request, size_of_u32},
};

/// `_IO(';', 0x80 + n)`: every request of iommufd, in the numbers that VFIO left free.
const fn iommufd_request(number: u32) -> u32 {
    request(0x80 - 100 + number)
}

/// `IOMMU_IOAS_ALLOC`, for filters of system calls, as are the others in public.
pub const IOAS_ALLOC: u32 = iommufd_request(1);
/// `IOMMU_IOAS_MAP`.
pub const IOAS_MAP: u32 = iommufd_request(5);
/// `IOMMU_IOAS_UNMAP`.
pub const IOAS_UNMAP: u32 = iommufd_request(6);
/// `VFIO_DEVICE_BIND_IOMMUFD`.
pub const DEVICE_BIND: u32 = request(18);
/// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`.
pub const DEVICE_ATTACH: u32 = request(19);

/// A view of memory that functions share.
#[derive(Debug)]
pub struct Iommufd {
    fd: OwnedFd,
    /// Number of the address space.
    space: u32,
    /// Whose memory is in it.
    mapped: Mutex<Vec<Arc<GuestMemoryMmap>>>,
    /// Registers of devices that are in it, by address.
    registers: Mutex<BTreeMap<u64, Arc<DeviceMapping>>>,
}

impl AsFd for Iommufd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Iommufd {
    /// Takes over an open `/dev/iommu`, and makes an address space in it.
    ///
    /// # Errors
    /// The kernel's: it is none.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        #[repr(C)]
        struct Alloc {
            size: u32,
            flags: u32,
            space: u32,
        }
        let mut alloc = Alloc {
            size: size_of_u32::<Alloc>(),
            flags: 0,
            space: 0,
        };
        ioctl(fd.as_fd(), IOAS_ALLOC, address_of(&mut alloc))?;
        Ok(Self {
            fd,
            space: alloc.space,
            mapped: Mutex::default(),
            registers: Mutex::default(),
        })
    }

    /// Makes a function, opened by its device node, ours, and has it see the address space. Before
    /// this it answers nothing.
    ///
    /// # Errors
    /// The kernel's: `EINVAL` and `EBUSY` when somebody has the function or its group, `EPERM`
    /// where the host cannot isolate interrupts, `ENOMEM` beyond `RLIMIT_MEMLOCK`.
    pub fn admit(&self, function: BorrowedFd<'_>) -> io::Result<()> {
        #[repr(C)]
        struct Bind {
            argsz: u32,
            flags: u32,
            iommufd: i32,
            device: u32,
        }
        #[repr(C)]
        struct Attach {
            argsz: u32,
            flags: u32,
            space: u32,
        }
        let mut bind = Bind {
            argsz: size_of_u32::<Bind>(),
            flags: 0,
            iommufd: self.fd.as_raw_fd(),
            device: 0,
        };
        ioctl(function, DEVICE_BIND, address_of(&mut bind))?;
        let mut attach = Attach {
            argsz: size_of_u32::<Attach>(),
            flags: 0,
            space: self.space,
        };
        ioctl(function, DEVICE_ATTACH, address_of(&mut attach)).map(drop)
    }

    /// Lets devices reach `length` bytes of guest memory at `address`, the guest's own, and pins
    /// them as soon as there is a function. They lie in one region.
    ///
    /// # Errors
    /// The kernel's: `ENOMEM` beyond `RLIMIT_MEMLOCK`, `EINVAL` beyond what the IOMMU addresses,
    /// `EEXIST` for what is mapped already.
    pub fn map(&self, memory: &Arc<GuestMemoryMmap>, address: u64, length: u64) -> io::Result<()> {
        let user = address_of_memory(memory, address, length)?;
        // The kernel pins the pages, so that devices never reach what this process maps there
        // later; guest memory is accessed as memory that others change.
        self.show(address, (user, length))?;
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        mapped.push(Arc::clone(memory));
        Ok(())
    }

    /// Lets devices reach the registers of another one, or of themselves, at `address`, the
    /// guest's own, until they are taken back.
    ///
    /// # Errors
    /// The kernel's: `EFAULT` from one that takes memory alone, as all do today.
    pub fn map_registers(&self, address: u64, registers: &Arc<DeviceMapping>) -> io::Result<()> {
        self.show(address, registers.range())?;
        let mut mapped = self
            .registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        mapped.insert(address, Arc::clone(registers));
        Ok(())
    }

    /// Takes the registers at `address` back from devices.
    ///
    /// # Errors
    /// The kernel's; they are still mapped.
    pub fn unmap_registers(&self, address: u64) -> io::Result<()> {
        let mut mapped = self
            .registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let registers = mapped.get(&address);
        let registers = registers.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        self.hide(address, registers.range().1)?;
        mapped.remove(&address);
        Ok(())
    }

    /// Takes all of it back from devices.
    ///
    /// # Errors
    /// The kernel's; what is left is still mapped.
    pub fn unmap_all(&self) -> io::Result<()> {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let mut registers = self
            .registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.hide(0, u64::MAX)?;
        mapped.clear();
        registers.clear();
        Ok(())
    }

    fn show(&self, iova: u64, (user, length): (u64, u64)) -> io::Result<()> {
        #[repr(C)]
        struct Map {
            size: u32,
            flags: u32,
            space: u32,
            reserved: u32,
            user: u64,
            length: u64,
            iova: u64,
        }
        const FIXED_READ_WRITE: u32 = 1 | 2 | 4;
        let mut map = Map {
            size: size_of_u32::<Map>(),
            flags: FIXED_READ_WRITE,
            space: self.space,
            reserved: 0,
            user,
            length,
            iova,
        };
        ioctl(self.as_fd(), IOAS_MAP, address_of(&mut map)).map(drop)
    }

    fn hide(&self, iova: u64, length: u64) -> io::Result<()> {
        #[repr(C)]
        struct Unmap {
            size: u32,
            space: u32,
            iova: u64,
            length: u64,
        }
        let mut unmap = Unmap {
            size: size_of_u32::<Unmap>(),
            space: self.space,
            iova,
            length,
        };
        ioctl(self.as_fd(), IOAS_UNMAP, address_of(&mut unmap)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn requests_are_those_of_the_kernel() {
        assert_eq!([IOAS_ALLOC, IOAS_MAP, IOAS_UNMAP], [0x3b81, 0x3b85, 0x3b86]);
        assert_eq!([DEVICE_BIND, DEVICE_ATTACH], [0x3b76, 0x3b77]);
    }

    #[test]
    fn other_files_are_refused() {
        assert!(Iommufd::new(File::open("/dev/null").unwrap().into()).is_err());
    }
}
