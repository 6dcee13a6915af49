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

use pericarp_runtime_config::LogLevel;
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

/// The least important lines that are written: what the operator wants, more when containerd itself
/// is asked for more.
fn level(wanted: LogLevel, debug: bool) -> Level {
    let level = match wanted {
        LogLevel::Error => Level::ERROR,
        LogLevel::Warn => Level::WARN,
        LogLevel::Info => Level::INFO,
        LogLevel::Debug => Level::DEBUG,
        LogLevel::Trace => Level::TRACE,
    };
    if debug {
        level.max(Level::DEBUG)
    } else {
        level
    }
}

/// Sends this process's log to the FIFO in the current directory; without one there is no log.
pub(crate) fn to_containerd(wanted: LogLevel, debug: bool) {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("log");
    let Ok(fifo) = opened else { return };
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_target(false)
        .with_max_level(level(wanted, debug))
        .with_writer(Mutex::new(Fifo(fifo)))
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerds_debug_level_adds_and_never_takes_away() {
        assert_eq!(level(LogLevel::Warn, false), Level::WARN);
        assert_eq!(level(LogLevel::Error, true), Level::DEBUG);
        assert_eq!(level(LogLevel::Trace, true), Level::TRACE);
    }
}
