//! Machine tests: the real VMM with guests of a few instructions, on any host whose `/dev/kvm` runs
//! those.

mod saved;
mod stopped;
mod support;

use std::{
    collections::BTreeSet,
    fs,
    os::fd::AsFd,
    process::Command,
    time::{Duration, Instant},
};

use pericarp_protocol::machine::{
    Blk, CacheMode, DeviceKind, ErrorCode, Event, GuestShutdown, Named, Nothing, Pmem, RateLimit,
    Request, ShutdownKind, Success, Text, Vcpus, encode_request,
};

use support::{Start, Vmm, at, switches};

/// `mov dx, port; mov al, value; out dx, al; hlt; jmp -3`
const fn out(port: u16, value: u8) -> [u8; 10] {
    let [low, high] = port.to_le_bytes();
    [0x66, 0xba, low, high, 0xb0, value, 0xee, 0xf4, 0xeb, 0xfd]
}

/// `pause; jmp -4`
const SPIN: [u8; 4] = [0xf3, 0x90, 0xeb, 0xfc];

const POWER_OFF: [u8; 10] = out(0x600, 0x34);

#[test]
fn a_guest_switches_itself_off() {
    need_kvm!();
    let mut vmm = Vmm::running(&POWER_OFF);
    let kind = ShutdownKind::PowerOff;
    assert_eq!(vmm.event(), Event::GuestShutdown(GuestShutdown { kind }));
    assert_eq!(vmm.receive(), None);
    assert!(vmm.wait().success());
}

#[test]
fn a_guest_resets() {
    need_kvm!();
    let mut vmm = Vmm::running(&out(0x602, 1));
    let kind = ShutdownKind::Reset;
    assert_eq!(vmm.event(), Event::GuestShutdown(GuestShutdown { kind }));
    assert!(vmm.wait().success());
}

#[test]
fn a_triple_fault_is_told_as_what_it_is() {
    need_kvm!();
    // UD2, and no interrupt descriptor table.
    let mut vmm = Vmm::running(&[0x0f, 0x0b]);
    let event = vmm.event();
    let Event::VcpuError(error) = event else {
        panic!("{event:?}");
    };
    assert_eq!((error.vcpu, error.reason.as_str()), (0, "triple fault"));
    assert!(vmm.wait().success());
}

#[test]
fn a_panic_is_an_event() {
    need_kvm!();
    let mut vmm = Vmm::running(&out(0x505, 1));
    assert_eq!(vmm.event(), Event::GuestPanicked(Nothing {}));
}

#[test]
fn requests_are_obeyed_while_the_guest_runs() {
    need_kvm!();
    let mut vmm = Vmm::running(&SPIN);
    for _ in 0..3 {
        assert_eq!(
            vmm.ask(&Request::Pause(Nothing {}), &[]),
            Ok(Success::Done(Nothing {}))
        );
        assert_eq!(
            vmm.ask(&Request::Resume(Nothing {}), &[]),
            Ok(Success::Done(Nothing {}))
        );
    }
    let Ok(Success::Statistics(counters)) = vmm.ask(&Request::Statistics(Nothing {}), &[]) else {
        panic!("no statistics");
    };
    assert!(counters.guest_resident_bytes > 0, "{counters:?}");
    assert_eq!(counters.vcpus, 1);
    let more = vmm
        .ask(&Request::ResizeVcpus(Vcpus { count: 2 }), &[])
        .unwrap_err();
    assert_eq!(more.code, ErrorCode::Invalid);
    assert!(more.reason.as_str().starts_with("Vcpus.count: "), "{more}");
    assert_eq!(
        vmm.ask(&Request::Shutdown(Nothing {}), &[]),
        Ok(Success::Done(Nothing {}))
    );
    assert!(vmm.wait().success());
}

fn disk() -> DeviceKind {
    DeviceKind::Blk(Blk {
        file: at(0),
        read_only: false,
        serial: Text::default(),
        queues: 1,
        cache: CacheMode::WriteBack,
        limit: RateLimit::default(),
    })
}

