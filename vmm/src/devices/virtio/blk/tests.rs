//! The disk between a driver's double and a file.

use std::{
    fs::File,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, MetadataExt},
    },
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use super::{
    Blk, Cache, Parameters,
    request::{
        F_DISCARD, F_FLUSH, F_MQ, F_RO, F_WRITE_ZEROES, HEADER_BYTES, RANGE_BYTES, SECTOR_BYTES,
    },
};
use crate::devices::virtio::{
    device::{Command, VirtioDevice},
    driver::{BUFFERS, Driver, Part, assert_hostile_chains_break},
    rate_limiter::{Rate, Rates},
};

const DISK_BYTES: u64 = 4 << 20;
const FEATURES: u64 = F_FLUSH | F_DISCARD | F_WRITE_ZEROES;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn parameters() -> Parameters {
    Parameters {
        read_only: false,
        serial: "disk-0".into(),
        queues: 1,
        cache: Cache::WriteBack,
        limit: Rates::NONE,
    }
}

fn file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES).unwrap();
    file
}

fn disk(file: &File) -> Blk {
    Blk::new(
        "disk0".into(),
        &parameters(),
        file.try_clone().unwrap().into(),
    )
    .unwrap()
}

/// Bytes that look random and are the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    fn bytes(&mut self, len: u64) -> Vec<u8> {
        (0..len)
            .map(|_| u8::try_from(self.next(256)).unwrap())
            .collect()
    }
}

struct Guest {
    driver: Driver,
}

impl Guest {
    fn new(blk: &mut Blk, features: u64) -> Self {
        let guest = Self {
            driver: Driver::new(blk.queue_sizes()),
        };
        blk.activate(guest.driver.activation(features)).unwrap();
        guest
    }

    /// Where request `slot` of a queue has its header and status; its data begins `at` bytes
    /// behind.
    fn slot(queue: usize, slot: u64) -> u64 {
        BUFFERS + queue as u64 * (8 << 20) + slot * 8192
    }

    /// Offers a request whose data is cut into the given pieces; gives the address of its status.
    fn offer(&mut self, queue: usize, slot: u64, (kind, sector): (u32, u64), data: &[Part]) -> u64 {
        let address = Self::slot(queue, slot);
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.put(address, &header);
        self.driver.put(address + 16, &[0xee]);
        let mut parts = vec![Part::Read(address, 16)];
        parts.extend(data);
        parts.push(Part::Write(address + 16, 1));
        self.driver.queues[queue].offer(&parts).unwrap();
        address + 16
    }

    /// Waits until a queue has an answer.
    fn wait(&mut self, blk: &mut Blk, queue: usize) -> u32 {
        loop {
            if let Some((_, len)) = self.driver.queues[queue].take_used() {
                return len;
            }
            assert!(self.driver.turn(blk, 5000).unwrap(), "no answer");
        }
    }

    /// One request from beginning to end; its status and the used length.
    fn ask(&mut self, blk: &mut Blk, request: (u32, u64), data: &[Part]) -> (u8, u32) {
        let status = self.offer(0, 0, request, data);
        blk.queue_kicked(0).unwrap();
        let len = self.wait(blk, 0);
        (self.driver.get(status, 1)[0], len)
    }

    fn clear(&mut self, blk: &mut Blk, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let at = BUFFERS + (16 << 20);
        let mut range = [0; RANGE_BYTES];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&sectors.to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        self.driver.put(at, &range);
        self.ask(blk, (kind, 0), &[Part::Read(at, 16)]).0
    }
}

/// Cuts `len` bytes at `address` into up to 20 pieces of any size.
fn pieces(random: &mut Random, address: u64, len: u64, part: fn(u64, u32) -> Part) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut done = 0;
    while done < len {
        let left = len - done;
        let piece = if parts.len() == 19 {
            left
        } else {
            1 + random.next(left)
        };
        parts.push(part(address + done, u32::try_from(piece).unwrap()));
        done += piece;
    }
    parts
}

