//! The device: negotiates with the daemon, hands it memory and queues, and watches its socket.

use std::{
    fmt,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixStream,
    },
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pericarp_sys::interrupted;
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures},
};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ids::VIRTIO_ID_FS,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    super::{
        device::{
            Activation, ActiveQueue, Broken, GuestMemory, Readiness, VirtioDevice, read_config,
        },
        saved::{DeviceState, Saved},
    },
    config::{CONFIG_BYTES, TAG_BYTES, config},
};

/// Entries of each queue: how many FUSE requests may be in flight. The driver of Linux has one
/// chain per request and holds back what does not fit.
const QUEUE_SIZE: u16 = 512;
/// The high-priority queue, which is queue 0.
const HIGH_PRIORITY_QUEUES: u16 = 1;
/// Request queues; virtiofsd serves one.
pub(crate) const REQUEST_QUEUES_MAX: u16 = 16;
/// Memory regions in one SET_MEM_TABLE message (vhost-user protocol, "Memory regions
/// description").
pub(crate) const REGIONS_MAX: usize = 8;
/// Protocol features that are used when the daemon has them. Not REPLY_ACK: nothing that a guest
/// does may have the event loop wait for the daemon, which says what it refuses by hanging up.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ;
/// How long a daemon may take to stop a queue: the only answer that the event loop waits for,
/// because until then the daemon may write to the guest's memory. A daemon that is later is lost.
const STOP_MS_MAX: u16 = 5000;
/// What the transport offers every driver, so that every daemon must know it.
const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

const DAEMON: u32 = 0;
const GONE: Readiness = (libc::EPOLLHUP | libc::EPOLLERR).cast_unsigned();

/// What a file system is to the guest.
#[derive(Debug, Clone)]
pub(crate) struct Parameters {
    /// The name to mount it by.
    pub(crate) tag: String,
    /// Request queues, besides the one for high priority.
    pub(crate) request_queues: u16,
}

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The tag.
    #[error("tag {0:?} is empty, has a zero byte, or is longer than {TAG_BYTES} bytes")]
    Tag(String),
    /// The number of queues.
    #[error("file system {tag}: request_queues is {given}; give 1 to {max}")]
    RequestQueues {
        /// The file system.
        tag: String,
        /// What was asked for.
        given: u16,
        /// What the daemon serves.
        max: u64,
    },
    /// The daemon lacks features.
    #[error("file system {tag}: the daemon lacks virtio features {missing:#x}; use virtiofsd 1.13")]
    Features {
        /// The file system.
        tag: String,
        /// The bits.
        missing: u64,
    },
    /// The daemon does not answer.
    #[error("file system {tag}: the daemon refused {message}: {reason}")]
    Daemon {
        /// The file system.
        tag: String,
        /// The message.
        message: &'static str,
        /// Why.
        reason: String,
    },
}

/// A file system behind a vhost-user daemon.
pub(crate) struct Fs {
    name: String,
    tag: String,
    config: [u8; CONFIG_BYTES],
    queue_sizes: Vec<u16>,
    daemon: Frontend,
    /// The same socket, to wait for its end.
    socket: UnixStream,
    daemon_gone: bool,
    active: Option<Activation>,
    /// What the daemon signals: the queues' interrupts, or placeholders if the driver polls.
    calls: Vec<EventFd>,
}

impl fmt::Debug for Fs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fs")
            .field("name", &self.name)
            .field("tag", &self.tag)
            .field("daemon_gone", &self.daemon_gone)
            .field("active", &self.active)
            .finish_non_exhaustive()
    }
}

impl Fs {
    /// A file system served by the daemon at the other end of `socket`, with which features are
    /// agreed here.
    ///
    /// # Errors
    /// A parameter is out of range, or the daemon lacks what is needed or does not answer.
    pub(crate) fn new(
        name: String,
        parameters: Parameters,
        socket: UnixStream,
    ) -> Result<Self, Error> {
        let Parameters {
            tag,
            request_queues,
        } = parameters;
        let Some(config) = config(&tag, request_queues) else {
            return Err(Error::Tag(tag));
        };
        check_queues(&tag, request_queues, u64::from(REQUEST_QUEUES_MAX))?;
        let refused = |message| {
            let tag = tag.clone();
            move |reason: String| Error::Daemon {
                tag,
                message,
                reason,
            }
        };
        let talk = socket
            .try_clone()
            .map_err(|e| refused("its socket")(e.to_string()))?;
        let queues = HIGH_PRIORITY_QUEUES + request_queues;
        let mut daemon = Frontend::from_stream(talk, u64::from(queues));
        let served = negotiate(&mut daemon, &tag).map_err(|failure| match failure {
            Failure::Features(error) => error,
            Failure::Message(message, reason) => refused(message)(reason),
        })?;
        let served = served.saturating_sub(u64::from(HIGH_PRIORITY_QUEUES));
        check_queues(&tag, request_queues, served)?;
        Ok(Self {
            name,
            tag,
            config,
            queue_sizes: vec![QUEUE_SIZE; usize::from(queues)],
            daemon,
            socket,
            daemon_gone: false,
            active: None,
            calls: Vec::new(),
        })
    }

