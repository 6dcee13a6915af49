//! A user namespace that no process is in, to map the owners of files by
//! ([`crate::mount_tree::map_ids`]).

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use nix::{errno::Errno, sys::wait::waitpid, unistd::Pid};

/// Makes a user namespace with these maps, lines of `<id inside> <id outside> <count>` as
/// user_namespaces(7) has them. It needs a process to be made in, which has ended on return.
///
/// # Errors
/// `EINVAL` or `EPERM` for a map that the kernel does not accept; else the kernel's.
pub fn with_maps(uid_map: &str, gid_map: &str) -> io::Result<OwnedFd> {
    let (mut near, far) = UnixStream::pair()?;
    let child = fork_into_user_namespace(&far)?;
    drop(far);
    let made = (|| {
        for (file, map) in [("uid_map", uid_map), ("gid_map", gid_map)] {
            // One write: the kernel takes the whole map at once or not at all.
            fs::write(format!("/proc/{child}/{file}"), map)?;
        }
        File::open(format!("/proc/{child}/ns/user"))
    })();
    let _ = near.write_all(&[0]);
    drop(near);
    collect(child)?;
    Ok(made?.into())
}

/// The child ends when it reads a byte from `end`, or when the other side is gone.
fn fork_into_user_namespace(end: &UnixStream) -> io::Result<i32> {
    let end = end.as_raw_fd();
    let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
    // SAFETY: without CLONE_VM and a stack this forks. Other threads of the caller are not in the
    // child and may have held any lock, so the child calls nothing but read(2) and _exit(2), with
    // memory of its own stack.
    let result = unsafe { libc::syscall(libc::SYS_clone, flags, 0usize, 0usize, 0usize, 0usize) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let mut byte = 0u8;
            // SAFETY: see above; the descriptor is the child's copy, and one byte is writable.
            unsafe {
                libc::read(end, (&raw mut byte).cast(), 1);
                libc::_exit(0)
            }
        }
        child => i32::try_from(child).map_err(io::Error::other),
    }
}

fn collect(child: i32) -> io::Result<()> {
    loop {
        match waitpid(Pid::from_raw(child), None) {
            Err(Errno::EINTR) => {}
            result => return Ok(result.map(drop)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_outlives_its_process() {
        // SAFETY: takes nothing and gives a number.
        if unsafe { libc::geteuid() } != 0 {
            eprintln!("skipped: only root may map other users");
            return;
        }
        let first = with_maps("0 65536 65536", "0 65536 65536").unwrap();
        let second = with_maps("0 65536 65536", "0 65536 65536").unwrap();
        let link = |fd: &OwnedFd| fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let first = link(&first).unwrap();
        assert!(first.to_str().unwrap().starts_with("user:["), "{first:?}");
        assert_ne!(first, link(&second).unwrap());
    }

    #[test]
    fn a_map_that_makes_no_sense_is_refused() {
        let error = with_maps("0 0 0", "0 0 0").unwrap_err();
        assert!(error.raw_os_error().is_some(), "{error}");
    }
}