fn run_against_model(mut blk: Blk, file: &File, features: u64) {
    let mut guest = Guest::new(&mut blk, features);
    let mut model = vec![0; usize::try_from(DISK_BYTES).unwrap()];
    let mut random = Random(0x1234_5678_9abc_def1);
    let sectors = DISK_BYTES / SECTOR_BYTES;
    for step in 0..400 {
        let count = 1 + random.next(if step % 4 == 0 { 512 } else { 16 });
        let sector = random.next(sectors - count);
        let len = count * SECTOR_BYTES;
        let at = usize::try_from(sector * SECTOR_BYTES).unwrap();
        let range = at..at + usize::try_from(len).unwrap();
        let address = BUFFERS + (1 << 20) + random.next(5000);
        match random.next(8) {
            0..=2 => {
                let bytes = random.bytes(len);
                guest.driver.put(address, &bytes);
                let parts = pieces(&mut random, address, len, Part::Read);
                assert_eq!(guest.ask(&mut blk, (T_OUT, sector), &parts), (OK, 1));
                model[range].copy_from_slice(&bytes);
            }
            3..=5 => {
                guest
                    .driver
                    .put(address, &vec![0x5a; usize::try_from(len).unwrap() + 1]);
                let parts = pieces(&mut random, address, len, Part::Write);
                let used = u32::try_from(len).unwrap() + 1;
                assert_eq!(guest.ask(&mut blk, (T_IN, sector), &parts), (OK, used));
                let seen = guest.driver.get(address, usize::try_from(len).unwrap());
                assert!(
                    seen == model[range],
                    "step {step}: {count} sectors at {sector}"
                );
                assert_eq!(guest.driver.get(address + len, 1), [0x5a]);
            }
            6 => {
                let flags = u32::try_from(random.next(2)).unwrap();
                let count = u32::try_from(count).unwrap();
                let status = guest.clear(&mut blk, T_WRITE_ZEROES, sector, count, flags);
                assert_eq!(status, OK);
                model[range].fill(0);
            }
            _ => assert_eq!(guest.ask(&mut blk, (T_FLUSH, 0), &[]), (OK, 1)),
        }
    }
    assert_eq!(guest.ask(&mut blk, (T_FLUSH, 0), &[]), (OK, 1));
    // What was flushed is there for whoever opens the file next, whatever becomes of the device.
    std::mem::forget(blk);
    let mut seen = vec![0; model.len()];
    file.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen == model);
}

#[test]
fn requests_of_every_size_match_a_model() {
    let backing = file();
    run_against_model(disk(&backing), &backing, FEATURES);
    let backing = file();
    run_against_model(disk(&backing).without_ring(), &backing, FEATURES);
    // A driver that knows no flush gets durable writes.
    let backing = file();
    run_against_model(disk(&backing), &backing, F_DISCARD | F_WRITE_ZEROES);
    for cache in [Cache::WriteThrough, Cache::Unsafe] {
        let backing = file();
        let wanted = Parameters {
            cache,
            ..parameters()
        };
        let fd = backing.try_clone().unwrap().into();
        let blk = Blk::new("disk0".into(), &wanted, fd).unwrap();
        assert_eq!(blk.features() & F_FLUSH != 0, cache == Cache::Unsafe);
        let features = FEATURES & blk.features();
        run_against_model(blk, &backing, features);
    }
}

#[test]
fn discarded_sectors_go_back_to_the_host() {
    let backing = file();
    backing
        .write_all_at(&vec![1; usize::try_from(DISK_BYTES).unwrap()], 0)
        .unwrap();
    let mut blk = disk(&backing);
    if blk.features() & F_DISCARD == 0 {
        println!("skipped: the file system of temporary files cannot punch holes");
        return;
    }
    let mut guest = Guest::new(&mut blk, FEATURES);
    let before = backing.metadata().unwrap().blocks();
    assert_eq!(guest.clear(&mut blk, T_DISCARD, 0, 4096, 0), OK);
    let after = backing.metadata().unwrap().blocks();
    assert!(
        after + 4096 <= before,
        "{before} blocks before, {after} after"
    );
    assert_eq!(guest.clear(&mut blk, T_WRITE_ZEROES, 4096, 4096, 1), OK);
    assert!(backing.metadata().unwrap().blocks() + 8192 <= before);
    assert_eq!(guest.clear(&mut blk, T_DISCARD, 8192, 1, 0), IO_ERROR);
    assert_eq!(guest.clear(&mut blk, T_DISCARD, 0, 1, 1), UNSUPPORTED);
}

