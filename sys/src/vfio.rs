//! VFIO (Documentation/driver-api/vfio.rst, uapi/linux/vfio.h): groups of PCI functions, the
//! container that is their view of memory, and the functions themselves.
//!
//! A newer kernel does without groups and containers: [`crate::iommufd`].
//!
//! The shim opens groups and containers and takes functions from them; the VMM gets all three as
//! descriptors. What the kernel writes into its structures is a peer's word: lists are bounded and
//! read by the offsets it gives only within the bytes it was given.

use std::{
    any::Any,
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::FileExt,
    },
    sync::{Arc, Mutex, PoisonError},
};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::mapping::DeviceMapping;

/// `_IO(';', 100 + n)`: every request of VFIO.
pub(crate) const fn request(number: u32) -> u32 {
    0x3b64 + number
}

/// `VFIO_GET_API_VERSION`, for filters of system calls, as are the others in public.
pub const GET_API_VERSION: u32 = request(0);
const CHECK_EXTENSION: u32 = request(1);
const SET_IOMMU: u32 = request(2);
const GROUP_GET_STATUS: u32 = request(3);
const GROUP_SET_CONTAINER: u32 = request(4);
const GROUP_GET_DEVICE_FD: u32 = request(6);
/// `VFIO_DEVICE_GET_INFO`.
pub const DEVICE_GET_INFO: u32 = request(7);
/// `VFIO_DEVICE_GET_REGION_INFO`.
pub const DEVICE_GET_REGION_INFO: u32 = request(8);
/// `VFIO_DEVICE_GET_IRQ_INFO`.
pub const DEVICE_GET_IRQ_INFO: u32 = request(9);
/// `VFIO_DEVICE_SET_IRQS`.
pub const DEVICE_SET_IRQS: u32 = request(10);
/// `VFIO_DEVICE_RESET`.
pub const DEVICE_RESET: u32 = request(11);
/// `VFIO_IOMMU_MAP_DMA`.
pub const IOMMU_MAP_DMA: u32 = request(13);
/// `VFIO_IOMMU_UNMAP_DMA`.
pub const IOMMU_UNMAP_DMA: u32 = request(14);

/// The one version of the interface.
const API_VERSION: i32 = 0;
/// `VFIO_TYPE1v2_IOMMU`.
const TYPE1_V2: usize = 3;

/// Region of configuration space (`VFIO_PCI_CONFIG_REGION_INDEX`); regions 0 to 5 are the BARs.
pub const CONFIG_REGION: u32 = 7;
/// `VFIO_PCI_MSI_IRQ_INDEX`.
pub const MSI: u32 = 1;
/// `VFIO_PCI_MSIX_IRQ_INDEX`.
pub const MSIX: u32 = 2;

/// Vectors of a function (PCI 3.0 §6.8.2.3: 11 bits).
const VECTORS_MAX: usize = 2048;
/// Parts of a region that may be mapped: a handful in every driver of the kernel.
const AREAS_MAX: usize = 64;
/// Bytes of a region's description with its lists.
const REGION_INFO_BYTES: usize = 4096;

pub(crate) fn ioctl(fd: BorrowedFd<'_>, request: u32, argument: usize) -> io::Result<i32> {
    // SAFETY: callers pass a number, or the address of a live structure of the size that the
    // request is defined with (its `argsz` says so).
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

pub(crate) fn address_of<T>(value: &mut T) -> usize {
    std::ptr::from_mut(value).expose_provenance()
}

pub(crate) fn size_of_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("a small structure")
}

/// Where `length` bytes of guest memory at `address`, in one region, lie in this process.
pub(crate) fn address_of_memory(
    memory: &GuestMemoryMmap,
    address: u64,
    length: u64,
) -> io::Result<u64> {
    let found = memory.to_region_addr(GuestAddress(address));
    let (region, offset) = found
        .filter(|(region, offset)| length <= region.len() - offset.0)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
    Ok(region.as_ptr().expose_provenance() as u64 + offset.0)
}

