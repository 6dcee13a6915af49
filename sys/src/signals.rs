//! Signal dispositions and the signal mask of a process that is about to execute another program.
//!
//! `execve(2)` resets handlers, but an ignored signal stays ignored and a blocked one stays blocked
//! in the new program. Rust's runtime ignores SIGPIPE in every program, and [`Command`] undoes that
//! for its children. It leaves others: glibc's posix_spawn(3) ignores the real-time signals that it
//! uses itself in the new program.

use std::{io, os::unix::process::CommandExt, process::Command};

/// Highest signal number of Linux (`_NSIG` of asm/signal.h).
const SIGNAL_MAX: libc::c_int = 64;

/// Size of the kernel's signal set in bytes.
const SET_BYTES: usize = SIGNAL_MAX as usize / 8;

/// `struct sigaction` of the kernel, which differs from the C library's: handler, flags, restorer
/// and mask. Architectures without a restorer have their mask one word earlier; zeros fit both.
const DEFAULT_ACTION: [u64; 4] = [0; 4];

/// Gives every signal its default disposition and unblocks all of them.
///
/// The system calls are made directly because the C library keeps some real-time signals for itself
/// and refuses to change them.
///
/// # Errors
/// The kernel's; none is known.
pub fn reset_all() -> io::Result<()> {
    reset_dispositions(|_| true)?;
    let none = [0u8; SET_BYTES];
    // SAFETY: the new set lives through the call and has the size that is given; no old set is
    // asked for.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            none.as_ptr(),
            std::ptr::null_mut::<u8>(),
            SET_BYTES,
        )
    };
    check(result)
}

/// Makes the program of `command` begin with default dispositions and no blocked signal.
pub fn reset_in(command: &mut Command) -> &mut Command {
    // SAFETY: the closure runs between fork and exec and makes system calls alone, on its own
    // stack; those are async-signal-safe.
    unsafe { command.pre_exec(reset_all) }
}

/// Undoes what this process inherited: gives every signal but SIGPIPE, which Rust's runtime ignores
/// on purpose, its default disposition. To be called first of all in `main`, before anything
/// installs a handler.
///
/// # Errors
/// The kernel's; none is known.
pub fn reset_inherited() -> io::Result<()> {
    // Signals with a handler are the runtime's (stack overflow); none is inherited with one.
    reset_dispositions(|signal| signal != libc::SIGPIPE && is_ignored(signal))
}

fn reset_dispositions(wanted: impl Fn(libc::c_int) -> bool) -> io::Result<()> {
    for signal in 1..=SIGNAL_MAX {
        if matches!(signal, libc::SIGKILL | libc::SIGSTOP) || !wanted(signal) {
            continue;
        }
        // SAFETY: the structure lives through the call and is at least as large as the kernel's; a
        // default disposition calls no code of this process.
        let result = unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT_ACTION.as_ptr(),
                std::ptr::null_mut::<u64>(),
                SET_BYTES,
            )
        };
        check(result)?;
    }
    Ok(())
}

fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = DEFAULT_ACTION;
    // SAFETY: no new action is given, and the kernel writes at most the size of its own structure,
    // which `action` has.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            std::ptr::null::<u64>(),
            action.as_mut_ptr(),
            SET_BYTES,
        )
    };
    result == 0 && action[0] == libc::SIG_IGN as u64
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen_by(command: &mut Command) -> String {
        let output = command
            .args(["^Sig[BI]", "/proc/self/status"])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn a_program_begins_with_default_signals() {
        let blocked = nix::sys::signal::SigSet::all();
        blocked.thread_block().unwrap();
        // SAFETY: ignoring a signal calls no code; no other test of this process expects SIGURG.
        unsafe { libc::signal(libc::SIGURG, libc::SIG_IGN) };
        let without = seen_by(&mut Command::new("grep"));
        assert!(without.contains("400000"), "SIGURG is inherited: {without}");
        let with = seen_by(reset_in(&mut Command::new("grep")));
        let none = "0000000000000000";
        assert_eq!(with, format!("SigBlk:\t{none}\nSigIgn:\t{none}\n"));
        assert!(is_ignored(libc::SIGURG) && is_ignored(libc::SIGPIPE));
        reset_inherited().unwrap();
        assert!(!is_ignored(libc::SIGURG) && is_ignored(libc::SIGPIPE));
        blocked.thread_unblock().unwrap();
    }
}