    fn broken(&self, reason: impl ToString) -> Broken {
        Broken {
            device: self.name(),
            reason: reason.to_string(),
        }
    }

    fn refused(&self, message: &str, reason: impl fmt::Display) -> Broken {
        self.broken(format!("the daemon refused {message}: {reason}"))
    }

    fn share_memory(&self, memory: &GuestMemory) -> Result<(), Broken> {
        let regions: Vec<_> = memory
            .iter()
            .map(|region| {
                let file = region.file_offset()?;
                let start = region.start_addr().raw_value();
                Some(VhostUserMemoryRegionInfo {
                    guest_phys_addr: start,
                    memory_size: region.len(),
                    // What the daemon calls the front end's address: see the header of the folder.
                    userspace_addr: start,
                    mmap_offset: file.start(),
                    mmap_handle: file.file().as_raw_fd(),
                })
            })
            .collect::<Option<_>>()
            .ok_or_else(|| self.broken("guest memory is no file, so it cannot be shared"))?;
        if regions.len() > REGIONS_MAX {
            return Err(self.broken(format!(
                "guest memory has {} regions, and the daemon takes {REGIONS_MAX}",
                regions.len()
            )));
        }
        self.daemon
            .set_mem_table(&regions)
            .map(drop)
            .map_err(|e| self.refused("SET_MEM_TABLE", e))
    }

    fn start_queue(&mut self, active: &ActiveQueue, activation: &Activation) -> Result<(), Broken> {
        let index = usize::from(active.index);
        let queue = &active.queue;
        let addresses = VringConfigData {
            queue_max_size: queue.max_size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: queue.desc_table(),
            used_ring_addr: queue.used_ring(),
            avail_ring_addr: queue.avail_ring(),
            log_addr: None,
        };
        let call = match activation.interrupt.queue_eventfd(active.index) {
            Some(call) => call,
            None => EventFd::new(EFD_NONBLOCK).map_err(|e| self.broken(e))?,
        };
        let set = |message: &'static str| move |e: vhost::Error| (message, e);
        let daemon = &mut self.daemon;
        let outcome = daemon
            .set_vring_num(index, queue.size())
            .map_err(set("SET_VRING_NUM"))
            .and_then(|()| {
                daemon
                    .set_vring_addr(index, &addresses)
                    .map_err(set("SET_VRING_ADDR"))
            })
            .and_then(|()| {
                let base = daemon.set_vring_base(index, queue.next_avail());
                base.map_err(set("SET_VRING_BASE"))
            })
            .and_then(|()| {
                daemon
                    .set_vring_call(index, &call)
                    .map_err(set("SET_VRING_CALL"))
            })
            .and_then(|()| {
                let kick = daemon.set_vring_kick(index, &active.kick);
                kick.map_err(set("SET_VRING_KICK"))
            })
            .and_then(|()| {
                daemon
                    .set_vring_enable(index, true)
                    .map_err(set("SET_VRING_ENABLE"))
            });
        self.calls.push(call);
        outcome.map_err(|(message, e)| self.refused(message, e))
    }

