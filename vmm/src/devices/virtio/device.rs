//! What every virtio device is to the rest of the VMM: one trait, so that the transport, the event
//! loop and the control socket treat all devices alike.
//!
//! Life of a device: made by the machine builder from the machine description (it takes its
//! descriptors there and opens nothing) -> [`VirtioDevice::activate`] when the driver sets
//! DRIVER_OK -> [`VirtioDevice::queue_kicked`] and [`VirtioDevice::descriptor_ready`] on the event
//! loop -> [`VirtioDevice::reset`] when the driver or the machine resets it, after which it can be
//! activated again.
//!
//! Threads: a device is owned behind one mutex. The event loop calls everything except the
//! configuration accesses, which come from the vCPU thread that trapped. No method may block on a
//! peer.

use std::{fmt::Debug, io, os::fd::BorrowedFd, sync::Arc};

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::{
    rate_limiter::Rates,
    saved::{DeviceState, RestoreError, Saved},
};
pub(crate) use crate::event_loop::{Poller, Readiness};

/// The guest's memory. Its layout is fixed for the life of the machine: memory that virtio-mem
/// plugs later is mapped from the start and merely not given out.
pub(crate) type GuestMemory = Arc<GuestMemoryMmap>;

/// Bits of a device's own tokens: the transport and the event loop use the rest of the number.
pub(crate) const TOKEN_BITS: u32 = 23;

/// Raises interrupts of a device: MSI-X messages, which we send by KVM_SIGNAL_MSI and vhost back
/// ends by the eventfd of a vector.
pub(crate) trait Interrupt: Debug + Send + Sync {
    /// "Used buffer notification" of one queue (virtio 1.2 §2.3). The caller has asked
    /// [`virtio_queue::QueueT::needs_notification`] first.
    fn signal_queue(&self, queue: u16);
    /// "Configuration change notification".
    fn signal_config(&self);
    /// The eventfd behind a queue's vector, for vhost and vhost-user back ends; `None` while the
    /// driver has set no vector.
    fn queue_eventfd(&self, queue: u16) -> Option<EventFd>;
}

/// One queue that the driver enabled.
#[derive(Debug)]
pub(crate) struct ActiveQueue {
    /// Its number in the device.
    pub(crate) index: u16,
    /// The queue itself, validated.
    pub(crate) queue: Queue,
    /// Signalled by KVM (ioeventfd) when the driver notifies; the event loop reads it before it
    /// calls [`VirtioDevice::queue_kicked`]. vhost back ends take a clone and answer
    /// [`VirtioDevice::owns_kicks`] with true.
    pub(crate) kick: EventFd,
}

/// What the transport gives a device when the driver sets DRIVER_OK.
#[derive(Debug)]
pub(crate) struct Activation {
    /// The guest's memory.
    pub(crate) memory: GuestMemory,
    /// Features that both sides agreed on.
    pub(crate) features: u64,
    /// The enabled queues, in order of their index; a driver may leave some out.
    pub(crate) queues: Vec<ActiveQueue>,
    /// Raises this device's interrupts.
    pub(crate) interrupt: Arc<dyn Interrupt>,
    /// The event loop, for descriptors of the device's own.
    pub(crate) poller: Arc<dyn Poller>,
}

/// The driver did something that the specification forbids, or a peer is gone: the device sets
/// DEVICE_NEEDS_RESET, stops serving its queues until it is reset, and the machine sends one event
/// about it. Never a panic, never a log line per act.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {reason}")]
pub(crate) struct Broken {
    /// Which device, such as "virtio-blk disk0".
    pub(crate) device: String,
    /// What was wrong, in words.
    pub(crate) reason: String,
}

/// A request of the control socket to one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    /// New limits for the only direction of a device (disk).
    Limit(Rates),
    /// New limits towards the guest.
    ReceiveLimit(Rates),
    /// New limits from the guest.
    TransmitLimit(Rates),
    /// A new goal in bytes: what a balloon holds, what pluggable memory has plugged.
    Resize(u64),
    /// The file behind a disk has a new size: read it again and tell the driver.
    FileResized,
}

