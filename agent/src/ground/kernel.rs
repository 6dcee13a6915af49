//! The guest's kernel: its release and its log.

use std::{fs::OpenOptions, io::Read, os::unix::fs::OpenOptionsExt};

use pericarp_protocol::limits::KERNEL_LOG_BYTES_MAX;

use super::files;

/// Largest record of the kernel's log in bytes (`PRINTKRB_RECORD_MAX`, and its dictionary).
const LOG_RECORD_BYTES_MAX: usize = 8192;

/// Records of the kernel's log that are read: its ring holds fewer.
const LOG_RECORDS_MAX: usize = 65536;

/// The running kernel's release.
pub(crate) fn release() -> String {
    files::read("/proc/sys/kernel/osrelease")
        .map(|text| text.trim_end().to_owned())
        .unwrap_or_default()
}

/// The end of the kernel's log, one line a record (Documentation/ABI/testing/dev-kmsg).
pub(crate) fn log() -> String {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg");
    let Ok(mut records) = opened else {
        return String::new();
    };
    let mut log = String::new();
    let mut buffer = vec![0; LOG_RECORD_BYTES_MAX];
    for _ in 0..LOG_RECORDS_MAX {
        let length = match records.read(&mut buffer) {
            Ok(length) => length,
            // Overwritten while it was read: the next is there.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => continue,
            Err(_) => break,
        };
        append(&mut log, &buffer[..length]);
        if log.len() > 2 * KERNEL_LOG_BYTES_MAX {
            keep_end(&mut log);
        }
    }
    keep_end(&mut log);
    log
}

/// Adds a record's line. A container that may write to `/dev/kmsg` chooses its text.
fn append(log: &mut String, record: &[u8]) {
    let record = String::from_utf8_lossy(record);
    // priority,sequence,microseconds,flags;text
    let Some((head, text)) = record.split_once(';') else {
        return;
    };
    let time = head.split(',').nth(2).and_then(|time| time.parse().ok());
    let time_us: u64 = time.unwrap_or(0);
    let line = text.lines().next().unwrap_or_default();
    log.push_str(&format!(
        "[{:5}.{:06}] {line}\n",
        time_us / 1_000_000,
        time_us % 1_000_000
    ));
}

/// Records that are separated by NULs, which no record has.
#[cfg(feature = "fuzzing")]
pub(crate) fn read_log(records: &[u8]) {
    let mut log = String::new();
    for record in records.split(|byte| *byte == 0) {
        let lines = log.lines().count();
        append(&mut log, record);
        assert!(log.lines().count() <= lines + 1, "{record:?}");
        keep_end(&mut log);
        assert!(log.len() <= KERNEL_LOG_BYTES_MAX);
    }
}

/// Cuts whole lines from the beginning until the rest fits.
fn keep_end(log: &mut String) {
    let excess = log.len().saturating_sub(KERNEL_LOG_BYTES_MAX);
    if excess > 0 {
        let cut = log.as_bytes()[excess..]
            .iter()
            .position(|byte| *byte == b'\n');
        let cut = cut.map_or(log.len(), |position| excess + position + 1);
        log.drain(..cut);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_is_kept_by_whole_lines() {
        let mut log = "line of text\n".repeat(KERNEL_LOG_BYTES_MAX / 10);
        keep_end(&mut log);
        assert!(
            log.len() <= KERNEL_LOG_BYTES_MAX && log.starts_with("line"),
            "{}",
            log.len()
        );
        let mut short = "a\n".to_owned();
        keep_end(&mut short);
        assert_eq!(short, "a\n");
    }
}
