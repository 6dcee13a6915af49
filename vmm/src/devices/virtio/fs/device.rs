//! The device: negotiates with the daemon, gives it the bounce memory and its queues, and watches
//! its socket. The relay thread passes requests on.

use std::{
    fmt, io,
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::Arc,
};

use vhost::{
    VhostBackend,
    vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures},
};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1, virtio_ids::VIRTIO_ID_FS,
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};

use super::{
    super::{
        device::{Activation, Broken, Confine, Poller, Readiness, VirtioDevice, read_config},
        saved::{DeviceState, RestoreError, Saved},
    },
    config::{CONFIG_BYTES, TAG_BYTES, config},
    relay::{Fault, Line, Relay},
    shadow::{Bounce, ENTRIES, Shadow},
};

/// Entries of each queue: how many FUSE requests may be in flight. The driver of Linux has one
/// chain per request and holds back what does not fit.
const QUEUE_SIZE: u16 = 512;
/// The high-priority queue, which is queue 0.
const HIGH_PRIORITY_QUEUES: u16 = 1;
/// Request queues; virtiofsd serves one.
pub(crate) const REQUEST_QUEUES_MAX: u16 = 16;
/// Protocol features that are used when the daemon has them. Not REPLY_ACK: nothing that a guest
/// does may have the event loop wait for the daemon, which says what it refuses by hanging up.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ;
/// Features of the queues to the daemon.
const RING_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Descriptors on the event loop: the daemon's socket, and what the relay tells.
const DAEMON: u32 = 0;
const TROUBLE: u32 = 1;
const READABLE: Readiness = libc::EPOLLIN.cast_unsigned();
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

/// The daemon that serves a file system.
struct Daemon {
    /// Kept open: the daemon ends when it is closed.
    _talk: Frontend,
    /// The same socket, to wait for its end.
    socket: UnixStream,
    gone: bool,
    /// Taken by the relay thread when it starts.
    prepared: Option<(Bounce, Vec<Line>)>,
    relay: Option<Relay>,
}

/// A file system behind a vhost-user daemon. Without one (yet), requests wait.
pub(crate) struct Fs {
    name: String,
    config: [u8; CONFIG_BYTES],
    queue_sizes: Vec<u16>,
    daemon: Option<Daemon>,
    /// The queues while there is no daemon.
    waiting: Option<Activation>,
    /// The event loop waits for the daemon and its relay.
    poller: Option<Arc<dyn Poller>>,
}

impl fmt::Debug for Fs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fs")
            .field("name", &self.name)
            .field("daemon", &self.daemon.is_some())
            .field("waiting", &self.waiting)
            .finish_non_exhaustive()
    }
}

impl Fs {
    /// A file system served by the daemon at the other end of `socket`, with which features are
    /// agreed here and which is given its queues.
    ///
    /// # Errors
    /// A parameter is out of range, or the daemon lacks what is needed or does not answer.
    pub(crate) fn new(
        name: String,
        parameters: Parameters,
        socket: Option<UnixStream>,
    ) -> Result<Self, Error> {
        let Parameters {
            tag,
            request_queues,
        } = parameters;
        let Some(config) = config(&tag, request_queues) else {
            return Err(Error::Tag(tag));
        };
        check_queues(&tag, request_queues, u64::from(REQUEST_QUEUES_MAX))?;
        let queues = HIGH_PRIORITY_QUEUES + request_queues;
        let daemon = socket
            .map(|socket| Daemon::meet(&tag, request_queues, socket))
            .transpose()?;
        Ok(Self {
            name,
            config,
            queue_sizes: vec![QUEUE_SIZE; usize::from(queues)],
            daemon,
            waiting: None,
            poller: None,
        })
    }

    fn broken(&self, reason: impl ToString) -> Broken {
        Broken {
            device: self.name(),
            reason: reason.to_string(),
        }
    }
}

impl Daemon {
    /// Agrees on features and gives the daemon memory and queues.
    fn meet(tag: &str, request_queues: u16, socket: UnixStream) -> Result<Self, Error> {
        let refused = |message, reason: String| Error::Daemon {
            tag: tag.to_owned(),
            message,
            reason,
        };
        let own = |error: io::Error| refused("its set-up", error.to_string());
        let queues = HIGH_PRIORITY_QUEUES + request_queues;
        let talk = socket.try_clone().map_err(own)?;
        let mut talk = Frontend::from_stream(talk, u64::from(queues));
        let failed = |failure| match failure {
            Failure::Features(error) => error,
            Failure::Message(message, reason) => refused(message, reason),
        };
        let served = negotiate(&mut talk, tag).map_err(failed)?;
        let served = served.saturating_sub(u64::from(HIGH_PRIORITY_QUEUES));
        check_queues(tag, request_queues, served)?;
        let bounce = Bounce::new(usize::from(queues)).map_err(own)?;
        let lines = (0..queues)
            .map(|_| Line::new())
            .collect::<Result<Vec<_>, _>>();
        let lines = lines.map_err(own)?;
        hand_over(&mut talk, &bounce, &lines).map_err(failed)?;
        Ok(Self {
            _talk: talk,
            socket,
            gone: false,
            prepared: Some((bounce, lines)),
            relay: None,
        })
    }

