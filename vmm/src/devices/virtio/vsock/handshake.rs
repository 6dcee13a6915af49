//! The line by which a host program asks for a connection to the guest: `CONNECT <port>\n`. Pure
//! parsing.

/// Longest line in bytes, its newline included: the word, a space and a port of ten digits, with
/// room to spare.
pub(crate) const LINE_BYTES_MAX: usize = 32;

const _: () = assert!("CONNECT 4294967295\n".len() <= LINE_BYTES_MAX);

/// What the first bytes of a stream are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Line {
    /// A whole line of `bytes` bytes that names a port of the guest.
    Port {
        /// The port.
        port: u32,
        /// Bytes of the line.
        bytes: usize,
    },
    /// The start of a line.
    Partial,
    /// Nothing that can become a line.
    Invalid,
}

/// Reads the first bytes of a stream; what is behind the line belongs to the connection.
pub(crate) fn parse(bytes: &[u8]) -> Line {
    let bounded = &bytes[..bytes.len().min(LINE_BYTES_MAX)];
    let Some(end) = bounded.iter().position(|byte| *byte == b'\n') else {
        return if bounded.len() < LINE_BYTES_MAX {
            Line::Partial
        } else {
            Line::Invalid
        };
    };
    let port = std::str::from_utf8(&bounded[..end])
        .ok()
        .and_then(|line| line.strip_prefix("CONNECT "))
        .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|digits| digits.parse().ok());
    match port {
        Some(port) => Line::Port {
            port,
            bytes: end + 1,
        },
        None => Line::Invalid,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines() {
        let port = |port, bytes| Line::Port { port, bytes };
        for (text, expected) in [
            (&b""[..], Line::Partial),
            (b"CONN", Line::Partial),
            (b"CONNECT 1025", Line::Partial),
            (b"CONNECT 1025\n", port(1025, 13)),
            (b"CONNECT 1025\nprocess x\n", port(1025, 13)),
            (b"CONNECT 4294967295\n", port(u32::MAX, 19)),
            (b"CONNECT 4294967296\n", Line::Invalid),
            (b"CONNECT -1\n", Line::Invalid),
            (b"CONNECT +1\n", Line::Invalid),
            (b"CONNECT \n", Line::Invalid),
            (b"CONNECT 1 \n", Line::Invalid),
            (b"connect 1\n", Line::Invalid),
            (b"\n", Line::Invalid),
            (b"CONNECT \xff\n", Line::Invalid),
            (&[b'C'; LINE_BYTES_MAX], Line::Invalid),
        ] {
            assert_eq!(parse(text), expected, "{:?}", String::from_utf8_lossy(text));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Line::Port { bytes: len, .. } = parse(&bytes) {
                prop_assert!(len <= LINE_BYTES_MAX && bytes[len - 1] == b'\n');
            }
        }
    }
}
