//! Descriptors that a process is born with.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicBool, Ordering},
};

/// Whether [`take_only`] ran.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes over the inherited descriptor `number` and closes every higher one. To be called first of
/// all in `main`, when nothing else has opened anything; a second call fails.
///
/// # Errors
/// `EBADF` when there is no such descriptor, `EBUSY` for a second call.
pub fn take_only(number: RawFd) -> io::Result<OwnedFd> {
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: takes numbers only; fails for what is not open.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let above = libc::c_uint::try_from(number).map_err(io::Error::other)? + 1;
    // SAFETY: the caller has opened nothing yet, so no owner loses its descriptor; guarded above
    // against a second call.
    if unsafe { libc::syscall(libc::SYS_close_range, above, libc::c_uint::MAX, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open (fcntl succeeded), and inherited, so no Rust value owns it; the guard lets
    // us take it once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
