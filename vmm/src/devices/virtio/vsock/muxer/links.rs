//! The guest's side of the muxer: packets from and for connections.

use std::{
    collections::VecDeque,
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixStream,
    },
};

use nix::sys::socket::{MsgFlags, recv, send};

use super::{
    super::{
        super::buffers::Buffers,
        buffer::Backlog,
        connection::{Connection, Ended, Event, Phase},
        packet::{HEADER_BYTES, HOST_CID, Header, Operation, TYPE_STREAM},
        table::room_bytes,
    },
    CLOSE_TICKS_MAX, Entry, Key, Link, Muxer, Stage,
};

/// Unread bytes discarded at once, and how often: more than a unix socket holds by default
/// (`net.core.wmem_default`, 208 KiB).
const DISCARD_BYTES: usize = 8192;
const DISCARDS_MAX: usize = 64;

impl Link {
    pub(super) fn new(key: Key, connection: Connection, answer_due: bool) -> Self {
        Self {
            key,
            connection,
            backlog: Backlog::default(),
            readable: false,
            queued: false,
            hung_up: false,
            unread: false,
            answer_due,
        }
    }

    fn header(&mut self, guest_cid: u64, operation: Operation, flags: u32, len: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.connection.tell_credit();
        Header {
            source_cid: HOST_CID,
            destination_cid: guest_cid,
            source_port: self.key.host_port,
            destination_port: self.key.guest_port,
            len,
            socket_type: TYPE_STREAM,
            operation: operation.number(),
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }

    /// Nobody will read what the guest sends: what is held is dropped, and the guest gets its room
    /// back.
    pub(super) fn stop_forwarding(&mut self) {
        self.unread = true;
        self.connection.forwarded(bytes_u32(self.backlog.len()));
        self.backlog.clear();
        self.connection.end_by_host(Ended {
            send: false,
            receive: true,
        });
    }

    /// Sends what the socket takes of the backlog.
    pub(super) fn flush(&mut self, stream: &impl AsFd) {
        if self.backlog.is_empty() {
            return;
        }
        match self.backlog.send(stream.as_fd()) {
            Ok(count) => self.connection.forwarded(bytes_u32(count)),
            Err(error) if is_transient(&error) => {}
            Err(_) => self.stop_forwarding(),
        }
    }

    /// Forwards the data of a packet, and keeps what the socket does not take.
    fn forward(&mut self, stream: Option<&impl AsFd>, data: &mut Buffers<'_>) {
        let stream = stream.filter(|_| !self.unread);
        let Some(stream) = stream else {
            self.connection.forwarded(bytes_u32(data.len()));
            return;
        };
        if self.backlog.is_empty() && data.len() > 0 {
            match data.send(stream.as_fd()) {
                Ok(count) => self.connection.forwarded(bytes_u32(count)),
                Err(error) if is_transient(&error) => {}
                Err(_) => {
                    self.connection.forwarded(bytes_u32(data.len()));
                    self.stop_forwarding();
                    return;
                }
            }
        }
        self.backlog.append(data);
    }

    /// The socket showed its end.
    fn end_of_socket(&mut self) {
        self.readable = false;
        self.connection.end_by_host(Ended {
            send: true,
            receive: self.hung_up,
        });
    }

    /// Reads from the socket into the guest's buffer behind the header; `None` when nothing came.
    fn read(&mut self, stream: &impl AsFd, credit: u32, room: &Buffers<'_>) -> Option<u32> {
        let mut data = room.view(HEADER_BYTES, credit as usize);
        let asked = data.len();
        match data.receive(stream.as_fd()) {
            Ok(0) => self.end_of_socket(),
            Ok(count) => {
                // A short read has emptied the socket; after a hang-up only its end says so.
                self.readable = self.hung_up || count == asked;
                self.connection.sent(bytes_u32(count));
                return Some(bytes_u32(count));
            }
            Err(error) if is_transient(&error) && !self.hung_up => self.readable = false,
            Err(_) => {
                self.hung_up = true;
                self.stop_forwarding();
                self.end_of_socket();
            }
        }
        None
    }
}

impl Muxer {
    pub(super) fn guest_connects(&mut self, key: Key, request: &Header) {
        let full = self.table.is_full();
        let streams = self.ports.get_mut(&key.host_port).filter(|_| !full);
        let Some(stream) = streams.and_then(VecDeque::pop_front) else {
            self.refuse(request);
            return;
        };
        let slot = self.table.insert(|slot| Entry {
            stream: Some(stream),
            armed: None,
            ticks_left: None,
            stage: Stage::Linked(Link::new(
                key,
                Connection::requested_by_guest(room_bytes(slot), request),
                false,
            )),
        });
        let slot = slot.expect("the table is not full");
        self.keys.insert(key, slot);
        self.counters.opened += 1;
        self.settle(slot);
    }

    pub(super) fn packet_of(&mut self, slot: u32, header: &Header, data: &mut Buffers<'_>) {
        let Some(Entry {
            stage: Stage::Linked(link),
            stream,
            ..
        }) = self.table.get_mut(slot)
        else {
            return;
        };
        match link.connection.receive(header) {
            Event::Nothing => {}
            Event::Opened => self.answer(slot),
            Event::Data => {
                self.counters.from_guest += data.len() as u64;
                link.forward(stream.as_ref(), data);
            }
            Event::Ended => {}
            Event::Reset => {
                self.guest_reset(slot);
                return;
            }
            Event::Violation => {
                self.counters.resets += 1;
                self.close_socket(slot);
            }
        }
        self.settle(slot);
    }

