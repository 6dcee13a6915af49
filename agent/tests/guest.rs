//! The agent as the first process of a real virtual machine: its own kernel, cgroup v2 and vsock.
//!
//! Runs only where `PERICARP_GUEST_COMMAND` starts such a machine with context id 3: booted by
//! `root=` from an image with the agent as its init and a root file system for containers at
//! `/rootfs`, two vCPUs of which `maxcpus=1` starts one, and an ext4 disk at PCI address 00:05.0.
//! `PERICARP_GUEST_STDIN_MIB` sets how much goes through stdin.

#![expect(clippy::unwrap_used, reason = "a test stops where it fails")]

mod common;

use std::{env, time::Instant};

use common::{Guest, deadline, process, refusal};
use pericarp_protocol::guest::{
    BlockDevice, ConfigureSandboxRequest, Empty, EventsRequest, ExecRequest,
    OnlineResourcesRequest, StatsRequest, Storage, Streams, storage::Source,
};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// What the agent may have resident: 1 MiB of its own, and the touched pages of its binary. Those
/// are clean, and with DAX they are the host's page cache and no memory of the guest.
const RESIDENT_BYTES_MAX: u64 = 9 << 19;

#[tokio::test]
async fn the_agent_is_an_init() {
    let Ok(command) = env::var("PERICARP_GUEST_COMMAND") else {
        eprintln!("skipped: PERICARP_GUEST_COMMAND starts no machine");
        return;
    };
    let guest = Guest::in_machine(&command, 3).await;
    let (started, ready) = (guest.hello.started_us, guest.hello.ready_us);
    eprintln!(
        "kernel {}, features {:?}",
        guest.hello.kernel_release, guest.hello.features
    );
    eprintln!(
        "agent began at {started} us and was ready {} us later",
        ready - started
    );
    assert!(
        (ready - started) * 100 <= ready * 15,
        "ready after more than 15 % of the boot"
    );

    configure(&guest).await;
    let found = measure(&guest).await;
    eprintln!("fresh: {found}");
    containers(&guest).await;
    out_of_memory(&guest).await;
    through_stdin(&guest).await;
    vcpus(&guest).await;
    many(&guest).await;
    guest
        .client
        .power_off(deadline(), &Empty::new())
        .await
        .unwrap();
    guest.ended();
}

async fn configure(guest: &Guest) {
    let disk = Storage {
        mount_point: "/run/pericarp/disk".to_owned(),
        source: Some(Source::BlockDevice(BlockDevice {
            pci_address: "0000:00:05.0".to_owned(),
            fs_type: "ext4".to_owned(),
            ..Default::default()
        })),
        ..Default::default()
    };
    let request = ConfigureSandboxRequest {
        sandbox_id: "sandbox".to_owned(),
        hostname: "pod".to_owned(),
        entropy: vec![1; 64],
        storages: vec![disk.clone()],
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

    let mut absent = disk;
    absent.mount_point = "/run/pericarp/absent".to_owned();
    absent.mut_block_device().pci_address = "0000:00:1e.0".to_owned();
    let waited = Instant::now();
    let (code, text) = refusal(guest.client.add_storage(deadline(), &absent).await);
    assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION, "{text}");
    assert!(waited.elapsed().as_secs() >= 9, "{text}");
}

