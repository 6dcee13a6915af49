//! Memory that a virtual machine sees: its own, pages that the VMM shows it, and files as
//! persistent memory.
//!
//! All mappings start at a multiple of 2 MiB or more, so that KVM can map huge pages.

use std::{
    fs::File,
    io,
    ops::{Deref, Range},
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    ptr::{self, NonNull},
    sync::{Arc, atomic::AtomicU32},
};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryRegion as _, GuestRegionMmap, mmap::MmapRegionBuilder,
};

/// Least alignment of every mapping: a huge page of x86-64.
const ALIGNMENT_BYTES: usize = 2 << 20;

const PAGE_BYTES: usize = 4096;

/// Protection of guest memory in this process.
const GUEST_PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// What to do with the pages of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestPages {
    /// Alignment that the pages of the file need: 2 MiB, or 1 GiB for hugetlb pages of that size.
    pub alignment_bytes: usize,
    /// Advise the kernel to use transparent huge pages.
    pub transparent: bool,
}

/// Maps `length` bytes of `file` from `offset` as guest memory at `guest_address`, shared with all
/// who map the file. The mapping stays for the life of the process, because devices and KVM hold
/// pointers into it.
///
/// # Errors
/// The kernel's, or the range wraps around.
pub fn map_guest_memory(
    file: Arc<File>,
    offset: u64,
    length: usize,
    guest_address: u64,
    pages: GuestPages,
) -> io::Result<GuestRegionMmap> {
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    let alignment = pages.alignment_bytes.max(ALIGNMENT_BYTES);
    let place = Reservation::new(length, alignment)?;
    let source = Some((file.as_raw_fd(), offset));
    place.map(0, length, GUEST_PROTECTION, flags, source)?;
    if pages.transparent {
        // SAFETY: advice on the mapping just made; the kernel may refuse it, which costs speed
        // only.
        unsafe { libc::madvise(place.start.as_ptr().cast(), length, libc::MADV_HUGEPAGE) };
    }
    let file = FileOffset::from_arc(file, offset);
    place.into_region(guest_address, flags, Some(file))
}

/// Most parts of a file that a private mapping shows: each is an area of the process's address
/// space, of which the kernel allows 65,530 (vm.max_map_count).
const PARTS_MAX: usize = 4096;

/// Smallest hole that separates two parts; a smaller one is mapped with its neighbours.
const HOLE_BYTES_MIN: u64 = 16 << 10;

/// Maps `length` bytes of `file` from `offset` as guest memory at `guest_address`, of which nobody
/// sees what is written: the file stays as it is, and pages are its until their first write. What
/// the file has no data for is memory of its own, because a page of a hole would first be made in
/// the file. The mapping stays for the life of the process.
///
/// The region has no file of its own; its pages are given back by [`give_back`].
///
/// # Errors
/// The kernel's, or the range wraps around.
pub fn map_private_memory(
    file: &File,
    offset: u64,
    length: usize,
    guest_address: u64,
) -> io::Result<GuestRegionMmap> {
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let place = Reservation::new(length, ALIGNMENT_BYTES)?;
    let own = flags | libc::MAP_ANONYMOUS;
    place.map(0, length, GUEST_PROTECTION, own, None)?;
    let end = offset.saturating_add(length as u64);
    for part in parts_with_data(file, offset..end)? {
        let from = usize::try_from(part.start - offset).map_err(io::Error::other)?;
        let bytes = usize::try_from(part.end - part.start).map_err(io::Error::other)?;
        let source = Some((file.as_raw_fd(), part.start));
        place.map(from, bytes, GUEST_PROTECTION, flags, source)?;
    }
    place.into_region(guest_address, flags, None)
}

