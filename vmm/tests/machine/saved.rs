//! A machine that is saved, and others that go on from it: each in a process of its own, with a
//! guest that counts in its memory and is driven by the timer of its local APIC.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's")]

use std::{
    fs::File,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt},
    },
    time::Instant,
};

use pericarp_protocol::machine::{ErrorCode, Failure, Nothing, Request, Save, Success};

use crate::{
    need_kvm,
    stopped::{COUNTER, busy, sleeper},
    support::{PATIENCE, Start, Vmm, at},
};

/// A template.
struct Saved {
    memory: File,
    state: Vec<u8>,
    count: u32,
}

/// Waits until a counter is beyond `from`.
fn counts(from: u32, read: impl Fn() -> u32) -> u32 {
    let start = Instant::now();
    loop {
        let count = read();
        if count > from {
            return count;
        }
        assert!(start.elapsed() < PATIENCE, "the guest stands at {count}");
        std::thread::yield_now();
    }
}

fn save(vmm: &mut Vmm) -> Result<Vec<u8>, Failure> {
    let state = tempfile::tempfile().unwrap();
    let request = Request::Save(Save { state: at(0) });
    vmm.ask(&request, &[state.as_fd()])?;
    let mut bytes = vec![0; usize::try_from(state.metadata().unwrap().len()).unwrap()];
    state.read_exact_at(&mut bytes, 0).unwrap();
    Ok(bytes)
}

/// Runs a guest until it has counted, and saves it.
fn template(code: &[u8]) -> Saved {
    let mut vmm = Vmm::running(code);
    counts(2, || vmm.read_u32(COUNTER));
    vmm.ask(&Request::Pause(Nothing {}), &[]).unwrap();
    let state = save(&mut vmm).unwrap();
    let count = vmm.read_u32(COUNTER);
    let memory = vmm.memory().try_clone().unwrap();
    assert!(vmm.hang_up().0.success());
    Saved {
        memory,
        state,
        count,
    }
}

fn content(file: &File) -> (Vec<u8>, u64) {
    let metadata = file.metadata().unwrap();
    let mut bytes = vec![0; usize::try_from(metadata.len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    (bytes, metadata.blocks())
}

fn go_on(saved: &Saved) -> Result<Vmm, Failure> {
    Vmm::described(Start::from_saved(&saved.memory, &saved.state))?.run()
}

#[test]
fn two_machines_go_on_from_one_and_leave_it_as_it_is() {
    need_kvm!();
    for code in [busy(), sleeper()] {
        let saved = template(&code);
        let before = saved.memory.metadata().unwrap().blocks();
        let (one, other) = (go_on(&saved).unwrap(), go_on(&saved).unwrap());
        for vmm in [&one, &other] {
            let count = counts(saved.count, || vmm.read_private_u32(COUNTER));
            counts(count, || vmm.read_private_u32(COUNTER));
        }
        drop(one);
        let count = other.read_private_u32(COUNTER);
        counts(count, || other.read_private_u32(COUNTER));
        assert_eq!(saved.memory.metadata().unwrap().blocks(), before);
        drop(other);
        let (bytes, blocks) = content(&saved.memory);
        assert_eq!(blocks, before, "no page was made in the file");
        let at = usize::try_from(COUNTER).unwrap();
        assert_eq!(bytes[at..at + 4], saved.count.to_le_bytes());
    }
}

#[test]
fn a_machine_that_goes_on_can_be_paused_and_is_counted() {
    need_kvm!();
    let saved = template(&sleeper());
    let mut vmm = go_on(&saved).unwrap();
    counts(saved.count, || vmm.read_private_u32(COUNTER));
    vmm.ask(&Request::Pause(Nothing {}), &[]).unwrap();
    let count = vmm.read_private_u32(COUNTER);
    assert_eq!(vmm.read_private_u32(COUNTER), count);
    vmm.ask(&Request::Resume(Nothing {}), &[]).unwrap();
    counts(count, || vmm.read_private_u32(COUNTER));
    let statistics = vmm.ask(&Request::Statistics(Nothing {}), &[]).unwrap();
    assert!(matches!(statistics, Success::Statistics(_)));
}

#[test]
fn only_a_paused_machine_is_saved_and_then_it_ends() {
    need_kvm!();
    let mut vmm = Vmm::running(&busy());
    let refused = save(&mut vmm).unwrap_err();
    assert_eq!(refused.code, ErrorCode::WrongState, "{refused}");
    vmm.ask(&Request::Pause(Nothing {}), &[]).unwrap();
    save(&mut vmm).unwrap();
    let refused = vmm.ask(&Request::Resume(Nothing {}), &[]).unwrap_err();
    assert_eq!(refused.code, ErrorCode::WrongState, "{refused}");
    vmm.ask(&Request::Shutdown(Nothing {}), &[]).unwrap();
    assert!(vmm.wait().success());
}

#[test]
fn what_is_not_this_machine_is_refused_by_name() {
    need_kvm!();
    let saved = template(&busy());
    let refused = |state: &[u8], change: fn(&mut Start)| {
        let mut start = Start::from_saved(&saved.memory, state);
        change(&mut start);
        let vmm = Vmm::described(start).and_then(Vmm::run);
        let failure = vmm.err().expect("it is refused");
        assert_eq!(failure.code, ErrorCode::Invalid, "{failure}");
        failure.to_string()
    };
    let same: fn(&mut Start) = |_| {};
    for length in [0, 8, 16, 100, saved.state.len() - 1] {
        let reason = refused(&saved.state[..length], same);
        assert!(reason.starts_with("Machine.saved: "), "{reason}");
    }
    let mut other = saved.state.clone();
    other[17] ^= 1;
    assert!(refused(&other, same).contains("build"));
    let reason = refused(&saved.state, |start| {
        start.machine.command_line =
            pericarp_protocol::machine::Text::new("command line", "other").unwrap();
    });
    assert!(reason.contains("command_line"), "{reason}");
    let reason = refused(&saved.state, |start| start.machine.vcpus_max = 2);
    assert!(reason.contains("vcpus_max"), "{reason}");
}
