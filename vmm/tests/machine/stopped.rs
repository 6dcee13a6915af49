//! A VMM that is stopped and continued: by signals and by the cgroup freezer. The guest must go on
//! by itself, so these tests watch a counter in its memory; a request would wake a stuck vCPU.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a failure here is the test's, and a skipped test says why"
)]

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use pericarp_protocol::machine::{Nothing, Request, Success};

use crate::{
    need_kvm,
    support::{ENTRY, PATIENCE, Vmm},
};

/// How often each test stops the VMM.
const STOPS: usize = 5;

/// Where the guests count; beyond their code and stack.
pub(crate) const COUNTER: u32 = 0x20_0000;

/// Counts without a pause: `inc dword [COUNTER]; jmp`.
pub(crate) fn busy() -> Vec<u8> {
    let mut code = vec![0xff, 0x05];
    code.extend_from_slice(&COUNTER.to_le_bytes());
    code.extend_from_slice(&[0xeb, 0xf8]);
    code
}

/// `mov ecx, register; mov eax, value; xor edx, edx; wrmsr`
fn write_msr(register: u32, value: u32) -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend_from_slice(&register.to_le_bytes());
    code.push(0xb8);
    code.extend_from_slice(&value.to_le_bytes());
    code.extend_from_slice(&[0x31, 0xd2, 0x0f, 0x30]);
    code
}

/// Halts, and counts the ticks of the local APIC's timer, which fires every 10 ms. The handler
/// never returns: where KVM emulates instructions, it has no IRET.
///
/// ```text
///     lgdt [...]; lidt [...]
///     enable the APIC; divide by 1; periodic, vector 0x20; 10,000,000 ns
/// 1:  mov esp, stack; sti; hlt; jmp 1b
/// handler:
///     inc dword [COUNTER]; end of interrupt; jmp 1b
/// ```
pub(crate) fn sleeper() -> Vec<u8> {
    const STACK: u32 = 0x18_0000;
    const VECTOR: u32 = 0x20;
    /// Offsets of the tables and of the handler, behind the code.
    const HANDLER: u16 = 0x100;
    const GLOBAL: u16 = 0x200;
    const INTERRUPTS: u16 = 0x300;
    const REGISTERS: u16 = 0x280;
    let base = u32::try_from(ENTRY).expect("below 4 GiB");
    let absolute = |offset: u16| base + u32::from(offset);

    let mut code = Vec::new();
    for (opcode, at) in [(0x15, REGISTERS), (0x1d, REGISTERS + 8)] {
        code.extend_from_slice(&[0x0f, 0x01, opcode]);
        code.extend_from_slice(&absolute(at).to_le_bytes());
    }
    for (register, value) in [
        (0x80f, 0x1ff),
        (0x83e, 0xb),
        (0x832, 1 << 17 | VECTOR),
        (0x838, 10_000_000),
    ] {
        code.extend(write_msr(register, value));
    }
    let halt = i32::try_from(code.len()).expect("short");
    code.push(0xbc);
    code.extend_from_slice(&STACK.to_le_bytes());
    code.extend_from_slice(&[0xfb, 0xf4, 0xeb, 0xf7]);

    code.resize(HANDLER.into(), 0xcc);
    code.extend_from_slice(&[0xff, 0x05]);
    code.extend_from_slice(&COUNTER.to_le_bytes());
    code.extend(write_msr(0x80b, 0));
    code.push(0xe9);
    let end = i32::try_from(code.len() + 4).expect("short");
    code.extend_from_slice(&(halt - end).to_le_bytes());

    code.resize(GLOBAL.into(), 0);
    // Flat: nothing, code at 8, data at 16.
    for descriptor in [0_u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff] {
        code.extend_from_slice(&descriptor.to_le_bytes());
    }
    code.resize(REGISTERS.into(), 0);
    for (limit, at) in [(23_u16, GLOBAL), (33 * 8 - 1, INTERRUPTS)] {
        code.extend_from_slice(&limit.to_le_bytes());
        code.extend_from_slice(&absolute(at).to_le_bytes());
        code.extend_from_slice(&[0; 2]);
    }
    // The other vectors are absent: an exception is a triple fault.
    code.resize(usize::from(INTERRUPTS) + 0x20 * 8, 0);
    let handler = absolute(HANDLER).to_le_bytes();
    code.extend_from_slice(&[
        handler[0], handler[1], 8, 0, 0, 0x8e, handler[2], handler[3],
    ]);
    code
}

/// Waits until `done`, which changes by itself.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn counts_on(vmm: &Vmm) {
    let before = vmm.read_u32(COUNTER);
    wait_until("the guest counts on", || vmm.read_u32(COUNTER) != before);
}

