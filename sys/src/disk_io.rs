//! Asynchronous reads, writes and maintenance of one file or block device, between it and guest
//! memory.
//!
//! io_uring where the kernel allows it; otherwise each operation is done at once, in the caller's
//! thread, behind the same interface (`kernel.io_uring_disabled` is set on many hosts).
//!
//! The kernel writes to guest memory while an operation is in flight. Each slot therefore keeps the
//! mapping and the vectors alive until the kernel has answered, and [`DiskIo`] waits for all
//! answers before it goes.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use io_uring::{IoUring, opcode, squeue, types};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::GuestMemoryMmap;

use crate::{
    guest_io::{Segment, VECTORS_MAX, vectors},
    interrupted,
};

/// Kernel threads that one ring may use for what cannot be done at once.
const WORKERS_MAX: u32 = 4;

/// Where zeroes come from when a device cannot make them itself.
static ZEROES: [u8; 4096] = [0; 4096];

/// The most bytes that [`Operation::WriteZeroData`] writes.
pub const ZERO_DATA_BYTES_MAX: u64 = (VECTORS_MAX * ZEROES.len()) as u64;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation<'a> {
    /// Read into the segments.
    Read {
        /// Where in the file.
        offset: u64,
        /// Where in the guest's memory.
        segments: &'a [Segment],
    },
    /// Write from the segments.
    Write {
        /// Where in the file.
        offset: u64,
        /// Where in the guest's memory.
        segments: &'a [Segment],
        /// Answer only once the data is on stable storage.
        durable: bool,
    },
    /// Bring the data of all answered writes to stable storage.
    Flush,
    /// `fallocate` with [`PUNCH_HOLE`] or [`ZERO_RANGE`].
    Allocate {
        /// The mode.
        mode: i32,
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Write zeroes as data; at most [`ZERO_DATA_BYTES_MAX`] bytes.
    WriteZeroData {
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
}

/// Give the range back; it reads as zeroes.
pub const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// Make the range read as zeroes, keeping its space.
pub const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// An answer: the caller's token, and the bytes moved (0 for operations that move none) or the
/// error.
pub type Completion = (u64, io::Result<usize>);

/// What an operation in flight needs to stay in place.
#[derive(Debug)]
struct Slot {
    token: u64,
    vectors: Box<[libc::iovec]>,
    _memory: Arc<GuestMemoryMmap>,
}

// SAFETY: the pointers in `vectors` lead into mappings that `_memory` keeps alive, or to a static;
// nobody dereferences them in this process but the kernel on behalf of the operation.
unsafe impl Send for Slot {}

enum Engine {
    Ring(Box<IoUring>),
    Direct(Vec<Completion>),
}

/// One file or block device with its operations in flight.
pub struct DiskIo {
    file: OwnedFd,
    event: EventFd,
    engine: Engine,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
}

impl std::fmt::Debug for DiskIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskIo")
            .field("file", &self.file)
            .field("ring", &matches!(self.engine, Engine::Ring(_)))
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

impl DiskIo {
    /// Prepares for up to `depth` operations at a time.
    ///
    /// # Errors
    /// No eventfd. A missing io_uring is no error.
    pub fn new(file: OwnedFd, depth: u16) -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let engine = match ring(depth, &event) {
            Ok(ring) => Engine::Ring(Box::new(ring)),
            Err(_) => Engine::Direct(Vec::new()),
        };
        Ok(Self::with(file, event, engine, depth))
    }

    /// As [`Self::new`] on a kernel without io_uring.
    ///
    /// # Errors
    /// No eventfd.
    pub fn without_ring(file: OwnedFd, depth: u16) -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self::with(file, event, Engine::Direct(Vec::new()), depth))
    }

    fn with(file: OwnedFd, event: EventFd, engine: Engine, depth: u16) -> Self {
        Self {
            file,
            event,
            engine,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..usize::from(depth)).rev().collect(),
        }
    }

    /// The file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Readable when there are answers.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Whether another operation may begin.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Operations begun and not yet taken back by [`Self::take_completed`].
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Begins an operation; with io_uring at the next [`Self::submit`].
    ///
    /// # Errors
    /// There is no room (`EBUSY`), or a segment lies outside guest memory (`EFAULT`).
    pub fn begin(
        &mut self,
        token: u64,
        memory: &Arc<GuestMemoryMmap>,
        operation: Operation<'_>,
    ) -> io::Result<()> {
        let vectors = match operation {
            Operation::Read { segments, .. } | Operation::Write { segments, .. } => {
                vectors(memory, segments)?
            }
            Operation::WriteZeroData { len, .. } => zero_vectors(len)?,
            Operation::Flush | Operation::Allocate { .. } => Vec::new(),
        };
        let index = self
            .free
            .pop()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBUSY))?;
        let slot = self.slots[index].insert(Slot {
            token,
            vectors: vectors.into_boxed_slice(),
            _memory: memory.clone(),
        });
        match &mut self.engine {
            Engine::Ring(ring) => {
                let entry = entry(&self.file, operation, &slot.vectors).user_data(index as u64);
                // SAFETY:
                // - The entry names `self.file`, which lives as long as the ring.
                // - Its vectors, and the memory that they lead to, stay in the slot until the
                //   kernel's answer is taken; `drain` waits for that before either is dropped.
                let pushed = unsafe { ring.submission().push(&entry) };
                if pushed.is_err() {
                    self.slots[index] = None;
                    self.free.push(index);
                    return Err(io::Error::from_raw_os_error(libc::EBUSY));
                }
            }
            Engine::Direct(done) => {
                let result = interrupted::retry(|| direct(&self.file, operation, &slot.vectors));
                done.push((token, result));
                self.slots[index] = None;
                self.free.push(index);
                self.event.write(1)?;
            }
        }
        Ok(())
    }

    /// Tells the kernel of what was begun.
    ///
    /// # Errors
    /// What `io_uring_enter` answers; what was begun stays begun.
    pub fn submit(&mut self) -> io::Result<()> {
        match &self.engine {
            Engine::Ring(ring) => {
                let submitted = interrupted::retry(|| ring.submit());
                submitted.or_else(|error| submit_later(&self.event, error))?;
                Ok(())
            }
            Engine::Direct(_) => Ok(()),
        }
    }

    /// Takes the answers that are there: at most as many as operations may be in flight.
    pub fn take_completed(&mut self) -> Vec<Completion> {
        // Non-blocking; a count of zero means that the answers were taken before.
        let _ = self.event.read();
        match &mut self.engine {
            Engine::Direct(done) => std::mem::take(done),
            Engine::Ring(ring) => {
                let mut completed = Vec::new();
                for entry in ring.completion() {
                    let index = usize::try_from(entry.user_data()).expect("a slot's index");
                    let Some(slot) = self.slots[index].take() else {
                        continue;
                    };
                    self.free.push(index);
                    let result = usize::try_from(entry.result())
                        .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
                    completed.push((slot.token, result));
                }
                completed
            }
        }
    }

    /// Waits for everything in flight and drops the answers.
    pub fn drain(&mut self) {
        self.take_completed();
        while self.in_flight() > 0 {
            let Engine::Ring(ring) = &self.engine else {
                return;
            };
            match ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error)
                    if error.kind() == io::ErrorKind::Interrupted
                        || error.raw_os_error() == Some(libc::EBUSY)
                        || error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(_) => {
                    // The kernel may still write to memory of these slots: it must stay mapped for
                    // ever.
                    for slot in &mut self.slots {
                        std::mem::forget(slot.take());
                    }
                    self.free = (0..self.slots.len()).rev().collect();
                    return;
                }
            }
            self.take_completed();
        }
    }
}