/// What is mapped in this process as long as this is kept.
type Owner = Arc<dyn Any + Send + Sync>;

/// A view of memory that functions share.
#[derive(Debug)]
pub struct Container {
    fd: OwnedFd,
    /// Address, bytes, and whose they are, which is kept.
    mapped: Mutex<Vec<(u64, u64, Owner)>>,
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Container {
    /// Takes over an open `/dev/vfio/vfio`.
    ///
    /// # Errors
    /// It is none, or of a version that does not exist yet.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        if ioctl(fd.as_fd(), GET_API_VERSION, 0)? != API_VERSION {
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        Ok(Self {
            fd,
            mapped: Mutex::default(),
        })
    }

    /// Whether this host translates for devices at all.
    ///
    /// # Errors
    /// The kernel's.
    pub fn has_iommu(&self) -> io::Result<bool> {
        Ok(ioctl(self.as_fd(), CHECK_EXTENSION, TYPE1_V2)? > 0)
    }

    /// Gives the container its translation; a container that has one already keeps it. A group is
    /// in it.
    ///
    /// # Errors
    /// The kernel's: `EPERM` where the host cannot isolate interrupts.
    pub fn set_iommu(&self) -> io::Result<()> {
        match ioctl(self.as_fd(), SET_IOMMU, TYPE1_V2) {
            // Another group brought it.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Lets devices reach `length` bytes of guest memory at `address`, the guest's own, and pins
    /// them. They lie in one region.
    ///
    /// # Errors
    /// The kernel's: `ENOMEM` beyond `RLIMIT_MEMLOCK`, `EINVAL` beyond what the IOMMU addresses,
    /// `EEXIST` for what is mapped already.
    pub fn map(&self, memory: &Arc<GuestMemoryMmap>, address: u64, length: u64) -> io::Result<()> {
        let user = address_of_memory(memory, address, length)?;
        // The kernel pins the pages, so that devices never reach what this process maps there
        // later; guest memory is accessed as memory that others change.
        self.show(address, (user, length), memory.clone())
    }

    /// Lets devices reach the registers of another one, or of themselves, at `address`, the
    /// guest's own, until they are taken back. Nothing is pinned.
    ///
    /// # Errors
    /// The kernel's: `EINVAL` beyond what the IOMMU addresses, `EEXIST` for what is mapped already.
    pub fn map_registers(&self, address: u64, registers: &Arc<DeviceMapping>) -> io::Result<()> {
        // What the IOMMU is told is where the registers are, not where this process has them; the
        // function whose they are stays open until then, because their mapping is kept.
        self.show(address, registers.range(), registers.clone())
    }

    /// Takes the registers at `address` back from devices.
    ///
    /// # Errors
    /// The kernel's; they are still mapped.
    pub fn unmap_registers(&self, address: u64) -> io::Result<()> {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let at = mapped.iter().position(|(iova, ..)| *iova == address);
        let at = at.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        self.hide(mapped[at].0, mapped[at].1)?;
        mapped.remove(at);
        Ok(())
    }

    /// Takes all of it back from devices.
    ///
    /// # Errors
    /// The kernel's; what is left is still mapped.
    pub fn unmap_all(&self) -> io::Result<()> {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((iova, size, _)) = mapped.last() {
            self.hide(*iova, *size)?;
            mapped.pop();
        }
        Ok(())
    }

    fn show(&self, iova: u64, (vaddr, size): (u64, u64), owner: Owner) -> io::Result<()> {
        #[repr(C)]
        struct Map {
            argsz: u32,
            flags: u32,
            vaddr: u64,
            iova: u64,
            size: u64,
        }
        const READ_WRITE: u32 = 1 | 2;
        let mut map = Map {
            argsz: size_of_u32::<Map>(),
            flags: READ_WRITE,
            vaddr,
            iova,
            size,
        };
        ioctl(self.as_fd(), IOMMU_MAP_DMA, address_of(&mut map))?;
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        mapped.push((iova, size, owner));
        Ok(())
    }

    fn hide(&self, iova: u64, size: u64) -> io::Result<()> {
        #[repr(C)]
        struct Unmap {
            argsz: u32,
            flags: u32,
            iova: u64,
            size: u64,
        }
        let mut unmap = Unmap {
            argsz: size_of_u32::<Unmap>(),
            flags: 0,
            iova,
            size,
        };
        ioctl(self.as_fd(), IOMMU_UNMAP_DMA, address_of(&mut unmap)).map(drop)
    }
}

/// Functions that cannot be told apart by the IOMMU.
#[derive(Debug)]
pub struct Group(OwnedFd);

impl From<OwnedFd> for Group {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Group> for OwnedFd {
    fn from(group: Group) -> Self {
        group.0
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Group {
    /// Whether every function of it is given up by the host.
    ///
    /// # Errors
    /// The kernel's.
    pub fn is_viable(&self) -> io::Result<bool> {
        #[repr(C)]
        struct Status {
            argsz: u32,
            flags: u32,
        }
        const VIABLE: u32 = 1;
        let mut status = Status {
            argsz: size_of_u32::<Status>(),
            flags: 0,
        };
        ioctl(self.as_fd(), GROUP_GET_STATUS, address_of(&mut status))?;
        Ok(status.flags & VIABLE != 0)
    }

    /// Puts the group into a container.
    ///
    /// # Errors
    /// The kernel's: `EINVAL` when it is in one already.
    pub fn enter(&self, container: &Container) -> io::Result<()> {
        let mut fd = container.fd.as_raw_fd();
        ioctl(self.as_fd(), GROUP_SET_CONTAINER, address_of(&mut fd)).map(drop)
    }

    /// Opens a function of the group by its address. The kernel resets it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(&self, address: &str) -> io::Result<OwnedFd> {
        let name = CString::new(address)?;
        let pointer = name.as_ptr().expose_provenance();
        let fd = ioctl(self.as_fd(), GROUP_GET_DEVICE_FD, pointer)?;
        // SAFETY: the kernel has just made this descriptor, close-on-exec, for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// A part of a function's registers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Region {
    /// Its bytes; 0 when there is none.
    pub size: u64,
    /// Where it begins in the function's file.
    offset: u64,
    /// What of it can be mapped: offset and bytes.
    pub mappable: Vec<(u64, u64)>,
}

/// Interrupts of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interrupts {
    /// How many vectors.
    pub count: u32,
    /// Vectors can be added while others are in use.
    pub grows: bool,
}

/// A PCI function.
#[derive(Debug)]
pub struct Function(File);

impl AsFd for Function {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Function {
    /// Takes over what [`Group::open`] opened.
    ///
    /// # Errors
    /// `ENOTTY` and others: it is none; `ENODEV`: it is one, but no PCI function;
    /// `EOPNOTSUPP`: nothing resets it.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        #[repr(C)]
        struct Info {
            argsz: u32,
            flags: u32,
            regions: u32,
            interrupts: u32,
        }
        const RESET: u32 = 1;
        const PCI: u32 = 2;
        let mut info = Info {
            argsz: size_of_u32::<Info>(),
            flags: 0,
            regions: 0,
            interrupts: 0,
        };
        ioctl(fd.as_fd(), DEVICE_GET_INFO, address_of(&mut info))?;
        if info.flags & PCI == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        if info.flags & RESET == 0 {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        Ok(Self(fd.into()))
    }

    /// Resets it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn reset(&self) -> io::Result<()> {
        ioctl(self.as_fd(), DEVICE_RESET, 0).map(drop)
    }

    /// Describes a region.
    ///
    /// # Errors
    /// The kernel's; `EINVAL` for a region that the function has not.
    pub fn region(&self, index: u32) -> io::Result<Region> {
        let mut bytes = [0_u8; REGION_INFO_BYTES];
        let size = u32::try_from(REGION_INFO_BYTES).expect("a page");
        bytes[..4].copy_from_slice(&size.to_ne_bytes());
        bytes[8..12].copy_from_slice(&index.to_ne_bytes());
        ioctl(self.as_fd(), DEVICE_GET_REGION_INFO, address_of(&mut bytes))?;
        Ok(parse_region(&bytes))
    }

    /// Describes the interrupts of one kind, [`MSI`] or [`MSIX`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn interrupts(&self, index: u32) -> io::Result<Interrupts> {
        #[repr(C)]
        struct Info {
            argsz: u32,
            flags: u32,
            index: u32,
            count: u32,
        }
        const EVENTFD: u32 = 1;
        const NO_RESIZE: u32 = 1 << 3;
        let mut info = Info {
            argsz: size_of_u32::<Info>(),
            flags: 0,
            index,
            count: 0,
        };
        ioctl(self.as_fd(), DEVICE_GET_IRQ_INFO, address_of(&mut info))?;
        let usable = info.flags & EVENTFD != 0;
        Ok(Interrupts {
            count: if usable { info.count } else { 0 },
            grows: info.flags & NO_RESIZE == 0,
        })
    }

    /// Has vectors from `start` on signal eventfds; `None` leaves one silent. The first call of a
    /// kind switches it on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn signal(&self, index: u32, start: u16, eventfds: &[Option<RawFd>]) -> io::Result<()> {
        const EVENTFDS: u32 = 1 << 2;
        if eventfds.is_empty() || eventfds.len() > VECTORS_MAX {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let fds: Vec<i32> = eventfds.iter().map(|fd| fd.unwrap_or(-1)).collect();
        self.set_interrupts(EVENTFDS, index, start, &fds)
    }

    /// Switches the interrupts of one kind off.
    ///
    /// # Errors
    /// The kernel's.
    pub fn silence(&self, index: u32) -> io::Result<()> {
        const NONE: u32 = 1;
        self.set_interrupts(NONE, index, 0, &[])
    }

    fn set_interrupts(&self, data: u32, index: u32, start: u16, fds: &[i32]) -> io::Result<()> {
        const TRIGGER: u32 = 1 << 5;
        const HEADER_WORDS: usize = 5;
        let count = u32::try_from(fds.len()).expect("at most VECTORS_MAX");
        let bytes = (u32::try_from(HEADER_WORDS).expect("5") + count) * 4;
        let mut words = vec![bytes, data | TRIGGER, index, u32::from(start), count];
        words.extend(fds.iter().map(|fd| fd.cast_unsigned()));
        let pointer = words.as_mut_ptr().expose_provenance();
        ioctl(self.as_fd(), DEVICE_SET_IRQS, pointer).map(drop)
    }

    /// Reads registers.
    ///
    /// # Errors
    /// The kernel's, and an access beyond the region.
    pub fn read(&self, region: &Region, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.0
            .read_exact_at(data, region.place(offset, data.len())?)
    }

    /// Writes registers.
    ///
    /// # Errors
    /// The kernel's, and an access beyond the region.
    pub fn write(&self, region: &Region, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, region.place(offset, data.len())?)
    }

    /// Maps a part of a region.
    ///
    /// # Errors
    /// The kernel's, and a part beyond the region.
    pub fn map(&self, region: &Region, offset: u64, length: u64) -> io::Result<DeviceMapping> {
        let length = usize::try_from(length).map_err(io::Error::other)?;
        DeviceMapping::new(self.as_fd(), region.place(offset, length)?, length)
    }
}

impl Region {
    fn place(&self, offset: u64, length: usize) -> io::Result<u64> {
        let inside = offset
            .checked_add(length as u64)
            .is_some_and(|end| end <= self.size);
        let place = self.offset.checked_add(offset).filter(|_| inside);
        place.ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))
    }
}