#[test]
fn disks_come_and_go() {
    need_kvm!();
    let mut vmm = Vmm::running(&SPIN);
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let mut addresses = BTreeSet::new();
    for _ in 0..3 {
        let Ok(Success::Added(address)) = vmm.add("disk", disk(), &[file.as_fd()]) else {
            panic!("not added");
        };
        addresses.insert(address.to_string());
        let again = vmm.add("disk", disk(), &[file.as_fd()]).unwrap_err();
        assert_eq!(again.code, ErrorCode::Exists);
        let device = Text::new("", "disk").unwrap();
        let removed = vmm.ask(&Request::RemoveDevice(Named { device }), &[]);
        assert_eq!(removed, Ok(Success::Done(Nothing {})));
    }
    assert_eq!(addresses.len(), 1, "the slot is used again: {addresses:?}");
    let device = Text::new("", "disk").unwrap();
    let gone = vmm
        .ask(&Request::RemoveDevice(Named { device }), &[])
        .unwrap_err();
    assert_eq!(gone.code, ErrorCode::NotFound);
    let device = Text::new("", "vsock").unwrap();
    let stays = vmm
        .ask(&Request::RemoveDevice(Named { device }), &[])
        .unwrap_err();
    assert_eq!(stays.code, ErrorCode::WrongState);
}

#[test]
fn sixty_four_disks_fit() {
    need_kvm!();
    let mut vmm = Vmm::running(&SPIN);
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let mut count = 0;
    while let Ok(Success::Added(_)) = vmm.add(&format!("disk{count}"), disk(), &[file.as_fd()]) {
        count += 1;
    }
    assert!(count + 3 >= 55, "{count} disks beside three devices");
}

#[test]
fn a_device_that_does_not_fit_leaves_nothing() {
    need_kvm!();
    let mut vmm = Vmm::running(&SPIN);
    let image = tempfile::tempfile().unwrap();
    image.set_len(1 << 20).unwrap();
    let pmem = || DeviceKind::Pmem(Pmem { file: at(0) });
    let added = vmm.add("first", pmem(), &[image.as_fd()]);
    assert!(added.is_ok(), "{added:?}");
    assert_eq!(vmm.mappings_of(&image), 1);
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let mut count = 0;
    while let Ok(Success::Added(_)) = vmm.add(&format!("disk{count}"), disk(), &[file.as_fd()]) {
        count += 1;
    }
    for _ in 0..3 {
        let refused = vmm.add("second", pmem(), &[image.as_fd()]).unwrap_err();
        assert_eq!(refused.code, ErrorCode::Exhausted, "{refused}");
    }
    assert_eq!(vmm.mappings_of(&image), 1);
}

#[test]
fn bad_input_names_the_field_and_starts_nothing() {
    need_kvm!();
    type Change = fn(&mut Start);
    let cases: [(&str, Change); 9] = [
        ("Machine.vcpus", |s| s.machine.vcpus = 0),
        ("Machine.memory_max_bytes", |s| {
            s.machine.memory_max_bytes = 1 << 45;
        }),
        ("Machine.pluggable", |s| s.machine.memory_max_bytes *= 2),
        ("Machine.kvm", |s| {
            s.kvm = fs::File::open("/dev/null").unwrap()
        }),
        ("Machine.memory", |s| {
            s.memory = fs::File::open("/dev/null").unwrap().into();
        }),
        ("Machine.uid", |s| s.machine.uid = 0),
        ("Machine.kernel", |s| s.machine.kernel = at(7)),
        ("Machine.kernel", |s| {
            s.kernel = tempfile::tempfile().unwrap()
        }),
        ("Machine.cpu_features", |s| {
            s.machine.cpu_features = Text::new("", "+nonsense").unwrap();
        }),
    ];
    for (field, change) in cases {
        let mut start = Start::new(&SPIN);
        change(&mut start);
        let mut vmm = Vmm::spawn();
        let described = vmm.ask(&Request::Start(start.machine.clone()), &start.descriptors());
        let ran = vmm.ask(&Request::Run(Nothing {}), &[]);
        let failure = described.and(ran).unwrap_err();
        assert_eq!(failure.code, ErrorCode::Invalid, "{field}: {failure}");
        assert!(
            failure.reason.as_str().starts_with(&format!("{field}: ")),
            "{field}: {failure}"
        );
        let again = vmm.ask(&Request::Run(Nothing {}), &[]).unwrap_err();
        assert_eq!(again.code, ErrorCode::WrongState);
        assert!(vmm.hang_up().0.success());
    }
}

