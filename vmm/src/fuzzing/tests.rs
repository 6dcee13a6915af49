//! Each entry with programs of pseudo-random bytes: what the fuzzer does for minutes, for a moment.

use proptest::prelude::*;

use vm_memory::{Bytes as _, GuestAddress};

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

/// Every offset of every BAR and of configuration space, each size from one to eight bytes, also
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
            // Every byte of the registers and every 61st of the rest, backwards past the start too.
            let near = (0..0x60).map(|at| bar - 8 + at);
            let far = (0..crate::devices::virtio::transport::BAR_BYTES + 16).step_by(61 + round);
            for address in near.chain(far.map(|at| bar + at)) {
                for size in 1..=8 {
                    guest.machine.bus().write_memory(address, &bytes[..size]);
                    let mut back = [0; 8];
                    guest.machine.bus().read_memory(address, &mut back[..size]);
                }
            }
            for offset in 0..0x110 {
                for size in 1..=8 {
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

/// A driver need not wait for the device: what it notifies right behind DRIVER_OK, before the event
/// loop has run at all, is served.
#[test]
fn a_notification_right_behind_driver_ok_is_not_lost() {
    let Some(mut guest) = machine() else { return };
    // The disk is the last function.
    let (slot, bar) = *guest.functions.last().unwrap();
    let rings = rings(slot, 0);
    // Get-id: a header that is read, 20 bytes and a status that are written.
    guest.put(BUFFERS, &[8, 0, 0, 0]);
    for (index, len, flags) in [(0_u64, 16_u32, 1_u16), (1, 20, 3), (2, 1, 2)] {
        let mut descriptor = [0; 16];
        let address = BUFFERS + index * 0x1000;
        descriptor[..8].copy_from_slice(&address.to_le_bytes());
        descriptor[8..12].copy_from_slice(&len.to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        descriptor[14] = u8::try_from(index + 1).unwrap();
        guest.put(rings + index * 16, &descriptor);
    }
    guest.put(rings + AVAILABLE, &[0, 0, 1, 0]);
    guest.drive((slot, bar), u64::MAX);
    guest.machine.bus().write_memory(bar + NOTIFY, &[0, 0]);
    guest.turn();
    let used: u16 = guest
        .machine
        .memory()
        .guest
        .read_obj(GuestAddress(rings + USED + 2))
        .unwrap();
    assert_eq!(used, 1, "the request is answered");
}
