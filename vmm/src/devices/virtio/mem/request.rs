//! Requests, answers and configuration of pluggable memory. Pure functions.

/// Device ID (virtio 1.2 §5.15.1).
pub(crate) const DEVICE_TYPE: u16 = 24;

/// `struct virtio_mem_req`: type, 3 words of padding, address, count, 3 words of padding.
pub(crate) const REQUEST_BYTES: usize = 24;
/// `struct virtio_mem_resp`: type, 3 words of padding, state.
pub(crate) const ANSWER_BYTES: usize = 10;

/// What the driver asks, with the range it names: not yet checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    /// Plug so many blocks from this address.
    Plug { address: u64, blocks: u16 },
    /// Unplug them.
    Unplug { address: u64, blocks: u16 },
    /// Unplug every block.
    UnplugAll,
    /// Tell whether they are plugged.
    State { address: u64, blocks: u16 },
}

/// What it is answered (§5.15.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Done.
    Ack,
    /// Not now: more than is requested.
    Nack,
    /// Not now: the memory cannot be given back at the moment.
    Busy,
    /// Never: the request is wrong.
    Error,
    /// The state of a range.
    State(State),
}

/// State of a range of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// All of them are plugged.
    Plugged,
    /// None is.
    Unplugged,
    /// Some are.
    Mixed,
}

/// Takes a request apart; `None` for a type that is not known.
pub(crate) fn parse(bytes: &[u8; REQUEST_BYTES]) -> Option<Request> {
    let kind = u16::from_le_bytes([bytes[0], bytes[1]]);
    let address = u64::from_le_bytes(bytes[8..16].try_into().expect("8 bytes"));
    let blocks = u16::from_le_bytes([bytes[16], bytes[17]]);
    match kind {
        0 => Some(Request::Plug { address, blocks }),
        1 => Some(Request::Unplug { address, blocks }),
        2 => Some(Request::UnplugAll),
        3 => Some(Request::State { address, blocks }),
        _ => None,
    }
}

/// Bytes of an answer.
pub(crate) fn answer(answer: Answer) -> [u8; ANSWER_BYTES] {
    let (kind, state) = match answer {
        Answer::Ack => (0, 0),
        Answer::Nack => (1, 0),
        Answer::Busy => (2, 0),
        Answer::Error => (3, 0),
        Answer::State(State::Plugged) => (0, 0),
        Answer::State(State::Unplugged) => (0, 1),
        Answer::State(State::Mixed) => (0, 2),
    };
    let mut bytes = [0; ANSWER_BYTES];
    bytes[0] = kind;
    bytes[8] = state;
    bytes
}

/// Length of `struct virtio_mem_config` (§5.15.4).
pub(crate) const CONFIG_BYTES: usize = 56;

/// What stands in the configuration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Config {
    pub(crate) block_bytes: u64,
    pub(crate) address: u64,
    pub(crate) region_bytes: u64,
    pub(crate) plugged_bytes: u64,
    pub(crate) requested_bytes: u64,
}

/// Device configuration. The whole region is usable: the driver decides where in it to plug.
pub(crate) fn config(config: Config) -> [u8; CONFIG_BYTES] {
    let mut bytes = [0; CONFIG_BYTES];
    let fields = [
        config.block_bytes,
        0, // node (not offered) and padding
        config.address,
        config.region_bytes,
        config.region_bytes,
        config.plugged_bytes,
        config.requested_bytes,
    ];
    for (to, field) in bytes.chunks_exact_mut(8).zip(fields) {
        to.copy_from_slice(&field.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_taken_apart(bytes: [u8; REQUEST_BYTES]) {
            let known = u16::from_le_bytes([bytes[0], bytes[1]]) < 4;
            prop_assert_eq!(parse(&bytes).is_some(), known);
        }
    }

    #[test]
    fn requests_and_answers_are_laid_out_as_the_specification_says() {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0] = 1;
        bytes[8..16].copy_from_slice(&(5u64 << 32).to_le_bytes());
        bytes[16] = 7;
        let unplug = Request::Unplug {
            address: 5 << 32,
            blocks: 7,
        };
        assert_eq!(parse(&bytes), Some(unplug));
        assert_eq!(answer(Answer::Error), [3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mixed = answer(Answer::State(State::Mixed));
        assert_eq!(mixed, [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
        let config = config(Config {
            block_bytes: 2 << 20,
            address: 1 << 32,
            region_bytes: 1 << 30,
            plugged_bytes: 4 << 20,
            requested_bytes: 8 << 20,
        });
        assert_eq!(config[16..24], (1u64 << 32).to_le_bytes());
        assert_eq!(config[32..40], (1u64 << 30).to_le_bytes());
        assert_eq!(config[48..], (8u64 << 20).to_le_bytes());
    }
}