    fn start(&mut self, activation: &Activation) -> Result<(), Broken> {
        if self.daemon_gone {
            return Err(self.broken("the daemon has ended"));
        }
        let features = activation.features & RING_FEATURES;
        self.daemon
            .set_features(features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
            .map_err(|e| self.refused("SET_FEATURES", e))?;
        self.share_memory(&activation.memory)?;
        for queue in &activation.queues {
            self.start_queue(queue, activation)?;
        }
        activation
            .poller
            .add(self.socket.as_raw_fd(), DAEMON, 0)
            .map_err(|e| self.broken(format!("socket of the daemon cannot be waited for: {e}")))
    }
}

/// GET_VRING_BASE (vhost-user protocol, "Front-end message types"): the queue stops, and the answer
/// says so, and where it stands. By hand, because the library waits for an answer without end.
pub(super) fn stop_queue(mut socket: &UnixStream, queue: u16) -> io::Result<u16> {
    /// Header (request, flags, size) and `vring state` (index, number).
    const MESSAGE_BYTES: usize = 20;
    const REQUEST: u32 = 11;
    const VERSION_1: u32 = 1;
    let mut message = [0; MESSAGE_BYTES];
    let words = [REQUEST, VERSION_1, 8, u32::from(queue), 0];
    for (to, word) in message.chunks_exact_mut(4).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    socket.write_all(&message)?;
    let mut filled = 0;
    while filled < MESSAGE_BYTES {
        let mut set = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        if interrupted::retry(|| poll(&mut set, PollTimeout::from(STOP_MS_MAX)))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match interrupted::retry(|| socket.read(&mut message[filled..]))? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => filled += count,
        }
    }
    if message[..4] == REQUEST.to_le_bytes() {
        Ok(u16::from_le_bytes([message[16], message[17]]))
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

fn check_queues(tag: &str, given: u16, max: u64) -> Result<(), Error> {
    if given == 0 || u64::from(given) > max {
        return Err(Error::RequestQueues {
            tag: tag.to_owned(),
            given,
            max,
        });
    }
    Ok(())
}

/// Why negotiation failed.
enum Failure {
    Features(Error),
    Message(&'static str, String),
}

/// Agrees on features with the daemon, and returns how many queues it serves.
fn negotiate(daemon: &mut Frontend, tag: &str) -> Result<u64, Failure> {
    let refused = |message| move |e: vhost::Error| Failure::Message(message, e.to_string());
    daemon.set_owner().map_err(refused("SET_OWNER"))?;
    let features = daemon.get_features().map_err(refused("GET_FEATURES"))?;
    let needed = RING_FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    if needed & !features != 0 {
        return Err(Failure::Features(Error::Features {
            tag: tag.to_owned(),
            missing: needed & !features,
        }));
    }
    let offered = daemon
        .get_protocol_features()
        .map_err(refused("GET_PROTOCOL_FEATURES"))?;
    let agreed = offered & PROTOCOL_FEATURES;
    daemon
        .set_protocol_features(agreed)
        .map_err(refused("SET_PROTOCOL_FEATURES"))?;
    if agreed.contains(VhostUserProtocolFeatures::MQ) {
        daemon.get_queue_num().map_err(refused("GET_QUEUE_NUM"))
    } else {
        Ok(u64::from(HIGH_PRIORITY_QUEUES) + 1)
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u16 {
        u16::try_from(VIRTIO_ID_FS).expect("device ids are small")
    }

    fn name(&self) -> String {
        format!("virtio-fs {}", self.name)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        let outcome = self.start(&activation);
        self.active = Some(activation);
        outcome
    }

    fn owns_kicks(&self) -> bool {
        true
    }

    fn queue_kicked(&mut self, _queue: u16) -> Result<(), Broken> {
        Ok(())
    }

    fn descriptor_ready(&mut self, token: u32, readiness: Readiness) -> Result<(), Broken> {
        if token != DAEMON || readiness & GONE == 0 || self.daemon_gone {
            return Ok(());
        }
        self.daemon_gone = true;
        if let Some(active) = &self.active {
            // Reported until removed; fails only when it is gone as wished.
            let _ = active.poller.remove(self.socket.as_raw_fd());
        }
        Err(self.broken("the daemon has ended; the file system is lost until the pod is made anew"))
    }

    fn reset(&mut self) {
        self.stop();
    }

    /// What a daemon knows of open files stays with it: a file system goes on with the daemon that
    /// it has.
    fn save(&mut self) -> Saved {
        let active = self.stop();
        let queues = active.map_or_else(Vec::new, |active| {
            let stopped = active.queues.iter();
            stopped
                .map(|queue| queue.kernel_position(&active.memory))
                .collect()
        });
        let state = DeviceState::Nothing;
        Saved { queues, state }
    }
}

impl Fs {
    /// Takes the queues back from the daemon, with the positions that it reached.
    fn stop(&mut self) -> Option<Activation> {
        let mut active = self.active.take()?;
        self.calls.clear();
        if self.daemon_gone {
            return Some(active);
        }
        // Fails when activation did not get that far.
        let _ = active.poller.remove(self.socket.as_raw_fd());
        for queue in &mut active.queues {
            // A daemon that fails here is ending or hangs: it is cut off, and the next activation
            // tells.
            match stop_queue(&self.socket, queue.index) {
                Ok(base) => queue.queue.set_next_avail(base),
                Err(_) => {
                    self.daemon_gone = true;
                    let _ = self.socket.shutdown(std::net::Shutdown::Both);
                    break;
                }
            }
        }
        Some(active)
    }
}
