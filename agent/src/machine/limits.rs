//! Limits that a container has although nobody set them for it: those of its processes, and those
//! of the guest's kernel.
//!
//! Under runc both are the node's. A process inherits the limits with which containerd started its
//! shim, and the kernel's limits follow from the memory of the whole node. In a guest they would
//! follow from the memory that it booted with, a fraction of what the pod may use:
//!
//! - The host sends the limits that its shim inherited. Processes for which the specification says
//!   nothing get them.
//! - The kernel's limits on threads, process numbers and open files are at least the node's. They
//!   protect one pod from another on a node; here the limit on the pod's memory does, because the
//!   kernel counts threads and files as memory of the container that has them.
//! - All other limits that the kernel computes from memory at boot, and only then, are computed
//!   anew when memory was added, by the kernel's formulas ([`LIMITS`]). They only go up. A value
//!   that somebody else has set stays.
//!
//! Hash tables that the kernel makes at boot cannot grow, except that of connection tracking.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use pericarp_protocol::{guest::NodeLimits, limits::RESOURCE_LIMITS_MAX};

use crate::ground::{errors::RpcError, files, log};

/// A limit of a process: `RLIMIT_*`, soft, hard.
type ResourceLimit = (u32, u64, u64);

/// Bytes of one page, on every architecture that guests have.
const PAGE_BYTES: u64 = 4096;

/// Memory as the kernel's formulas see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Memory {
    /// `totalram_pages()` in bytes.
    total_bytes: u64,
    /// `nr_free_buffer_pages()` of `mm/page_alloc.c`: pages above the high watermark in zones that
    /// the kernel allocates from.
    buffer_pages: u64,
}

impl Memory {
    fn read(root: &Path) -> Option<Self> {
        let meminfo = files::read(root.join("proc/meminfo")).ok()?;
        let zoneinfo = files::read(root.join("proc/zoneinfo")).ok()?;
        Some(Self {
            total_bytes: total_bytes(&meminfo)?,
            buffer_pages: buffer_pages(&zoneinfo),
        })
    }
}

fn total_bytes(meminfo: &str) -> Option<u64> {
    let total = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = total.trim().strip_suffix(" kB")?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

fn buffer_pages(zoneinfo: &str) -> u64 {
    let (mut counted, mut high, mut sum) = (false, 0, 0);
    for line in zoneinfo.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            // "Node 0, zone   Normal"
            ["Node", _, "zone", name] => counted = matches!(name, "DMA" | "DMA32" | "Normal"),
            ["high", pages] => high = pages.parse().unwrap_or(u64::MAX),
            ["managed", pages] if counted => {
                sum += pages.parse().unwrap_or(0u64).saturating_sub(high);
            }
            _ => {}
        }
    }
    sum
}

/// A limit of the kernel.
struct Limit {
    /// The file, beneath the root.
    path: &'static str,
    /// What the kernel would compute if it booted now, number by number; the larger of that and
    /// what is there counts.
    numbers: fn(&Memory, &Node) -> Vec<u64>,
}

const fn limit(path: &'static str, numbers: fn(&Memory, &Node) -> Vec<u64>) -> Limit {
    Limit { path, numbers }
}