impl Drop for DiskIo {
    fn drop(&mut self) {
        self.drain();
    }
}

/// What was not submitted stays in the ring, and goes when the caller submits again. Returns the
/// errors that do not pass.
fn submit_later(event: &EventFd, error: io::Error) -> io::Result<usize> {
    match error.raw_os_error() {
        // The kernel has answers to give first: they come by the eventfd.
        Some(libc::EBUSY) => Ok(0),
        // It has no memory for now, and there may be no answer that would wake the caller.
        Some(libc::EAGAIN) => Ok(event.write(1).map(|_| 0)?),
        _ => Err(error),
    }
}

fn ring(depth: u16, event: &EventFd) -> io::Result<IoUring> {
    let ring = IoUring::new(u32::from(depth).next_power_of_two())?;
    ring.submitter()
        .register_eventfd(event.as_fd().as_raw_fd())?;
    // Older kernels cannot limit it: they then use what they see fit.
    let _ = ring
        .submitter()
        .register_iowq_max_workers(&mut [WORKERS_MAX, WORKERS_MAX]);
    Ok(ring)
}

fn entry(file: &OwnedFd, operation: Operation<'_>, vectors: &[libc::iovec]) -> squeue::Entry {
    let file = types::Fd(file.as_raw_fd());
    let count = u32::try_from(vectors.len()).expect("bounded by VECTORS_MAX");
    match operation {
        Operation::Read { offset, .. } => opcode::Readv::new(file, vectors.as_ptr(), count)
            .offset(offset)
            .build(),
        Operation::Write {
            offset, durable, ..
        } => opcode::Writev::new(file, vectors.as_ptr(), count)
            .offset(offset)
            .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
            .build(),
        Operation::WriteZeroData { offset, .. } => {
            opcode::Writev::new(file, vectors.as_ptr(), count)
                .offset(offset)
                .build()
        }
        Operation::Flush => opcode::Fsync::new(file)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Operation::Allocate { mode, offset, len } => opcode::Fallocate::new(file, len)
            .offset(offset)
            .mode(mode)
            .build(),
    }
}

