//! Plays the host for one agent in a real virtual machine: boots it by a command, speaks to it as
//! the shim does, and checks what it finds.
//!
//! ```text
//! host FOLDER COMMAND [key=value ...]
//!   stdin_mib=N   what goes through stdin and back
//!   containers=N  how many are created and deleted, one after another
//!   pause_s=N     how long the machine stands still when the guest's log says VM-PAUSE
//!   hello=1       nothing but the hello is wanted
//!   panic=1       the guest ends by a panic of its kernel
//! ```
//!
//! `COMMAND` is run by `sh`. It starts a machine whose connection to the agent's port goes to
//! `FOLDER/agent.sock` and whose ports are reached by `FOLDER/vsock.sock`; at PCI address 00:06.0
//! is an ext4 disk with a root file system for containers. `vmm/examples/launch.rs` does that, and
//! `tests/tests/node_agent.rs` runs both in the test node.
//!
//! Figures are printed as `key=value`, a line each; what is wrong is a panic.

#![expect(clippy::unwrap_used, reason = "a check stops where it fails")]
#![expect(clippy::print_stdout, reason = "what it finds out is its output")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::{
    collections::BTreeMap,
    env,
    path::Path,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use common::{Guest, deadline, process};
use pericarp_protocol::guest::{
    BlockDevice, ConfigureSandboxRequest, Empty, Event, EventsRequest, ExecRequest, NodeLimits,
    ResizeTerminalRequest, ResourceLimit, StatsRequest, Storage, Streams, storage::Source,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
};

/// Where the disk with the containers' root file system is mounted.
const ROOTFS: &str = "/run/pericarp/rootfs";

/// Containers before the first look: caches fill, and the reaper's and runtime's tables grow.
const CONTAINERS_BEFORE: u32 = 20;

/// By how much the agent may differ after any number of containers: its allocator's granularity.
const AGENT_GROWTH_KIB_MAX: u64 = 64;

/// By how much memory that nobody can reclaim may differ: caches of the kernel's allocator. One
/// forgotten cgroup a container is more, even in a short run.
const GUEST_GROWTH_KIB_MAX: u64 = 512;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut arguments = env::args().skip(1);
    let (folder, command) = (arguments.next().unwrap(), arguments.next().unwrap());
    let options: BTreeMap<String, u32> = arguments
        .map(|argument| {
            let (key, value) = argument.split_once('=').unwrap();
            (key.to_owned(), value.parse().unwrap())
        })
        .collect();
    let number = |key: &str, default| options.get(key).copied().unwrap_or(default);

    let guest = Guest::in_machine(&command, Path::new(&folder), Path::new(ROOTFS)).await;
    println!("kernel={}", guest.hello.kernel_release);
    println!("features={}", guest.hello.features.join(","));
    println!("agent_started_us={}", guest.hello.started_us);
    println!("agent_ready_us={}", guest.hello.ready_us);
    if number("hello", 0) == 1 {
        power_off(guest).await;
        return;
    }
    if number("panic", 0) == 1 {
        configure(&guest, &[("vm.panic_on_oom", "2")]).await;
        until_panic(&guest).await;
        guest.ended();
        return;
    }
    configure(&guest, &[]).await;
    look(&guest, "fresh").await;
    inherited(&guest).await;
    terminals(&guest).await;
    let forever = ttrpc::context::Context::default();
    let events = guest.client.events(forever, &EventsRequest::new()).await;
    let mut events = events.unwrap();
    out_of_memory(&guest, &mut events).await;
    clock_after_pause(&guest, number("pause_s", 5)).await;
    through_stdin(&guest, number("stdin_mib", 16)).await;
    many(&guest, number("containers", 20)).await;
    surprise_removal(&guest, &mut events).await;
    power_off(guest).await;
}

async fn power_off(guest: Guest) {
    let off = guest.client.power_off(deadline(), &Empty::new()).await;
    off.unwrap();
    guest.ended();
}

async fn configure(guest: &Guest, sysctls: &[(&str, &str)]) {
    let disk = Storage {
        mount_point: ROOTFS.to_owned(),
        source: Some(Source::BlockDevice(BlockDevice {
            pci_address: "0000:00:06.0".to_owned(),
            fs_type: "ext4".to_owned(),
            ..Default::default()
        })),
        ..Default::default()
    };
    let sysctls = sysctls.iter();
    let request = ConfigureSandboxRequest {
        sandbox_id: "sandbox".to_owned(),
        hostname: "pod".to_owned(),
        entropy: vec![1; 64],
        storages: vec![disk],
        sysctls: sysctls
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
        node_limits: Some(node_limits()).into(),
        ..Default::default()
    };
    guest
        .client
        .configure_sandbox(deadline(), &request)
        .await
        .unwrap();
    let stats = guest
        .client
        .stats(deadline(), &StatsRequest::default())
        .await
        .unwrap();
    assert_eq!(stats.file_systems.len(), 1);
    assert!(stats.file_systems[0].capacity_bytes > 1 << 20);
}