/// Reads `struct vfio_region_info` with its capabilities.
fn parse_region(bytes: &[u8; REGION_INFO_BYTES]) -> Region {
    const MAPPABLE: u32 = 1 << 2;
    const CAPABILITIES: u32 = 1 << 3;
    const SPARSE: u16 = 1;
    let word = |at: usize| {
        let bytes = bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    let double = |at: usize| {
        let bytes = bytes.get(at..at.checked_add(8)?)?;
        Some(u64::from_ne_bytes(bytes.try_into().ok()?))
    };
    let flags = word(4).unwrap_or(0);
    let mut region = Region {
        size: double(16).unwrap_or(0),
        offset: double(24).unwrap_or(0),
        mappable: Vec::new(),
    };
    if flags & MAPPABLE == 0 {
        return region;
    }
    let mut next = if flags & CAPABILITIES == 0 {
        0
    } else {
        word(12).unwrap_or(0)
    };
    // As many capabilities as the kernel knows, several times over.
    for _ in 0..AREAS_MAX {
        let Some(at) = usize::try_from(next).ok().filter(|at| *at != 0) else {
            break;
        };
        let Some(header) = word(at) else { break };
        if header & 0xffff == u32::from(SPARSE) {
            let count = word(at + 8).map_or(0, |count| count as usize);
            let area =
                |index: usize| Some((double(at + 16 + index * 16)?, double(at + 24 + index * 16)?));
            region.mappable = (0..count.min(AREAS_MAX)).map_while(area).collect();
            return region;
        }
        next = word(at + 4).unwrap_or(0);
    }
    region.mappable = vec![(0, region.size)];
    region
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(flags: u32, first: u32) -> [u8; REGION_INFO_BYTES] {
        let mut bytes = [0; REGION_INFO_BYTES];
        bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
        bytes[12..16].copy_from_slice(&first.to_ne_bytes());
        bytes[16..24].copy_from_slice(&0x8000_u64.to_ne_bytes());
        bytes[24..32].copy_from_slice(&(1_u64 << 40).to_ne_bytes());
        bytes
    }

    #[test]
    fn regions_are_mapped_whole_in_parts_or_not_at_all() {
        assert!(parse_region(&info(3, 0)).mappable.is_empty());
        let whole = parse_region(&info(7, 0));
        assert_eq!(whole.mappable, [(0, 0x8000)]);
        assert_eq!(whole.place(0x7ffc, 4).unwrap(), (1 << 40) + 0x7ffc);
        assert!(whole.place(0x7ffd, 4).is_err() && whole.place(u64::MAX, 1).is_err());
        let mut parts = info(15, 64);
        parts[64..66].copy_from_slice(&1_u16.to_ne_bytes());
        parts[72..76].copy_from_slice(&2_u32.to_ne_bytes());
        parts[88..96].copy_from_slice(&0x1000_u64.to_ne_bytes());
        parts[96..104].copy_from_slice(&0x4000_u64.to_ne_bytes());
        parts[104..112].copy_from_slice(&0x2000_u64.to_ne_bytes());
        assert_eq!(
            parse_region(&parts).mappable,
            [(0, 0x1000), (0x4000, 0x2000)]
        );
    }

    #[test]
    fn lists_of_a_broken_kernel_end() {
        // A capability that is its own next one, and one beyond the bytes.
        let mut circle = info(15, 64);
        circle[64..66].copy_from_slice(&3_u16.to_ne_bytes());
        circle[68..72].copy_from_slice(&64_u32.to_ne_bytes());
        assert_eq!(parse_region(&circle).mappable, [(0, 0x8000)]);
        assert_eq!(parse_region(&info(15, u32::MAX)).mappable, [(0, 0x8000)]);
        let mut long = info(15, 4000);
        long[4000..4002].copy_from_slice(&1_u16.to_ne_bytes());
        long[4008..4012].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(parse_region(&long).mappable.len() <= 5);
    }

    #[test]
    fn other_files_are_refused() {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        assert!(Container::new(null()).is_err());
        assert!(Function::new(null()).is_err());
        assert!(Group::from(null()).is_viable().is_err());
    }
}
