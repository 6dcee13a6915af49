//! The device: moves packets between the queues and the muxer.

use std::{
    io,
    os::unix::net::{UnixListener, UnixStream},
};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::{Queue, QueueT};

use super::{
    super::{
        buffers::BufferChain,
        chain,
        device::{Activation, Broken, GuestMemory, Readiness, VirtioDevice, read_config},
        saved::{DeviceState, RestoreError, Saved},
    },
    muxer::Muxer,
    packet::{HEADER_BYTES, HOST_CID, Header},
};

/// Entries of each queue. The driver of Linux fills the receive queue with 4 KiB buffers, so that
/// this is 1 MiB of guest memory.
const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;

/// Packets each way before other devices have their turn.
pub(crate) const PACKETS_PER_TURN_MAX: usize = 256;

/// What a vsock device is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parameters {
    /// The guest's context id.
    pub(crate) guest_cid: u64,
}

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// 0 to 2 are reserved, and so are all bits of a 32-bit id (§5.10.4); the upper half must be
    /// zero.
    #[error("guest_cid {0} of the vsock device is reserved; give 3 to 4294967294")]
    GuestCid(u64),
    /// The listener or the timer.
    #[error("vsock listener or timer cannot be set up")]
    SetUp(#[source] io::Error),
}

/// The vsock device.
#[derive(Debug)]
pub(crate) struct Vsock {
    name: String,
    guest_cid: u64,
    muxer: Muxer,
    active: Option<Activation>,
    /// The driver must learn that its connections are gone.
    reset_due: bool,
}

impl Vsock {
    /// A device whose guest can be dialled through `listener` and can dial each port of `ports`
    /// once per socket given.
    ///
    /// # Errors
    /// The context id is reserved, or the kernel refuses a timer.
    pub(crate) fn new(
        name: String,
        parameters: Parameters,
        listener: Option<UnixListener>,
        ports: impl IntoIterator<Item = (u32, UnixStream)>,
    ) -> Result<Self, Error> {
        let guest_cid = parameters.guest_cid;
        if guest_cid <= HOST_CID || guest_cid >= u64::from(u32::MAX) {
            return Err(Error::GuestCid(guest_cid));
        }
        Ok(Self {
            name,
            guest_cid,
            muxer: Muxer::new(guest_cid, listener, ports).map_err(Error::SetUp)?,
            active: None,
            reset_due: false,
        })
    }

    /// Lets a tick of the deadlines pass.
    #[cfg(test)]
    pub(crate) fn tick(&mut self) {
        self.muxer.count_tick().unwrap();
        self.turn().unwrap();
    }

    fn broken(&self, reason: impl ToString) -> Broken {
        Broken {
            device: self.name(),
            reason: reason.to_string(),
        }
    }

    /// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (§5.10.6.7): all connections are gone.
    fn send_reset(&self, activation: &mut Activation) -> Result<(), Broken> {
        const TRANSPORT_RESET: [u8; 4] = [0; 4];
        let memory = activation.memory.clone();
        let [queue] = queues(activation, [EVENT]);
        let Some(queue) = queue else { return Ok(()) };
        // A driver without a buffer for it finds out by its own time-outs.
        if let Some(mut chain) = BufferChain::take(queue, &memory).map_err(|e| self.broken(e))? {
            let count = chain.writable.write(&TRANSPORT_RESET);
            let count = u32::try_from(count).map_err(|e| self.broken(e))?;
            queue
                .add_used(&*memory, chain.head, count)
                .map_err(|e| self.broken(e))?;
            activation.interrupt.signal_queue(EVENT);
        }
        Ok(())
    }

    /// Moves what can be moved both ways.
    fn turn(&mut self) -> Result<(), Broken> {
        let Some(mut active) = self.active.take() else {
            return Ok(());
        };
        let outcome = self.turn_on(&mut active);
        self.active = Some(active);
        outcome
    }

    fn turn_on(&mut self, active: &mut Activation) -> Result<(), Broken> {
        let memory = active.memory.clone();
        let mut again = [false; 2];
        let [transmit, receive] = queues(active, [TRANSMIT, RECEIVE]);
        if let Some(queue) = transmit {
            let more = self.take_packets(queue, &memory)?;
            again[0] = more && self.muxer.takes_packets();
        }
        if let Some(queue) = receive {
            again[1] = self.give_packets(queue, &memory)?;
        }
        for (number, again) in [TRANSMIT, RECEIVE].into_iter().zip(again) {
            let [queue] = queues(active, [number]);
            let Some(queue) = queue else {
                continue;
            };
            // Answers that just left may have made room for packets that were left in the queue.
            let waits = number == TRANSMIT
                && self.muxer.takes_packets()
                && chain::is_waiting(queue, &memory).map_err(|e| self.broken(e))?;
            if queue
                .needs_notification(&*memory)
                .map_err(|e| self.broken(e))?
            {
                active.interrupt.signal_queue(number);
            }
            if again || waits {
                active.kick_again(number);
            }
        }
        Ok(())
    }

