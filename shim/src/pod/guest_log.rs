//! What the guest's kernel says, kept for a diagnosis.

use std::{os::fd::OwnedFd, path::PathBuf};

use tokio::{io::AsyncReadExt, net::unix::pipe};
use tracing::warn;

use crate::{guest::panics, host::private};

/// Bytes of the guest's log that are kept for a diagnosis.
const GUEST_LOG_BYTES_MAX: u64 = 1 << 20;

/// Without a path the log is read and dropped: the guest must not wait for it.
pub(crate) async fn keep(console: OwnedFd, path: Option<PathBuf>) {
    let path = path.unwrap_or_else(|| "/dev/null".into());
    let opened = private::file().append(true).create(true).open(path);
    let (Ok(mut reader), Ok(file)) = (pipe::Receiver::from_owned_fd(console), opened) else {
        return;
    };
    let mut file = tokio::fs::File::from_std(file);
    let mut left = GUEST_LOG_BYTES_MAX;
    let mut panic = panics::Finder::default();
    let mut buffer = vec![0; 4096];
    while let Ok(count) = reader.read(&mut buffer).await {
        if count == 0 {
            break;
        }
        if let Some(words) = panic.find(buffer.get(..count).unwrap_or_default()) {
            // The guest's own words: quoted, so that they are one line and no more.
            warn!(words, "the guest's kernel panicked");
        }
        let keep = usize::try_from(left).unwrap_or(usize::MAX).min(count);
        left = left.saturating_sub(keep as u64);
        let bytes = buffer.get(..keep).unwrap_or_default();
        // Past the bound the log is read on and dropped, so that the guest never waits for it.
        if tokio::io::AsyncWriteExt::write_all(&mut file, bytes)
            .await
            .is_err()
        {
            left = 0;
        }
        let _ = tokio::io::AsyncWriteExt::flush(&mut file).await;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn the_guests_log_is_kept_when_it_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("guest.log");
        for (wanted, kept) in [(None, None), (Some(path.clone()), Some("words"))] {
            let flags = nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK;
            let (reader, writer) = nix::unistd::pipe2(flags).unwrap();
            nix::unistd::write(&writer, b"words").unwrap();
            drop(writer);
            keep(reader, wanted).await;
            assert_eq!(fs::read_to_string(&path).ok().as_deref(), kept);
        }
    }
}
