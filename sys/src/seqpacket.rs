//! Messages with descriptors on a `SOCK_SEQPACKET` unix socket.

use std::{
    io::{self, IoSlice},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};

use crate::rights;

/// The most descriptors of one message (`SCM_MAX_FD` of the kernel).
pub const DESCRIPTORS_MAX: usize = rights::DESCRIPTORS_MAX;

/// One message.
#[derive(Debug)]
pub struct Received {
    /// Bytes of it in the buffer; 0 is the end of the connection.
    pub length: usize,
    /// Its descriptors, close-on-exec.
    pub descriptors: Vec<OwnedFd>,
    /// The buffer was too small for it, or the process could take no more descriptors.
    pub truncated: bool,
}

/// A connected pair, close-on-exec.
///
/// # Errors
/// The kernel's.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?)
}

/// Sends one message. It goes whole or not at all.
///
/// # Errors
/// The kernel's; `EPIPE` without a signal when the peer is gone.
pub fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    debug_assert_eq!(sent, bytes.len(), "datagrams are never split");
    Ok(())
}

/// Receives one message.
///
/// # Errors
/// The kernel's; `EAGAIN` on a socket that does not block.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let received = rights::receive(socket, buffer)?;
    Ok(Received {
        length: received.length,
        descriptors: received.descriptors,
        truncated: received.bytes_lost || received.descriptors_lost,
    })
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, os::fd::AsFd};

    use super::*;

    #[test]
    fn a_message_carries_bytes_and_descriptors() {
        let (left, right) = pair().unwrap();
        let (mut reader, writer) = {
            let (reader, writer) = nix::unistd::pipe().unwrap();
            (File::from(reader), writer)
        };
        send(left.as_fd(), b"hello", &[writer.as_fd()]).unwrap();
        drop(writer);
        let mut buffer = [0; 8];
        let received = receive(right.as_fd(), &mut buffer).unwrap();
        assert_eq!(&buffer[..received.length], b"hello");
        assert!(!received.truncated);
        assert_eq!(received.descriptors.len(), 1);
        drop(received);
        assert_eq!(
            reader.read(&mut buffer).unwrap(),
            0,
            "all writers are closed"
        );
    }

    #[test]
    fn truncation_and_the_end_are_told() {
        let (left, right) = pair().unwrap();
        send(left.as_fd(), b"hello", &[]).unwrap();
        drop(left);
        let mut buffer = [0; 4];
        assert!(receive(right.as_fd(), &mut buffer).unwrap().truncated);
        assert_eq!(receive(right.as_fd(), &mut buffer).unwrap().length, 0);
    }
}
