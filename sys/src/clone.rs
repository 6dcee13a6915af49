//! `clone3(2)` as a fork, into new namespaces and with a child that belongs to the caller's parent.
//!
//! `fork` of the C library cannot say `CLONE_PARENT`, and its `clone` wants a stack of its own.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

/// Which of the two processes this is after [`fork_sibling`].
#[derive(Debug)]
pub enum Forked {
    /// The caller; the other is its sibling.
    Caller {
        /// The new process, in the caller's PID namespace.
        pid: i32,
        /// Stands for the new process whatever becomes of its number.
        pidfd: OwnedFd,
    },
    /// The new process.
    New,
}

/// Forks a process into the namespaces `flags` (`CLONE_NEW*`) and makes it a child of the caller's
/// parent, which hears of its end with SIGCHLD.
///
/// # Errors
/// `EINVAL` for the first process of a PID namespace, `EBUSY` when the process has other threads;
/// else the kernel's.
pub fn fork_sibling(flags: u64) -> io::Result<Forked> {
    fork(flags | i64::from(libc::CLONE_PARENT).cast_unsigned(), 0)
}

/// Forks a child, which the caller collects ([`crate::pidfd::collect`]).
///
/// # Errors
/// `EBUSY` when the process has other threads; else the kernel's.
pub fn fork_child() -> io::Result<Forked> {
    fork(0, libc::SIGCHLD)
}

fn fork(flags: u64, exit_signal: i32) -> io::Result<Forked> {
    if !is_single_threaded() {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero bytes are a valid `clone_args`: no flags, no stack of its own (as fork
    // does), no pointers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags | i64::from(libc::CLONE_PIDFD).cast_unsigned();
    arguments.exit_signal = i64::from(exit_signal).cast_unsigned();
    arguments.pidfd = (&raw mut pidfd).expose_provenance() as u64;
    // SAFETY:
    // - Without CLONE_VM the child has a copy of this memory, its stack included, so both return
    //   from here as after fork.
    // - This process has one thread (checked above), so no lock is held by a thread that the child
    //   lacks.
    // - `pidfd` outlives the call and is the only memory of the caller that the kernel writes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut arguments,
            size_of::<libc::clone_args>(),
        )
    };
    match result {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::New),
        pid => Ok(Forked::Caller {
            pid: i32::try_from(pid).map_err(io::Error::other)?,
            // SAFETY: the kernel made this descriptor for this call, so nothing else owns it.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
    }
}

fn is_single_threaded() -> bool {
    // unshare(2): CLONE_THREAD changes nothing in a process of one thread and is EINVAL in any
    // other. Needs no /proc, which in a container's mount namespace could be anything. SAFETY:
    // takes a number only, and with this one changes nothing.
    unsafe { libc::unshare(libc::CLONE_THREAD) == 0 }
}
