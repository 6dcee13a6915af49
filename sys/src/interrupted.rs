//! System calls that a signal or a stop interrupts.

use std::io;

/// Repeats `call` while it fails with `EINTR`. A call with a timeout begins it anew each time.
///
/// # Errors
/// The call's, but not `EINTR`.
pub fn retry<T, E: Into<io::Error>>(mut call: impl FnMut() -> Result<T, E>) -> io::Result<T> {
    loop {
        match call().map_err(Into::into) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;

    #[test]
    fn only_interruptions_are_repeated() {
        let mut results = vec![Ok(7), Err(Errno::EINTR), Err(Errno::EINTR)];
        assert_eq!(retry(|| results.pop().unwrap()).unwrap(), 7);
        assert!(results.is_empty());
        let error = retry(|| Err::<(), _>(Errno::EAGAIN)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
    }
}