/// Does an operation at once.
fn direct(file: &OwnedFd, operation: Operation<'_>, vectors: &[libc::iovec]) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    let count = libc::c_int::try_from(vectors.len()).expect("bounded by VECTORS_MAX");
    let position = |offset: u64| {
        libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
    };
    let rc = match operation {
        Operation::Read { offset, .. } => {
            let offset = position(offset)?;
            // SAFETY: the vectors lead into guest memory that the caller's slot keeps mapped during
            // the call.
            unsafe { libc::preadv(fd, vectors.as_ptr(), count, offset) }
        }
        Operation::Write {
            offset, durable, ..
        } => {
            let offset = position(offset)?;
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as above; the kernel only reads from the vectors.
            unsafe { libc::pwritev2(fd, vectors.as_ptr(), count, offset, flags) }
        }
        Operation::WriteZeroData { offset, .. } => {
            let offset = position(offset)?;
            // SAFETY: the vectors lead to a static, from which the kernel only reads.
            unsafe { libc::pwritev(fd, vectors.as_ptr(), count, offset) }
        }
        Operation::Flush => return Ok(nix::unistd::fdatasync(file).map(|()| 0)?),
        Operation::Allocate { mode, offset, len } => {
            let (offset, len) = (position(offset)?, position(len)?);
            // SAFETY: takes no pointer.
            let rc = unsafe { libc::fallocate(fd, mode, offset, len) };
            rc as libc::ssize_t
        }
    };
    usize::try_from(rc).map_err(|_| io::Error::last_os_error())
}

