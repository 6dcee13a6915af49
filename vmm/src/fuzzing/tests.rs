//! Each entry with programs of pseudo-random bytes: what the fuzzer does for minutes, for a moment.

use proptest::prelude::*;

use vm_memory::{Bytes as _, GuestAddress};

use crate::devices::virtio::transport::BAR_BYTES;

use super::machine::{AVAILABLE, BUFFERS, Guest, NOTIFY, USED, config, rings};

/// Programs of one entry.
const CASES: u32 = 64;

fn play(entry: fn(&[u8])) {
    let strategy = prop::collection::vec(any::<u8>(), 0..600);
    let config = ProptestConfig {
        cases: CASES,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let outcome = runner.run(&strategy, |data| {
        entry(&data);
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn any_program_leaves_a_device_that_can_be_reset() {
    for entry in [
        super::blk,
        super::net,
        super::vsock,
        super::balloon,
        super::mem,
        super::pmem,
        super::rng,
        super::console,
    ] {
        play(entry);
    }
}

#[test]
fn any_bytes_are_a_queue_and_any_writes_registers() {
    play(super::queue);
    play(super::registers);
    play(super::passthrough);
}

#[test]
fn any_file_is_a_saved_machine_and_any_daemon_serves_one() {
    play(super::saved);
    play(super::relay);
}

fn machine() -> Option<Guest> {
    let guest = Guest::new();
    if guest.is_none() {
        println!("skipped: no /dev/kvm that makes a machine");
    }
    guest
}

#[test]
fn any_program_leaves_a_machine_as_new() {
    if machine().is_some() {
        play(super::machine);
    }
}

/// Every offset of every BAR and of configuration space, each size from none to eight bytes, also
/// across its ends, while the devices live.
#[test]
fn a_scribble_over_every_bar_only_hurts_the_guest() {
    let Some(mut guest) = machine() else { return };
    let functions = guest.functions.clone();
    for (slot, bar) in functions.iter().copied() {
        for (round, value) in [0_u64, u64::MAX, 0x0123_4567_89ab_cdef]
            .into_iter()
            .enumerate()
        {
            guest.bring_up((slot, bar), u64::MAX);
            let bytes = value.to_le_bytes();
            // Every byte of the registers, backwards past the start too, the first of each page and
            // every 61st of the rest.
            let near = (0..0x60).map(|at| bar - 8 + at);
            let pages = (0..BAR_BYTES).step_by(0x1000);
            let far = (0..BAR_BYTES + 16).step_by(61 + round);
            for address in near.chain(pages.chain(far).map(|at| bar + at)) {
                for size in 0..=8 {
                    guest.machine.bus().write_memory(address, &bytes[..size]);
                    let mut back = [0; 8];
                    guest.machine.bus().read_memory(address, &mut back[..size]);
                }
            }
            for offset in 0..0x110 {
                for size in 0..=8 {
                    let bus = guest.machine.bus();
                    bus.write_memory(config(slot, offset), &bytes[..size]);
                }
            }
            guest.turn();
            put_back(&mut guest, (slot, bar));
        }
    }
    // All of them still come up.
    for function in functions {
        guest.bring_up(function, u64::MAX);
        let mut status = [0];
        let address = function.1 + 0x14;
        guest.machine.bus().read_memory(address, &mut status);
        assert_eq!(status, [15], "function {:#x} lives", function.0);
    }
}

fn put_back(guest: &mut Guest, (slot, bar): (u8, u64)) {
    for (offset, half) in [(0x10, bar), (0x14, bar >> 32)] {
        let bus = guest.machine.bus();
        bus.write_memory(config(slot, offset), &half.to_le_bytes()[..4]);
    }
    guest.machine.bus().write_memory(config(slot, 4), &[2, 0]);
}

/// Puts one request of up to three buffers into queue `queue` at `head`: bytes that are read, or
/// room for so many.
fn request(guest: &Guest, queue: u64, head: u16, parts: &[Result<&[u8], u32>]) {
    let table = queue + u64::from(head) * 16;
    for (index, part) in (0_u16..).zip(parts) {
        let address = BUFFERS + u64::from(head + index) * 0x1000;
        let (len, flags) = match part {
            Ok(bytes) => {
                guest.put(address, bytes);
                (u32::try_from(bytes.len()).unwrap(), 0)
            }
            Err(room) => (*room, 2),
        };
        let has_next = u16::from(usize::from(index) + 1 < parts.len());
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&address.to_le_bytes());
        descriptor[8..12].copy_from_slice(&len.to_le_bytes());
        descriptor[12..14].copy_from_slice(&(flags | has_next).to_le_bytes());
        descriptor[14..].copy_from_slice(&(head + index + 1).to_le_bytes());
        guest.put(table + u64::from(index) * 16, &descriptor);
    }
    let memory = &guest.machine.memory().guest;
    let next: u16 = memory
        .read_obj(GuestAddress(queue + AVAILABLE + 2))
        .unwrap();
    guest.put(
        queue + AVAILABLE + 4 + u64::from(next) * 2,
        &head.to_le_bytes(),
    );
    guest.put(queue + AVAILABLE + 2, &(next + 1).to_le_bytes());
}

/// Requests that the device has answered on a queue.
fn used(guest: &Guest, queue: u64) -> u16 {
    let memory = &guest.machine.memory().guest;
    memory.read_obj(GuestAddress(queue + USED + 2)).unwrap()
}

/// What a driver reads for its disk's name.
const GET_ID: &[u8] = &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A driver need not wait for the device: what it notifies right behind DRIVER_OK, before the event
/// loop has run at all, is served.
#[test]
fn a_notification_right_behind_driver_ok_is_not_lost() {
    let Some(mut guest) = machine() else { return };
    // The disk is the last function.
    let (slot, bar) = *guest.functions.last().unwrap();
    let rings = rings(slot, 0);
    request(&guest, rings, 0, &[Ok(GET_ID), Err(20), Err(1)]);
    guest.drive((slot, bar), u64::MAX, usize::MAX);
    guest.machine.bus().write_memory(bar + NOTIFY, &[0, 0]);
    guest.turn();
    assert_eq!(used(&guest, rings), 1, "the request is answered");
}

/// A driver that gives up after any of its steps, with the event loop behind it or not, also with
/// sizes and addresses of queues written while they are in use: the device is reset and comes up.
#[test]
fn a_reset_at_every_step_leaves_a_device_that_comes_up() {
    let Some(mut guest) = machine() else { return };
    let status = |guest: &Guest, bar: u64| {
        let mut status = [0xff];
        guest.machine.bus().read_memory(bar + 0x14, &mut status);
        status[0]
    };
    for function in guest.functions.clone() {
        let bar = function.1;
        for step in 0.. {
            let more = !guest.drive(function, u64::MAX, step);
            if step % 2 == 0 {
                guest.turn();
            }
            for (offset, data) in [
                (0x16, [0, 0]),
                (0x18, [4, 0]),
                (0x20, [0, 0]),
                (0x1c, [1, 0]),
            ] {
                guest.machine.bus().write_memory(bar + offset, &data);
            }
            guest.machine.bus().write_memory(bar + NOTIFY, &[0, 0]);
            guest.machine.bus().write_memory(bar + 0x14, &[0]);
            guest.turn();
            assert_eq!(
                status(&guest, bar),
                0,
                "reset after step {step} of {:#x}",
                function.0
            );
            if !more {
                break;
            }
        }
        guest.bring_up(function, u64::MAX);
        assert_eq!(status(&guest, bar), 15, "{:#x} comes up", function.0);
    }
}

/// Every device of a machine stops, is written down as text, and goes on in another machine, whose
/// memory is as the first one's was.
#[test]
fn every_device_goes_on_in_another_machine() {
    let (Some(mut first), Some(mut second)) = (machine(), machine()) else {
        return;
    };
    let functions = first.functions.clone();
    assert_eq!(
        functions, second.functions,
        "machines of one description are alike"
    );
    for function in &functions {
        first.bring_up(*function, u64::MAX);
    }
    let by_type = |guest: &Guest, wanted: u16| {
        let found = functions.iter().find(|(slot, _)| {
            let function = &guest.machine.functions()[slot];
            function.device().device_type() == wanted
        });
        *found.unwrap()
    };
    let (disk, mem, balloon) = (by_type(&first, 2), by_type(&first, 24), by_type(&first, 5));
    // One answered request of the disk, one plugged block, and a goal of the balloon.
    let queues = [disk, mem].map(|(slot, _)| rings(slot, 0));
    request(&first, queues[0], 0, &[Ok(GET_ID), Err(20), Err(1)]);
    let region = first.machine.memory().layout.pluggable.start;
    let block = |kind: u8| {
        let mut bytes = [0; 24];
        bytes[0] = kind;
        bytes[8..16].copy_from_slice(&region.to_le_bytes());
        bytes[16] = 1;
        bytes
    };
    request(&first, queues[1], 0, &[Ok(&block(0)), Err(10)]);
    first.machine.set_balloon(8 << 20).unwrap();
    first
        .machine
        .bus()
        .write_memory(balloon.1 + 0x2004, &7_u32.to_le_bytes());
    for (_, bar) in [disk, mem] {
        first.machine.bus().write_memory(bar + NOTIFY, &[0, 0]);
    }
    first.turn();
    assert_eq!(queues.map(|queue| used(&first, queue)), [1, 1]);

    let mut image = vec![0; 32 << 20];
    let saved: Vec<String> = functions
        .iter()
        .map(|(slot, _)| first.machine.functions()[slot].save())
        .map(|saved| serde_json::to_string(&saved).unwrap())
        .collect();
    first
        .machine
        .memory()
        .guest
        .read_slice(&mut image, GuestAddress(0))
        .unwrap();
    second
        .machine
        .memory()
        .guest
        .write_slice(&image, GuestAddress(0))
        .unwrap();
    for ((slot, bar), text) in functions.iter().zip(&saved) {
        let saved = serde_json::from_str(text).unwrap();
        second.machine.functions()[slot].restore(&saved).unwrap();
        let mut status = [0];
        second.machine.bus().read_memory(bar + 0x14, &mut status);
        assert_eq!(status, [15], "function {slot:#x} lives");
        let again = second.machine.functions()[slot].save();
        assert_eq!(
            serde_json::to_string(&again).unwrap(),
            *text,
            "and is the same"
        );
        second.machine.functions()[slot]
            .restore(&again)
            .unwrap_or_else(|error| {
                panic!("{error}");
            });
    }
    // The queues go on where they stood, and what was plugged is plugged.
    request(&second, queues[0], 3, &[Ok(GET_ID), Err(20), Err(1)]);
    request(&second, queues[1], 2, &[Ok(&block(3)), Err(10)]);
    for (_, bar) in [disk, mem] {
        second.machine.bus().write_memory(bar + NOTIFY, &[0, 0]);
    }
    second.turn();
    assert_eq!(queues.map(|queue| used(&second, queue)), [2, 2]);
    let answer = GuestAddress(BUFFERS + 3 * 0x1000);
    let mut state = [0xff; 10];
    second
        .machine
        .memory()
        .guest
        .read_slice(&mut state, answer)
        .unwrap();
    assert_eq!(state, [0; 10], "answered, and plugged");
    let mut goal = [0; 8];
    second
        .machine
        .bus()
        .read_memory(balloon.1 + 0x2000, &mut goal);
    assert_eq!(
        goal,
        [0, 8, 0, 0, 7, 0, 0, 0],
        "2,048 pages wanted, 7 given"
    );
}

/// What another device left is refused, and nothing of it is taken.
#[test]
fn what_another_device_left_is_refused() {
    let Some(mut guest) = machine() else { return };
    let functions = guest.functions.clone();
    for function in &functions {
        guest.bring_up(*function, u64::MAX);
    }
    let all: Vec<_> = functions
        .iter()
        .map(|(slot, _)| guest.machine.functions()[slot].save())
        .collect();
    for (index, (slot, _)) in functions.iter().enumerate() {
        for (other, saved) in all.iter().enumerate() {
            let outcome = guest.machine.functions()[slot].restore(saved);
            assert_eq!(outcome.is_ok(), other == index, "{index} from {other}");
        }
    }
}
