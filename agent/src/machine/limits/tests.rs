//! Formulas against what kernels computed, and a made-up `/proc` that grows.

use std::fs;

use pericarp_protocol::guest::ResourceLimit as Wire;

use super::*;

const ZONES: &str = "\
Node 0, zone      DMA
  pages free     3840
        high     17
        spanned  4095
        managed  3840
Node 0, zone    DMA32
        high     3920
        managed  772807
Node 0, zone   Normal
        high     23944
        managed  4718592
Node 0, zone  Movable
        high     32
        managed  9000000
";

/// What a kernel with 24,683,652 KiB computed: one of another version, whose inodes are larger by
/// 8 bytes, and whose memory had grown a little since.
#[test]
fn formulas_agree_with_a_kernel() {
    let memory = Memory {
        total_bytes: 24_683_652 << 10,
        buffer_pages: 6_141_856,
    };
    let node = Node {
        pid_max: 4 << 20,
        ..Node::default()
    };
    let computed = |path: &str| {
        let limit = LIMITS.iter().find(|limit| limit.path.ends_with(path));
        (limit.unwrap().numbers)(&memory, &node)
    };
    for (path, expected) in [
        ("kernel/threads-max", 192_729),
        ("user/max_user_namespaces", 96_364),
        ("fs/file-max", 2_466_165),
        ("inotify/max_user_watches", 192_536),
        ("fanotify/max_user_marks", 205_039),
        ("epoll/max_user_watches", 5_491_489),
        ("ipv4/tcp_max_orphans", 131_072),
        ("ipv4/tcp_max_tw_buckets", 131_072),
        ("ipv4/tcp_max_syn_backlog", 2048),
        ("inet_peer_threshold", 65_664),
        ("nf_conntrack_max", 262_144),
        ("nf_conntrack_expect_max", 4096),
        ("max_user_bgreq", 7871),
    ] {
        let found = computed(path)[0];
        assert!(
            found.abs_diff(expected) <= expected / 50,
            "{path}: {found}, not {expected}"
        );
    }
    assert_eq!(computed("tcp_mem"), [287_898, 383_866, 575_796]);
    assert_eq!(computed("udp_mem"), [575_799, 767_732, 1_151_598]);
    assert_eq!(computed("tcp_wmem"), [0, 0, 4 << 20]);
    assert_eq!(buffer_pages(ZONES), 3823 + 768_887 + 4_694_648);
    assert_eq!(
        total_bytes("MemTotal:  24683652 kB\n"),
        Some(memory.total_bytes)
    );
}

/// A made-up root, with the files of a kernel that booted with 256 MiB.
fn root() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in [
        ("proc/sys/kernel/pid_max", "32768\n"),
        ("proc/sys/kernel/threads-max", "1871\n"),
        ("proc/sys/user/max_user_namespaces", "935\n"),
        ("proc/sys/fs/nr_open", "1048576\n"),
        ("proc/sys/fs/file-max", "23000\n"),
        ("proc/sys/net/ipv4/tcp_mem", "2604\t3473\t5208\n"),
        ("proc/sys/net/ipv4/tcp_rmem", "4096\t131072\t500000\n"),
    ] {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    has_memory(&root, 256);
    root
}

fn has_memory(root: &tempfile::TempDir, mib: u64) {
    let meminfo = format!("MemTotal: {} kB\nMemFree: 1 kB\n", mib << 10);
    fs::write(root.path().join("proc/meminfo"), meminfo).unwrap();
    let zones = format!("Node 0, zone Normal\n high 0\n managed {}\n", mib << 8);
    fs::write(root.path().join("proc/zoneinfo"), zones).unwrap();
}

fn limits(root: &tempfile::TempDir) -> Limits {
    Limits {
        root: Some(root.path().to_owned()),
        state: Mutex::default(),
    }
}