/// A node's limits: more threads, descriptors and process numbers than a small guest has.
fn node_limits() -> NodeLimits {
    let limit = |resource, soft, hard| ResourceLimit {
        resource,
        soft,
        hard,
        ..Default::default()
    };
    NodeLimits {
        resources: vec![limit(6, 23_630, 23_630), limit(7, 1024, 2_000_000)],
        threads_max: 47_261,
        pid_max: 4_194_304,
        file_max: 500_000,
        nr_open: 2_000_000,
        ..Default::default()
    }
}

/// What a process has that nobody asked for: limits, signals, devices.
async fn inherited(guest: &Guest) {
    let script = "ulimit -n; ulimit -Hn; ulimit -u; \
        cat /proc/sys/kernel/threads-max /proc/sys/kernel/pid_max /proc/sys/fs/file-max \
        /proc/sys/user/max_user_namespaces; \
        grep ^SigIgn /proc/self/status; env | grep ^A=; \
        mknod /tmp/tun c 10 200 && cat /tmp/tun 2>&1";
    let mut spec = guest.spec(&["sh", "-c", script]);
    spec["process"]["env"] = json!(["A=image", "PATH=/bin", "A=pod"]);
    spec["process"]["capabilities"] = json!({
        "bounding": ["CAP_MKNOD"], "effective": ["CAP_MKNOD"], "permitted": ["CAP_MKNOD"],
    });
    let (output, ..) = guest.run("i", &spec).await.unwrap();
    // A tunnel that is not attached to an interface is in a bad state, which is not a refusal.
    let expected = "1024\n2000000\n23630\n47261\n4194304\n500000\n23630\n\
        SigIgn:\t0000000000000000\nA=pod\ncat: read error: File descriptor in bad state\n";
    assert_eq!(output, expected);
}

/// A container without a terminal, one with, and an exec with one; a new size is seen by both.
async fn terminals(guest: &Guest) {
    let (output, errors, status) = guest
        .run("c", &guest.spec(&["sh", "-c", "hostname; id -u; exit 3"]))
        .await
        .unwrap();
    assert_eq!(
        (output.as_str(), errors.as_str(), status),
        ("pod\n0\n", "", 3)
    );

    let program = [
        "sh",
        "-c",
        "stty size; read line; stty size; echo got $line",
    ];
    let mut spec = guest.spec(&program);
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({ "width": 90, "height": 30 });
    let terminals = json!({ "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                            "options": ["newinstance", "ptmxmode=0666"] });
    spec["mounts"].as_array_mut().unwrap().push(terminals);
    let (streams, mut stream) = terminal_streams(guest).await;
    guest.create("t", &spec, streams).await.unwrap();
    guest.start_process("t", "").await.unwrap();
    expect(&mut stream, "30 90\r\n").await;

    let exec = json!({ "user": { "uid": 5, "gid": 6 }, "args": program, "terminal": true,
                       "env": ["PATH=/bin"], "cwd": "/" });
    let (streams, mut exec_stream) = terminal_streams(guest).await;
    let request = ExecRequest {
        container_id: "t".to_owned(),
        exec_id: "e".to_owned(),
        oci_process: serde_json::to_vec(&exec).unwrap(),
        streams: Some(streams).into(),
        terminal_width: 70,
        terminal_height: 20,
        ..Default::default()
    };
    guest.client.exec(deadline(), &request).await.unwrap();
    guest.start_process("t", "e").await.unwrap();
    expect(&mut exec_stream, "20 70\r\n").await;

    for (exec_id, stream) in [("e", &mut exec_stream), ("", &mut stream)] {
        let request = ResizeTerminalRequest {
            container_id: "t".to_owned(),
            exec_id: exec_id.to_owned(),
            width: 111,
            height: 44,
            ..Default::default()
        };
        guest
            .client
            .resize_terminal(deadline(), &request)
            .await
            .unwrap();
        stream.write_all(b"word\n").await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "word\r\n44 111\r\ngot word\r\n");
        assert_eq!(guest.wait("t", exec_id).await.unwrap().exit_status, 0);
        guest.delete("t", exec_id).await.unwrap();
    }
}

async fn terminal_streams(guest: &Guest) -> (Streams, UnixStream) {
    let (terminal, stream) = guest.stream().await;
    let streams = Streams {
        stdin: terminal,
        stdout: terminal,
        ..Default::default()
    };
    (streams, stream)
}

async fn expect(stream: &mut UnixStream, text: &str) {
    let mut read = vec![0; text.len()];
    stream.read_exact(&mut read).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&read), text);
}

