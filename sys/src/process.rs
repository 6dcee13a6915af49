//! Starting a process with descriptors at fixed numbers, in a cgroup, and as the first of a PID
//! namespace.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, RawFd},
        unix::{net::UnixListener, process::CommandExt},
    },
    process::{Child, Command},
};

use nix::sched::{CloneFlags, unshare};

/// Spawns `command` with `descriptor` open at `number`.
///
/// # Errors
/// What [`Command::spawn`] or dup2(2) says.
pub fn spawn_with_descriptor(
    command: &mut Command,
    descriptor: RawFd,
    number: RawFd,
) -> io::Result<Child> {
    place_descriptor(command, descriptor, number);
    command.spawn()
}

/// How a process is placed before its first instruction.
#[derive(Debug, Default)]
pub struct Placement<'a> {
    /// (descriptor, number it shall have).
    pub descriptors: &'a [(RawFd, RawFd)],
    /// An open `cgroup.procs` (v2) or `tasks` (v1) file per hierarchy.
    pub cgroups: &'a [File],
    /// Make it PID 1 of a new PID namespace, so that all it forks dies with it.
    pub new_pid_namespace: bool,
}

/// Spawns `command` placed as asked. Blocks for as long as fork and exec take.
///
/// # Errors
/// What unshare(2), [`Command::spawn`], dup2(2) or the write to a cgroup says.
pub fn spawn_placed(command: &mut Command, placement: &Placement<'_>) -> io::Result<Child> {
    for (descriptor, number) in placement.descriptors {
        place_descriptor(command, *descriptor, *number);
    }
    for cgroup in placement.cgroups {
        let descriptor = cgroup.as_raw_fd();
        // SAFETY: the closure runs between fork and exec and calls write(2) alone, which is
        // async-signal-safe; the descriptor is open in the child because fork copies it and the
        // caller holds the file across the call.
        unsafe {
            command.pre_exec(move || {
                // "0" is the writing process itself (cgroups(7)).
                let text = b"0";
                if libc::write(descriptor, text.as_ptr().cast(), text.len()) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
    }
    if !placement.new_pid_namespace {
        return command.spawn();
    }
    // unshare(CLONE_NEWPID) concerns the children of the calling thread alone, so it happens on a
    // thread of its own.
    std::thread::scope(|scope| {
        let spawner = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWPID).map_err(io::Error::from)?;
            command.spawn()
        });
        spawner
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the spawning thread panicked")))
    })
}

/// Takes the listening unix socket that a parent left open at `number`. Call it once: a second
/// listener would close the first.
///
/// # Errors
/// When `number` is not an open socket.
pub fn take_listener(number: RawFd) -> io::Result<UnixListener> {
    // SAFETY: fcntl(2) with F_SETFD touches no memory; a number that is not open is an error.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, as fcntl(2) has just told, and nothing else in this process
    // owns it: it was inherited at a number that only the caller knows.
    let listener = unsafe { UnixListener::from_raw_fd(number) };
    // Anything but a socket is refused here.
    listener.local_addr()?;
    Ok(listener)
}

fn place_descriptor(command: &mut Command, descriptor: RawFd, number: RawFd) {
    // SAFETY: the closure runs between fork and exec and calls dup2(2) and fcntl(2) alone, which
    // are async-signal-safe; the callers of this module hold the descriptor open across the spawn.
    unsafe {
        command.pre_exec(move || {
            let result = if descriptor == number {
                libc::fcntl(number, libc::F_SETFD, 0)
            } else {
                libc::dup2(descriptor, number)
            };
            if result < 0 {
                Err(io::Error::last_os_error())
            } else {
                Ok(())
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::fd::AsRawFd, process::Stdio};

    use super::*;

    #[test]
    fn descriptor_is_at_its_number() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo hello >&9"]).stdin(Stdio::null());
        let mut child = spawn_with_descriptor(&mut command, writer.as_raw_fd(), 9).unwrap();
        drop(writer);
        drop(command);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(text, "hello\n");
    }

    #[test]
    fn first_of_its_pid_namespace() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo $$"]).stdout(Stdio::piped());
        let placement = Placement {
            new_pid_namespace: true,
            ..Placement::default()
        };
        let child = spawn_placed(&mut command, &placement).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "1\n");
    }
}
