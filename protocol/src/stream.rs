//! The header line of a connection to the guest's [`STREAM_PORT`](crate::STREAM_PORT).
//!
//! Shapes, each ended by one newline and at most [`STREAM_HEADER_BYTES_MAX`] bytes long:
//!
//! ```text
//! process <id>          a stream of a process to come; <id> is a decimal u64, not 0, unique
//! tcp <address> <port>  a connection to a listener in the pod, such as `tcp ::1 8080`
//! ```
//!
//! The agent answers `ok\n` or `error <text>\n`; after `ok` the connection is raw bytes in both
//! directions.

use std::net::IpAddr;

use crate::limits::STREAM_HEADER_BYTES_MAX;

/// What a stream connection is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Header {
    /// A standard stream of a process that a later request names by this number.
    Process(u64),
    /// A TCP connection to a listener inside the pod.
    Tcp(IpAddr, u16),
}

/// Why a header line was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Longer than [`STREAM_HEADER_BYTES_MAX`], or without its newline within that.
    #[error("stream header is longer than {STREAM_HEADER_BYTES_MAX} bytes")]
    TooLong,
    /// Not one of the two shapes.
    #[error("stream header is neither 'process <id>' nor 'tcp <address> <port>'")]
    Malformed,
}

impl Header {
    /// Parses a line without its newline.
    ///
    /// # Errors
    /// The line is too long or is none of the shapes above.
    pub fn parse(line: &[u8]) -> Result<Self, HeaderError> {
        if line.len() >= STREAM_HEADER_BYTES_MAX {
            return Err(HeaderError::TooLong);
        }
        let text = std::str::from_utf8(line).map_err(|_| HeaderError::Malformed)?;
        let words: Vec<&str> = text.split(' ').collect();
        match words.as_slice() {
            ["process", id] => match id.parse() {
                Ok(0) | Err(_) => Err(HeaderError::Malformed),
                Ok(id) => Ok(Self::Process(id)),
            },
            ["tcp", address, port] => Ok(Self::Tcp(
                address.parse().map_err(|_| HeaderError::Malformed)?,
                port.parse().map_err(|_| HeaderError::Malformed)?,
            )),
            _ => Err(HeaderError::Malformed),
        }
    }
}

impl std::fmt::Display for Header {
    /// The line with its newline.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Process(id) => writeln!(f, "process {id}"),
            Self::Tcp(address, port) => writeln!(f, "tcp {address} {port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trips() {
        for header in [
            Header::Process(1),
            Header::Process(u64::MAX),
            Header::Tcp("127.0.0.1".parse().unwrap(), 80),
            Header::Tcp("::1".parse().unwrap(), 65535),
        ] {
            let line = header.to_string();
            assert_eq!(
                Header::parse(line.trim_end_matches('\n').as_bytes()),
                Ok(header)
            );
        }
    }

    #[test]
    fn header_refuses_other_lines() {
        for line in [
            "",
            "process",
            "process 0",
            "process -1",
            "process 1 2",
            "tcp ::1",
            "tcp localhost 1",
            "tcp ::1 65536",
            "udp ::1 1",
        ] {
            assert_eq!(
                Header::parse(line.as_bytes()),
                Err(HeaderError::Malformed),
                "{line:?}"
            );
        }
        assert_eq!(
            Header::parse(&[b'p'; STREAM_HEADER_BYTES_MAX]),
            Err(HeaderError::TooLong)
        );
    }
}