/// A container with a terminal, and an exec in it.
async fn containers(guest: &Guest) {
    let began = Instant::now();
    let (output, errors, status) = guest
        .run("c", &guest.spec(&["sh", "-c", "hostname; id -u; exit 3"]))
        .await
        .unwrap();
    assert_eq!(
        (output.as_str(), errors.as_str(), status),
        ("pod\n0\n", "", 3)
    );
    eprintln!(
        "a container from creation to deletion: {} ms",
        began.elapsed().as_millis()
    );

    let mut spec = guest.spec(&["sh", "-c", "stty size; read line; echo got $line"]);
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({ "width": 90, "height": 30 });
    let (terminal, mut stream) = guest.stream().await;
    let streams = Streams {
        stdin: terminal,
        stdout: terminal,
        ..Default::default()
    };
    guest.create("t", &spec, streams).await.unwrap();
    guest.start_process("t", "").await.unwrap();
    let mut size = [0; 7];
    stream.read_exact(&mut size).await.unwrap();
    assert_eq!(&size, b"30 90\r\n");

    let (stdout, mut out) = guest.stream().await;
    let exec = json!({ "user": { "uid": 5, "gid": 6 }, "args": ["id", "-u"],
                       "env": ["PATH=/bin"], "cwd": "/" });
    let request = ExecRequest {
        container_id: "t".to_owned(),
        exec_id: "e".to_owned(),
        oci_process: serde_json::to_vec(&exec).unwrap(),
        streams: Some(Streams {
            stdout,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    guest.client.exec(deadline(), &request).await.unwrap();
    guest.start_process("t", "e").await.unwrap();
    let mut said = String::new();
    out.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "5\n");
    assert_eq!(guest.wait("t", "e").await.unwrap().exit_status, 0);
    guest.delete("t", "e").await.unwrap();

    stream.write_all(b"word\n").await.unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "word\r\ngot word\r\n");
    assert_eq!(guest.wait("t", "").await.unwrap().exit_status, 0);
    guest.delete("t", "").await.unwrap();
}

async fn out_of_memory(guest: &Guest) {
    let mut events = guest
        .client
        .events(ttrpc::context::Context::default(), &EventsRequest::new())
        .await
        .unwrap();
    let mut spec = guest.spec(&["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"]);
    spec["linux"]["resources"] = json!({ "memory": { "limit": 16 << 20, "swap": 16 << 20 } });
    spec["linux"]["devices"] = json!([
        { "path": "/dev/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 438 },
    ]);
    guest.create("o", &spec, Streams::default()).await.unwrap();
    guest.start_process("o", "").await.unwrap();
    let end = guest.wait("o", "").await.unwrap();
    assert_eq!((end.exit_status, end.oom_killed), (137, true));
    let event = events.recv().await.unwrap();
    assert_eq!(event.unwrap().out_of_memory().container_id, "o");
    guest.delete("o", "").await.unwrap();
}

/// Each block carries its number, so that a lost or moved byte shows.
async fn through_stdin(guest: &Guest) {
    let blocks: u64 = env::var("PERICARP_GUEST_STDIN_MIB").map_or(64, |text| text.parse().unwrap());
    let (stdin, mut into) = guest.stream().await;
    let (stdout, mut out) = guest.stream().await;
    let streams = Streams {
        stdin,
        stdout,
        ..Default::default()
    };
    guest
        .create("s", &guest.spec(&["cat"]), streams)
        .await
        .unwrap();
    guest.start_process("s", "").await.unwrap();
    let began = Instant::now();
    let first: Vec<u8> = (0..1u64 << 17)
        .flat_map(|word| (word * word).to_le_bytes())
        .collect();
    let stamp = |block: &mut [u8], number: u64| {
        for page in block.chunks_exact_mut(4096) {
            page[..8].copy_from_slice(&number.to_le_bytes());
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
    eprintln!(
        "{blocks} MiB through stdin and back: {} ms",
        began.elapsed().as_millis()
    );
    guest
        .client
        .close_stdin(deadline(), &process("s", ""))
        .await
        .unwrap();
    guest.delete("s", "").await.unwrap();
}

async fn vcpus(guest: &Guest) {
    for count in [2, 1] {
        let request = OnlineResourcesRequest {
            vcpus: count,
            memory: true,
            ..Default::default()
        };
        let online = guest
            .client
            .online_resources(deadline(), &request)
            .await
            .unwrap();
        assert_eq!(online.vcpus, count);
    }
}

async fn many(guest: &Guest) {
    let spec = guest.spec(&["true"]);
    for number in 0..20 {
        guest.run(&format!("warm{number}"), &spec).await.unwrap();
    }
    let before = measure(guest).await;
    let began = Instant::now();
    for number in 0..200 {
        assert_eq!(guest.run(&format!("c{number}"), &spec).await.unwrap().2, 0);
    }
    eprintln!("200 containers: {} ms", began.elapsed().as_millis());
    let after = measure(guest).await;
    eprintln!("before: {before}\nafter:  {after}");
    assert_eq!(
        (before.descriptors, before.mounts, before.cgroups),
        (after.descriptors, after.mounts, after.cgroups)
    );
    assert!(
        after.rss_bytes <= before.rss_bytes + (64 << 10),
        "the agent grew"
    );
    assert!(after.rss_bytes <= RESIDENT_BYTES_MAX, "the agent has grown");
}

struct Measured {
    rss_bytes: u64,
    descriptors: u32,
    mounts: u32,
    cgroups: u32,
    available_bytes: u64,
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "agent {} KiB, {} descriptors, {} mounts, {} cgroups, {} KiB available in the guest",
            self.rss_bytes >> 10,
            self.descriptors,
            self.mounts,
            self.cgroups,
            self.available_bytes >> 10
        )
    }
}

async fn measure(guest: &Guest) -> Measured {
    let found = guest
        .client
        .diagnostics(deadline(), &Empty::new())
        .await
        .unwrap();
    Measured {
        rss_bytes: found.agent_rss_bytes,
        descriptors: found.agent_open_descriptors,
        mounts: found.mounts,
        cgroups: found.cgroups,
        available_bytes: found.memory_available_bytes,
    }
}
