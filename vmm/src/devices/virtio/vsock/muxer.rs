//! Joins the guest's connections to unix sockets. The device hands it the guest's packets and asks
//! it for packets to the guest; the event loop tells it which sockets are ready. It does all socket
//! I/O and never blocks.
//!
//! Fairness: connections with something for the guest stand in one line ([`Muxer::next`]), get one
//! packet each, and go to its end.
//!
//! A socket's readiness is waited for only while it could be acted on: not for reading while data
//! of it already waits for the guest's credit or buffers, and not at all after a hang-up (epoll
//! would report that one for ever).

mod links;
mod sockets;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
    time::Duration,
};

use nix::sys::{
    timer::{Expiration, TimerSetTimeFlags},
    timerfd::{ClockId, TimerFd, TimerFlags},
};

use super::{
    super::{
        buffers::Buffers,
        device::{Poller, Readiness},
    },
    buffer::Backlog,
    connection::Connection,
    handshake::LINE_BYTES_MAX,
    packet::{HEADER_BYTES, HOST_CID, Header, Operation, TYPE_STREAM},
    table::Table,
};

/// Answers to packets of no connection that wait for a buffer of the guest.
pub(crate) const REPLIES_MAX: usize = 256;
/// Connections accepted before other descriptors have their turn.
const ACCEPTS_PER_TURN_MAX: usize = 64;

/// The unit of deadlines: nothing here needs to be more exact.
const TICK: Duration = Duration::from_secs(1);
/// Ticks until a host program must have sent its line, and the guest must have answered a request.
/// The guest's agent answers in microseconds; a guest that is starved of CPU gets this long.
const OPEN_TICKS_MAX: u32 = 10;
/// Ticks until the guest must have answered the shutdown of both directions by RST. Linux grants
/// the same (`VSOCK_CLOSE_TIMEOUT`, 8 s).
const CLOSE_TICKS_MAX: u32 = 8;

const LISTENER: u32 = 0;
const TIMER: u32 = 1;

const READABLE: Readiness = libc::EPOLLIN.cast_unsigned();
const WRITABLE: Readiness = libc::EPOLLOUT.cast_unsigned();
const GONE: Readiness = (libc::EPOLLHUP | libc::EPOLLERR).cast_unsigned();

/// First of the ports that connections of host programs come from; above what services listen on.
const HOST_PORTS_FIRST: u32 = 1 << 30;

/// The two ports that name a connection; the context ids are fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Port of the host.
    pub(crate) host_port: u32,
    /// Port of the guest.
    pub(crate) guest_port: u32,
}

/// What a slot of the table is doing.
#[derive(Debug)]
enum Stage {
    /// Accepted; the first `len` bytes of its line are read.
    Handshake {
        line: [u8; LINE_BYTES_MAX],
        len: usize,
    },
    /// Joined to a connection of the guest.
    Linked(Link),
    /// The guest is done; what it sent last is still on its way to the socket.
    Draining(Backlog),
}

/// A connection of the guest and the state of its socket.
#[derive(Debug)]
struct Link {
    key: Key,
    connection: Connection,
    backlog: Backlog,
    /// The socket has data or its end to read.
    readable: bool,
    /// It stands in the line for the guest's buffers.
    queued: bool,
    /// The socket's other end is closed; what is in it can still be read.
    hung_up: bool,
    /// Nobody reads what the guest sends.
    unread: bool,
    /// A host program waits for "OK <port>\n".
    answer_due: bool,
}

/// A socket, what it is for, and what is waited for on it.
#[derive(Debug)]
struct Entry {
    /// Closed early when the guest must still get an RST.
    stream: Option<UnixStream>,
    armed: Option<Readiness>,
    ticks_left: Option<u32>,
    stage: Stage,
}

/// Counters for the statistics.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Counters {
    /// Connections opened, of both sides.
    pub(crate) opened: u64,
    /// Requests of either side that were refused.
    pub(crate) refused: u64,
    /// Connections that this side reset: rules broken, deadlines passed.
    pub(crate) resets: u64,
    /// Data bytes read from sockets into the guest.
    pub(crate) to_guest: u64,
    /// Data bytes taken from the guest.
    pub(crate) from_guest: u64,
}

/// The muxer.
#[derive(Debug)]
pub(crate) struct Muxer {
    guest_cid: u64,
    listener: Option<UnixListener>,
    listener_armed: bool,
    ports: BTreeMap<u32, VecDeque<UnixStream>>,
    timer: TimerFd,
    timer_running: bool,
    poller: Option<Arc<dyn Poller>>,
    table: Table<Entry>,
    keys: HashMap<Key, u32>,
    ready: VecDeque<u32>,
    replies: VecDeque<Header>,
    next_host_port: u32,
    counters: Counters,
}

impl Muxer {
    /// A muxer that serves nothing yet.
    pub(crate) fn new(
        guest_cid: u64,
        listener: Option<UnixListener>,
        ports: impl IntoIterator<Item = (u32, UnixStream)>,
    ) -> io::Result<Self> {
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let mut by_port: BTreeMap<u32, VecDeque<UnixStream>> = BTreeMap::new();
        for (port, stream) in ports {
            by_port.entry(port).or_default().push_back(stream);
        }
        Ok(Self {
            guest_cid,
            listener,
            listener_armed: false,
            ports: by_port,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            timer_running: false,
            poller: None,
            table: Table::default(),
            keys: HashMap::new(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            next_host_port: HOST_PORTS_FIRST,
            counters: Counters::default(),
        })
    }

    /// Begins to serve on `poller`.
    pub(crate) fn start(&mut self, poller: Arc<dyn Poller>) -> io::Result<()> {
        poller.add(self.timer_descriptor(), TIMER, READABLE)?;
        self.poller = Some(poller);
        self.listen()
    }

    /// Ends every connection at once. The listener and unused sockets of ports stay for the next
    /// start.
    pub(crate) fn stop(&mut self) {
        let slots: Vec<u32> = self.table.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.remove(slot);
        }
        self.ready.clear();
        self.replies.clear();
        self.stop_timer();
        self.stop_listening();
        if let Some(poller) = self.poller.take() {
            // Fails only when it is not there, and then it is gone as wished.
            let _ = poller.remove(self.timer_descriptor());
        }
    }