#[test]
fn messages_that_are_none_are_answered() {
    need_kvm!();
    let mut vmm = Vmm::running(&SPIN);
    let mut other_version = encode_request(77, &Request::Pause(Nothing {}));
    other_version[0] ^= 0xff;
    // Its number is read although the rest is lost.
    let mut too_long = encode_request(78, &Request::Pause(Nothing {}));
    too_long.resize(9000, 0);
    for (number, bytes) in [
        (77, &other_version[..]),
        (77, &other_version[..9]),
        (78, &too_long),
        (0, &[0; 9000]),
    ] {
        vmm.send_bytes(bytes);
        let answer = vmm.receive().unwrap();
        let pericarp_protocol::machine::Message::Failure(failure) = answer.1 else {
            panic!("{answer:?}");
        };
        assert_eq!(answer.0, number);
        assert_eq!(failure.code, ErrorCode::Invalid);
    }
    assert!(
        vmm.ask(&Request::Pause(Nothing {}), &[]).is_ok(),
        "it still obeys"
    );
}

/// A VMM at its limit of descriptors refuses a request that brings more, by its number.
#[test]
fn lost_descriptors_are_the_requests_failure() {
    need_kvm!();
    let start = Start::new(&SPIN);
    // Standard streams, the control socket, the loop's: one is left of the three that come.
    let mut vmm = Vmm::spawn_by(Command::new("/bin/sh").args([
        "-c",
        "ulimit -n 6 && exec \"$0\"",
        env!("CARGO_BIN_EXE_pericarp-vmm"),
    ]));
    let lost = vmm.ask(&Request::Start(start.machine.clone()), &start.descriptors());
    assert_eq!(lost.unwrap_err().code, ErrorCode::Invalid);
    assert!(vmm.hang_up().0.success());
}

#[test]
fn the_end_of_the_shim_is_the_end_of_the_machine() {
    need_kvm!();
    let mut vmm = Vmm::running(&SPIN);
    let (_, took) = vmm.hang_up();
    eprintln!("the VMM ended {took:?} after its shim");
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[test]
fn the_end_of_the_machine_is_told_at_once() {
    need_kvm!();
    let mut vmm = Vmm::running(&SPIN);
    let start = Instant::now();
    vmm.child.kill().unwrap();
    assert_eq!(vmm.receive(), None);
    let took = start.elapsed();
    eprintln!("the VMM's end was told after {took:?}");
    assert!(took < Duration::from_millis(100), "{took:?}");
}

/// `hlt; jmp -3`, without interrupts: for ever.
const SLEEP: [u8; 3] = [0xf4, 0xeb, 0xfd];

/// No timer, no figures that nobody asked for: a guest that sleeps costs its host nothing.
#[test]
fn an_idle_machine_never_runs() {
    need_kvm!();
    let mut vmm = Vmm::running(&SLEEP);
    assert!(vmm.ask(&Request::Statistics(Nothing {}), &[]).is_ok());
    let pid = vmm.child.id();
    // Longer than any timer's tick; the first windows may hold the rest of the start.
    let window = Duration::from_secs(2);
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut before = switches(pid);
    loop {
        std::thread::sleep(window);
        let after = switches(pid);
        if after == before {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "something runs: {before:?}, {after:?}"
        );
        before = after;
    }
}

fn status_line(status: &str, key: &str) -> String {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{key}:")));
    line.unwrap_or_else(|| panic!("no {key}"))
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn the_jail_is_closed() {
    need_kvm!();
    let vmm = Vmm::running(&SPIN);
    let process = format!("/proc/{}", vmm.child.id());
    for task in fs::read_dir(format!("{process}/task")).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status_line(&status, set), "0000000000000000", "{set}");
        }
        assert_eq!(status_line(&status, "NoNewPrivs"), "1");
        assert_eq!(status_line(&status, "Seccomp"), "2");
        assert_eq!(status_line(&status, "Uid"), "65534 65534 65534 65534");
        assert_eq!(status_line(&status, "Gid"), "65534 65534 65534 65534");
        assert_eq!(status_line(&status, "Groups"), "");
    }
    let root = fs::read_dir(format!("{process}/root")).unwrap();
    assert_eq!(root.count(), 0, "the root is empty");
    let limits = fs::read_to_string(format!("{process}/limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .unwrap();
    assert!(core.contains(" 0 "), "{core}");
    // Twice the connections of vsock: they cannot take the last descriptor.
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .unwrap();
    assert!(files.contains(" 8192 "), "{files}");
    for namespace in ["mnt", "net", "ipc", "uts", "pid"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&vmm.child.id().to_string()), of("self"), "{namespace}");
    }
}

