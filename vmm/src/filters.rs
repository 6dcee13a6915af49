//! Filters of system calls, one for each kind of thread: what is not in the table kills the
//! process.
//!
//! Each rule has its reason. The programs are compiled from the table at start, before the jail is
//! entered.

use std::{collections::BTreeMap, io, sync::OnceLock};

use pericarp_sys::{iommufd, vfio};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// When a call is allowed.
#[derive(Debug, Clone, Copy)]
enum Only {
    /// With any arguments.
    Always,
    /// ioctl: with one of these requests.
    Requests(&'static [u32]),
    /// mmap, mprotect: without PROT_EXEC in the third argument.
    NotExecutable,
    /// fcntl: with one of these commands.
    Commands(&'static [u32]),
}

/// One system call, when it is allowed, and why.
type Rule = (libc::c_long, Only, &'static str);

use Only::{Always, Commands, NotExecutable, Requests};

/// What every thread of a Rust program needs.
const COMMON: &[Rule] = &[
    (libc::SYS_futex, Always, "locks and condition variables"),
    (
        libc::SYS_write,
        Always,
        "eventfds; the text of a panic on standard error",
    ),
    (libc::SYS_read, Always, "eventfds"),
    (libc::SYS_close, Always, "descriptors that go out of use"),
    (libc::SYS_mmap, NotExecutable, "the allocator"),
    (
        libc::SYS_munmap,
        Always,
        "the allocator; a thread's stack at its end",
    ),
    (libc::SYS_mremap, Always, "the allocator, for large vectors"),
    (libc::SYS_mprotect, NotExecutable, "the allocator"),
    (
        libc::SYS_madvise,
        Always,
        "the allocator; a thread's stack at its end",
    ),
    (libc::SYS_brk, Always, "the allocator"),
    (
        libc::SYS_sched_yield,
        Always,
        "locks of the standard library",
    ),
    (libc::SYS_rt_sigprocmask, Always, "a thread's end; abort"),
    (
        libc::SYS_rt_sigreturn,
        Always,
        "return from the handler of the signal that ends a run",
    ),
    (libc::SYS_sigaltstack, Always, "a thread's end"),
    (
        libc::SYS_restart_syscall,
        Always,
        "a call that a stop interrupted",
    ),
    (
        libc::SYS_clock_gettime,
        Always,
        "where the vDSO cannot tell the time",
    ),
    (libc::SYS_gettid, Always, "abort"),
    (libc::SYS_getpid, Always, "abort"),
    (libc::SYS_tgkill, Always, "interrupting vCPUs; abort"),
    (libc::SYS_exit, Always, "a thread's end"),
    (libc::SYS_exit_group, Always, "the process's end"),
];

/// KVM on a vCPU's own thread. The numbers are those of uapi/linux/kvm.h.
const KVM_OF_VCPU: &[u32] = &[
    0xae80,                // KVM_RUN
    0x4020_aea5,           // KVM_SIGNAL_MSI: a vector that waited is unmasked
    0x4020_ae76,           // KVM_IRQFD: a vector behind an eventfd is masked or unmasked
    0x4008_ae6a,           // KVM_SET_GSI_ROUTING: its message changes
    0x4040_ae79,           // KVM_IOEVENTFD: a BAR moves
    vfio::DEVICE_SET_IRQS, // a function that is passed through: vectors come into use
];

/// A vCPU's thread.
const VCPU: &[Rule] = &[
    (
        libc::SYS_ioctl,
        Requests(KVM_OF_VCPU),
        "running the vCPU, and registers of devices",
    ),
    (
        libc::SYS_eventfd2,
        Always,
        "none of its own, but a vector's when the guest sets it up",
    ),
    (
        libc::SYS_fcntl,
        Commands(&[1, 1030]),
        "F_GETFD: checks of the standard library; F_DUPFD_CLOEXEC: second handles of eventfds",
    ),
    (
        libc::SYS_pread64,
        Always,
        "registers of functions that are passed through",
    ),
    (
        libc::SYS_pwrite64,
        Always,
        "registers of functions that are passed through",
    ),
];

/// The thread that relays requests to the file-system daemon.
const RELAY: &[Rule] = &[
    (
        libc::SYS_ioctl,
        Requests(&[0x4020_aea5]),
        "KVM_SIGNAL_MSI: interrupts of its device",
    ),
    (libc::SYS_epoll_wait, Always, "its loop"),
    (libc::SYS_epoll_pwait, Always, "its loop"),
    (libc::SYS_epoll_ctl, Always, "queues that come and go"),
    (
        libc::SYS_fallocate,
        Always,
        "memory that goes back to the host",
    ),
];

/// Requests of the event loop's devices.
const LOOP_REQUESTS: &[u32] = &[
    0x4020_aea5,           // KVM_SIGNAL_MSI
    0x4020_ae76,           // KVM_IRQFD
    0x4008_ae6a,           // KVM_SET_GSI_ROUTING
    0x4040_ae79,           // KVM_IOEVENTFD
    0x4020_ae46,           // KVM_SET_USER_MEMORY_REGION: regions of devices added later
    0x8090_ae81,           // KVM_GET_REGS: this and the next ten, of a machine that is saved
    0x8138_ae83,           // KVM_GET_SREGS
    0xc008_ae88,           // KVM_GET_MSRS
    0xc008_ae91,           // KVM_GET_CPUID2
    0x8400_ae8e,           // KVM_GET_LAPIC
    0x8004_ae98,           // KVM_GET_MP_STATE
    0x8040_ae9f,           // KVM_GET_VCPU_EVENTS
    0x8080_aea1,           // KVM_GET_DEBUGREGS
    0x9000_aea4,           // KVM_GET_XSAVE
    0x8188_aea6,           // KVM_GET_XCRS
    0x8030_ae7c,           // KVM_GET_CLOCK
    0xc004_ae02,           // KVM_GET_MSR_INDEX_LIST
    0x5421,                // FIONBIO: sockets
    0x541b,                // FIONREAD: sockets and pipes
    0x8008_1272,           // BLKGETSIZE64: size of a block device
    0x1268,                // BLKSSZGET
    0x127b,                // BLKPBSZGET
    0x1277,                // BLKDISCARD
    0x127f,                // BLKZEROOUT
    0x8004_54d2,           // TUNGETIFF
    0x4004_54d0,           // TUNSETOFFLOAD
    0x4004_54d9,           // TUNSETQUEUE: the driver chooses how many queues it uses
    0x4004_54d8,           // TUNSETVNETHDRSZ
    0x4004_54dc,           // TUNSETVNETLE
    0x8004_54cf,           // TUNGETFEATURES
    0x8004_54d7,           // TUNGETVNETHDRSZ
    0x8008_af00,           // VHOST_GET_FEATURES
    0x4008_af00,           // VHOST_SET_FEATURES
    0xaf01,                // VHOST_SET_OWNER
    0xaf02,                // VHOST_RESET_OWNER
    0x4008_af03,           // VHOST_SET_MEM_TABLE
    0x4008_af10,           // VHOST_SET_VRING_NUM
    0x4028_af11,           // VHOST_SET_VRING_ADDR
    0x4008_af12,           // VHOST_SET_VRING_BASE
    0xc008_af12,           // VHOST_GET_VRING_BASE
    0x4008_af20,           // VHOST_SET_VRING_KICK
    0x4008_af21,           // VHOST_SET_VRING_CALL
    0x4008_af22,           // VHOST_SET_VRING_ERR
    0x4008_af30,           // VHOST_NET_SET_BACKEND
    0x4008_af25,           // VHOST_SET_BACKEND_FEATURES
    0x8008_af26,           // VHOST_GET_BACKEND_FEATURES
    0xc00c_aee0, // KVM_CREATE_DEVICE: its list of groups of functions that are passed through
    0x4018_aee1, // KVM_SET_DEVICE_ATTR: groups come and go
    vfio::GET_API_VERSION, // a container is one
    vfio::DEVICE_GET_INFO, // these and the rest: functions come and go
    vfio::DEVICE_GET_REGION_INFO,
    vfio::DEVICE_GET_IRQ_INFO,
    vfio::DEVICE_SET_IRQS,
    vfio::DEVICE_RESET,
    vfio::IOMMU_MAP_DMA,
    vfio::IOMMU_UNMAP_DMA,
    iommufd::IOAS_ALLOC, // these and the rest: the same by iommufd
    iommufd::IOAS_MAP,
    iommufd::IOAS_UNMAP,
    iommufd::DEVICE_BIND,
    iommufd::DEVICE_ATTACH,
];

/// The event loop.
const LOOP: &[Rule] = &[
    (libc::SYS_ioctl, Requests(LOOP_REQUESTS), "devices"),
    (libc::SYS_epoll_wait, Always, "the loop"),
    (libc::SYS_epoll_pwait, Always, "the loop"),
    (libc::SYS_epoll_ctl, Always, "descriptors of devices"),
    (libc::SYS_poll, Always, "the last messages to the shim"),
    (
        libc::SYS_eventfd2,
        Always,
        "queues of a device being activated",
    ),
    (
        libc::SYS_timerfd_create,
        Always,
        "rate limits and time-outs of a device added later",
    ),
    (
        libc::SYS_timerfd_settime,
        Always,
        "rate limits and time-outs",
    ),
    (libc::SYS_recvmsg, Always, "the control socket; vhost-user"),
    (libc::SYS_sendmsg, Always, "the control socket; vhost-user"),
    (libc::SYS_recvfrom, Always, "streams of vsock"),
    (libc::SYS_sendto, Always, "streams of vsock"),
    (libc::SYS_accept4, Always, "streams of vsock"),
    (libc::SYS_shutdown, Always, "streams of vsock"),
    (libc::SYS_getsockopt, Always, "errors of sockets"),
    (libc::SYS_setsockopt, Always, "buffers of sockets"),
    (
        libc::SYS_readv,
        Always,
        "packets and streams into guest memory",
    ),
    (
        libc::SYS_writev,
        Always,
        "packets and streams from guest memory",
    ),
    (libc::SYS_pread64, Always, "disks without io_uring"),
    (libc::SYS_pwrite64, Always, "disks without io_uring"),
    (libc::SYS_preadv, Always, "disks without io_uring"),
    (libc::SYS_pwritev, Always, "disks without io_uring"),
    (libc::SYS_preadv2, Always, "disks without io_uring"),
    (libc::SYS_pwritev2, Always, "disks without io_uring"),
    (libc::SYS_fsync, Always, "flush of disks"),
    (libc::SYS_fdatasync, Always, "flush of disks"),
    (
        libc::SYS_fallocate,
        Always,
        "discard of disks; memory that goes back to the host",
    ),
    (libc::SYS_lseek, Always, "size of a disk"),
    (libc::SYS_fstat, Always, "kind and size of files"),
    (libc::SYS_statx, Always, "kind and size of files"),
    (
        libc::SYS_newfstatat,
        Always,
        "kind and size of files, by descriptor: the root is empty",
    ),
    (libc::SYS_io_uring_setup, Always, "disks"),
    (libc::SYS_io_uring_enter, Always, "disks"),
    (libc::SYS_io_uring_register, Always, "disks"),
    (libc::SYS_getrandom, Always, "virtio-rng"),
    (
        libc::SYS_fcntl,
        Always,
        "descriptors that must not block; second handles",
    ),
    (libc::SYS_dup, Always, "second handles"),
    (libc::SYS_getrusage, Always, "statistics"),
    (libc::SYS_membarrier, Always, "the io_uring library"),
];

/// A filter could not be made or installed.
#[derive(Debug, thiserror::Error)]
#[error("filter of system calls: {0}")]
pub(crate) struct FilterError(String);

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A vCPU's.
    Vcpu,
    /// The event loop's.
    Loop,
    /// The file system's.
    Relay,
}

static VCPU_PROGRAM: OnceLock<BpfProgram> = OnceLock::new();
static LOOP_PROGRAM: OnceLock<BpfProgram> = OnceLock::new();
static RELAY_PROGRAM: OnceLock<BpfProgram> = OnceLock::new();

/// Compiles all programs.
pub(crate) fn prepare() -> Result<(), FilterError> {
    for (program, rules) in [
        (&VCPU_PROGRAM, VCPU),
        (&LOOP_PROGRAM, LOOP),
        (&RELAY_PROGRAM, RELAY),
    ] {
        let compiled = compile(rules)?;
        program.get_or_init(|| compiled);
    }
    Ok(())
}

/// Confines the calling thread, for good.
pub(crate) fn confine(kind: Kind) -> Result<(), FilterError> {
    let program = match kind {
        Kind::Vcpu => &VCPU_PROGRAM,
        Kind::Loop => &LOOP_PROGRAM,
        Kind::Relay => &RELAY_PROGRAM,
    };
    let program = program
        .get()
        .ok_or_else(|| FilterError("it is not prepared".to_owned()))?;
    seccompiler::apply_filter(program).map_err(|error| FilterError(error.to_string()))
}

/// As [`confine`], for the threads that the machine starts.
pub(crate) fn confine_vcpu() -> io::Result<()> {
    confine(Kind::Vcpu).map_err(io::Error::other)
}

/// As [`confine`], for the thread of a file system.
pub(crate) fn confine_relay() -> io::Result<()> {
    confine(Kind::Relay).map_err(io::Error::other)
}

fn compile(rules: &[Rule]) -> Result<BpfProgram, FilterError> {
    let error = |error: seccompiler::BackendError| FilterError(error.to_string());
    let mut map: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (call, only, _) in COMMON.iter().chain(rules) {
        let conditions = conditions(*only).map_err(error)?;
        map.entry(*call).or_default().extend(conditions);
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(error)?;
    let (kill, allow) = (SeccompAction::KillProcess, SeccompAction::Allow);
    let filter = SeccompFilter::new(map, kill, allow, arch).map_err(error)?;
    filter.try_into().map_err(error)
}

/// Alternatives for a call; none means always.
fn conditions(only: Only) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let equals = |values: &[u32]| {
        let rule = |value: &u32| {
            let (length, value) = (SeccompCmpArgLen::Dword, u64::from(*value));
            let condition = SeccompCondition::new(1, length, SeccompCmpOp::Eq, value)?;
            SeccompRule::new(vec![condition])
        };
        values.iter().map(rule).collect()
    };
    match only {
        Always => Ok(Vec::new()),
        Requests(values) | Commands(values) => equals(values),
        NotExecutable => {
            let executable = u64::from(libc::PROT_EXEC.cast_unsigned());
            let operator = SeccompCmpOp::MaskedEq(executable);
            let condition = SeccompCondition::new(2, SeccompCmpArgLen::Dword, operator, 0)?;
            Ok(vec![SeccompRule::new(vec![condition])?])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_programs_compile_and_every_rule_has_a_reason() {
        prepare().unwrap();
        for rules in [COMMON, VCPU, LOOP, RELAY] {
            for (index, (call, _, reason)) in rules.iter().enumerate() {
                assert!(reason.len() > 3);
                assert!(
                    rules[..index].iter().all(|(other, ..)| other != call),
                    "{call} twice"
                );
            }
        }
    }

    /// Names the test below to the process that it starts.
    const VICTIM: &str = "PERICARP_FILTER_VICTIM";

    #[test]
    fn a_forbidden_call_kills() {
        use std::{os::unix::process::ExitStatusExt, process::Command};
        if let Some(kind) = std::env::var_os(VICTIM) {
            prepare().unwrap();
            let kind = match kind.to_str() {
                Some("vcpu") => Kind::Vcpu,
                Some("loop") => Kind::Loop,
                _ => Kind::Relay,
            };
            confine(kind).unwrap();
            let _ = std::fs::File::open("/dev/null");
            std::process::exit(0);
        }
        for kind in ["vcpu", "loop", "relay"] {
            let status = Command::new(std::env::current_exe().unwrap())
                .args([
                    "filters::tests::a_forbidden_call_kills",
                    "--exact",
                    "--nocapture",
                ])
                .env(VICTIM, kind)
                .status()
                .unwrap();
            assert_eq!(status.signal(), Some(libc::SIGSYS), "{kind}: {status}");
        }
    }

    #[test]
    fn no_thread_may_open_connect_or_execute() {
        for forbidden in [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_fork,
            libc::SYS_ptrace,
            libc::SYS_mount,
            libc::SYS_setuid,
            libc::SYS_process_vm_writev,
        ] {
            for rules in [COMMON, VCPU, LOOP, RELAY] {
                assert!(
                    rules.iter().all(|(call, ..)| *call != forbidden),
                    "{forbidden}"
                );
            }
        }
    }
}
