//! A queue to the daemon, with the VMM as its driver, and the bounce memory that both map: rings
//! and room for the contents of requests. The daemon sees nothing else of the VMM or the guest.
//!
//! ```text
//! bounce memory:  | ring page | ring page | ... | room, in pages ...                          |
//! ring page:      descriptors (0), available ring (2048), used ring (2560)
//! ```
//!
//! The daemon is not trusted: what it writes to the used ring is checked against the requests in
//! flight. Pages of the room are allocated from the lowest up, so that a file system that is seldom
//! used touches few of them.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use nix::fcntl::{FallocateFlags, fallocate};
use pericarp_sys::{
    guest_io::Segment,
    mapping::{GuestPages, map_guest_memory},
    memory_file::{self, Pages},
};
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::super::{device::GuestMemory, segments::SegmentChain};

/// Entries of each queue to the daemon: two per request.
pub(crate) const ENTRIES: u16 = 128;
/// Requests in flight.
const REQUESTS_MAX: usize = ENTRIES as usize / 2;

const PAGE_BYTES: usize = 4096;
/// Room for requests: several of the largest, which have 1 MiB and their headers.
const ROOM_BYTES: usize = 8 << 20;
/// Pages of room that an idle file system keeps; the rest is freed.
const KEPT_PAGES: usize = 16;
/// Where the memory lies in the daemon's messages.
const BASE: u64 = 1 << 20;

const AVAILABLE: u64 = 2048;
const USED: u64 = 2560;
const _: () = assert!(16 * ENTRIES as u64 <= AVAILABLE);
const _: () = assert!(AVAILABLE + 4 + 2 * ENTRIES as u64 + 2 <= USED);
const _: () = assert!(USED + 4 + 8 * ENTRIES as u64 + 2 <= PAGE_BYTES as u64);

/// VIRTQ_DESC_F_NEXT and VIRTQ_DESC_F_WRITE.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Why a request cannot be passed on now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// Requests in flight take the room; it can be passed on later.
    Now,
    /// It is empty or larger than all of the room.
    Ever,
}

/// The daemon violated the protocol.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the daemon {0}")]
pub(crate) struct Lie(&'static str);

/// A run of pages of the room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: usize,
    count: usize,
}

/// The bounce memory.
#[derive(Debug)]
pub(crate) struct Bounce {
    memory: GuestMemoryMmap,
    file: Arc<File>,
    queues: usize,
    taken: Vec<bool>,
    /// Pages from this one on have not been used since the last [`Self::shrink`].
    untouched: usize,
}

impl Bounce {
    /// Memory for `queues` queues, none of it touched.
    pub(crate) fn new(queues: usize) -> io::Result<Self> {
        let bytes = queues * PAGE_BYTES + ROOM_BYTES;
        let file = Arc::new(File::from(memory_file::create(bytes as u64, Pages::Base)?));
        let pages = GuestPages {
            alignment_bytes: PAGE_BYTES,
            transparent: false,
        };
        let region = map_guest_memory(Arc::clone(&file), 0, bytes, BASE, pages)?;
        let memory = GuestMemoryMmap::from_regions(vec![region]).map_err(io::Error::other)?;
        Ok(Self {
            memory,
            file,
            queues,
            taken: vec![false; ROOM_BYTES / PAGE_BYTES],
            untouched: 0,
        })
    }

    /// As the daemon is told of it.
    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: (self.queues * PAGE_BYTES + ROOM_BYTES) as u64,
            userspace_addr: BASE,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    fn take(&mut self, bytes: usize) -> Result<Run, Full> {
        let count = bytes.div_ceil(PAGE_BYTES).max(1);
        if count > self.taken.len() {
            return Err(Full::Ever);
        }
        let mut free = 0;
        let last = self.taken.iter().position(|taken| {
            free = if *taken { 0 } else { free + 1 };
            free == count
        });
        let first = last.ok_or(Full::Now)? + 1 - count;
        self.taken[first..first + count].fill(true);
        self.untouched = self.untouched.max(first + count);
        Ok(Run { first, count })
    }

    fn give_back(&mut self, run: Run) {
        self.taken[run.first..run.first + run.count].fill(false);
    }

    /// Whether an idle file system has more room than it needs.
    pub(crate) fn is_large(&self) -> bool {
        self.untouched > KEPT_PAGES
    }