#[test]
fn open_descriptors_are_exactly_the_expected_ones() {
    need_kvm!();
    let vmm = Vmm::running(&SPIN);
    let mut kinds = std::collections::BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", vmm.child.id())).unwrap() {
        let entry = entry.unwrap();
        // Standard error is the test's own.
        if entry.file_name() == "2" {
            continue;
        }
        let target = fs::read_link(entry.path()).unwrap();
        let target = target.to_string_lossy().into_owned();
        let kind = match target.as_str() {
            path if path.starts_with("/memfd:") => "memory",
            // Nameless: the kernel's file, and memory where huge pages are advised.
            path if path.ends_with("(deleted)") => "nameless file",
            path if path.starts_with('/') || path.starts_with("anon_inode:") => path,
            other => other.split(':').next().unwrap(),
        };
        *kinds.entry(kind.to_owned()).or_insert(0) += 1;
    }
    let expected = [
        ("/dev/kvm", 1),
        ("/dev/null", 2),     // standard input and output
        ("memory", 1),        // the guest's
        ("nameless file", 1), // the kernel
        ("pipe", 1),          // the console's output
        ("socket", 2),        // control, vsock's listener
        ("anon_inode:[eventpoll]", 1),
        ("anon_inode:[eventfd]", 1), // the doorbell: no queue is live
        ("anon_inode:[timerfd]", 1), // vsock's deadlines
        ("anon_inode:kvm-vm", 1),
        ("anon_inode:kvm-vcpu:0", 1),
    ];
    let expected = expected.map(|(kind, count)| (kind.to_owned(), count));
    assert_eq!(kinds, expected.into_iter().collect());
}

/// Writes pseudo-random words all over configuration space and the first BARs, then switches off.
///
/// ```text
///     mov ecx, 200000
///     mov eax, seed
/// 1:  imul eax, eax, 1664525
///     add eax, 1013904223
///     mov ebx, eax
///     shr ebx, 9
///     and ebx, mask
///     or ebx, base
///     mov [ebx], eax
///     mov edx, [ebx]
///     loop 1b
///     power off
/// ```
fn scribble(base: u32, mask: u32) -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend_from_slice(&20_000_u32.to_le_bytes());
    code.push(0xb8);
    code.extend_from_slice(&0x1234_5678_u32.to_le_bytes());
    let start = code.len();
    code.extend_from_slice(&[0x69, 0xc0]);
    code.extend_from_slice(&1_664_525_u32.to_le_bytes());
    code.push(0x05);
    code.extend_from_slice(&1_013_904_223_u32.to_le_bytes());
    code.extend_from_slice(&[0x89, 0xc3, 0xc1, 0xeb, 0x09, 0x81, 0xe3]);
    code.extend_from_slice(&mask.to_le_bytes());
    code.extend_from_slice(&[0x81, 0xcb]);
    code.extend_from_slice(&base.to_le_bytes());
    code.extend_from_slice(&[0x89, 0x03, 0x8b, 0x13]);
    let back = code.len() + 2 - start;
    code.extend_from_slice(&[
        0xe2,
        0_u8.wrapping_sub(u8::try_from(back).expect("a short loop")),
    ]);
    code.extend_from_slice(&POWER_OFF);
    code
}

#[test]
fn a_guest_that_scribbles_over_configuration_space_only_hurts_itself() {
    need_kvm!();
    // Functions 0 of devices 0 to 7, every byte of their 256, unaligned too.
    let mut vmm = Vmm::running(&scribble(0xe000_0000, 0x3_80ff));
    let kind = ShutdownKind::PowerOff;
    assert_eq!(vmm.event(), Event::GuestShutdown(GuestShutdown { kind }));
    assert!(vmm.wait().success());
}
