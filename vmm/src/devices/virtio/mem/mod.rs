//! virtio-mem (virtio 1.2 §5.15): memory that is plugged and unplugged while the guest runs.
//!
//! - Thread: the event loop.
//! - Descriptors held: none; guest memory's memfd through its mapping.
//! - Limits: [`blocks::BLOCKS_MAX`] blocks of the region, [`device::BATCH_MAX`] requests a turn.
//! - State that a snapshot needs: the requested size, the map of plugged blocks, the queue's
//!   indices.
//!
//! The region is part of the guest's memory from the start, mapped and without pages; the guest's
//! own firmware tables do not name it. The control socket sets how much of it the driver should
//! have; the driver plugs and unplugs blocks towards that, and what it unplugs goes back to the
//! host.
//!
//! What a hostile guest can do: refuse to give memory back, as any guest can; write to blocks it
//! never plugged. Those pages count against the pod's memory cgroup like all others, so it gains
//! nothing that the pod's limit does not allow.
//!
//! ```text
//!   control socket --Resize--> requested size --config interrupt--> driver
//!   driver --PLUG / UNPLUG / UNPLUG_ALL / STATE--> Blocks --unplugged--> Discard
//! ```

pub(crate) mod blocks;
mod device;
pub(crate) mod request;

#[cfg(test)]
mod tests;

pub(crate) use device::{Mem, Parameters};
