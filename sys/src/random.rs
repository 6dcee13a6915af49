//! Random bytes from the kernel, without a descriptor of `/dev/urandom`: who calls may have an
//! empty root.

use std::io;

/// Fills `bytes` from the kernel's generator. Never blocks: on a host whose generator is not seeded
/// yet it fails.
///
/// # Errors
/// `WouldBlock` before the host's generator is seeded (early boot only).
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        let rest = &mut bytes[filled..];
        // SAFETY: pointer and length are those of a live, exclusively borrowed slice.
        let rc =
            unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), libc::GRND_NONBLOCK) };
        match usize::try_from(rc) {
            Ok(count) => filled += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_filled() {
        // A kilobyte in which 64 bytes in a row stay zero has probability 2^-502.
        let mut bytes = [0u8; 1024];
        fill(&mut bytes).unwrap();
        assert!(
            bytes
                .chunks(64)
                .all(|chunk| chunk.iter().any(|byte| *byte != 0))
        );
        fill(&mut []).unwrap();
    }
}
