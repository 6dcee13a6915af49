//! Log lines to containerd, which reads them from the FIFO `log` in the bundle.
//!
//! A log never holds the pod up: when nobody reads, lines are dropped. The FIFO is opened for
//! reading too, so that a containerd that went away is no broken pipe.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    sync::Mutex,
};

use tracing::Level;

#[derive(Debug)]
struct Fifo(File);

impl Write for Fifo {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(bytes.len()),
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends this process's log to the FIFO in the current directory; without one there is no log.
pub(crate) fn to_containerd(debug: bool) {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("log");
    let Ok(fifo) = opened else { return };
    let level = if debug { Level::DEBUG } else { Level::INFO };
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_target(false)
        .with_max_level(level)
        .with_writer(Mutex::new(Fifo(fifo)))
        .init();
}