fn zero_vectors(len: u64) -> io::Result<Vec<libc::iovec>> {
    if len > ZERO_DATA_BYTES_MAX {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let len = usize::try_from(len).expect("bounded above");
    Ok((0..len)
        .step_by(ZEROES.len())
        .map(|done| libc::iovec {
            iov_base: ZEROES.as_ptr().cast_mut().cast(),
            iov_len: ZEROES.len().min(len - done),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn file() -> File {
        let path = std::env::temp_dir().join(format!(
            "disk-io-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file
    }

    fn finish(disk: &mut DiskIo) -> Vec<Completion> {
        disk.submit().unwrap();
        let mut fds = [PollFd::new(disk.event.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(5000u16)).unwrap(), 1);
        disk.take_completed()
    }

    fn round_trip(mut disk: DiskIo, mut file: File) {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        memory
            .write_slice(b"written by a guest", GuestAddress(100))
            .unwrap();
        let segments = [
            Segment {
                address: GuestAddress(100),
                len: 7,
            },
            Segment {
                address: GuestAddress(107),
                len: 11,
            },
        ];
        for durable in [false, true] {
            let write = Operation::Write {
                offset: 4096,
                segments: &segments,
                durable,
            };
            disk.begin(7, &memory, write).unwrap();
            let completed = finish(&mut disk);
            assert!(matches!(completed[..], [(7, Ok(18))]), "{completed:?}");
        }
        let read = Operation::Read {
            offset: 4100,
            segments: &[Segment {
                address: GuestAddress(0x8000),
                len: 14,
            }],
        };
        disk.begin(8, &memory, read).unwrap();
        assert!(matches!(finish(&mut disk)[..], [(8, Ok(14))]));
        let mut seen = [0; 14];
        memory.read_slice(&mut seen, GuestAddress(0x8000)).unwrap();
        assert_eq!(&seen, b"ten by a guest");
        for operation in [
            Operation::Flush,
            Operation::Allocate {
                mode: PUNCH_HOLE,
                offset: 4096,
                len: 4,
            },
            Operation::WriteZeroData {
                offset: 4110,
                len: 5000,
            },
        ] {
            disk.begin(9, &memory, operation).unwrap();
            let completed = finish(&mut disk);
            assert!(matches!(completed[..], [(9, Ok(_))]), "{completed:?}");
        }
        let mut bytes = vec![0; 5000];
        std::io::Seek::seek(&mut file, io::SeekFrom::Start(4096)).unwrap();
        file.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes[..18], b"\0\0\0\0ten by a g\0\0\0\0");
        assert_eq!(disk.in_flight(), 0);
    }

    #[test]
    fn with_and_without_a_ring() {
        let disk_file = file();
        let disk = DiskIo::new(disk_file.try_clone().unwrap().into(), 4).unwrap();
        println!("{disk:?}");
        round_trip(disk, disk_file);
        let disk_file = file();
        let disk = DiskIo::without_ring(disk_file.try_clone().unwrap().into(), 4).unwrap();
        round_trip(disk, disk_file);
    }

    #[test]
    fn room_is_bounded_and_drop_waits() {
        let mut disk = DiskIo::new(file().into(), 4).unwrap();
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        if matches!(disk.engine, Engine::Direct(_)) {
            println!("skipped: no io_uring here");
            return;
        }
        for token in 0..4 {
            disk.begin(token, &memory, Operation::Flush).unwrap();
        }
        assert!(!disk.has_room());
        let error = disk.begin(4, &memory, Operation::Flush).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
        disk.drain();
        assert_eq!(disk.in_flight(), 0);
        disk.begin(5, &memory, Operation::Flush).unwrap();
        disk.submit().unwrap();
        drop(disk);
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    #[test]
    fn a_kernel_without_memory_is_asked_again() {
        let disk = DiskIo::new(file().into(), 4).unwrap();
        let is_ready = || {
            let mut fds = [PollFd::new(disk.event(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
        };
        let fails = |number| submit_later(&disk.event, io::Error::from_raw_os_error(number));
        assert!(fails(libc::EBUSY).is_ok());
        assert!(fails(libc::EBADF).is_err());
        assert!(!is_ready());
        assert!(fails(libc::EAGAIN).is_ok());
        assert!(is_ready());
    }

    #[test]
    fn memory_that_is_not_the_guests_is_refused() {
        let mut disk = DiskIo::new(file().into(), 4).unwrap();
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap());
        let read = Operation::Read {
            offset: 0,
            segments: &[Segment {
                address: GuestAddress(0xfff),
                len: 2,
            }],
        };
        assert!(disk.begin(0, &memory, read).is_err());
        assert_eq!(disk.in_flight(), 0);
    }
}