    /// Frees the pages above those that requests use or that are kept.
    pub(crate) fn shrink(&mut self) {
        let used = self.taken.iter().rposition(|taken| *taken);
        let from = used.map_or(0, |last| last + 1).max(KEPT_PAGES);
        let start = self.queues * PAGE_BYTES + from * PAGE_BYTES;
        let length = (self.untouched.saturating_sub(from)) * PAGE_BYTES;
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let both = i64::try_from(start).ok().zip(i64::try_from(length).ok());
        if let Some((start, length)) = both.filter(|(_, length)| *length > 0) {
            // On failure the memory merely stays allocated.
            let _ = fallocate(&*self.file, mode, start, length);
        }
        self.untouched = from;
    }

    fn address(&self, run: Run) -> u64 {
        BASE + ((self.queues + run.first) * PAGE_BYTES) as u64
    }

    fn slice(&self, address: u64, length: usize) -> VolatileSlice<'_> {
        let slice = self.memory.get_slice(GuestAddress(address), length);
        slice.expect("within the bounce memory")
    }
}

/// A request that the daemon has.
#[derive(Debug)]
pub(crate) struct InFlight {
    /// The guest's chain.
    pub(crate) chain: SegmentChain,
    /// The activation that it belongs to.
    pub(crate) generation: u64,
    run: Run,
    entries: [Option<u16>; 2],
    /// Where the daemon writes, and how much it may.
    answer: (u64, usize),
}

/// One queue to the daemon.
#[derive(Debug)]
pub(crate) struct Shadow {
    base: u64,
    free: Vec<u16>,
    in_flight: Vec<Option<InFlight>>,
    count: usize,
    next_available: u16,
    told: u16,
    next_used: u16,
}

impl Shadow {
    /// Queue number `index` of `bounce`, whose ring page is zero.
    pub(crate) fn new(index: usize) -> Self {
        Self {
            base: BASE + (index * PAGE_BYTES) as u64,
            free: (0..ENTRIES).rev().collect(),
            in_flight: (0..ENTRIES).map(|_| None).collect(),
            count: 0,
            next_available: 0,
            told: 0,
            next_used: 0,
        }
    }