fn stands_still(vmm: &Vmm) {
    let before = vmm.read_u32(COUNTER);
    // Longer than two ticks of the sleeper.
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(vmm.read_u32(COUNTER), before, "the guest runs");
}

/// The VMM still obeys, and reaches the vCPU wherever that is.
fn obeys(vmm: &mut Vmm) {
    let done = Ok(Success::Done(Nothing {}));
    assert!(vmm.ask(&Request::Statistics(Nothing {}), &[]).is_ok());
    assert_eq!(vmm.ask(&Request::Pause(Nothing {}), &[]), done);
    stands_still(vmm);
    assert_eq!(vmm.ask(&Request::Resume(Nothing {}), &[]), done);
    counts_on(vmm);
    assert_eq!(vmm.ask(&Request::Shutdown(Nothing {}), &[]), done);
    assert!(vmm.wait().success());
}

fn stop(pid: Pid) {
    kill(pid, Signal::SIGSTOP).unwrap();
    let stopped = waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
    assert_eq!(stopped, WaitStatus::Stopped(pid, Signal::SIGSTOP));
}

fn goes_on_after_stops(code: &[u8]) {
    let mut vmm = Vmm::running(code);
    let pid = vmm.pid();
    for _ in 0..STOPS {
        counts_on(&vmm);
        stop(pid);
        stands_still(&vmm);
        kill(pid, Signal::SIGCONT).unwrap();
    }
    counts_on(&vmm);
    obeys(&mut vmm);
}

#[test]
fn a_busy_guest_goes_on_after_a_stop() {
    need_kvm!();
    goes_on_after_stops(&busy());
}

#[test]
fn a_guest_that_halts_goes_on_after_a_stop() {
    need_kvm!();
    goes_on_after_stops(&sleeper());
}

/// A request that was sent during the stop is answered after it.
#[test]
fn requests_wait_for_a_stopped_vmm() {
    need_kvm!();
    let mut vmm = Vmm::running(&busy());
    for _ in 0..STOPS {
        stop(vmm.pid());
        let pause = vmm.send(&Request::Pause(Nothing {}), &[]);
        let resume = vmm.send(&Request::Resume(Nothing {}), &[]);
        kill(vmm.pid(), Signal::SIGCONT).unwrap();
        assert!(vmm.reply(pause).is_ok());
        assert!(vmm.reply(resume).is_ok());
        counts_on(&vmm);
    }
    obeys(&mut vmm);
}

/// A cgroup of version 2 beside the root, removed when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mut fields = mounts.lines().map(|line| line.split(' '));
        let root = fields
            .find_map(|mut fields| {
                let place = fields.nth(1)?;
                (fields.next()? == "cgroup2").then_some(place)
            })
            .ok_or_else(|| io::Error::other("no cgroup v2 hierarchy is mounted"))?;
        let folder = Path::new(root).join(format!("pericarp-test-{name}-{}", std::process::id()));
        fs::create_dir(&folder)?;
        Ok(Self(folder))
    }

    fn write(&self, file: &str, text: &str) -> io::Result<()> {
        fs::write(self.0.join(file), text)
    }

    fn freeze(&self, frozen: bool) -> io::Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        let line = format!("frozen {}", u8::from(frozen));
        wait_until(&line, || {
            let events = fs::read_to_string(self.0.join("cgroup.events")).unwrap();
            events.lines().any(|found| found == line)
        });
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn goes_on_after_freezes(name: &str, code: &[u8]) {
    let cgroup = match Cgroup::new(name) {
        Ok(cgroup) => cgroup,
        Err(error) => return println!("skipped: a cgroup cannot be made: {error}"),
    };
    let mut vmm = Vmm::running(code);
    let joined = cgroup.write("cgroup.procs", &vmm.pid().to_string());
    if let Err(error) = joined.and_then(|()| cgroup.freeze(false)) {
        return println!("skipped: no freezer: {error}");
    }
    for _ in 0..STOPS {
        counts_on(&vmm);
        cgroup.freeze(true).unwrap();
        stands_still(&vmm);
        cgroup.freeze(false).unwrap();
    }
    counts_on(&vmm);
    obeys(&mut vmm);
}

#[test]
fn a_busy_guest_goes_on_after_a_freeze() {
    need_kvm!();
    goes_on_after_freezes("busy", &busy());
}

#[test]
fn a_guest_that_halts_goes_on_after_a_freeze() {
    need_kvm!();
    goes_on_after_freezes("sleeper", &sleeper());
}