/// Why a device did not obey a [`Command`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    /// It knows no such command.
    #[error("{0} cannot do that")]
    Unsupported(String),
    /// It knows the command but not with this value.
    #[error("{device}: {reason}")]
    Invalid {
        /// Which device, such as "virtio-mem mem0".
        device: String,
        /// What was wrong.
        reason: String,
    },
}

/// How far a device has come that gives memory to the guest or takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    /// What it shall have given or taken.
    pub(crate) goal_bytes: u64,
    /// What it has.
    pub(crate) actual_bytes: u64,
}

/// Puts the system call filter of a device's thread on the calling thread.
pub(crate) type Confine = fn() -> io::Result<()>;

/// A virtio device.
pub(crate) trait VirtioDevice: Debug + Send {
    /// Device ID (virtio 1.2 §5).
    fn device_type(&self) -> u16;
    /// For messages: kind and name, such as "virtio-blk disk0".
    fn name(&self) -> String;
    /// The largest size of each queue; its length is the number of queues. Powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// Device features offered. The transport adds VERSION_1, INDIRECT_DESC and EVENT_IDX to them;
    /// a back end elsewhere (vhost-user) that knows less must take them out of what it passes on.
    fn features(&self) -> u64;
    /// Reads device configuration. Bytes past the end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes device configuration; what is read-only or past the end is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }
    /// A shared memory region (virtio 1.2 §2.10) or other guest-physical range beyond BARs of the
    /// transport, as (size in bytes), for devices that need one; the machine maps it and tells the
    /// address by [`Self::set_region`].
    fn region_size(&self) -> Option<u64> {
        None
    }
    /// The file that the machine maps as the region, shared and read-only for the guest.
    fn region_file(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Where the machine put the region of [`Self::region_size`].
    fn set_region(&mut self, guest_address: u64) {
        let _ = guest_address;
    }
    /// Starts the threads of a device that has some. Called once, behind the jail and before the
    /// first activation; devices that are added later have none.
    fn start_threads(&mut self, confine: Confine) -> io::Result<()> {
        let _ = confine;
        Ok(())
    }
    /// DRIVER_OK: begin to serve.
    fn activate(&mut self, activation: Activation) -> Result<(), Broken>;
    /// True when a back end outside the event loop (vhost) reads the kicks itself.
    fn owns_kicks(&self) -> bool {
        false
    }
    /// The driver notified a queue.
    fn queue_kicked(&mut self, queue: u16) -> Result<(), Broken>;
    /// A descriptor that was added to the poller is ready.
    fn descriptor_ready(&mut self, token: u32, readiness: Readiness) -> Result<(), Broken> {
        let _ = (token, readiness);
        Ok(())
    }
    /// Back to the state before activation. What is in flight is finished or dropped; nothing
    /// touches guest memory afterwards.
    fn reset(&mut self);
    /// Stops as [`Self::reset`] does and gives what another device needs to go on. May wait for
    /// requests that the host works on. The vCPUs stand still.
    fn save(&mut self) -> Saved;
    /// Takes the state of another device of this kind, before [`Self::activate`], whose queues then
    /// stand where they stood.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Nothing => Ok(()),
            other => Err(self.cannot_restore(other)),
        }
    }
    /// The error for a state of another kind of device.
    fn cannot_restore(&self, state: &DeviceState) -> RestoreError {
        RestoreError {
            device: self.name(),
            reason: format!("{state:?} is of another kind or size"),
        }
    }
    /// Does what the control socket asks.
    fn command(&mut self, command: Command) -> Result<(), CommandError> {
        let _ = command;
        Err(CommandError::Unsupported(self.name()))
    }
    /// What a device that gives or takes memory shall reach and has reached, in bytes.
    fn progress(&self) -> Option<Progress> {
        None
    }
    /// Counters for the statistics message, by name.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Reads device configuration that is held as its bytes; bytes past the end read as zero.
pub(crate) fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(rest) = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
    else {
        return;
    };
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_reads_are_bounded_by_its_bytes() {
        let config = [1, 2, 3, 4];
        for (offset, expected) in [
            (0, [1, 2, 3]),
            (2, [3, 4, 0]),
            (4, [0, 0, 0]),
            (u64::MAX, [0, 0, 0]),
        ] {
            let mut data = [9; 3];
            read_config(&config, offset, &mut data);
            assert_eq!(data, expected, "offset {offset}");
        }
    }
}
