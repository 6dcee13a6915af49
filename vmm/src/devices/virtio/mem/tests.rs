//! Pluggable memory between a driver's double and a memfd whose resident size is counted.

use std::{fs::File, sync::atomic::Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::{
    Mem, Parameters,
    request::{ANSWER_BYTES, REQUEST_BYTES},
};
use crate::devices::virtio::{
    device::{Command, VirtioDevice},
    discard::{
        Discard,
        tests::{memory, resident_bytes},
    },
    driver::{BUFFERS, Driver, Part, assert_hostile_chains_break},
};

const START: u64 = 1 << 32;
const BLOCK: u64 = 2 << 20;
const REGION: u64 = 8 * BLOCK;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u8 = 0;
const NACK: u8 = 1;
const BUSY: u8 = 2;
const ERROR: u8 = 3;

fn parameters() -> Parameters {
    Parameters {
        address: START,
        region_bytes: REGION,
        block_bytes: BLOCK,
        requested_bytes: 4 * BLOCK,
    }
}

fn mem(discard: &Discard) -> Mem {
    Mem::new("mem0".into(), parameters(), discard.clone()).unwrap()
}

struct Guest {
    driver: Driver,
    file: File,
}

impl Guest {
    fn new(mem: &mut Mem) -> Self {
        let (memory, file) = memory(8 << 20, START, REGION);
        let driver = Driver::with_memory(memory, mem.queue_sizes());
        mem.activate(driver.activation(0)).unwrap();
        Self { driver, file }
    }

    fn ask(&mut self, mem: &mut Mem, kind: u16, block: u64, count: u16) -> (u8, u8) {
        let mut request = [0; REQUEST_BYTES];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&(START + block * BLOCK).to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        self.ask_bytes(mem, &request)
    }

    fn ask_bytes(&mut self, mem: &mut Mem, request: &[u8]) -> (u8, u8) {
        self.driver.put(BUFFERS, request);
        self.driver.put(BUFFERS + 64, &[0xee; ANSWER_BYTES]);
        self.driver.queues[0]
            .offer(&[
                Part::Read(BUFFERS, u32::try_from(request.len()).unwrap()),
                Part::Write(BUFFERS + 64, 10),
            ])
            .unwrap();
        mem.queue_kicked(0).unwrap();
        assert_eq!(self.driver.queues[0].take_used().unwrap().1, 10);
        let answer = self.driver.get(BUFFERS + 64, ANSWER_BYTES);
        (answer[0], answer[8])
    }

    fn fill(&self, block: u64, count: u64) {
        let bytes = vec![7; usize::try_from(count * BLOCK).unwrap()];
        let at = GuestAddress(START + block * BLOCK);
        self.driver.memory.write_slice(&bytes, at).unwrap();
    }
}

fn sizes(mem: &Mem) -> (u64, u64) {
    let mut config = [0; 56];
    mem.read_config(0, &mut config);
    let field = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
    assert_eq!((field(0), field(16)), (BLOCK, START));
    assert_eq!((field(24), field(32)), (REGION, REGION));
    (field(40), field(48))
}

#[test]
fn memory_grows_and_shrinks_on_the_host_too() {
    let mut mem = mem(&Discard::default());
    let mut guest = Guest::new(&mut mem);
    assert_eq!(sizes(&mem), (0, 4 * BLOCK));
    assert_eq!(guest.ask(&mut mem, PLUG, 0, 3), (ACK, 0));
    guest.fill(0, 3);
    assert_eq!(guest.ask(&mut mem, STATE, 0, 3), (ACK, 0));
    assert_eq!(guest.ask(&mut mem, STATE, 3, 5), (ACK, 1));
    assert_eq!(guest.ask(&mut mem, STATE, 0, 8), (ACK, 2));
    // One more than requested.
    assert_eq!(guest.ask(&mut mem, PLUG, 3, 2), (NACK, 0));
    assert_eq!(sizes(&mem), (3 * BLOCK, 4 * BLOCK));
    mem.command(Command::Resize(5 * BLOCK)).unwrap();
    assert_eq!(guest.driver.signals.config.load(Ordering::SeqCst), 1);
    assert_eq!(guest.ask(&mut mem, PLUG, 3, 2), (ACK, 0));
    assert_eq!(guest.ask(&mut mem, PLUG, 4, 1), (ERROR, 0));
    guest.fill(3, 2);

    let before = resident_bytes(&guest.file);
    mem.command(Command::Resize(BLOCK)).unwrap();
    assert_eq!(guest.ask(&mut mem, UNPLUG, 1, 3), (ACK, 0));
    assert_eq!(before - resident_bytes(&guest.file), 3 * BLOCK);
    assert_eq!(guest.driver.get(START + BLOCK, 4), [0; 4]);
    assert_eq!(guest.driver.get(START + 4 * BLOCK, 4), [7; 4]);
    assert_eq!(guest.ask(&mut mem, UNPLUG, 0, 2), (ERROR, 0));
    assert_eq!(sizes(&mem), (2 * BLOCK, BLOCK));

    // A new driver finds what is plugged, and starts afresh.
    mem.reset();
    assert_eq!(sizes(&mem), (2 * BLOCK, BLOCK));
    mem.activate(guest.driver.activation(0)).unwrap();
    let mut guest = Guest::new(&mut mem);
    assert_eq!(guest.ask(&mut mem, UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(sizes(&mem), (0, BLOCK));
}

#[test]
fn nothing_is_unplugged_while_memory_is_pinned() {
    let discard = Discard::default();
    let mut mem = mem(&discard);
    let mut guest = Guest::new(&mut mem);
    assert_eq!(guest.ask(&mut mem, PLUG, 0, 2), (ACK, 0));
    let pin = discard.pin();
    assert_eq!(guest.ask(&mut mem, UNPLUG, 0, 1), (BUSY, 0));
    assert_eq!(guest.ask(&mut mem, UNPLUG_ALL, 0, 0), (BUSY, 0));
    assert_eq!(sizes(&mem).0, 2 * BLOCK);
    drop(pin);
    assert_eq!(guest.ask(&mut mem, UNPLUG, 0, 1), (ACK, 0));
}

#[test]
fn wrong_requests_are_errors() {
    let mut mem = mem(&Discard::default());
    let mut guest = Guest::new(&mut mem);
    for (kind, block, count) in [
        (PLUG, 0, 0),
        (PLUG, 8, 1),
        (PLUG, 7, 2),
        (PLUG, 0, u16::MAX),
        (UNPLUG, 0, 1),
        (STATE, 0, 9),
        (STATE, 0u64.wrapping_sub(1), 1),
        (4, 0, 1),
        (u16::MAX, 0, 1),
    ] {
        let block = block.min(1 << 40);
        assert_eq!(
            guest.ask(&mut mem, kind, block, count),
            (ERROR, 0),
            "{kind} {block} {count}"
        );
    }
    assert_eq!(guest.ask_bytes(&mut mem, &[0; 23]), (ERROR, 0));
    assert_eq!(guest.ask_bytes(&mut mem, &[]), (ERROR, 0));
    // No room for the answer.
    guest.driver.queues[0]
        .offer(&[Part::Read(BUFFERS, 24), Part::Write(BUFFERS + 64, 9)])
        .unwrap();
    let broken = mem.queue_kicked(0).unwrap_err();
    assert!(
        broken.to_string().starts_with("virtio-mem mem0: "),
        "{broken}"
    );
    mem.queue_kicked(0).unwrap();
}

#[test]
fn hostile_chains_break_it() {
    let discard = Discard::default();
    assert_hostile_chains_break(|| mem(&discard), &[64], &[0]);
}

#[test]
fn goals_must_be_whole_blocks_of_the_region() {
    let mut mem = mem(&Discard::default());
    for wrong in [1, BLOCK + 4096, REGION + BLOCK, u64::MAX] {
        let error = mem.command(Command::Resize(wrong)).unwrap_err();
        assert!(error.to_string().contains("whole blocks"), "{error}");
    }
    assert!(mem.command(Command::FileResized).is_err());
    let make = |parameters| {
        Mem::new("mem0".into(), parameters, Discard::default())
            .unwrap_err()
            .to_string()
    };
    let good = parameters();
    for (wrong, field) in [
        (
            Parameters {
                block_bytes: 3 << 20,
                ..good
            },
            "block_bytes",
        ),
        (
            Parameters {
                block_bytes: 1 << 20,
                ..good
            },
            "block_bytes",
        ),
        (
            Parameters {
                block_bytes: 0,
                ..good
            },
            "block_bytes",
        ),
        (
            Parameters {
                region_bytes: 0,
                ..good
            },
            "0 bytes at",
        ),
        (
            Parameters {
                region_bytes: BLOCK + 1,
                ..good
            },
            "blocks of",
        ),
        (
            Parameters {
                region_bytes: 1 << 50,
                ..good
            },
            "blocks of",
        ),
        (
            Parameters {
                address: 1 << 20,
                ..good
            },
            "0x100000",
        ),
        (
            Parameters {
                address: u64::MAX - BLOCK + 1,
                ..good
            },
            "blocks of",
        ),
        (
            Parameters {
                requested_bytes: 9 * BLOCK,
                ..good
            },
            "requested_bytes",
        ),
        (
            Parameters {
                requested_bytes: 1,
                ..good
            },
            "requested_bytes",
        ),
    ] {
        let text = make(wrong);
        assert!(text.contains(field), "{wrong:?}: {text}");
    }
}