#[test]
fn wrong_requests_get_an_error_status() {
    let backing = file();
    let mut blk = disk(&backing);
    let mut guest = Guest::new(&mut blk, FEATURES);
    let sectors = DISK_BYTES / SECTOR_BYTES;
    let read = |len| vec![Part::Write(BUFFERS + 0x10000, len)];
    let write = |len| vec![Part::Read(BUFFERS + 0x10000, len)];
    for (request, data, status) in [
        ((T_IN, sectors), read(512), IO_ERROR),
        ((T_IN, sectors - 1), read(1024), IO_ERROR),
        ((T_IN, u64::MAX), read(512), IO_ERROR),
        ((T_IN, 0), read(511), IO_ERROR),
        ((T_IN, 0), read(1), IO_ERROR),
        ((T_OUT, sectors), write(512), IO_ERROR),
        ((T_OUT, 1 << 55), write(512), IO_ERROR),
        ((T_OUT, 0), write(513), IO_ERROR),
        ((T_GET_ID, 0), read(19), IO_ERROR),
        ((T_DISCARD, 0), write(15), IO_ERROR),
        ((T_DISCARD, 0), write(32), IO_ERROR),
        ((T_WRITE_ZEROES, 0), vec![], IO_ERROR),
        ((2, 0), vec![], UNSUPPORTED),
        ((u32::MAX, 0), vec![], UNSUPPORTED),
    ] {
        let answer = guest.ask(&mut blk, request, &data);
        assert_eq!(answer, (status, 1), "{request:?} {data:?}");
    }
    // Nothing of that harmed it.
    assert_eq!(guest.ask(&mut blk, (T_IN, 0), &read(512)), (OK, 513));
    // A header that is too short can still be answered; no room for a status cannot.
    guest.driver.queues[0]
        .offer(&[Part::Read(BUFFERS, 15), Part::Write(BUFFERS + 64, 1)])
        .unwrap();
    blk.queue_kicked(0).unwrap();
    guest.wait(&mut blk, 0);
    assert_eq!(guest.driver.get(BUFFERS + 64, 1), [IO_ERROR]);
    guest.driver.queues[0]
        .offer(&[Part::Read(BUFFERS, 16)])
        .unwrap();
    let broken = blk.queue_kicked(0).unwrap_err();
    assert!(
        broken.to_string().starts_with("virtio-blk disk0: "),
        "{broken}"
    );
}