/// The limits that the kernel computes from memory at boot, in the order in which they are set,
/// with the files of Linux 6.12 that have the formulas. `min_free_kbytes` and the reserves of
/// `vm.*_reserve_kbytes` are not among them: the kernel itself lets those follow added memory.
const LIMITS: [Limit; 28] = [
    // kernel/pid.c computes it from the number of possible CPUs.
    limit("proc/sys/kernel/pid_max", |_, node| vec![node.pid_max]),
    // kernel/fork.c, set_max_threads() and fork_init().
    limit("proc/sys/kernel/threads-max", |memory, node| {
        vec![threads(memory, node)]
    }),
    limit("proc/sys/user/max_cgroup_namespaces", namespaces),
    limit("proc/sys/user/max_ipc_namespaces", namespaces),
    limit("proc/sys/user/max_mnt_namespaces", namespaces),
    limit("proc/sys/user/max_net_namespaces", namespaces),
    limit("proc/sys/user/max_pid_namespaces", namespaces),
    limit("proc/sys/user/max_time_namespaces", namespaces),
    limit("proc/sys/user/max_user_namespaces", namespaces),
    limit("proc/sys/user/max_uts_namespaces", namespaces),
    // fs/file.c has a constant, which the node may have raised.
    limit("proc/sys/fs/nr_open", |_, node| vec![node.nr_open]),
    // fs/file_table.c, files_maxfiles_init(): a tenth of memory at 1 KiB each. The kernel leaves
    // out what is in use at boot, which is little.
    limit("proc/sys/fs/file-max", |memory, node| {
        vec![(memory.total_bytes / 1024 / 10).max(node.file_max)]
    }),
    // fs/notify/inotify/inotify_user.c, inotify_user_setup(): 1 % of memory.
    limit("proc/sys/fs/inotify/max_user_watches", |memory, _| {
        let watches = memory.total_bytes / 100 / (2 * INODE_BYTES + INOTIFY_MARK_BYTES);
        vec![watches.clamp(8192, 1_048_576)]
    }),
    // fs/notify/fanotify/fanotify_user.c, fanotify_user_setup(): 1 % of memory.
    limit("proc/sys/fs/fanotify/max_user_marks", |memory, _| {
        let marks = memory.total_bytes / 100 / (2 * INODE_BYTES);
        vec![marks.clamp(8192, 1_048_576)]
    }),
    // fs/eventpoll.c, eventpoll_init(): 4 % of memory.
    limit("proc/sys/fs/epoll/max_user_watches", |memory, _| {
        vec![memory.total_bytes / 25 / EPOLL_ITEM_BYTES]
    }),
    // net/ipv4/tcp.c, tcp_init_mem() and tcp_init().
    limit("proc/sys/net/ipv4/tcp_mem", |memory, _| {
        pressure(memory.buffer_pages / 16)
    }),
    limit("proc/sys/net/ipv4/tcp_wmem", |memory, _| {
        vec![0, 0, socket_share(memory).clamp(64 << 10, 4 << 20)]
    }),
    limit("proc/sys/net/ipv4/tcp_rmem", |memory, _| {
        vec![0, 0, socket_share(memory).clamp(131_072, 6 << 20)]
    }),
    limit("proc/sys/net/ipv4/tcp_max_orphans", |memory, _| {
        vec![established(memory) / 2]
    }),
    // net/ipv4/tcp_ipv4.c, tcp_sk_init().
    limit("proc/sys/net/ipv4/tcp_max_tw_buckets", |memory, _| {
        vec![established(memory) / 2]
    }),
    limit("proc/sys/net/ipv4/tcp_max_syn_backlog", |memory, _| {
        vec![(established(memory) / 128).max(128)]
    }),
    // net/ipv4/inetpeer.c, inet_initpeers(): 1 % of memory.
    limit("proc/sys/net/ipv4/inet_peer_threshold", |memory, _| {
        let peers = memory.total_bytes / 100 / INET_PEER_BYTES;
        vec![peers.clamp(4096, 65_664)]
    }),
    // net/ipv4/udp.c, udp_init().
    limit("proc/sys/net/ipv4/udp_mem", |memory, _| {
        pressure(memory.buffer_pages / 8)
    }),
    // net/netfilter/nf_conntrack_core.c, nf_conntrack_init_start(). The table grows with its limit.
    limit(
        "proc/sys/net/netfilter/nf_conntrack_buckets",
        |memory, _| vec![tracked(memory)],
    ),
    limit("proc/sys/net/netfilter/nf_conntrack_max", |memory, _| {
        vec![tracked(memory)]
    }),
    // net/netfilter/nf_conntrack_expect.c, nf_conntrack_expect_init().
    limit(
        "proc/sys/net/netfilter/nf_conntrack_expect_max",
        |memory, _| vec![tracked(memory) / 256 * 4],
    ),
    // fs/fuse/inode.c, sanitize_global_limit().
    limit("sys/module/fuse/parameters/max_user_bgreq", fuse_requests),
    limit(
        "sys/module/fuse/parameters/max_user_congthresh",
        fuse_requests,
    ),
];