    /// Takes packets of the guest; true when more may wait: after a whole turn also if it emptied
    /// the queue, since the driver was not asked to notify.
    fn take_packets(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Result<bool, Broken> {
        for _ in 0..PACKETS_PER_TURN_MAX {
            if !self.muxer.takes_packets() {
                return Ok(true);
            }
            let Some(mut chain) = BufferChain::take(queue, memory).map_err(|e| self.broken(e))?
            else {
                if queue
                    .enable_notification(&**memory)
                    .map_err(|e| self.broken(e))?
                {
                    continue;
                }
                return Ok(false);
            };
            if chain.writable.len() > 0 {
                return Err(self.broken("transmit buffer is device-writable"));
            }
            let Some(header) = chain
                .readable
                .read_array()
                .map(|bytes| Header::parse(&bytes))
            else {
                return Err(self.broken("packet is shorter than its header"));
            };
            let len = header.len as usize;
            if len > chain.readable.len() {
                return Err(self.broken("packet says that it is longer than its buffers"));
            }
            self.muxer.packet(&header, &mut chain.readable.view(0, len));
            queue
                .add_used(&**memory, chain.head, 0)
                .map_err(|e| self.broken(e))?;
        }
        Ok(true)
    }

    /// Gives packets to the guest; true when more may wait and the guest may have buffers for them.
    fn give_packets(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Result<bool, Broken> {
        for _ in 0..PACKETS_PER_TURN_MAX {
            if !self.muxer.has_output() {
                return Ok(false);
            }
            let Some(mut chain) = BufferChain::take(queue, memory).map_err(|e| self.broken(e))?
            else {
                // Only now is a notification of new buffers wanted.
                if queue
                    .enable_notification(&**memory)
                    .map_err(|e| self.broken(e))?
                {
                    continue;
                }
                return Ok(false);
            };
            if chain.readable.len() > 0 || chain.writable.len() <= HEADER_BYTES {
                return Err(
                    self.broken("receive buffer is device-readable or has no room for data")
                );
            }
            let Some(bytes) = self.muxer.next(&mut chain.writable) else {
                chain::unpop(queue);
                return Ok(false);
            };
            let bytes = u32::try_from(bytes).map_err(|e| self.broken(e))?;
            queue
                .add_used(&**memory, chain.head, bytes)
                .map_err(|e| self.broken(e))?;
        }
        Ok(true)
    }
}

/// The queues of the given numbers that the driver enabled.
fn queues<const N: usize>(active: &mut Activation, numbers: [u16; N]) -> [Option<&mut Queue>; N] {
    let mut found = numbers.map(|_| None);
    for queue in &mut active.queues {
        if let Some(at) = numbers.iter().position(|number| *number == queue.index) {
            found[at] = Some(&mut queue.queue);
        }
    }
    found
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u16 {
        u16::try_from(VIRTIO_ID_VSOCK).expect("device ids are small")
    }

    fn name(&self) -> String {
        format!("virtio-vsock {}", self.name)
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), Broken> {
        let memory = activation.memory.clone();
        // Buffers are looked for when there is something to put into them. The only event is the
        // reset after a restore, and it is sent here.
        for queue in queues(&mut activation, [RECEIVE, EVENT])
            .into_iter()
            .flatten()
        {
            queue
                .disable_notification(&*memory)
                .map_err(|e| self.broken(e))?;
        }
        self.muxer
            .start(activation.poller.clone())
            .map_err(|e| self.broken(format!("sockets cannot be waited for: {e}")))?;
        if std::mem::take(&mut self.reset_due) {
            self.send_reset(&mut activation)?;
        }
        self.active = Some(activation);
        self.turn()
    }

    fn queue_kicked(&mut self, queue: u16) -> Result<(), Broken> {
        if queue == EVENT {
            return Ok(());
        }
        self.turn()
    }

    fn descriptor_ready(&mut self, token: u32, readiness: Readiness) -> Result<(), Broken> {
        if self.active.is_none() {
            return Ok(());
        }
        self.muxer
            .descriptor_ready(token, readiness)
            .map_err(|e| self.broken(format!("listener or timer failed: {e}")))?;
        self.turn()
    }

    fn reset(&mut self) {
        self.muxer.stop();
        self.active = None;
    }

    /// Connections do not move: the host's programs see theirs end, and the driver is told by the
    /// device that goes on.
    fn save(&mut self) -> Saved {
        let connections = self.muxer.len() > 0;
        self.muxer.stop();
        Saved::stopped(self.active.take(), DeviceState::Vsock { connections })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock { connections } = *state else {
            return Err(self.cannot_restore(state));
        };
        self.reset_due = connections;
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = self.muxer.counters();
        vec![
            ("connections", self.muxer.len() as u64),
            ("connections_opened", counters.opened),
            ("connections_refused", counters.refused),
            ("connections_reset", counters.resets),
            ("bytes_to_guest", counters.to_guest),
            ("bytes_from_guest", counters.from_guest),
            ("bytes_buffered", self.muxer.buffered_bytes() as u64),
        ]
    }
}
