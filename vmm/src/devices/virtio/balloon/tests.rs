//! The balloon between a driver's double and a memfd whose resident size is counted.

use std::{fs::File, sync::atomic::Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::{
    Balloon, Parameters,
    request::{F_DEFLATE_ON_OOM, F_REPORTING, F_STATS, PFNS_MAX},
};
use crate::devices::virtio::{
    device::{Command, VirtioDevice},
    discard::{
        Discard,
        tests::{memory, resident_bytes},
    },
    driver::{BUFFERS, Driver, HOSTILE_CHAINS, Part, assert_hostile_chains_break},
};

const LOW_BYTES: u64 = 8 << 20;
const HIGH_START: u64 = 1 << 32;
const HIGH_BYTES: u64 = 8 << 20;
const FEATURES: u64 = F_STATS | F_DEFLATE_ON_OOM | F_REPORTING;
/// Where lists of pages lie.
const LIST: u64 = BUFFERS;

fn balloon(discard: &Discard) -> Balloon {
    let parameters = Parameters {
        deflate_on_oom: true,
        free_page_reporting: true,
    };
    Balloon::new("balloon0".into(), parameters, discard.clone()).unwrap()
}

fn guest(balloon: &mut Balloon, features: u64) -> (Driver, File) {
    let (memory, file) = memory(LOW_BYTES, HIGH_START, HIGH_BYTES);
    let driver = Driver::with_memory(memory, balloon.queue_sizes());
    balloon.activate(driver.activation(features)).unwrap();
    (driver, file)
}

fn fill(driver: &Driver, address: u64, len: usize) {
    driver
        .memory
        .write_slice(&vec![7; len], GuestAddress(address))
        .unwrap();
}

fn send(driver: &mut Driver, balloon: &mut Balloon, queue: u16, pages: &[u64]) {
    let list: Vec<u8> = pages
        .iter()
        .flat_map(|address| u32::try_from(address / 4096).unwrap().to_le_bytes())
        .collect();
    driver.put(LIST, &list);
    let parts = [Part::Read(LIST, u32::try_from(list.len()).unwrap())];
    driver.queues[usize::from(queue)].offer(&parts).unwrap();
    balloon.queue_kicked(queue).unwrap();
    assert_eq!(driver.queues[usize::from(queue)].take_used().unwrap().1, 0);
}

#[test]
fn inflated_pages_go_back_to_the_host() {
    let mut balloon = balloon(&Discard::default());
    let (mut driver, file) = guest(&mut balloon, FEATURES);
    fill(&driver, HIGH_START, 4 << 20);
    fill(&driver, 2 << 20, 4096);
    // The rings and the list take pages of their own.
    send(&mut driver, &mut balloon, 0, &[HIGH_START + (6 << 20)]);
    let before = resident_bytes(&file);
    let pages: Vec<u64> = (0..256).map(|page| HIGH_START + page * 4096).collect();
    send(&mut driver, &mut balloon, 0, &pages);
    send(
        &mut driver,
        &mut balloon,
        0,
        &[2 << 20, HIGH_START + (3 << 20)],
    );
    let after = resident_bytes(&file);
    // 258 pages less; the list itself is a new one.
    assert!(
        before - after >= 257 * 4096,
        "{before} before, {after} after"
    );
    assert_eq!(driver.get(HIGH_START, 8), [0; 8]);
    assert_eq!(driver.get(HIGH_START + (3 << 20) + 4096, 8), [7; 8]);
    send(&mut driver, &mut balloon, 1, &pages);
    let counters = balloon.counters();
    assert!(counters.contains(&("inflated_pages", 259)), "{counters:?}");
    assert!(counters.contains(&("deflated_pages", 256)), "{counters:?}");
    assert_eq!(driver.signals.queue.load(Ordering::SeqCst), 4);
}

#[test]
fn free_pages_go_back_to_the_host() {
    let mut balloon = balloon(&Discard::default());
    let (mut driver, file) = guest(&mut balloon, FEATURES);
    // The rings take pages of their own.
    driver.queues[3]
        .offer(&[Part::Write(HIGH_START, 4096)])
        .unwrap();
    balloon.queue_kicked(3).unwrap();
    assert!(driver.queues[3].take_used().is_some());
    fill(&driver, HIGH_START, 8 << 20);
    let before = resident_bytes(&file);
    driver.queues[3]
        .offer(&[
            Part::Write(HIGH_START, 4 << 20),
            Part::Write(HIGH_START + (6 << 20), 1 << 20),
            // Only what is whole pages goes: one of these, none of those.
            Part::Write(HIGH_START + (5 << 20) + 1, 8192),
            Part::Write(HIGH_START + (5 << 20) + 12289, 4096),
        ])
        .unwrap();
    balloon.queue_kicked(3).unwrap();
    assert!(driver.queues[3].take_used().is_some());
    assert_eq!(before - resident_bytes(&file), (5 << 20) + 4096);
    assert_eq!(driver.get(HIGH_START + (5 << 20) + 1, 1), [7]);
}

#[test]
fn nothing_goes_while_memory_is_pinned() {
    let discard = Discard::default();
    let mut balloon = balloon(&discard);
    let (mut driver, _file) = guest(&mut balloon, FEATURES);
    fill(&driver, HIGH_START, 4096);
    let pin = discard.pin();
    send(&mut driver, &mut balloon, 0, &[HIGH_START]);
    assert_eq!(driver.get(HIGH_START, 1), [7]);
    assert!(balloon.counters().contains(&("kept_bytes", 4096)));
    drop(pin);
    send(&mut driver, &mut balloon, 0, &[HIGH_START]);
    assert_eq!(driver.get(HIGH_START, 1), [0]);
}

#[test]
fn the_goal_is_told_and_the_driver_tells_what_it_holds() {
    let mut balloon = balloon(&Discard::default());
    let (driver, _file) = guest(&mut balloon, FEATURES);
    balloon.command(Command::Resize(5 << 20)).unwrap();
    assert_eq!(driver.signals.config.load(Ordering::SeqCst), 1);
    let mut config = [9; 16];
    balloon.read_config(0, &mut config);
    assert_eq!(config, [0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    balloon.write_config(4, &[1, 2, 0, 0]);
    for (offset, bytes) in [(0, &[9; 4][..]), (4, &[9; 3]), (5, &[9; 4]), (8, &[9; 4])] {
        balloon.write_config(offset, bytes);
    }
    balloon.read_config(2, &mut config[..8]);
    assert_eq!(config[..8], [0, 0, 1, 2, 0, 0, 0, 0]);
    assert!(balloon.counters().contains(&("actual_bytes", 0x201 * 4096)));
    assert!(balloon.command(Command::Resize(1 << 50)).is_err());
    assert!(balloon.command(Command::FileResized).is_err());
    balloon.reset();
    assert!(balloon.counters().contains(&("actual_bytes", 0)));
}

#[test]
fn figures_are_asked_for_and_shown() {
    let mut balloon = balloon(&Discard::default());
    let (mut driver, _file) = guest(&mut balloon, FEATURES);
    let offer = |driver: &mut Driver, balloon: &mut Balloon, free: u8| {
        driver.put(
            LIST,
            &[
                4, 0, free, 0, 0, 0, 0, 0, 0, 0, 5, 0, 99, 0, 0, 0, 0, 0, 0, 0,
            ],
        );
        driver.queues[2].offer(&[Part::Read(LIST, 20)]).unwrap();
        balloon.queue_kicked(2).unwrap();
    };
    offer(&mut driver, &mut balloon, 1);
    // The device keeps the buffer until someone wants figures.
    assert!(driver.queues[2].take_used().is_none());
    assert!(balloon.counters().contains(&("guest_free_bytes", 1)));
    assert!(driver.turn(&mut balloon, 1000).unwrap());
    assert!(driver.queues[2].take_used().is_some());
    offer(&mut driver, &mut balloon, 2);
    let counters = balloon.counters();
    assert!(counters.contains(&("guest_free_bytes", 2)), "{counters:?}");
    assert!(
        counters.contains(&("guest_total_bytes", 99)),
        "{counters:?}"
    );
}

#[test]
fn hostile_drivers_break_the_balloon() {
    let make = || balloon(&Discard::default());
    let sizes = make().queue_sizes().to_vec();
    assert_hostile_chains_break(make, &sizes, &[0, 1]);
    for queue in [2, 3] {
        for (what, break_queue) in HOSTILE_CHAINS {
            let mut balloon = make();
            let mut driver = Driver::new(balloon.queue_sizes());
            balloon.activate(driver.activation(FEATURES)).unwrap();
            break_queue(&mut driver.queues[usize::from(queue)]);
            assert!(
                balloon.queue_kicked(queue).is_err(),
                "{what} on queue {queue}"
            );
            balloon.queue_kicked(queue).unwrap();
            balloon.reset();
        }
    }
    // Pages that are not the guest's, and a list that is too long.
    for (page, count) in [
        (HIGH_START + HIGH_BYTES, 1),
        (LOW_BYTES, 1),
        (0, PFNS_MAX as u64 + 1),
    ] {
        let mut balloon = make();
        let (mut driver, _file) = guest(&mut balloon, FEATURES);
        let list: Vec<u8> = (0..count)
            .flat_map(|_| u32::try_from(page / 4096).unwrap().to_le_bytes())
            .collect();
        driver.put(LIST, &list);
        let parts = [Part::Read(LIST, u32::try_from(list.len()).unwrap())];
        driver.queues[0].offer(&parts).unwrap();
        let broken = balloon.queue_kicked(0).unwrap_err();
        assert!(
            broken.to_string().starts_with("virtio-balloon balloon0: "),
            "{broken}"
        );
    }
}

#[test]
fn the_balloon_comes_back_after_a_reset_at_any_time() {
    let mut balloon = balloon(&Discard::default());
    for step in 0..5 {
        let (mut driver, _file) = guest(&mut balloon, FEATURES);
        for at in 0..step {
            match at {
                0 => driver.put(LIST, &[0, 1, 0, 0]),
                1 => drop(driver.queues[0].offer(&[Part::Read(LIST, 4)])),
                2 => balloon.queue_kicked(0).unwrap(),
                _ => balloon.command(Command::Resize(4096)).unwrap(),
            }
        }
        balloon.reset();
        for queue in 0..4 {
            balloon.queue_kicked(queue).unwrap();
        }
        balloon.descriptor_ready(0, 1).unwrap();
    }
}