/// Sizes of structures of a 64-bit Linux 6.12: `struct inode`, `struct inotify_inode_mark`,
/// `struct epitem` with `struct eppoll_entry`, `struct inet_peer` in whole cache lines. They vary
/// by a few words with the configuration.
const INODE_BYTES: u64 = 608;
const INOTIFY_MARK_BYTES: u64 = 80;
const EPOLL_ITEM_BYTES: u64 = 184;
const INET_PEER_BYTES: u64 = 192;

/// `THREAD_SIZE` of x86-64 and of arm64 with pages of 4 KiB.
const THREAD_BYTES: u64 = 16 << 10;

/// Threads may take an eighth of memory with their stacks.
fn threads(memory: &Memory, node: &Node) -> u64 {
    let computed = memory.total_bytes / (8 * THREAD_BYTES);
    // Each thread has a number of its own.
    computed.max(node.threads_max).min(node.pid_max)
}

/// Threads that are reserved for the agent and the kernel.
const THREADS_KEPT: u64 = 256;

fn threads_of_containers(threads_max: u64, memory_bytes: u64) -> u64 {
    let stacks = memory_bytes / (2 * THREAD_BYTES);
    stacks
        .min(threads_max.saturating_sub(THREADS_KEPT))
        .max(THREADS_KEPT)
}

fn namespaces(memory: &Memory, node: &Node) -> Vec<u64> {
    vec![threads(memory, node) / 2]
}

/// Minimum, pressure and maximum of a protocol's memory in pages.
fn pressure(pages: u64) -> Vec<u64> {
    let pressure = pages.max(128);
    let low = pressure / 4 * 3;
    vec![low, pressure, 2 * low]
}

/// What one socket may use at most: 1/128 of memory.
fn socket_share(memory: &Memory) -> u64 {
    memory.buffer_pages * PAGE_BYTES / 128
}

/// Slots that the table of established connections would have (`alloc_large_system_hash()` of
/// `mm/mm_init.c`): one per 128 KiB.
fn established(memory: &Memory) -> u64 {
    let slots = memory.total_bytes.next_multiple_of(1 << 20) >> 17;
    slots.next_power_of_two().min(512 << 10)
}

/// Requests of unprivileged FUSE mounts: 1/8192 of memory, at 392 bytes each.
fn fuse_requests(memory: &Memory, _: &Node) -> Vec<u64> {
    vec![((memory.total_bytes >> 13) / 392).min(65_535)]
}

/// Connections that are tracked.
fn tracked(memory: &Memory) -> u64 {
    const LIST_HEAD_BYTES: u64 = 8;
    match memory.total_bytes {
        bytes if bytes > 4 << 30 => 262_144,
        bytes if bytes > 1 << 30 => 65_536,
        bytes => (bytes / 16_384 / LIST_HEAD_BYTES).max(1024),
    }
}

/// The node's own values of limits that are the guest's too, at least.
#[derive(Debug, Clone, Copy, Default)]
struct Node {
    threads_max: u64,
    pid_max: u64,
    file_max: u64,
    nr_open: u64,
}

/// The limits of one guest.
#[derive(Debug)]
pub(crate) struct Limits {
    /// Where `proc` is; none where the kernel is not ours to set.
    root: Option<PathBuf>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    processes: Vec<ResourceLimit>,
    node: Node,
    /// Memory for which the kernel's limits were computed.
    memory: Option<Memory>,
    /// What each file held when it was last looked at or written here.
    known: HashMap<&'static str, Vec<u64>>,
}