    /// The guest accepted what a host program asked for.
    fn answer(&mut self, slot: u32) {
        let Some(entry) = self.table.get_mut(slot) else {
            return;
        };
        entry.ticks_left = None;
        let (Stage::Linked(link), Some(stream)) = (&mut entry.stage, &entry.stream) else {
            return;
        };
        if !std::mem::take(&mut link.answer_due) {
            return;
        }
        self.counters.opened += 1;
        let line = format!("OK {}\n", link.key.host_port);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let descriptor = stream.as_raw_fd();
        // A new socket takes the line whole, or its other end is gone.
        if send(descriptor, line.as_bytes(), flags) != Ok(line.len()) {
            self.reset(slot);
        }
    }

    /// RST of the guest. What it sent before it ended its side in order is still delivered.
    fn guest_reset(&mut self, slot: u32) {
        let drain = self.table.get_mut(slot).and_then(|entry| {
            let Stage::Linked(link) = &mut entry.stage else {
                return None;
            };
            let drain = link.connection.guest_ended().send && !link.backlog.is_empty();
            drain.then(|| (link.key, link.queued, std::mem::take(&mut link.backlog)))
        });
        let Some((key, queued, backlog)) = drain else {
            self.remove(slot);
            return;
        };
        self.keys.remove(&key);
        if queued {
            self.ready.retain(|other| *other != slot);
        }
        if let Some(entry) = self.table.get_mut(slot) {
            entry.ticks_left = None;
            entry.stage = Stage::Draining(backlog);
        }
        self.rearm(slot);
    }

    /// Ends a connection from this side: RST to the guest, and the socket is closed.
    pub(super) fn reset(&mut self, slot: u32) {
        if let Some(Entry {
            stage: Stage::Linked(link),
            ..
        }) = self.table.get_mut(slot)
        {
            link.connection.reset();
        }
        self.close_socket(slot);
        self.settle(slot);
    }

    /// Draws the conclusions after anything has happened to a connection.
    pub(super) fn settle(&mut self, slot: u32) {
        let Some(Entry {
            stage: Stage::Linked(link),
            stream,
            ..
        }) = self.table.get_mut(slot)
        else {
            return;
        };
        if link.backlog.is_empty() && link.connection.phase() == Phase::Open {
            let ended = link.connection.guest_ended();
            if ended == Ended::BOTH {
                // §5.10.6.5: RST is the answer to the shutdown of both directions. All data is out.
                link.connection.reset();
                if let Some(stream) = stream {
                    finish(stream);
                }
                self.close_socket(slot);
                self.settle(slot);
                return;
            }
            if let Some(stream) = stream {
                // Fails when it is done already.
                if ended.send {
                    let _ = stream.shutdown(Shutdown::Write);
                }
            }
        }
        if link.connection.guest_ended().receive {
            link.readable = false;
            if let Some(stream) = stream {
                let _ = stream.shutdown(Shutdown::Read);
            }
        }
        if link.connection.phase() == Phase::Over {
            self.remove(slot);
            return;
        }
        if link.readable {
            link.connection.want_credit();
        }
        let has_data = link.readable && link.connection.credit() > 0;
        if !link.queued && (has_data || link.connection.has_control()) {
            link.queued = true;
            self.ready.push_back(slot);
        }
        self.rearm(slot);
    }

    /// Makes one packet of a connection in `room`; `None` when it has none after all.
    pub(super) fn produce(&mut self, slot: u32, room: &mut Buffers<'_>) -> Option<usize> {
        let guest_cid = self.guest_cid;
        let Some(Entry {
            stage: Stage::Linked(link),
            stream,
            ..
        }) = self.table.get_mut(slot)
        else {
            return None;
        };
        link.queued = false;
        let mut len = None;
        if !link.connection.has_control() && link.readable {
            let credit = link.connection.credit();
            if let Some(stream) = stream.as_ref().filter(|_| credit > 0) {
                len = link.read(stream, credit, room);
            }
        }
        let header = if let Some(len) = len {
            self.counters.to_guest += u64::from(len);
            Some(link.header(guest_cid, Operation::Data, 0, len))
        } else {
            let control = link.connection.next_control();
            control.map(|(operation, flags)| link.header(guest_cid, operation, flags, 0))
        };
        let closing = header.is_some_and(|header| header.operation == Operation::Shutdown.number())
            && link.connection.host_ended() == Ended::BOTH;
        self.settle(slot);
        if closing {
            self.set_deadline(slot, CLOSE_TICKS_MAX);
        }
        let header = header?;
        room.write(&header.to_bytes());
        Some(HEADER_BYTES + header.len as usize)
    }
}

/// Ends a socket in order. Closed with unread data in it, it would show its other end ECONNRESET
/// where the end of the stream belongs.
fn finish(stream: &UnixStream) {
    let mut unread = [0; DISCARD_BYTES];
    // Fails when it is done already.
    let _ = stream.shutdown(Shutdown::Both);
    for _ in 0..DISCARDS_MAX {
        let flags = MsgFlags::MSG_DONTWAIT;
        if !matches!(recv(stream.as_raw_fd(), &mut unread, flags), Ok(count) if count > 0) {
            return;
        }
    }
}

/// Bytes of one connection in flight: bounded by its room, or by the length field of a header.
fn bytes_u32(count: usize) -> u32 {
    u32::try_from(count).expect("bounded by a 32-bit length")
}

pub(super) fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