    /// As the daemon is told of it.
    pub(crate) fn addresses(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: ENTRIES,
            queue_size: ENTRIES,
            flags: 0,
            desc_table_addr: self.base,
            used_ring_addr: self.base + USED,
            avail_ring_addr: self.base + AVAILABLE,
            log_addr: None,
        }
    }

    /// Requests that the daemon has.
    pub(crate) fn in_flight(&self) -> usize {
        self.count
    }

    /// Copies a request of the guest into the room and puts it into the ring; [`Self::publish`]
    /// shows it. A chain that does not fit now comes back.
    pub(crate) fn add(
        &mut self,
        bounce: &mut Bounce,
        guest: &GuestMemory,
        chain: SegmentChain,
        generation: u64,
    ) -> Result<(), Full> {
        let length = |bytes: u64| usize::try_from(bytes).map_err(|_| Full::Ever);
        let (reads, writes) = (length(chain.readable_len())?, length(chain.writable_len())?);
        // The answer starts at a cache line.
        let answer_at = reads.next_multiple_of(64);
        let bytes = answer_at.checked_add(writes).ok_or(Full::Ever)?;
        if self.count == REQUESTS_MAX {
            return Err(Full::Now);
        }
        let run = bounce.take(bytes)?;
        let address = bounce.address(run);
        copy(guest, &chain.readable, &bounce.slice(address, reads), true);
        let answer = (address + answer_at as u64, writes);
        let parts = [(address, reads, 0), (answer.0, writes, WRITE)];
        let parts: Vec<_> = parts.into_iter().filter(|part| part.1 > 0).collect();
        let mut entries = [None; 2];
        let mut next = None;
        for (place, part) in entries.iter_mut().zip(parts.iter().rev()) {
            let entry = self.free.pop().expect("two entries a request");
            self.describe(bounce, entry, *part, next);
            *place = Some(entry);
            next = Some(entry);
        }
        let Some(head) = next else {
            bounce.give_back(run);
            return Err(Full::Ever);
        };
        let slot = u64::from(self.next_available % ENTRIES);
        store(bounce, self.base + AVAILABLE + 4 + 2 * slot, head);
        self.next_available = self.next_available.wrapping_add(1);
        self.count += 1;
        self.in_flight[usize::from(head)] = Some(InFlight {
            chain,
            generation,
            run,
            entries,
            answer,
        });
        Ok(())
    }

    fn describe(
        &self,
        bounce: &Bounce,
        entry: u16,
        (address, length, flags): (u64, usize, u16),
        next: Option<u16>,
    ) {
        let mut bytes = [0; 16];
        let length = u32::try_from(length).expect("no larger than the room");
        let flags = flags | if next.is_some() { NEXT } else { 0 };
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.unwrap_or(0).to_le_bytes());
        let at = self.base + 16 * u64::from(entry);
        bounce.slice(at, 16).copy_from(&bytes);
    }

    /// Publishes the added requests; true when the daemon wants a notification.
    pub(crate) fn publish(&mut self, bounce: &Bounce) -> bool {
        let (before, now) = (self.told, self.next_available);
        if before == now {
            return false;
        }
        fence(Ordering::Release);
        store(bounce, self.base + AVAILABLE + 2, now);
        self.told = now;
        // The index must be visible before the daemon's event index is read.
        fence(Ordering::SeqCst);
        let wanted_at = load(bounce, self.base + USED + 4 + 8 * u64::from(ENTRIES));
        let since_wanted = now.wrapping_sub(wanted_at).wrapping_sub(1);
        since_wanted < now.wrapping_sub(before)
    }

    /// Takes the next answer: the request and the number of bytes written.
    pub(crate) fn take_used(&mut self, bounce: &Bounce) -> Result<Option<(InFlight, usize)>, Lie> {
        let index = load(bounce, self.base + USED + 2);
        fence(Ordering::Acquire);
        let waiting = index.wrapping_sub(self.next_used);
        if waiting == 0 {
            return Ok(None);
        }
        if usize::from(waiting) > self.count {
            return Err(Lie("answered more requests than it has"));
        }
        let slot = u64::from(self.next_used % ENTRIES);
        let element = self.base + USED + 4 + 8 * slot;
        let mut bytes = [0; 8];
        bounce.slice(element, 8).copy_to(&mut bytes);
        let [a, b, c, d, e, f, g, h] = bytes;
        let id = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        let length = usize::try_from(u32::from_le_bytes([e, f, g, h])).unwrap_or(usize::MAX);
        let request = self.in_flight.get_mut(id).and_then(Option::take);
        let request = request.ok_or(Lie("answered a request that it does not have"))?;
        self.next_used = self.next_used.wrapping_add(1);
        self.count -= 1;
        self.free.extend(request.entries.iter().flatten());
        if length > request.answer.1 {
            return Err(Lie("wrote more than there is room for"));
        }
        Ok(Some((request, length)))
    }

    /// Asks for a notification of the next answer; true when one has arrived meanwhile.
    pub(crate) fn wait_for_answers(&self, bounce: &Bounce) -> bool {
        let wish = self.base + AVAILABLE + 4 + 2 * u64::from(ENTRIES);
        store(bounce, wish, self.next_used);
        fence(Ordering::SeqCst);
        load(bounce, self.base + USED + 2) != self.next_used
    }
}

impl InFlight {
    /// Copies the answer to the guest and gives the room back.
    pub(crate) fn deliver(&self, bounce: &mut Bounce, guest: &GuestMemory, length: usize) {
        let answer = bounce.slice(self.answer.0, length);
        copy(guest, &self.chain.writable, &answer, false);
        bounce.give_back(self.run);
    }

    /// Gives the room back: nobody waits for the answer any more.
    pub(crate) fn forget(&self, bounce: &mut Bounce) {
        bounce.give_back(self.run);
    }
}

/// Copies between segments of the guest and one slice, as far as both reach. The segments were
/// checked when the chain was taken.
fn copy(guest: &GuestMemory, segments: &[Segment], slice: &VolatileSlice<'_>, to_slice: bool) {
    let mut done = 0;
    for segment in segments {
        for part in guest.get_slices(segment.address, segment.len).flatten() {
            let count = part.len().min(slice.len() - done);
            let (Ok(here), Ok(part)) = (slice.subslice(done, count), part.subslice(0, count))
            else {
                return;
            };
            if to_slice {
                part.copy_to_volatile_slice(here);
            } else {
                here.copy_to_volatile_slice(part);
            }
            done += count;
        }
    }
}

