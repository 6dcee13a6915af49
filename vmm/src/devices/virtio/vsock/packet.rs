//! The packet header (virtio 1.2 §5.10.6): pure parsing and making.

/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = 44;
/// Context id of the host (§5.10.4).
pub(crate) const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`
pub(crate) const TYPE_STREAM: u16 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender receives no more.
pub(crate) const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender sends no more.
pub(crate) const SHUTDOWN_SEND: u32 = 2;

/// What a packet does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Opens a connection.
    Request,
    /// Accepts one.
    Response,
    /// Ends one at once, or refuses it.
    Reset,
    /// Ends one or both directions.
    Shutdown,
    /// Carries data.
    Data,
    /// Tells room and count.
    CreditUpdate,
    /// Asks for a [`Self::CreditUpdate`].
    CreditRequest,
}

const OPERATIONS: [(u16, Operation); 7] = [
    (1, Operation::Request),
    (2, Operation::Response),
    (3, Operation::Reset),
    (4, Operation::Shutdown),
    (5, Operation::Data),
    (6, Operation::CreditUpdate),
    (7, Operation::CreditRequest),
];

impl Operation {
    /// `None` for a number that the specification does not define.
    pub(crate) fn from_number(number: u16) -> Option<Self> {
        let mut known = OPERATIONS.iter();
        known.find(|(known, _)| *known == number).map(|(_, op)| *op)
    }

    /// `VIRTIO_VSOCK_OP_*`
    pub(crate) fn number(self) -> u16 {
        let mut known = OPERATIONS.iter();
        let found = known.find(|(_, operation)| *operation == self);
        found.expect("every operation is in the table").0
    }
}

/// `struct virtio_vsock_hdr`. From a guest it is untrusted as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Header {
    /// Context id of the sender.
    pub(crate) source_cid: u64,
    /// Context id of the receiver.
    pub(crate) destination_cid: u64,
    /// Port of the sender.
    pub(crate) source_port: u32,
    /// Port of the receiver.
    pub(crate) destination_port: u32,
    /// Bytes of data behind the header.
    pub(crate) len: u32,
    /// Stream or another.
    pub(crate) socket_type: u16,
    /// See [`Operation`].
    pub(crate) operation: u16,
    /// Of a shutdown.
    pub(crate) flags: u32,
    /// Room of the sender's receive buffer in bytes.
    pub(crate) buf_alloc: u32,
    /// Bytes that the sender has taken out of that buffer so far, modulo 2^32.
    pub(crate) fwd_cnt: u32,
}

impl Header {
    /// Reads a header; any 44 bytes are one.
    pub(crate) fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            source_cid: u64::from_le_bytes(take(&mut rest)),
            destination_cid: u64::from_le_bytes(take(&mut rest)),
            source_port: u32::from_le_bytes(take(&mut rest)),
            destination_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            socket_type: u16::from_le_bytes(take(&mut rest)),
            operation: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// The header's bytes.
    pub(crate) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields: [&[u8]; 10] = [
            &self.source_cid.to_le_bytes(),
            &self.destination_cid.to_le_bytes(),
            &self.source_port.to_le_bytes(),
            &self.destination_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.socket_type.to_le_bytes(),
            &self.operation.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut at = 0;
        for field in fields {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        }
        bytes
    }

    /// The RST that answers a packet of no connection (§5.10.6.6). Its type is the packet's, known
    /// or not.
    pub(crate) fn refusal(&self) -> Self {
        Self {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            socket_type: self.socket_type,
            operation: Operation::Reset.number(),
            ..Self::default()
        }
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (field, behind) = rest
        .split_first_chunk()
        .expect("fields add up to HEADER_BYTES");
    *rest = behind;
    *field
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn operations_have_the_numbers_of_the_specification() {
        for (number, operation) in OPERATIONS {
            assert_eq!(operation.number(), number);
            assert_eq!(Operation::from_number(number), Some(operation));
        }
        assert_eq!(Operation::from_number(0), None);
        assert_eq!(Operation::from_number(8), None);
    }

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let mut bytes = [0; HEADER_BYTES];
        for (at, byte) in [
            (0, 3),
            (8, 2),
            (16, 5),
            (20, 6),
            (24, 7),
            (28, 1),
            (30, 5),
            (32, 8),
        ] {
            bytes[at] = byte;
        }
        (bytes[36], bytes[40]) = (9, 10);
        let header = Header::parse(&bytes);
        let expected = Header {
            source_cid: 3,
            destination_cid: HOST_CID,
            source_port: 5,
            destination_port: 6,
            len: 7,
            socket_type: TYPE_STREAM,
            operation: 5,
            flags: 8,
            buf_alloc: 9,
            fwd_cnt: 10,
        };
        assert_eq!(header, expected);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_and_come_back(
            bytes in prop::array::uniform32(any::<u8>()),
            tail in any::<[u8; 12]>(),
        ) {
            let mut whole = [0; HEADER_BYTES];
            whole[..32].copy_from_slice(&bytes);
            whole[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::parse(&whole).to_bytes(), whole);
        }
    }
}
