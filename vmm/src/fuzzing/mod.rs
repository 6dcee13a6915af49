//! Entries for the fuzz targets of `tests/fuzz`: each takes any bytes, plays them as what a hostile
//! guest does, and panics when what must hold does not. Also run by this crate's own tests.
//!
//! [`program`] plays the driver of one device on the real queue code, [`machine`] a whole guest on
//! the bus of a whole machine without vCPUs. Bounds: what one input may do is limited by its
//! length, which the fuzzer bounds.

mod bytes;
mod devices;
mod machine;
mod program;
mod relay;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use pericarp_sys::mapping::SharedWords;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use self::bytes::Choices;
use crate::{
    devices::{
        passthrough::{
            function::{AccessTarget, access_target},
            mediate::{CONFIG_BYTES, check},
        },
        virtio::{
            buffers::BufferChain,
            segments::SegmentChain,
            transport::registers::{Effect, Registers},
        },
    },
    machine::saved::SavedMachine,
    pci::config::{ConfigSpace, FUNCTION_BYTES, Identity},
};

pub use devices::{balloon, blk, console, mem, net, pmem, rng, vsock};
pub use machine::machine;
pub use relay::relay;

/// Guest memory of [`queue`]: rings at the start, the rest for buffers and indirect tables.
const QUEUE_MEMORY_BYTES: usize = 0x4000;
const QUEUE_SIZE: u16 = 16;
const AVAILABLE: u32 = 0x400;
const USED: u32 = 0x800;

/// Memory as the guest wrote it: both views of descriptor chains end, agree about what is a chain,
/// and never name a byte outside memory.
pub fn queue(data: &[u8]) {
    let memory = [(GuestAddress(0), QUEUE_MEMORY_BYTES)];
    let memory = GuestMemoryMmap::from_ranges(&memory).expect("a small mapping");
    let memory = Arc::new(memory);
    let image = &data[..data.len().min(QUEUE_MEMORY_BYTES)];
    let fits = "it is cut to the memory's size";
    memory.write_slice(image, GuestAddress(0)).expect(fits);
    let [mut borrowing, mut owning] = [rings(), rings()];
    // A queue's length of chains: as many as the available index may announce.
    for _ in 0..=QUEUE_SIZE {
        let borrowed = BufferChain::take(&mut borrowing, &memory);
        let owned = SegmentChain::take(&mut owning, &memory);
        match (borrowed, owned) {
            (Ok(Some(borrowed)), Ok(Some(owned))) => {
                assert_eq!(borrowed.head, owned.head);
                assert_eq!(borrowed.readable.len() as u64, owned.readable_len());
                assert_eq!(borrowed.writable.len() as u64, owned.writable_len());
                let used = borrowing.add_used(memory.as_ref(), borrowed.head, 0);
                let again = owning.add_used(memory.as_ref(), owned.head, 0);
                assert_eq!(used.is_ok(), again.is_ok());
            }
            (Ok(None), Ok(None)) | (Err(_), Err(_)) => break,
            (borrowed, owned) => panic!("{borrowed:?} but {owned:?}"),
        }
    }
}

fn rings() -> Queue {
    let mut queue = Queue::new(QUEUE_SIZE).expect("a power of two");
    queue.set_desc_table_address(Some(0), None);
    queue.set_avail_ring_address(Some(AVAILABLE), None);
    queue.set_used_ring_address(Some(USED), None);
    queue.set_ready(true);
    queue
}

/// Registers and configuration space as a guest's writes: a device is activated and reset in turn
/// only, queues stand still while it lives, and only writable bits of configuration space change.
pub fn registers(data: &[u8]) {
    let mut choices = Choices::new(data);
    let _ = write_registers(&mut choices);
}