/// A container that asks for more memory than it may have.
fn greedy(guest: &Guest) -> Value {
    let mut spec = guest.spec(&["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"]);
    spec["linux"]["resources"] = json!({ "memory": { "limit": 16 << 20, "swap": 16 << 20 } });
    spec
}

type Events = ttrpc::asynchronous::ClientStreamReceiver<Event>;

async fn out_of_memory(guest: &Guest, events: &mut Events) {
    guest
        .create("o", &greedy(guest), Streams::default())
        .await
        .unwrap();
    guest.start_process("o", "").await.unwrap();
    let end = guest.wait("o", "").await.unwrap();
    assert_eq!((end.exit_status, end.oom_killed), (137, true));
    let event = events.recv().await.unwrap();
    assert_eq!(event.unwrap().out_of_memory().container_id, "o");
    guest.delete("o", "").await.unwrap();
}

/// The wall clock is the host's again when the machine was paused.
async fn clock_after_pause(guest: &Guest, pause_s: u32) {
    // As much as whole seconds and a busy computer can hide.
    const SLACK_S: u64 = 2;
    let script = "while read word; do [ $word = date ] || echo '<1>VM-PAUSE' >/dev/kmsg; \
                  date +%s; done";
    let mut spec = guest.spec(&["sh", "-c", script]);
    let kmsg = json!({ "path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11 });
    spec["linux"]["devices"] = json!([kmsg]);
    spec["linux"]["resources"] = json!({ "devices": [
        { "allow": true, "type": "c", "major": 1, "minor": 11, "access": "rwm" },
    ] });
    let (mut into, out) = guest.start_piped("p", &spec).await;
    let mut lines = BufReader::new(out).lines();
    let mut word = "date\n";
    let began = Instant::now();
    let mut behind_before = None;
    // The pause falls into some round trip, which then takes as long. Its own answer may be from
    // before the pause: the next one counts.
    let mut paused = false;
    loop {
        let asked = Instant::now();
        into.write_all(word.as_bytes()).await.unwrap();
        let line = lines.next_line().await.unwrap().unwrap();
        let here = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let behind = here.abs_diff(line.parse().unwrap());
        let Some(before) = behind_before else {
            behind_before = Some(behind);
            word = "pause\n";
            continue;
        };
        word = "date\n";
        if paused {
            assert!(
                behind <= before + SLACK_S,
                "{before} s before, {behind} s after"
            );
            println!("clock_behind_s={behind}");
            break;
        }
        paused = asked.elapsed().as_secs() + 1 >= u64::from(pause_s);
        assert!(
            began.elapsed() < common::BOOT_MAX,
            "the machine was not paused"
        );
    }
    into.shutdown().await.unwrap();
    assert_eq!(guest.wait("p", "").await.unwrap().exit_status, 0);
    guest.delete("p", "").await.unwrap();
}

/// Ends the guest by its kernel: it shall panic when memory is out.
async fn until_panic(guest: &Guest) {
    guest
        .create("o", &greedy(guest), Streams::default())
        .await
        .unwrap();
    // The answers get lost with the guest.
    let _ = guest.start_process("o", "").await;
    guest.wait("o", "").await.unwrap_err();
}

/// Each block carries its number, so that a lost or moved byte shows.
async fn through_stdin(guest: &Guest, blocks: u32) {
    let (mut into, mut out) = guest.start_piped("s", &guest.spec(&["cat"])).await;
    let began = Instant::now();
    let first: Vec<u8> = (0..1u64 << 17)
        .flat_map(|word| (word * word).to_le_bytes())
        .collect();
    let stamp = |block: &mut [u8], number: u32| {
        for page in block.chunks_exact_mut(4096) {
            page[..4].copy_from_slice(&number.to_le_bytes());
        }
    };
    let mut expected = first.clone();
    let writer = tokio::spawn(async move {
        let mut block = first;
        for number in 0..blocks {
            stamp(&mut block, number);
            into.write_all(&block).await.unwrap();
        }
        into.shutdown().await.unwrap();
        into
    });
    let mut block = vec![0; 1 << 20];
    for number in 0..blocks {
        out.read_exact(&mut block).await.unwrap();
        stamp(&mut expected, number);
        assert!(block == expected, "block {number}");
    }
    assert_eq!(out.read(&mut block).await.unwrap(), 0);
    drop(writer.await.unwrap());
    assert_eq!(guest.wait("s", "").await.unwrap().exit_status, 0);
    println!("stdin_mib={blocks}");
    println!("stdin_ms={}", began.elapsed().as_millis());
    guest
        .client
        .close_stdin(deadline(), &process("s", ""))
        .await
        .unwrap();
    guest.delete("s", "").await.unwrap();
}

/// A function that goes without the host's request is told of: the balloon, by the guest's sysfs.
async fn surprise_removal(guest: &Guest, events: &mut Events) {
    const BALLOON: &str = "0000:00:04.0";
    let line = format!("echo 1 >/sys/bus/pci/devices/{BALLOON}/remove");
    let mut spec = guest.spec(&["sh", "-c", &line]);
    let sysfs = json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs" });
    spec["mounts"].as_array_mut().unwrap().push(sysfs);
    assert_eq!(guest.run("r", &spec).await.unwrap().2, 0);
    let event = events.recv().await.unwrap();
    assert_eq!(event.unwrap().device_gone().pci_address, BALLOON);
}

/// Containers one after another must leave nothing in the guest.
async fn many(guest: &Guest, count: u32) {
    let spec = guest.spec(&["true"]);
    for number in 0..CONTAINERS_BEFORE {
        guest.run(&format!("warm{number}"), &spec).await.unwrap();
    }
    let before = look(guest, "before").await;
    let began = Instant::now();
    for number in 0..count {
        let (_, _, status) = guest.run(&format!("c{number}"), &spec).await.unwrap();
        assert_eq!(status, 0);
    }
    println!("containers={count}");
    println!("containers_ms={}", began.elapsed().as_millis());
    let after = look(guest, "after").await;
    for name in ["descriptors", "mounts", "cgroups", "processes"] {
        assert_eq!(before[name], after[name], "{name}");
    }
    let grown = |names: &[&str]| {
        let sum = |figures: &BTreeMap<String, u64>| names.iter().map(|name| figures[*name]).sum();
        let (before, after): (u64, u64) = (sum(&before), sum(&after));
        after.saturating_sub(before)
    };
    assert!(grown(&["VmRSS"]) <= AGENT_GROWTH_KIB_MAX, "the agent grew");
    let kept = ["AnonPages", "Percpu", "SUnreclaim"];
    assert!(grown(&kept) <= GUEST_GROWTH_KIB_MAX, "the guest grew");
}

/// What the guest says of the agent and of itself, a figure a line; sizes are in KiB.
const LOOK: &str = r#"
number='s/:[ \t]*\([0-9]*\).*/ \1/p'
sed -n "/^Vm\(HWM\|RSS\|PTE\)\|^Rss\|^Threads/$number" /proc/1/status
sed -n "/^Rss\|^Anonymous/$number" /proc/1/smaps_rollup
sed -n "/^MemAvailable\|^Slab\|^SUnreclaim\|^AnonPages\|^Percpu/$number" /proc/meminfo
echo descriptors $(ls /proc/1/fd | wc -l)
echo mounts $(wc -l </proc/1/mountinfo)
echo cgroups $(find /sys/fs/cgroup -type d | wc -l)
set -- $(grep -ls '^Kthread:.0$' /proc/[0-9]*/status); echo processes $#
grep '^nr_d[a-z]*_\?descendants' /sys/fs/cgroup/cgroup.stat
"#;

/// Looks at the guest from a container that shares its PID namespace, and prints what it sees.
async fn look(guest: &Guest, when: &str) -> BTreeMap<String, u64> {
    let mut spec = guest.spec(&["sh", "-c", LOOK]);
    let ptrace = json!(["CAP_SYS_PTRACE"]);
    spec["process"]["capabilities"] =
        json!({ "bounding": ptrace, "effective": ptrace, "permitted": ptrace });
    spec["linux"]["namespaces"] = json!([{ "type": "mount" }]);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs" }));
    mounts.push(json!({ "destination": "/sys/fs/cgroup", "type": "cgroup2", "source": "cgroup" }));
    let (output, errors, status) = guest.run("look", &spec).await.unwrap();
    assert_eq!((errors.as_str(), status), ("", 0));
    let figures: BTreeMap<String, u64> = output
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect();
    for (name, value) in &figures {
        println!("{when}.{name}={value}");
    }
    figures
}
