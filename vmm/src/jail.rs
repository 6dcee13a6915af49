//! The jail: what the VMM gives up before the first guest instruction, in this order.
//!
//! | step | what is gone afterwards |
//! |---|---|
//! | limits | core dumps, more than [`DESCRIPTORS_MAX`] descriptors |
//! | namespaces | the host's mounts, network, IPC and name (our starter makes the PID namespace) |
//! | root | every file: the root is an empty read-only tmpfs |
//! | ids | root; supplementary groups |
//! | capabilities | all sets, the bounding set included |
//! | flags | new privileges, being traced by others of the same user, living on without the shim |
//!
//! The filters of system calls follow on each thread ([`crate::filters`]). Nothing is opened after
//! the jail; what a device needs later comes over the control socket.

use std::io;

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
    },
    unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid},
};
use pericarp_sys::capabilities;

use crate::devices::virtio::vsock::CONNECTIONS_MAX;

/// Descriptors of the process: all vsock connections, and as many again for devices and requests,
/// so that connections of a guest never leave none for the shim.
const DESCRIPTORS_MAX: u64 = 2 * CONNECTIONS_MAX as u64;

/// A folder that exists on every host, to mount the empty root on in our own mount namespace.
const MOUNT_POINT: &str = "/proc";

/// A step of the jail failed: the machine is not started.
#[derive(Debug, thiserror::Error)]
#[error("jail: {step}: {source}")]
pub(crate) struct JailError {
    step: &'static str,
    #[source]
    source: io::Error,
}

fn at<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> JailError {
    move |source| JailError {
        step,
        source: source.into(),
    }
}

/// Enters the jail, for good. The process has one thread. `memory_bytes` is the guest's memory:
/// what may be pinned for functions that are passed through.
pub(crate) fn enter(uid: u32, gid: u32, memory_bytes: u64) -> Result<(), JailError> {
    allow_pinning(memory_bytes);
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(at("no core dumps"))?;
    setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS_MAX, DESCRIPTORS_MAX)
        .map_err(at("limit of descriptors"))?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    unshare(namespaces).map_err(at("namespaces"))?;
    empty_root()?;
    setgroups(&[]).map_err(at("groups"))?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(group, group, group).map_err(at("group"))?;
    // The bounding set can only be emptied with a capability that the change of user takes away.
    for capability in 0..=capabilities::last().map_err(at("bounding set"))? {
        capabilities::drop_bounding(capability).map_err(at("bounding set"))?;
    }
    setresuid(user, user, user).map_err(at("user"))?;
    capabilities::clear_ambient().map_err(at("ambient capabilities"))?;
    capabilities::set(0, 0, 0).map_err(at("capabilities"))?;
    prctl::set_no_new_privs().map_err(at("no new privileges"))?;
    prctl::set_dumpable(false).map_err(at("not traceable"))?;
    // Cleared by the change of user, so it comes after; the end of the control socket covers the
    // time before.
    prctl::set_pdeathsig(Some(Signal::SIGKILL)).map_err(at("death with the shim"))?;
    Ok(())
}

/// Lets the guest's memory, and no more, be pinned, where the limit is lower. Few pods have it
/// pinned: where it cannot be, they are told.
fn allow_pinning(memory_bytes: u64) {
    /// Other locked memory: rings of io_uring on old kernels.
    const OTHER_BYTES: u64 = 64 << 20;
    let wanted = memory_bytes.saturating_add(OTHER_BYTES);
    if getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(soft, _)| soft < wanted) {
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, wanted, wanted);
    }
}

fn empty_root() -> Result<(), JailError> {
    let none: Option<&str> = None;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none).map_err(at("private mounts"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("tmpfs"),
        MOUNT_POINT,
        Some("tmpfs"),
        flags,
        Some("size=4k,nr_inodes=1,mode=555"),
    )
    .map_err(at("empty root"))?;
    chdir(MOUNT_POINT).map_err(at("empty root"))?;
    // pivot_root(2) with the same folder twice stacks the old root on the new one, where it can be
    // taken off.
    pivot_root(".", ".").map_err(at("change of root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(at("the old root"))?;
    chdir("/").map_err(at("empty root"))?;
    let read_only = flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, "/", none, read_only, none).map_err(at("read-only root"))
}
