//! The console from the driver's side.

use std::{
    io::Read,
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use super::super::{
    device::VirtioDevice,
    driver::{BUFFERS, Driver, EVENT_IDX, Part, assert_hostile_chains_break},
};
use super::*;

fn console() -> (Console, UnixStream) {
    let (reader, output) = UnixStream::pair().unwrap();
    let console = Console::new("log".to_owned(), OwnedFd::from(output)).unwrap();
    (console, reader)
}

fn counter(device: &dyn VirtioDevice, name: &str) -> u64 {
    let counters = device.counters();
    counters.iter().find(|(key, _)| *key == name).unwrap().1
}

#[test]
fn text_arrives_in_order() {
    let (mut console, mut reader) = console();
    let mut driver = Driver::new(&[8, 8]);
    console.activate(driver.activation(0)).unwrap();
    driver.put(BUFFERS, b"Linux version 6.12\n");
    let chains: [&[Part]; 2] = [
        &[Part::Read(BUFFERS, 6), Part::Read(BUFFERS + 6, 8)],
        &[Part::Read(BUFFERS + 14, 5)],
    ];
    for parts in chains {
        driver.queues[1].offer(parts).unwrap();
    }
    console.queue_kicked(1).unwrap();
    assert_eq!(driver.queues[1].take_used().map(|used| used.1), Some(0));
    assert!(driver.queues[1].take_used().is_some());
    let mut text = [0; 19];
    reader.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"Linux version 6.12\n");
    assert_eq!(counter(&console, "bytes_written"), 19);
}

#[test]
fn a_slow_or_dead_reader_costs_bytes_and_nothing_else() {
    let (mut console, reader) = console();
    let mut driver = Driver::new(&[8, 8]);
    console.activate(driver.activation(0)).unwrap();
    let mut offered = 0u64;
    let mut reader = Some(reader);
    for round in 0..64 {
        if round == 32 {
            reader = None;
        }
        driver.queues[1]
            .offer(&[Part::Read(BUFFERS, 64 << 10)])
            .unwrap();
        offered += 64 << 10;
        console.queue_kicked(1).unwrap();
        assert!(driver.queues[1].take_used().is_some());
    }
    drop(reader);
    let dropped = counter(&console, "bytes_dropped");
    assert!(dropped > 0);
    assert_eq!(dropped + counter(&console, "bytes_written"), offered);
}

#[test]
fn more_than_a_turns_share_waits_for_the_next_turn() {
    let (mut console, _reader) = console();
    let mut driver = Driver::new(&[8, 512]);
    for _ in 0..300 {
        driver.queues[1].offer(&[Part::Read(BUFFERS, 1)]).unwrap();
    }
    console.activate(driver.activation(0)).unwrap();
    let mut used = 0;
    while driver.queues[1].take_used().is_some() {
        used += 1;
    }
    assert_eq!(used, device::CHAINS_PER_TURN_MAX);
    assert!(driver.turn(&mut console, 0).unwrap());
    assert!(driver.queues[1].take_used().is_some());
}

#[test]
fn a_whole_turn_that_empties_the_queue_leaves_no_driver_unheard() {
    let (mut console, _reader) = console();
    let mut driver = Driver::new(&[8, 512]);
    console.activate(driver.activation(EVENT_IDX)).unwrap();
    for _ in 0..device::CHAINS_PER_TURN_MAX {
        driver.queues[1].offer(&[Part::Read(BUFFERS, 1)]).unwrap();
    }
    console.queue_kicked(1).unwrap();
    while driver.turn(&mut console, 0).unwrap() {}
    assert!(driver.queues[1].wants_notification());
}

#[test]
fn hostile_drivers_break_the_device_and_no_more() {
    assert_hostile_chains_break(|| console().0, &[8, 8], &[1]);
    let (mut console, _reader) = console();
    let mut driver = Driver::new(&[8, 8]);
    console.activate(driver.activation(0)).unwrap();
    driver.queues[1].offer(&[Part::Write(BUFFERS, 8)]).unwrap();
    assert!(console.queue_kicked(1).is_err());
    console.reset();
    for queue in [0, 1, 2, u16::MAX] {
        console.queue_kicked(queue).unwrap();
    }
}
