//! The pseudo-terminal of a process.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use nix::{
    fcntl::{OFlag, openat},
    sys::{
        stat::{Mode, SFlag, fstat, makedev},
        statfs::{DEVPTS_SUPER_MAGIC, fstatfs},
    },
};
use pericarp_sys::{guest, terminal};

use super::{super::error::ContainerError, Step};

/// Both ends.
#[derive(Debug)]
pub(super) struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    /// A new terminal of the devpts instance whose root is `devpts`.
    pub(super) fn open(devpts: BorrowedFd<'_>) -> Result<Self, ContainerError> {
        let object = "/dev/pts/ptmx";
        // In a running container anything may have been mounted there: only the kernel's own is a
        // terminal.
        let is_devpts =
            fstatfs(devpts).step("read", object)?.filesystem_type() == DEVPTS_SUPER_MAGIC;
        if !is_devpts {
            let error = io::Error::from_raw_os_error(libc::ENODEV);
            return Err(ContainerError::kernel("open a terminal of", object, &error));
        }
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let master = openat(devpts, "ptmx", flags, Mode::empty()).step("open", object)?;
        let stat = fstat(&master).step("read", object)?;
        let is_node = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR;
        if !is_node || stat.st_rdev != makedev(5, 2) {
            let error = io::Error::from_raw_os_error(libc::ENODEV);
            return Err(ContainerError::kernel("open a terminal of", object, &error));
        }
        Self::of(master)
    }

    /// A new terminal of the guest's, for a container that mounts no devpts.
    pub(super) fn open_guests() -> Result<Self, ContainerError> {
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_NOCTTY);
        Self::of(options.open("/dev/ptmx").step("open", "/dev/ptmx")?.into())
    }

    fn of(master: OwnedFd) -> Result<Self, ContainerError> {
        let slave = terminal::open_peer(master.as_fd()).step("open", "the terminal's other end")?;
        Ok(Self { master, slave })
    }

    /// Sets columns and rows.
    pub(super) fn resize(&self, size: Option<(u16, u16)>) -> Result<(), ContainerError> {
        let Some((columns, rows)) = size else {
            return Ok(());
        };
        guest::set_terminal_size(self.master.as_fd(), columns, rows)
            .step("set the size of", "the terminal")
    }

    /// The end that the process uses.
    pub(super) fn slave(&self) -> BorrowedFd<'_> {
        self.slave.as_fd()
    }

    /// Makes the terminal the session's own and gives the end for the agent.
    pub(super) fn control(self, uid: u32) -> Result<(OwnedFd, OwnedFd), ContainerError> {
        // The user may open it by name; a terminal that cannot be given away is still usable as the
        // descriptor.
        let _ = nix::unistd::fchown(&self.slave, Some(uid.into()), None);
        terminal::set_controlling(self.slave.as_fd()).step("control", "the terminal")?;
        Ok((self.master, self.slave))
    }
}