fn resource(resource: u32, soft: u64, hard: u64) -> Wire {
    Wire {
        resource,
        soft,
        hard,
        ..Default::default()
    }
}

#[test]
fn threads_and_files_are_the_nodes_at_least() {
    let root = root();
    let at = |path: &str| {
        let text = fs::read_to_string(root.path().join("proc/sys").join(path)).unwrap();
        text.trim().to_owned()
    };
    let limits = limits(&root);
    let node = NodeLimits {
        resources: vec![
            resource(6, 23_630, 23_630),
            resource(7, 1024, 1 << 40),
            resource(8, u64::MAX, u64::MAX),
        ],
        threads_max: 47_261,
        pid_max: 4_194_304,
        file_max: 600_000,
        nr_open: 2_000_000,
        ..Default::default()
    };
    limits.set(&node).unwrap();
    assert_eq!(at("kernel/pid_max"), "4194304");
    assert_eq!(at("kernel/threads-max"), "47261");
    assert_eq!(at("user/max_user_namespaces"), "23630");
    assert_eq!(at("fs/file-max"), "600000");
    assert_eq!(at("fs/nr_open"), "2000000");
    // No more than the kernel can give.
    assert_eq!(
        limits.of_processes(),
        [
            (6, 23_630, 23_630),
            (7, 1024, 2_000_000),
            (8, u64::MAX, u64::MAX)
        ]
    );
}

#[test]
fn threads_have_numbers() {
    let root = root();
    let limits = limits(&root);
    let node = NodeLimits {
        threads_max: 47_261,
        ..Default::default()
    };
    limits.set(&node).unwrap();
    let threads = fs::read_to_string(root.path().join("proc/sys/kernel/threads-max")).unwrap();
    assert_eq!(threads, "32768");
}

#[test]
fn limits_follow_memory_unless_somebody_set_them() {
    let root = root();
    let file = |path: &str| root.path().join("proc/sys").join(path);
    let at = |path: &str| fs::read_to_string(file(path)).unwrap();
    let limits = limits(&root);
    limits.set(&NodeLimits::new()).unwrap();
    let before = at("kernel/threads-max");
    fs::write(file("net/ipv4/tcp_mem"), "1 2 3").unwrap();
    limits.follow();
    assert_eq!(at("kernel/threads-max"), before);
    has_memory(&root, 4096);
    limits.follow();
    assert_eq!(at("kernel/threads-max"), "32768");
    assert_eq!(at("net/ipv4/tcp_rmem"), "4096 131072 6291456");
    assert_eq!(at("net/ipv4/tcp_mem"), "1 2 3");
    assert_eq!(at("fs/file-max"), "419430");
    // They do not go down.
    has_memory(&root, 256);
    limits.follow();
    assert_eq!(at("fs/file-max"), "419430");
    assert!(!file("net/ipv4/udp_mem").exists());
}

#[test]
fn limits_are_checked() {
    let limits = Limits::new(false);
    let refusal = |resources: Vec<Wire>| {
        let node = NodeLimits {
            resources,
            ..Default::default()
        };
        limits.set(&node).unwrap_err().to_string()
    };
    assert!(refusal(vec![resource(16, 0, 0)]).starts_with("node_limits.resources: 16 is not"));
    assert!(refusal(vec![resource(1, 2, 1)]).contains("soft limit 2 is above"));
    assert!(refusal(vec![resource(1, 0, 0); 2]).contains("occurs twice"));
    assert!(refusal(vec![resource(1, 0, 0); 17]).contains("more than 16"));
    assert_eq!(limits.of_processes(), []);
}

#[test]
fn containers_leave_threads_for_the_agent() {
    let of = super::threads_of_containers;
    assert_eq!(of(47_261, 64 << 30), 47_261 - 256);
    assert_eq!(of(47_261, 512 << 20), 16_384, "half of memory in stacks");
    assert_eq!(of(300, 64 << 20), 256, "some, however small");
}