fn write_registers(choices: &mut Choices<'_>) -> Option<()> {
    let mut registers = Registers::new(0x30, &[256, 16]);
    let words = Arc::new(SharedWords::new(FUNCTION_BYTES).expect("a page"));
    let mut space = ConfigSpace::new(words, 0, &IDENTITY);
    space.add_bar(0, BAR_BYTES, 0);
    let capability = space.add_capability(0x11, &[1, 0, 0, 0x40, 0, 0], &[0, 0xc0]);
    let fixed = [space.word(0), space.word(8), space.word(0x34)];
    let mut live: Option<Vec<_>> = None;
    loop {
        let (space_wanted, offset) = (choices.byte()? & 1 == 1, choices.half()?);
        let data = choices.some(8)?;
        if space_wanted {
            space.write(offset, data);
            let now = [space.word(0), space.word(8), space.word(0x34)];
            assert_eq!(now, fixed, "the identity is not the guest's to change");
            let control = space.word(capability) >> 16;
            assert_eq!(control & !0xc000, 1, "only two bits of message control");
            if let Some(range) = space.bar(0, BAR_BYTES) {
                assert!(range.start % BAR_BYTES == 0 && range.end - range.start == BAR_BYTES);
            }
            continue;
        }
        let mut back = [0; 8];
        registers.read(u64::from(offset), &mut back[..data.len()]);
        match registers.write(u64::from(offset), data) {
            Effect::Activate => {
                assert!(live.is_none(), "a device is activated once");
                live = Some(registers.queues().to_vec());
            }
            Effect::Reset => {
                assert!(live.take().is_some(), "only a live device is reset");
                registers.finish_reset();
            }
            Effect::None => {}
        }
        if let Some(queues) = &live {
            let now = registers
                .queues()
                .iter()
                .map(|queue| queue.without_vector());
            assert!(now.eq(queues.iter().map(|queue| queue.without_vector())));
        }
    }
}

/// A passthrough device as its configuration space describes it, and what a guest then writes:
/// no bytes give a space that does not hang together, and none of the guest's writes changes what
/// is not its own.
pub fn passthrough(data: &[u8]) {
    let _ = mediate_and_write(&mut Choices::new(data));
}

fn mediate_and_write(choices: &mut Choices<'_>) -> Option<()> {
    let mut sizes = [0; 6];
    for size in &mut sizes {
        *size = 1_u64.checked_shl(u32::from(choices.byte()?)).unwrap_or(0);
    }
    let mut bytes = [0; CONFIG_BYTES];
    for byte in &mut bytes {
        *byte = choices.byte()?;
    }
    let seen = check::mediated(&bytes, &sizes)?;
    let words = Arc::new(SharedWords::new(FUNCTION_BYTES).expect("a page"));
    let mut space = ConfigSpace::show(words, 0, &seen.words, seen.writable);
    loop {
        let offset = choices.half()?;
        space.write(offset, choices.some(8)?);
        for (index, (first, writable)) in seen.words.iter().zip(&seen.writable).enumerate() {
            let changed = space.word(index * 4) ^ first;
            assert_eq!(changed & !writable, 0, "word {index:#x}");
        }
        for bar in &seen.bars {
            if let Some(range) = bar.range(&space) {
                assert!(range.start.is_multiple_of(bar.size));
                assert_eq!(range.end - range.start, bar.size);
            }
        }
        if let Some(place) = &seen.msi {
            let (message, _) = place.message(&space);
            assert_eq!(message.address & 3, 0, "messages are words");
        }
        if let Some(place) = &seen.msix {
            let at = u64::from(offset);
            if let AccessTarget::Table(at) = access_target(place, place.table.0, at, 4) {
                assert!(at + 4 <= u64::from(place.count) * 16);
            }
        }
    }
}

/// A saved machine that somebody else wrote, whole or behind a header of ours: it is refused, or is
/// what it says, byte for byte.
pub fn saved(data: &[u8]) {
    for bytes in [data.to_vec(), SavedMachine::with_header(data)] {
        if let Ok(saved) = SavedMachine::parse(&bytes) {
            let again = SavedMachine::parse(&saved.to_bytes().expect("it was parsed"));
            let again = again.expect("what we write is read");
            assert_eq!(saved.to_bytes().ok(), again.to_bytes().ok());
        }
    }
}

/// Size of the BAR of [`registers`].
const BAR_BYTES: u64 = 0x8000;

const IDENTITY: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1042,
    revision: 1,
    class: 0x01_8000,
    subsystem_vendor: 0x1af4,
    subsystem: 0x40,
    multifunction: false,
};