/// The parts of a range of a file that have data, whole pages, at most [`PARTS_MAX`].
fn parts_with_data(file: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut parts: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let Some(start) = seek(file, at, Whence::SeekData)? else {
            break;
        };
        let end = seek(file, start, Whence::SeekHole)?.unwrap_or(range.end);
        let page = PAGE_BYTES as u64;
        let part = start / page * page..end.next_multiple_of(page).min(range.end);
        if part.start >= range.end {
            break;
        }
        at = part.end;
        join(&mut parts, part, HOLE_BYTES_MIN);
    }
    let mut hole = HOLE_BYTES_MIN;
    while parts.len() > PARTS_MAX {
        hole *= 2;
        let mut joined = Vec::new();
        for part in parts {
            join(&mut joined, part, hole);
        }
        parts = joined;
    }
    Ok(parts)
}

/// Appends `part`, or extends the last part when the hole between them is smaller than
/// `hole_bytes`.
fn join(parts: &mut Vec<Range<u64>>, part: Range<u64>, hole_bytes: u64) {
    match parts.last_mut() {
        Some(last) if part.start - last.end < hole_bytes => last.end = part.end,
        _ => parts.push(part),
    }
}

/// The next data or hole of a file; `None` beyond the last data.
fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    let from = libc::off_t::try_from(from).map_err(io::Error::other)?;
    match lseek(file, from, whence) {
        Ok(found) => u64::try_from(found).map(Some).map_err(io::Error::other),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Gives pages of a region without a file back. What is there afterwards is what was there before
/// anybody wrote: zeros, or the data of the file that the region was made from.
///
/// # Errors
/// The range is not the region's, or the kernel's.
pub fn give_back(region: &GuestRegionMmap, offset: u64, length: u64) -> io::Result<()> {
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    let end = offset.checked_add(length).ok_or_else(invalid)?;
    if end > region.len() {
        return Err(invalid());
    }
    let offset = usize::try_from(offset).map_err(io::Error::other)?;
    let length = usize::try_from(length).map_err(io::Error::other)?;
    let start = region.as_ptr().wrapping_add(offset).cast();
    // SAFETY: the range is mapped memory of a guest, whose content may change at any time.
    if unsafe { libc::madvise(start, length, libc::MADV_DONTNEED) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Memory of whole pages that the VMM writes and a guest reads, as words. Both see every store;
/// only whole words are atomic.
#[derive(Debug)]
pub struct SharedWords(Reservation);

impl SharedWords {
    /// Zeroed words; `length` is in bytes and a multiple of the page.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(length: usize) -> io::Result<Self> {
        assert_eq!(length % PAGE_BYTES, 0, "KVM maps whole pages");
        let place = Reservation::new(length, PAGE_BYTES)?;
        // Private, so that pages never written are the one zero page of the host (this process does
        // not fork).
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        place.map(0, length, libc::PROT_READ | libc::PROT_WRITE, flags, None)?;
        Ok(Self(place))
    }
}

impl Deref for SharedWords {
    type Target = [AtomicU32];

    fn deref(&self) -> &[AtomicU32] {
        let start = self.0.start.as_ptr().cast_const().cast();
        // SAFETY: the mapping is readable and writable, aligned to a page, lives as long as `self`,
        // and whoever else maps it (a guest) does so as plain memory, for which atomics are the
        // right type.
        unsafe { std::slice::from_raw_parts(start, self.0.length / size_of::<AtomicU32>()) }
    }
}

/// A file mapped shared and read-only, followed by zeros up to a length.
#[derive(Debug)]
pub struct FileMapping(Reservation);

impl FileMapping {
    /// Maps `file_bytes` of `file` and zeros up to `length`, a multiple of 2 MiB.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(file: BorrowedFd<'_>, file_bytes: usize, length: usize) -> io::Result<Self> {
        let place = Reservation::new(length, ALIGNMENT_BYTES)?;
        let zeros = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        place.map(0, length, libc::PROT_READ, zeros, None)?;
        let mapped = file_bytes.next_multiple_of(PAGE_BYTES).min(length);
        if mapped > 0 {
            let source = Some((file.as_raw_fd(), 0));
            place.map(0, mapped, libc::PROT_READ, libc::MAP_SHARED, source)?;
        }
        Ok(Self(place))
    }
}

/// Registers of a device, mapped as they are. The VMM never looks at them; a test plays the driver
/// by them.
#[derive(Debug)]
pub struct DeviceMapping(Reservation);

impl DeviceMapping {
    /// Largest page that the processor maps.
    const ALIGNMENT_BYTES_MAX: usize = 1 << 30;

    /// Maps `length` bytes of `file` from `offset`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(file: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<Self> {
        let pages = length.next_power_of_two();
        let alignment = pages.clamp(PAGE_BYTES, Self::ALIGNMENT_BYTES_MAX);
        let place = Reservation::new(length, alignment)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let source = Some((file.as_raw_fd(), offset));
        place.map(0, length, protection, libc::MAP_SHARED, source)?;
        Ok(Self(place))
    }

    /// Where it lies in this process, for the kernel, and its bytes.
    pub(crate) fn range(&self) -> (u64, u64) {
        let start = self.0.start.as_ptr().expose_provenance();
        (start as u64, self.0.length as u64)
    }

    fn place<T>(&self, offset: usize) -> Option<*mut Unaligned<T>> {
        let end = offset.checked_add(size_of::<T>())?;
        let start = self.0.start.as_ptr();
        (end <= self.0.length).then(|| start.wrapping_add(offset).cast())
    }

    fn get<T: Copy>(&self, offset: usize) -> Option<T> {
        // SAFETY: the place lies in the mapping, which is readable, and its type needs no
        // alignment. What is there changes by itself, as a volatile access expects.
        self.place::<T>(offset)
            .map(|place| unsafe { place.read_volatile() }.0)
    }

    fn set<T: Copy>(&self, offset: usize, value: T) -> Option<()> {
        // SAFETY: as above; the mapping is writable, and nobody has a reference to it.
        self.place::<T>(offset)
            .map(|place| unsafe { place.write_volatile(Unaligned(value)) })
    }

    /// Loads `size` bytes (1, 2, 4 or 8) from `offset`, which need not be aligned. `None` beyond
    /// the mapping and for other sizes.
    #[must_use]
    pub fn load(&self, offset: usize, size: usize) -> Option<u64> {
        match size {
            1 => self.get::<u8>(offset).map(u64::from),
            2 => self.get::<u16>(offset).map(u64::from),
            4 => self.get::<u32>(offset).map(u64::from),
            8 => self.get::<u64>(offset),
            _ => None,
        }
    }

    /// Stores the lower `size` bytes (1, 2, 4 or 8) of `value` at `offset`, which need not be
    /// aligned. `None` beyond the mapping and for other sizes.
    pub fn store(&self, offset: usize, size: usize, value: u64) -> Option<()> {
        let [a, b, c, d, ..] = value.to_le_bytes();
        match size {
            1 => self.set(offset, a),
            2 => self.set(offset, u16::from_le_bytes([a, b])),
            4 => self.set(offset, u32::from_le_bytes([a, b, c, d])),
            8 => self.set(offset, value),
            _ => None,
        }
    }
}