#[test]
fn serial_size_and_read_only_are_told() {
    let backing = file();
    let wanted = Parameters {
        read_only: true,
        queues: 4,
        ..parameters()
    };
    let fd = backing.try_clone().unwrap().into();
    let mut blk = Blk::new("disk0".into(), &wanted, fd).unwrap();
    assert_eq!(blk.features() & (F_RO | F_MQ), F_RO | F_MQ);
    assert_eq!(blk.features() & (F_DISCARD | F_WRITE_ZEROES), 0);
    let mut guest = Guest::new(&mut blk, F_FLUSH | F_RO | F_DISCARD);
    let data = [Part::Write(BUFFERS + 0x10000, 20)];
    assert_eq!(guest.ask(&mut blk, (T_GET_ID, 0), &data), (OK, 21));
    assert_eq!(&guest.driver.get(BUFFERS + 0x10000, 8), b"disk-0\0\0");
    let data = [Part::Read(BUFFERS + 0x10000, 512)];
    assert_eq!(guest.ask(&mut blk, (T_OUT, 0), &data), (IO_ERROR, 1));
    assert_eq!(guest.clear(&mut blk, T_DISCARD, 0, 1, 0), IO_ERROR);

    let capacity = |blk: &Blk| {
        let mut bytes = [0; 8];
        blk.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(capacity(&blk), DISK_BYTES / SECTOR_BYTES);
    backing.set_len(2 * DISK_BYTES + 100).unwrap();
    let last = 2 * DISK_BYTES / SECTOR_BYTES - 1;
    let data = [Part::Write(BUFFERS + 0x10000, 512)];
    assert_eq!(guest.ask(&mut blk, (T_IN, last), &data), (IO_ERROR, 1));
    blk.command(Command::FileResized).unwrap();
    assert_eq!(guest.driver.signals.config.load(Ordering::SeqCst), 1);
    assert_eq!(capacity(&blk), 2 * DISK_BYTES / SECTOR_BYTES);
    assert_eq!(guest.ask(&mut blk, (T_IN, last), &data), (OK, 513));
    // The file shrinks behind our back: an error, not zeroes.
    backing.set_len(512).unwrap();
    assert_eq!(guest.ask(&mut blk, (T_IN, last), &data), (IO_ERROR, 1));
    assert!(blk.command(Command::Resize(0)).is_err());
}

#[test]
fn more_requests_than_may_be_in_flight_all_get_done() {
    for ring in [true, false] {
        let backing = file();
        let wanted = Parameters {
            queues: 4,
            ..parameters()
        };
        let fd = backing.try_clone().unwrap().into();
        let mut blk = Blk::new("disk0".into(), &wanted, fd).unwrap();
        if !ring {
            blk = blk.without_ring();
        }
        let mut guest = Guest::new(&mut blk, FEATURES | F_MQ);
        for round in 0..4u64 {
            for queue in 0..4 {
                for slot in 0..85 {
                    let sector = queue as u64 * 85 + slot;
                    let address = Guest::slot(queue, slot) + 1024;
                    let byte = u8::try_from((sector + round) % 251).unwrap();
                    guest.driver.put(address, &[byte; 512]);
                    let data = [Part::Read(address, 512)];
                    guest.offer(queue, slot, (T_OUT, sector), &data);
                }
            }
            for queue in 0..4 {
                blk.queue_kicked(queue).unwrap();
            }
            for queue in 0..4 {
                for _ in 0..85 {
                    guest.wait(&mut blk, queue);
                }
            }
            for sector in 0..340 {
                let mut seen = [0; 512];
                backing.read_exact_at(&mut seen, sector * 512).unwrap();
                assert_eq!(
                    seen[..],
                    [u8::try_from((sector + round) % 251).unwrap(); 512]
                );
            }
        }
        assert_eq!(blk.counters()[2], ("writes", 4 * 340));
    }
}

#[test]
fn hostile_chains_break_the_disk() {
    let backing = file();
    assert_hostile_chains_break(|| disk(&backing), &[256], &[0]);
}

#[test]
fn the_same_request_offered_for_ever_is_bounded() {
    let backing = file();
    let mut blk = disk(&backing);
    let mut guest = Guest::new(&mut blk, FEATURES);
    guest.offer(0, 0, (T_IN, 0), &[Part::Write(BUFFERS + 4096, 512)]);
    let head = 2;
    for _ in 0..50 {
        for _ in 0..200 {
            guest.driver.queues[0].publish(head);
        }
        blk.queue_kicked(0).unwrap();
        let mut answers = 0;
        while answers < 200 {
            guest.wait(&mut blk, 0);
            answers += 1;
        }
    }
    assert!(blk.counters()[0].1 >= 50 * 200);
}

#[test]
fn a_reset_leaves_guest_memory_alone_and_the_disk_works_again() {
    let backing = file();
    let mut blk = disk(&backing);
    for count in [0, 1, 10, 80] {
        let mut guest = Guest::new(&mut blk, FEATURES);
        for slot in 0..count {
            let data = [Part::Write(Guest::slot(0, slot) + 1024, 4096)];
            guest.offer(0, slot, (T_IN, slot * 8), &data);
        }
        blk.queue_kicked(0).unwrap();
        blk.reset();
        for slot in 0..count {
            guest.driver.put(Guest::slot(0, slot) + 1024, &[0x77; 4096]);
        }
        assert!(!guest.driver.turn(&mut blk, 0).unwrap());
        blk.queue_kicked(0).unwrap();
        blk.descriptor_ready(0, 1).unwrap();
        for slot in 0..count {
            let seen = guest.driver.get(Guest::slot(0, slot) + 1024, 4096);
            assert!(seen.iter().all(|byte| *byte == 0x77));
        }
    }
    let mut guest = Guest::new(&mut blk, FEATURES);
    let data = [Part::Write(BUFFERS + 0x10000, 512)];
    assert_eq!(guest.ask(&mut blk, (T_IN, 0), &data), (OK, 513));
}

#[test]
fn limits_hold() {
    let backing = file();
    let wanted = Parameters {
        limit: Rates {
            bytes: Rate {
                per_second: 1 << 20,
                burst: 64 << 10,
            },
            ..Rates::NONE
        },
        ..parameters()
    };
    let fd = backing.try_clone().unwrap().into();
    let mut blk = Blk::new("disk0".into(), &wanted, fd).unwrap();
    let mut guest = Guest::new(&mut blk, FEATURES);
    let start = Instant::now();
    for slot in 0..80 {
        let data = [Part::Write(Guest::slot(0, slot) + 1024, 4096)];
        guest.offer(0, slot, (T_IN, slot), &data);
    }
    blk.queue_kicked(0).unwrap();
    for _ in 0..80 {
        guest.wait(&mut blk, 0);
    }
    // 320 KiB, of which 64 at once, at 1 MiB a second.
    assert!(
        start.elapsed() >= Duration::from_millis(230),
        "{:?}",
        start.elapsed()
    );
    blk.command(Command::Limit(Rates::NONE)).unwrap();
}

#[test]
fn wrong_parameters_name_the_field() {
    let backing = file();
    let make = |parameters: &Parameters, file: OwnedFd| {
        Blk::new("disk0".into(), parameters, file)
            .unwrap_err()
            .to_string()
    };
    let fd = || OwnedFd::from(backing.try_clone().unwrap());
    for queues in [0, 17] {
        let wrong = Parameters {
            queues,
            ..parameters()
        };
        assert!(make(&wrong, fd()).contains("queues"));
    }
    let wrong = Parameters {
        serial: "x".repeat(21),
        ..parameters()
    };
    assert!(make(&wrong, fd()).contains("serial"));
    let null = File::open("/dev/null").unwrap().into();
    let text = make(&parameters(), null);
    assert!(
        text.contains("neither a regular file nor a block device"),
        "{text}"
    );
    let path = std::env::current_exe().unwrap();
    let text = make(&parameters(), File::open(path).unwrap().into());
    assert!(text.contains("not open for writing"), "{text}");
}