fn load(bounce: &Bounce, address: u64) -> u16 {
    let value = bounce.memory.load(GuestAddress(address), Ordering::Relaxed);
    u16::from_le(value.expect("within the bounce memory"))
}

fn store(bounce: &Bounce, address: u64, value: u16) {
    let stored = bounce
        .memory
        .store(value.to_le(), GuestAddress(address), Ordering::Relaxed);
    stored.expect("within the bounce memory");
}

/// What a daemon may do, for tests and the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
impl Shadow {
    /// The head of the request at a place of the available ring.
    pub(crate) fn head(&self, bounce: &Bounce, place: u16) -> u16 {
        let at = AVAILABLE + 4 + 2 * u64::from(place % ENTRIES);
        load(bounce, self.base + at)
    }

    /// Answers as a daemon does: an element of the used ring, and its index.
    pub(crate) fn answer(&self, bounce: &Bounce, place: u16, id: u32, length: u32) {
        let element = self.base + USED + 4 + 8 * u64::from(place % ENTRIES);
        let bytes = [id.to_le_bytes(), length.to_le_bytes()].concat();
        bounce.slice(element, 8).copy_from(&bytes);
        self.set_used_index(bounce, place.wrapping_add(1));
    }

    /// Sets the used index, whatever it means.
    pub(crate) fn set_used_index(&self, bounce: &Bounce, index: u16) {
        store(bounce, self.base + USED + 2, index);
    }