    /// Counters so far.
    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    /// Connections and handshakes now.
    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// Bytes of the guest that wait for full sockets now.
    pub(crate) fn buffered_bytes(&self) -> usize {
        let entries = self.table.iter();
        entries
            .map(|(_, entry)| match &entry.stage {
                Stage::Handshake { .. } => 0,
                Stage::Linked(link) => link.backlog.len(),
                Stage::Draining(backlog) => backlog.len(),
            })
            .sum()
    }

    /// Whether a packet of the guest may be taken: the answer that it may need has room.
    pub(crate) fn takes_packets(&self) -> bool {
        self.replies.len() < REPLIES_MAX
    }

    /// Whether there may be something for the guest.
    pub(crate) fn has_output(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

    /// Makes the next packet for the guest in `room`, and returns its bytes; `None` when there is
    /// none after all.
    pub(crate) fn next(&mut self, room: &mut Buffers<'_>) -> Option<usize> {
        debug_assert!(room.len() > HEADER_BYTES);
        if let Some(reply) = self.replies.pop_front() {
            return Some(room.write(&reply.to_bytes()));
        }
        // Each turn takes one out of the line; `produce` puts it back only when it made a packet.
        while let Some(slot) = self.ready.pop_front() {
            if let Some(bytes) = self.produce(slot, room) {
                return Some(bytes);
            }
        }
        None
    }

    /// Takes a packet of the guest with its data.
    pub(crate) fn packet(&mut self, header: &Header, data: &mut Buffers<'_>) {
        if header.source_cid != self.guest_cid {
            // §5.10.6: the driver must use its own context id; there is nobody to answer.
            return;
        }
        let key = Key {
            host_port: header.destination_port,
            guest_port: header.source_port,
        };
        let known = header.destination_cid == HOST_CID && header.socket_type == TYPE_STREAM;
        let slot = known.then(|| self.keys.get(&key).copied()).flatten();
        match (slot, Operation::from_number(header.operation)) {
            (Some(slot), _) => self.packet_of(slot, header, data),
            (None, Some(Operation::Reset)) => {}
            (None, Some(Operation::Request)) if known => self.guest_connects(key, header),
            (None, _) => self.refuse(header),
        }
    }

    /// A descriptor is ready.
    pub(crate) fn descriptor_ready(&mut self, token: u32, readiness: Readiness) -> io::Result<()> {
        match token {
            LISTENER => self.accept(),
            TIMER => self.tick(),
            _ => {
                if let Some(slot) = self.table.slot(token) {
                    self.socket_ready(slot, readiness);
                }
                Ok(())
            }
        }
    }

    fn refuse(&mut self, header: &Header) {
        self.counters.refused += 1;
        self.replies.push_back(header.refusal());
    }

    fn timer_descriptor(&self) -> RawFd {
        use std::os::fd::AsFd;
        self.timer.as_fd().as_raw_fd()
    }

    fn set_deadline(&mut self, slot: u32, ticks: u32) {
        let Some(entry) = self.table.get_mut(slot) else {
            return;
        };
        // The running tick may be almost over.
        entry.ticks_left = Some(ticks + 1);
        self.start_timer();
    }

    fn start_timer(&mut self) {
        if !self.timer_running {
            let interval = Expiration::Interval(TICK.into());
            self.timer_running = self.timer.set(interval, TimerSetTimeFlags::empty()).is_ok();
        }
    }

    fn stop_timer(&mut self) {
        // Fails for no running timer; one that runs on costs a wake-up and finds no deadline.
        let _ = self.timer.unset();
        self.timer_running = false;
    }

    fn tick(&mut self) -> io::Result<()> {
        match self.timer.wait() {
            Ok(()) => {}
            Err(nix::Error::EAGAIN) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        self.count_tick()
    }

    /// One tick has passed.
    pub(crate) fn count_tick(&mut self) -> io::Result<()> {
        let slots: Vec<u32> = self.table.iter().map(|(slot, _)| slot).collect();
        let mut running = false;
        for slot in slots {
            let Some(entry) = self.table.get_mut(slot) else {
                continue;
            };
            match entry.ticks_left {
                None => {}
                Some(0 | 1) => {
                    entry.ticks_left = None;
                    self.expire(slot);
                }
                Some(ticks) => {
                    entry.ticks_left = Some(ticks - 1);
                    running = true;
                }
            }
        }
        if !running {
            self.stop_timer();
        }
        // After a pause for want of descriptors.
        self.listen()
    }

    fn expire(&mut self, slot: u32) {
        let linked = self
            .table
            .get_mut(slot)
            .is_some_and(|entry| matches!(entry.stage, Stage::Linked(_)));
        if linked {
            self.counters.resets += 1;
            self.reset(slot);
        } else {
            self.counters.refused += 1;
            self.remove(slot);
        }
    }
}