    /// Closes the connection to a daemon that cannot be used any more, so that it ends.
    fn give_up(&mut self) {
        self.gone = true;
        // Fails when it has gone already.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Gives the daemon its memory and starts its queues.
fn hand_over(talk: &mut Frontend, bounce: &Bounce, lines: &[Line]) -> Result<(), Failure> {
    let refused = |message| move |e: vhost::Error| Failure::Message(message, e.to_string());
    talk.set_features(RING_FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
        .map_err(refused("SET_FEATURES"))?;
    talk.set_mem_table(&[bounce.region()])
        .map_err(refused("SET_MEM_TABLE"))?;
    for (index, line) in lines.iter().enumerate() {
        talk.set_vring_num(index, ENTRIES)
            .map_err(refused("SET_VRING_NUM"))?;
        talk.set_vring_addr(index, &Shadow::new(index).addresses())
            .map_err(refused("SET_VRING_ADDR"))?;
        talk.set_vring_base(index, 0)
            .map_err(refused("SET_VRING_BASE"))?;
        talk.set_vring_call(index, &line.call)
            .map_err(refused("SET_VRING_CALL"))?;
        talk.set_vring_kick(index, &line.kick)
            .map_err(refused("SET_VRING_KICK"))?;
        talk.set_vring_enable(index, true)
            .map_err(refused("SET_VRING_ENABLE"))?;
    }
    Ok(())
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

    fn start_threads(&mut self, confine: Confine) -> io::Result<()> {
        let Some(daemon) = &mut self.daemon else {
            return Ok(());
        };
        if let Some((bounce, lines)) = daemon.prepared.take() {
            daemon.relay = Some(Relay::start(bounce, lines, confine)?);
        }
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        let failed = |e: io::Error| self.broken(format!("the daemon cannot be waited for: {e}"));
        let Some(daemon) = &self.daemon else {
            self.waiting = Some(activation);
            return Ok(());
        };
        if daemon.gone {
            return Err(self.broken("the daemon has ended"));
        }
        let Some(relay) = &daemon.relay else {
            return Err(self.broken("it was added to a machine that runs"));
        };
        let poller = Arc::clone(&activation.poller);
        poller
            .add(daemon.socket.as_raw_fd(), DAEMON, 0)
            .and_then(|()| poller.add(relay.trouble().bell.as_raw_fd(), TROUBLE, READABLE))
            .map_err(failed)?;
        if !relay.serve(activation) {
            return Err(self.broken("its thread has ended"));
        }
        self.poller = Some(poller);
        Ok(())
    }

    fn owns_kicks(&self) -> bool {
        true
    }

    fn queue_kicked(&mut self, _queue: u16) -> Result<(), Broken> {
        Ok(())
    }

    fn descriptor_ready(&mut self, token: u32, readiness: Readiness) -> Result<(), Broken> {
        let Some(daemon) = self.daemon.as_mut().filter(|daemon| !daemon.gone) else {
            return Ok(());
        };
        if token == DAEMON && readiness & GONE != 0 {
            daemon.gone = true;
            if let Some(poller) = &self.poller {
                // Reported until removed; fails only when it is gone as wished.
                let _ = poller.remove(daemon.socket.as_raw_fd());
            }
            return Err(self.broken(
                "the daemon has ended; the file system is lost until the pod is made anew",
            ));
        }
        let fault = daemon
            .relay
            .as_ref()
            .and_then(|relay| relay.trouble().take());
        match fault {
            None => Ok(()),
            Some(Fault::Driver(reason)) => Err(self.broken(reason)),
            Some(Fault::Daemon(reason)) => {
                daemon.give_up();
                Err(self.broken(reason))
            }
        }
    }

    fn reset(&mut self) {
        self.stop(false);
    }

    /// What a daemon knows of open files stays with it: a file system goes on with the daemon that
    /// it has, or was saved before anybody mounted it.
    fn save(&mut self) -> Saved {
        let (active, in_flight) = self.stop(true);
        let unanswered = u32::try_from(in_flight).unwrap_or(u32::MAX);
        Saved::stopped(active, DeviceState::Fs { unanswered })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Fs { unanswered: 0 } => Ok(()),
            DeviceState::Fs { unanswered } => Err(RestoreError {
                device: self.name(),
                reason: format!(
                    "its daemon had not answered {unanswered} requests when it was saved"
                ),
            }),
            other => Err(self.cannot_restore(other)),
        }
    }
}

impl Fs {
    /// Takes the queues back, and tells how many requests are without an answer.
    fn stop(&mut self, drain: bool) -> (Option<Activation>, usize) {
        let Some(daemon) = &mut self.daemon else {
            return (self.waiting.take(), 0);
        };
        let (Some(poller), Some(relay)) = (self.poller.take(), &daemon.relay) else {
            return (None, 0);
        };
        // These fail when they are not waited for any more.
        let _ = poller.remove(daemon.socket.as_raw_fd());
        let _ = poller.remove(relay.trouble().bell.as_raw_fd());
        let stopped = relay.stop(drain);
        // What the former driver did wrong ends with it; a daemon that lied is not asked again.
        if let Some(Fault::Daemon(_)) = relay.trouble().take() {
            daemon.give_up();
        }
        (stopped.active, stopped.in_flight)
    }
}
