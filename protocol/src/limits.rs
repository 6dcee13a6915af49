//! The bound of every message and table that crosses a process boundary, with the reason for each.

/// Largest `Hello` frame in bytes: a version, a kernel release and a list of features fit in a
/// fraction of it.
pub const HELLO_BYTES_MAX: usize = 4096;

/// Longest header line of a stream in bytes, its newline included.
pub const STREAM_HEADER_BYTES_MAX: usize = 256;

/// Streams that the host opened and that no process has taken yet: three per process being created
/// at once.
pub const STREAMS_PENDING_MAX: usize = 256;

/// Largest OCI specification in bytes. ttrpc itself refuses messages above 4 MiB; a pod with a
/// thousand mounts is 300 KiB.
pub const OCI_SPEC_BYTES_MAX: usize = 3 << 20;

/// Longest container, exec or sandbox id in bytes (containerd allows 76).
pub const ID_BYTES_MAX: usize = 128;

/// Containers of one pod, ended ones included until they are deleted.
pub const CONTAINERS_MAX: usize = 1024;

/// Exec processes of one container that live or wait to be deleted.
pub const EXECS_MAX: usize = 1024;

/// Resource limits of processes: one for each `RLIMIT_*` of Linux (`RLIM_NLIMITS`).
pub const RESOURCE_LIMITS_MAX: usize = 16;

/// Events that wait for the host before the oldest kind is folded into one.
pub const EVENTS_PENDING_MAX: usize = 256;

/// Seconds that a driver of the guest may take to make the devices of a function that is passed
/// through: firmware of large ones takes its time.
pub const DRIVER_SECONDS_MAX: u64 = 30;

/// Bytes of the guest's kernel log that a diagnosis carries.
pub const KERNEL_LOG_BYTES_MAX: usize = 256 << 10;

const _: () = assert!(KERNEL_LOG_BYTES_MAX < OCI_SPEC_BYTES_MAX);