    /// Writes into the ring page, whatever it means.
    pub(crate) fn scribble(&self, bounce: &Bounce, offset: u16, bytes: &[u8]) {
        let room = PAGE_BYTES - bytes.len().min(PAGE_BYTES);
        let offset = usize::from(offset).min(room) as u64;
        bounce
            .slice(self.base + offset, bytes.len())
            .copy_from(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest() -> GuestMemory {
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap())
    }

    fn segment(address: u64, len: usize) -> Segment {
        Segment {
            address: GuestAddress(address),
            len,
        }
    }

    fn chain(reads: &[Segment], writes: &[Segment]) -> SegmentChain {
        SegmentChain {
            head: 7,
            readable: reads.to_vec(),
            writable: writes.to_vec(),
        }
    }

    /// What the daemon finds: the chain's parts as (address, length, writable).
    fn descriptors(bounce: &Bounce, shadow: &Shadow, slot: u16) -> Vec<(u64, usize, bool)> {
        let mut head = load(bounce, shadow.base + AVAILABLE + 4 + 2 * u64::from(slot));
        let mut parts = Vec::new();
        loop {
            let mut bytes = [0; 16];
            let at = shadow.base + 16 * u64::from(head);
            bounce.slice(at, 16).copy_to(&mut bytes);
            let address = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let length = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
            let flags = u16::from_le_bytes(bytes[12..14].try_into().unwrap());
            parts.push((address, length as usize, flags & WRITE != 0));
            if flags & NEXT == 0 {
                return parts;
            }
            head = u16::from_le_bytes(bytes[14..].try_into().unwrap());
        }
    }

    #[test]
    fn a_request_goes_there_and_its_answer_back() {
        let (guest, mut bounce, mut shadow) = (guest(), Bounce::new(2).unwrap(), Shadow::new(1));
        guest.write_slice(b"question", GuestAddress(4096)).unwrap();
        let reads = [segment(4096, 4), segment(4100, 4)];
        let writes = [segment(8192, 3), segment(12288, 100)];
        for round in 0..300 {
            let chain = chain(&reads, &writes);
            shadow.add(&mut bounce, &guest, chain, 1).unwrap();
            assert!(shadow.publish(&bounce) || round > 0);
            let parts = descriptors(&bounce, &shadow, round % ENTRIES);
            assert_eq!(
                parts.iter().map(|part| part.1).collect::<Vec<_>>(),
                [8, 103]
            );
            assert!(!parts[0].2 && parts[1].2);
            let mut bytes = [0; 8];
            bounce.slice(parts[0].0, 8).copy_to(&mut bytes);
            assert_eq!(&bytes, b"question");
            bounce.slice(parts[1].0, 6).copy_from(b"answer");
            let id = u32::from(shadow.head(&bounce, round));
            shadow.answer(&bounce, round, id, 6);
            let (request, length) = shadow.take_used(&bounce).unwrap().unwrap();
            request.deliver(&mut bounce, &guest, length);
            let mut found = [0; 3];
            guest.read_slice(&mut found, GuestAddress(8192)).unwrap();
            assert_eq!(&found, b"ans");
            guest.read_slice(&mut found, GuestAddress(12288)).unwrap();
            assert_eq!(&found, b"wer");
        }
        assert_eq!(shadow.in_flight(), 0);
        assert!(!bounce.is_large(), "small requests use the same page");
    }

    #[test]
    fn room_is_bounded_and_comes_back() {
        let (guest, mut bounce, mut shadow) = (guest(), Bounce::new(2).unwrap(), Shadow::new(0));
        let large = || chain(&[segment(0, 80)], &[segment(0, (1 << 20) + 16)]);
        let mut count = 0;
        while shadow.add(&mut bounce, &guest, large(), 1).is_ok() {
            count += 1;
        }
        assert_eq!(count, 7, "what 8 MiB hold");
        let small = chain(&[segment(0, 80)], &[]);
        assert!(shadow.add(&mut bounce, &guest, small, 1).is_ok());
        assert!(bounce.is_large());
        let ever = chain(&[segment(0, 9 << 20)], &[]);
        assert_eq!(shadow.add(&mut bounce, &guest, ever, 1), Err(Full::Ever));
        let empty = chain(&[], &[]);
        assert_eq!(shadow.add(&mut bounce, &guest, empty, 1), Err(Full::Ever));
        shadow.publish(&bounce);
        for slot in 0..8 {
            let id = u32::from(shadow.head(&bounce, slot));
            shadow.answer(&bounce, slot, id, 0);
            shadow
                .take_used(&bounce)
                .unwrap()
                .unwrap()
                .0
                .forget(&mut bounce);
        }
        bounce.shrink();
        assert!(!bounce.is_large());
        let mut many = 0;
        let small = || chain(&[segment(0, 80)], &[]);
        while shadow.add(&mut bounce, &guest, small(), 1).is_ok() {
            many += 1;
        }
        assert_eq!(many, REQUESTS_MAX);
    }

    #[test]
    fn a_daemon_that_lies_is_found_out() {
        let (guest, mut bounce) = (guest(), Bounce::new(1).unwrap());
        type Lying = fn(&Bounce, &Shadow, u32);
        let lies: [(Lying, &str); 4] = [
            (|b, s, _| s.answer(b, 0, 5000, 0), "does not have"),
            (|b, s, id| s.answer(b, 0, id ^ 1, 0), "does not have"),
            (
                |b, s, id| s.answer(b, 0, id, 101),
                "more than there is room",
            ),
            (
                |b, s, _| s.set_used_index(b, 2),
                "more requests than it has",
            ),
        ];
        for (lie, words) in lies {
            let mut shadow = Shadow::new(0);
            shadow.set_used_index(&bounce, 0);
            let chain = chain(&[segment(0, 8)], &[segment(0, 100)]);
            shadow.add(&mut bounce, &guest, chain, 1).unwrap();
            shadow.publish(&bounce);
            let id = u32::from(shadow.head(&bounce, 0));
            lie(&bounce, &shadow, id);
            let error = shadow.take_used(&bounce).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn notifications_are_given_when_they_are_wanted() {
        let (guest, mut bounce, mut shadow) = (guest(), Bounce::new(1).unwrap(), Shadow::new(0));
        let small = || chain(&[segment(0, 8)], &[]);
        shadow.add(&mut bounce, &guest, small(), 1).unwrap();
        assert!(shadow.publish(&bounce), "the first is wanted");
        shadow.add(&mut bounce, &guest, small(), 1).unwrap();
        assert!(!shadow.publish(&bounce), "the daemon is at work");
        let wish = shadow.base + USED + 4 + 8 * u64::from(ENTRIES);
        store(&bounce, wish, 2);
        shadow.add(&mut bounce, &guest, small(), 1).unwrap();
        assert!(shadow.publish(&bounce));
        assert!(!shadow.publish(&bounce), "nothing new");
        assert!(!shadow.wait_for_answers(&bounce));
        let id = u32::from(shadow.head(&bounce, 0));
        shadow.answer(&bounce, 0, id, 0);
        assert!(shadow.wait_for_answers(&bounce), "one has come meanwhile");
    }
}
