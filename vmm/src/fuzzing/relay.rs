//! The file-system daemon as a stranger: it has the bounce memory and writes what it likes, while
//! requests of the guest come and go.

use std::sync::Arc;

use pericarp_sys::guest_io::Segment;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::bytes::Choices;
use crate::devices::virtio::{
    device::GuestMemory,
    fs::shadow::{Bounce, Shadow},
    segments::SegmentChain,
};

/// Guest memory: more than the room for requests.
const MEMORY_BYTES: usize = 16 << 20;

/// Requests of any sizes, answers of any kind: nothing is read or written beyond what a request
/// has, its room comes back once, and what the daemon cannot have done is a lie.
pub fn relay(data: &[u8]) {
    let memory = [(GuestAddress(0), MEMORY_BYTES)];
    let memory = GuestMemoryMmap::from_ranges(&memory).expect("a small mapping");
    let bounce = Bounce::new(1).expect("a memfd");
    let _ = serve(&mut Choices::new(data), &Arc::new(memory), bounce);
}

fn serve(choices: &mut Choices<'_>, guest: &GuestMemory, mut bounce: Bounce) -> Option<()> {
    let mut shadow = Shadow::new(0);
    let (mut asked, mut answered) = (0_usize, 0_usize);
    let mut place = 0_u16;
    loop {
        match choices.byte()? % 8 {
            0..=2 => {
                let chain = SegmentChain {
                    head: choices.half()?,
                    readable: segments(choices)?,
                    writable: segments(choices)?,
                };
                asked += usize::from(shadow.add(&mut bounce, guest, chain, 1).is_ok());
            }
            3 => drop(shadow.publish(&bounce)),
            4 => {
                let id = match choices.byte()? % 4 {
                    0 => choices.word()?,
                    _ => u32::from(shadow.head(&bounce, place)),
                };
                let length = choices.half()?;
                shadow.answer(&bounce, place, id, u32::from(length));
                place = place.wrapping_add(1);
            }
            5 => shadow.scribble(&bounce, choices.half()?, choices.some(16)?),
            6 => bounce.shrink(),
            _ => {
                // After a lie nothing of the daemon's is looked at any more.
                while let Some((request, length)) = shadow.take_used(&bounce).ok()? {
                    assert!(length as u64 <= request.chain.writable_len());
                    request.deliver(&mut bounce, guest, length);
                    answered += 1;
                }
                shadow.wait_for_answers(&bounce);
            }
        }
        assert_eq!(shadow.in_flight(), asked - answered);
    }
}

/// Up to four segments in guest memory.
fn segments(choices: &mut Choices<'_>) -> Option<Vec<Segment>> {
    let count = choices.byte()? % 5;
    let mut segments = Vec::new();
    for _ in 0..count {
        let (address, length) = (choices.word()?, choices.half()?);
        let length = usize::from(length) << (choices.byte()? % 6);
        let room = MEMORY_BYTES - length.min(MEMORY_BYTES);
        let address = usize::try_from(address).unwrap_or(0) % (room + 1);
        segments.push(Segment {
            address: GuestAddress(address as u64),
            len: length.min(MEMORY_BYTES),
        });
    }
    Some(segments)
}
