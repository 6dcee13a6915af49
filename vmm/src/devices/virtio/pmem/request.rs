//! Requests of the driver (virtio 1.2 §5.19.6): pure parsing.

/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`
const FLUSH: u32 = 0;

/// Bytes of a request: its type.
pub(crate) const REQUEST_BYTES: usize = 4;
/// Bytes of a response: its result.
pub(crate) const RESPONSE_BYTES: usize = 4;

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    /// Make what was written durable.
    Flush,
    /// A type that the specification does not define.
    Unknown(u32),
}

impl Request {
    /// Reads a request.
    pub(crate) fn parse(bytes: [u8; REQUEST_BYTES]) -> Self {
        match u32::from_le_bytes(bytes) {
            FLUSH => Self::Flush,
            other => Self::Unknown(other),
        }
    }

    /// The response's bytes: 0 for done, 1 for an error (§5.19.7.1). A read-only region has nothing
    /// to flush.
    pub(crate) fn response(self) -> [u8; RESPONSE_BYTES] {
        match self {
            Self::Flush => 0u32.to_le_bytes(),
            Self::Unknown(_) => 1u32.to_le_bytes(),
        }
    }
}