impl Limits {
    /// No limits yet. `in_guest` tells whether the kernel's may be set.
    pub(crate) fn new(in_guest: bool) -> Self {
        Self {
            root: in_guest.then(|| PathBuf::from("/")),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the node's limits over. To be called before anything else sets a sysctl.
    pub(crate) fn set(&self, node: &NodeLimits) -> Result<(), RpcError> {
        let mut processes = checked(node)?;
        let mut state = self.state();
        state.node = Node {
            threads_max: node.threads_max,
            pid_max: node.pid_max,
            file_max: node.file_max,
            nr_open: node.nr_open,
        };
        if let Some(root) = &self.root {
            let pid_max = numbers(&root.join("proc/sys/kernel/pid_max"));
            let own = pid_max.and_then(|numbers| numbers.first().copied());
            state.node.pid_max = node.pid_max.max(own.unwrap_or(0));
            state.known = LIMITS
                .iter()
                .filter_map(|limit| Some((limit.path, numbers(&root.join(limit.path))?)))
                .collect();
            state.memory = None;
            state.follow(root);
        }
        let root = self.root.as_deref().unwrap_or(Path::new("/"));
        // setrlimit(2): above it even root may not go.
        let nr_open = numbers(&root.join("proc/sys/fs/nr_open"));
        let nr_open = nr_open.and_then(|numbers| numbers.first().copied());
        for (resource, soft, hard) in &mut processes {
            if *resource == RLIMIT_NOFILE {
                *hard = (*hard).min(nr_open.unwrap_or(u64::MAX));
                *soft = (*soft).min(*hard);
            }
        }
        state.processes = processes;
        Ok(())
    }

    /// Lets the kernel's limits follow memory that was added. Cheap when none was.
    pub(crate) fn follow(&self) {
        if let Some(root) = &self.root {
            self.state().follow(root);
        }
    }

    /// Threads that all containers may have together. The agent needs some itself to end containers
    /// that have too many, and stacks must not fill all of memory. `None` where the agent does not
    /// run in a guest of its own.
    pub(crate) fn threads_of_containers(&self) -> Option<u64> {
        let root = self.root.as_deref()?;
        let threads = numbers(&root.join("proc/sys/kernel/threads-max"))?;
        let memory = Memory::read(root)?;
        Some(threads_of_containers(*threads.first()?, memory.total_bytes))
    }

    /// What a process gets where its specification says nothing.
    pub(crate) fn of_processes(&self) -> Vec<ResourceLimit> {
        self.state().processes.clone()
    }
}

/// `RLIMIT_NOFILE` of asm-generic/resource.h, whose numbers the contract uses.
const RLIMIT_NOFILE: u32 = 7;

/// `RLIM_NLIMITS` of asm-generic/resource.h.
const RESOURCES: u32 = 16;

fn checked(node: &NodeLimits) -> Result<Vec<ResourceLimit>, RpcError> {
    let invalid = |reason: String| RpcError::Invalid {
        field: "node_limits.resources",
        reason,
    };
    if node.resources.len() > RESOURCE_LIMITS_MAX {
        return Err(invalid(format!("more than {RESOURCE_LIMITS_MAX}")));
    }
    let mut limits: Vec<ResourceLimit> = Vec::new();
    for limit in &node.resources {
        let resource = limit.resource;
        if resource >= RESOURCES || limit.soft > limit.hard {
            return Err(invalid(format!(
                "{resource} is not a resource, or its soft limit {} is above its hard limit {}",
                limit.soft, limit.hard
            )));
        }
        if limits.iter().any(|(known, ..)| *known == resource) {
            return Err(invalid(format!("resource {resource} occurs twice")));
        }
        limits.push((resource, limit.soft, limit.hard));
    }
    Ok(limits)
}

impl State {
    fn follow(&mut self, root: &Path) {
        let memory = Memory::read(root);
        if memory.is_none() || memory == self.memory {
            return;
        }
        self.memory = memory;
        let Some(memory) = memory else { return };
        for limit in &LIMITS {
            let path = root.join(limit.path);
            // What this kernel does not have.
            let Some(current) = numbers(&path) else {
                continue;
            };
            if self.known.get(limit.path) != Some(&current) {
                continue;
            }
            let mut wanted = current.clone();
            for (number, computed) in wanted.iter_mut().zip((limit.numbers)(&memory, &self.node)) {
                *number = computed.max(*number);
            }
            if wanted == current {
                continue;
            }
            let words: Vec<_> = wanted.iter().map(u64::to_string).collect();
            if let Err(error) = files::write(&path, &words.join(" ")) {
                log::warn(format_args!(
                    "cannot set {} to {words:?}: {error}",
                    path.display()
                ));
            }
            // The kernel may round.
            if let Some(set) = numbers(&path) {
                self.known.insert(limit.path, set);
            }
        }
    }
}

/// The numbers of a file, if it can be read.
fn numbers(path: &Path) -> Option<Vec<u64>> {
    let text = files::read(path).ok()?;
    text.split_whitespace()
        .map(|word| word.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests;
