//! Children of this process: which have ended and how, and signals by number.
//!
//! `nix` names signals by an enum without the real-time ones: a process that such a signal ends is
//! an error there.

use std::{io, mem::MaybeUninit};

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this exit code.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
}

/// A child that has ended and is not collected yet; it stays so.
#[must_use]
pub fn peek_ended() -> Option<i32> {
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    let info = wait(libc::P_ALL, 0, flags).ok()??;
    Some(info.0)
}

/// Collects the child `pid` if it has ended.
///
/// # Errors
/// `ECHILD` when it is no child of this process, or somebody collected it already.
pub fn collect(pid: i32) -> io::Result<Option<Ended>> {
    let id = libc::id_t::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    Ok(wait(libc::P_PID, id, libc::WEXITED | libc::WNOHANG)?.map(|(_, ended)| ended))
}

/// Sends signal number `signal` to `pid`.
///
/// # Errors
/// The kernel's.
pub fn send_signal(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill(2) takes two numbers and touches no memory of this process.
    if unsafe { libc::kill(pid, signal) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn wait(kind: libc::idtype_t, id: libc::id_t, flags: i32) -> io::Result<Option<(i32, Ended)>> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: `info` is writable and of the structure's own size, and outlives the call.
    if unsafe { libc::waitid(kind, id, info.as_mut_ptr(), flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroes are a valid `siginfo_t`, and the kernel writes valid values over them.
    let info = unsafe { info.assume_init() };
    // SAFETY: waitid(2) fills in the members of a SIGCHLD, or leaves the zeroes when no child is in
    // that state.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let ended = match info.si_code {
        libc::CLD_EXITED => Ended::Exited(status),
        _ => Ended::Signaled(status),
    };
    Ok(Some((pid, ended)))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    #[expect(clippy::zombie_processes, reason = "collecting it is what is tested")]
    fn a_real_time_signal_is_reported_by_number() {
        let child = Command::new("sh")
            .args(["-c", "kill -40 $$"])
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        while peek_ended() != Some(pid) {
            std::thread::yield_now();
        }
        assert_eq!(collect(pid).unwrap(), Some(Ended::Signaled(40)));
        assert!(collect(pid).is_err());
    }
}
