//! The kernel's announcements of devices that come and go (`NETLINK_KOBJECT_UEVENT`).
//!
//! A message is `action@path`, a NUL, and `KEY=value` pairs, each ended by a NUL
//! (`lib/kobject_uevent.c`). A container with `CAP_SYS_ADMIN` over the pod's network namespace can
//! send some too, so what did not come from the kernel is not heard.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    time::Instant,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, socket,
    },
};

use super::pci::PciAddress;

/// Largest uevent in bytes (`UEVENT_BUFFER_SIZE` of the kernel, and its header).
pub(crate) const UEVENT_BYTES_MAX: usize = 4096;

/// Group of the kernel's own announcements.
const GROUP: u32 = 1;

/// A socket on which they arrive.
#[derive(Debug)]
pub(crate) struct Uevents(OwnedFd);

impl AsFd for Uevents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Uevents {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Uevents {
    /// Hears everything from now on.
    pub(crate) fn new() -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUP))?;
        Ok(Self(fd))
    }

    /// Waits until anything is announced; `false` when the deadline has passed.
    pub(crate) fn wait(&self, deadline: Instant) -> io::Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX);
        let ready = match poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(ready) => ready,
            Err(nix::Error::EINTR) => return Ok(true),
            Err(error) => return Err(error.into()),
        };
        // What it says does not matter: the caller looks again. ENOBUFS means that much was said.
        let mut buffer = [0; UEVENT_BYTES_MAX];
        while self.receive(&mut buffer).is_ok() {}
        Ok(ready > 0)
    }

    /// The next announcement; empty when somebody else than the kernel sent it.
    pub(crate) fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let (length, from) = recvfrom::<NetlinkAddr>(self.as_raw_fd(), buffer)?;
        let from_kernel = from.is_some_and(|address| address.pid() == 0);
        Ok(&buffer[..if from_kernel { length } else { 0 }])
    }
}

/// The PCI function whose removal a message announces.
pub(crate) fn removed_function(message: &[u8]) -> Option<PciAddress> {
    let mut action = None;
    let mut subsystem = None;
    let mut slot = None;
    for pair in message.split(|byte| *byte == 0).skip(1) {
        let Ok(pair) = std::str::from_utf8(pair) else {
            continue;
        };
        match pair.split_once('=') {
            Some(("ACTION", value)) => action = Some(value),
            Some(("SUBSYSTEM", value)) => subsystem = Some(value),
            Some(("PCI_SLOT_NAME", value)) => slot = Some(value),
            _ => {}
        }
    }
    let is_removal = action == Some("remove") && subsystem == Some("pci");
    PciAddress::parse(slot.filter(|_| is_removal)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(pairs: &[&str]) -> Vec<u8> {
        let mut message = b"remove@/devices/pci0000:00/0000:00:05.0\0".to_vec();
        for pair in pairs {
            message.extend(pair.as_bytes());
            message.push(0);
        }
        message
    }

    #[test]
    fn the_removal_of_a_pci_function_is_read() {
        let pairs = [
            "ACTION=remove",
            "SUBSYSTEM=pci",
            "PCI_SLOT_NAME=0000:00:05.0",
            "SEQNUM=9",
        ];
        let found = removed_function(&message(&pairs)).unwrap();
        assert_eq!(found.to_string(), "0000:00:05.0");
        for (index, other) in [
            (0, "ACTION=add"),
            (1, "SUBSYSTEM=net"),
            (2, "PCI_SLOT_NAME=../../etc"),
            (2, "PCI_SLOT_NAME"),
        ] {
            let mut pairs = pairs;
            pairs[index] = other;
            assert_eq!(removed_function(&message(&pairs)), None, "{other}");
        }
        for message in [&b""[..], b"\0", b"remove@/x", b"\0\xff=\0"] {
            assert_eq!(removed_function(message), None);
        }
    }
}