/// A value at an address of any alignment.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T>(T);

/// What a slot of KVM's memory map shows to the guest.
#[derive(Debug, Clone)]
pub enum Backing {
    /// Guest memory.
    Guest(Arc<GuestRegionMmap>),
    /// Words of the VMM, read-only for the guest.
    Words(Arc<SharedWords>),
    /// A file, read-only for the guest.
    File(Arc<FileMapping>),
    /// Registers of a device that is passed through.
    Device(Arc<DeviceMapping>),
}

impl Backing {
    /// Start in this process, and length.
    pub(crate) fn range(&self) -> (NonNull<u8>, usize) {
        match self {
            Self::Guest(region) => {
                let start = NonNull::new(region.as_ptr()).expect("a mapping is not at zero");
                (start, region.size())
            }
            Self::Words(words) => (words.0.start, words.0.length),
            Self::File(file) => (file.0.start, file.0.length),
            Self::Device(device) => (device.0.start, device.0.length),
        }
    }

    /// Whether a guest may only read it.
    pub(crate) fn read_only(&self) -> bool {
        !matches!(self, Self::Guest(_) | Self::Device(_))
    }
}

/// Address space that belongs to us, at a wanted alignment; unmapped when dropped.
#[derive(Debug)]
struct Reservation {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a reservation is a range of address space without a thread's affinity; it gives out no
// reference by itself.
unsafe impl Send for Reservation {}
// SAFETY: as above; the types around it decide how its memory is accessed.
unsafe impl Sync for Reservation {}

impl Reservation {
    fn new(length: usize, alignment: usize) -> io::Result<Self> {
        let whole = length
            .checked_add(alignment)
            .filter(|_| length > 0)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new private mapping at an address of the kernel's choice touches no existing
        // memory.
        let base = unsafe { libc::mmap(ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base: *mut u8 = base.cast();
        let head = base.align_offset(alignment);
        let start = base.wrapping_add(head);
        let tail = whole - head - length;
        // SAFETY: both ranges lie within the mapping just made (head is less than the alignment),
        // and nothing uses them.
        unsafe {
            if head > 0 {
                libc::munmap(base.cast(), head);
            }
            if tail > 0 {
                libc::munmap(start.wrapping_add(length).cast(), tail);
            }
        }
        let start = NonNull::new(start).expect("a mapping is not at zero");
        Ok(Self { start, length })
    }

    /// Maps over a part of the reservation, which nobody references yet.
    fn map(
        &self,
        from: usize,
        length: usize,
        protection: i32,
        flags: i32,
        source: Option<(RawFd, u64)>,
    ) -> io::Result<()> {
        assert!(from + length <= self.length, "a part of the reservation");
        let (descriptor, offset) = source.unwrap_or((-1, 0));
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let place = self.start.as_ptr().wrapping_add(from).cast();
        // SAFETY: MAP_FIXED replaces a part of our own reservation only (asserted), which has no
        // references yet.
        let result = unsafe {
            libc::mmap(
                place,
                length,
                protection,
                flags | libc::MAP_FIXED,
                descriptor,
                offset,
            )
        };
        if result == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Turns a reservation that is mapped whole with [`GUEST_PROTECTION`] into guest memory at
    /// `guest_address`. It stays mapped for the life of the process.
    fn into_region(
        self,
        guest_address: u64,
        flags: i32,
        file: Option<FileOffset>,
    ) -> io::Result<GuestRegionMmap> {
        let mut builder = MmapRegionBuilder::new(self.length)
            .with_mmap_prot(GUEST_PROTECTION)
            .with_mmap_flags(flags);
        if let Some(file) = file {
            builder = builder.with_file_offset(file);
        }
        // SAFETY: the mapping has this length and this protection, and is never taken away, since
        // the reservation is forgotten.
        let builder = unsafe { builder.with_raw_mmap_pointer(self.start.as_ptr()) };
        std::mem::forget(self);
        let region = builder.build().map_err(io::Error::other)?;
        GuestRegionMmap::new(region, GuestAddress(guest_address))
            .ok_or_else(|| io::Error::other("guest memory wraps around the address space"))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and the types around it give out references only for their own
        // life.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd, sync::atomic::Ordering};

    use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};

    use super::*;

    fn memfd(bytes: &[u8], length: u64) -> File {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let mut file = File::from(nix::sys::memfd::memfd_create("test", flags).unwrap());
        file.write_all(bytes).unwrap();
        file.set_len(length).unwrap();
        file
    }

    #[test]
    fn guest_memory_is_aligned_and_shared_with_the_file() {
        let file = Arc::new(memfd(b"abc", 4 << 20));
        let pages = GuestPages {
            alignment_bytes: ALIGNMENT_BYTES,
            transparent: true,
        };
        let region = map_guest_memory(file, 0, 4 << 20, 1 << 32, pages).unwrap();
        assert_eq!(region.as_ptr().align_offset(ALIGNMENT_BYTES), 0);
        assert_eq!(region.start_addr().0, 1 << 32);
        let mut found = [0; 3];
        region
            .read_slice(&mut found, MemoryRegionAddress(0))
            .unwrap();
        assert_eq!(&found, b"abc");
    }

    #[test]
    fn private_memory_begins_as_the_file_and_leaves_it_alone() {
        use std::os::unix::fs::{FileExt, MetadataExt};
        let file = memfd(b"", 4 << 20);
        file.write_at(b"data", 1 << 20).unwrap();
        file.write_at(b"more", 3 << 20).unwrap();
        let blocks = || file.metadata().unwrap().blocks();
        let before = blocks();
        let map = || map_private_memory(&file, 0, 4 << 20, 1 << 32).unwrap();
        let (one, other) = (map(), map());
        let read = |region: &GuestRegionMmap, at: u64| {
            let mut found = [9; 4];
            let address = MemoryRegionAddress(at);
            region.read_slice(&mut found, address).unwrap();
            found
        };
        for at in [0, 2 << 20] {
            assert_eq!(read(&one, at), [0; 4]);
            one.write_slice(b"mine", MemoryRegionAddress(at)).unwrap();
        }
        assert_eq!(&read(&one, 3 << 20), b"more");
        one.write_slice(b"mine", MemoryRegionAddress(1 << 20))
            .unwrap();
        assert_eq!(&read(&one, 1 << 20), b"mine");
        assert_eq!(&read(&other, 1 << 20), b"data");
        assert_eq!(read(&other, 0), [0; 4]);
        assert_eq!(blocks(), before, "no page is made in the file");
        give_back(&one, 0, 2 << 20).unwrap();
        assert_eq!(read(&one, 0), [0; 4]);
        assert_eq!(&read(&one, 1 << 20), b"data");
        assert_eq!(&read(&one, 2 << 20), b"mine");
        assert!(give_back(&one, 4 << 20, 4096).is_err());
    }

    #[test]
    fn parts_of_a_file_are_few_and_have_all_of_its_data() {
        use std::os::unix::fs::FileExt;
        let bytes = 16384 * 32768_u64;
        let file = memfd(b"", bytes);
        for number in 0..16384 {
            file.write_at(b"x", number * 32768).unwrap();
        }
        let parts = parts_with_data(&file, 32768..bytes).unwrap();
        assert!(parts.len() <= PARTS_MAX, "{}", parts.len());
        let covers = |at: u64| parts.iter().any(|part| part.contains(&at));
        assert!((1..16384).all(|number| covers(number * 32768)));
        assert!(!covers(0), "only what was asked for");
        let empty = memfd(b"", bytes);
        assert!(parts_with_data(&empty, 0..bytes).unwrap().is_empty());
    }

    #[test]
    fn words_start_zeroed_and_keep_what_is_stored() {
        let words = SharedWords::new(PAGE_BYTES).unwrap();
        assert_eq!(words.len(), PAGE_BYTES / 4);
        assert_eq!(words[7].load(Ordering::Relaxed), 0);
        words[7].store(9, Ordering::Relaxed);
        assert_eq!(words[7].load(Ordering::Relaxed), 9);
    }

    #[test]
    fn registers_are_reached_whole_at_any_alignment_and_not_beyond() {
        let file = memfd(b"", 4096);
        let registers = DeviceMapping::new(file.as_fd(), 0, 4096).unwrap();
        registers.store(1, 4, 0xffff_ffff_0403_0201).unwrap();
        assert_eq!(registers.load(0, 8), Some(0x04_0302_0100));
        assert_eq!(registers.load(3, 2), Some(0x0403));
        assert_eq!(registers.load(4095, 1), Some(0));
        assert!(registers.load(4095, 2).is_none() && registers.load(0, 3).is_none());
        assert!(registers.store(usize::MAX, 8, 0).is_none());
    }

    #[test]
    fn a_file_is_followed_by_zeros() {
        let file = memfd(b"abc", 3);
        let mapping = FileMapping::new(file.as_fd(), 3, ALIGNMENT_BYTES).unwrap();
        let (start, length) = Backing::File(Arc::new(mapping)).range();
        assert_eq!(length, ALIGNMENT_BYTES);
        assert_eq!(start.as_ptr().align_offset(ALIGNMENT_BYTES), 0);
    }
}
