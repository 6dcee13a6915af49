//! Descriptors across a process boundary: sent over a socket, taken over from a parent, kept from a
//! child.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    sys::socket::{ControlMessage, MsgFlags, sendmsg},
};

use crate::{interrupted, rights};

/// Most descriptors that one message carries: `SCM_MAX_FD` of the kernel.
pub const DESCRIPTORS_MAX: usize = rights::DESCRIPTORS_MAX;

/// Sends some of `bytes` with all of `descriptors` and returns how many bytes went.
///
/// # Errors
/// The kernel's.
pub fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Err(Errno::EINTR) => {}
            result => return Ok(result?),
        }
    }
}

/// Receives bytes with the descriptors that came with them; 0 bytes are the end of the stream.
///
/// # Errors
/// The kernel's; `EMSGSIZE` when descriptors were lost.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let received = interrupted::retry(|| rights::receive(socket, buffer))?;
    if received.descriptors_lost {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    Ok((received.length, received.descriptors))
}

/// Takes standard input away from the process: gives it as a descriptor of its own and leaves
/// `/dev/null` in its place.
///
/// # Errors
/// The kernel's.
pub fn take_stdin() -> io::Result<OwnedFd> {
    let taken = io::stdin().as_fd().try_clone_to_owned()?;
    nix::unistd::dup2_stdin(std::fs::File::open("/dev/null")?)?;
    Ok(taken)
}

/// Marks every descriptor from 3 on to be closed by the next execve(2).
///
/// # Errors
/// The kernel's.
pub fn close_all_on_exec() -> io::Result<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: takes numbers only; with this flag nothing is closed now, so no owner loses its
    // descriptor.
    if unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
    };

    use super::*;

    #[test]
    fn a_descriptor_arrives_with_its_bytes() {
        let (near, far) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        assert_eq!(send(near.as_fd(), b"hello", &[writer.as_fd()]).unwrap(), 5);
        drop(writer);
        let mut buffer = [0; 16];
        let (length, mut descriptors) = receive(far.as_fd(), &mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"hello");
        let mut writer = std::fs::File::from(descriptors.pop().unwrap());
        assert!(descriptors.is_empty());
        writer.write_all(b"x").unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
        drop(near);
        assert_eq!(receive(far.as_fd(), &mut buffer).unwrap().0, 0);
    }
}
