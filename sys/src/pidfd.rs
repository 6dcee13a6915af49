//! Processes by descriptor: a number may be used again, a pidfd stands for one process for ever.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::wait::{Id, WaitPidFlag, waitid},
};

/// Opens a pidfd of `pid`.
///
/// # Errors
/// `ESRCH` when there is no such process.
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two numbers and touches no memory of this process.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor for this call, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends `signal`; 0 only asks whether the process is there.
///
/// # Errors
/// `ESRCH` when the process has ended and was collected.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: takes numbers and a null pointer, which means "as kill(2) would".
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether the process ended within `timeout_ms` (-1: waits for it). It need not be a child, and is
/// not collected.
///
/// # Errors
/// The kernel's.
pub fn wait_ended(pidfd: BorrowedFd<'_>, timeout_ms: i32) -> io::Result<bool> {
    let timeout = PollTimeout::try_from(timeout_ms).map_err(io::Error::other)?;
    let mut descriptors = [PollFd::new(pidfd, PollFlags::POLLIN)];
    loop {
        match poll(&mut descriptors, timeout) {
            Err(Errno::EINTR) => {}
            result => return Ok(result.map(|ready| ready > 0)?),
        }
    }
}

/// Waits for a child's end and collects it, unless somebody else collects it first.
///
/// # Errors
/// The kernel's, but not `ECHILD`.
pub fn collect(pidfd: impl AsFd) -> io::Result<()> {
    loop {
        match waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED) {
            Err(Errno::EINTR) => {}
            // EINVAL: nix does not know the real-time signal that ended it; it is collected all the
            // same.
            Ok(_) | Err(Errno::ECHILD | Errno::EINVAL) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_end_is_seen_and_collected_once() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pidfd = open(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(!wait_ended(pidfd.as_fd(), 0).unwrap());
        send_signal(pidfd.as_fd(), libc::SIGKILL).unwrap();
        assert!(wait_ended(pidfd.as_fd(), -1).unwrap());
        collect(&pidfd).unwrap();
        collect(&pidfd).unwrap();
        assert!(send_signal(pidfd.as_fd(), 0).is_err());
        assert!(child.try_wait().is_err());
    }
}
