//! The host's side of the muxer: the listener, the handshake, readiness of sockets, and what is
//! waited for on them.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    os::unix::net::UnixStream,
};

use nix::sys::socket::{MsgFlags, recv};

use super::{
    super::{
        super::device::Readiness,
        connection::{Connection, Ended, Phase},
        handshake::{self, LINE_BYTES_MAX, Line},
        table::{SLOTS_MAX, room_bytes},
    },
    ACCEPTS_PER_TURN_MAX, Entry, GONE, HOST_PORTS_FIRST, Key, LISTENER, Link, Muxer,
    OPEN_TICKS_MAX, READABLE, Stage, WRITABLE,
    links::is_transient,
};

impl Muxer {
    /// Waits for host programs, unless the table is full.
    pub(super) fn listen(&mut self) -> io::Result<()> {
        let (Some(listener), Some(poller)) = (&self.listener, &self.poller) else {
            return Ok(());
        };
        if !self.listener_armed && !self.table.is_full() {
            poller.add(listener.as_raw_fd(), LISTENER, READABLE)?;
            self.listener_armed = true;
        }
        Ok(())
    }

    /// Leaves host programs in the listener's backlog, which the shim has bounded.
    pub(super) fn stop_listening(&mut self) {
        if let (Some(listener), Some(poller), true) =
            (&self.listener, &self.poller, self.listener_armed)
        {
            // Fails only when it is not there, and then it is gone as wished.
            let _ = poller.remove(listener.as_raw_fd());
        }
        self.listener_armed = false;
    }

    pub(super) fn accept(&mut self) -> io::Result<()> {
        for _ in 0..ACCEPTS_PER_TURN_MAX {
            if self.table.is_full() {
                self.stop_listening();
                return Ok(());
            }
            let Some(listener) = &self.listener else {
                return Ok(());
            };
            match listener.accept() {
                Ok((stream, _)) => self.begin_handshake(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::ECONNABORTED) => {}
                    // No descriptor or memory is left: again when a connection ends, or with the
                    // next tick.
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) => {
                        self.stop_listening();
                        self.start_timer();
                        return Ok(());
                    }
                    _ => return Err(error),
                },
            }
        }
        Ok(())
    }

    fn begin_handshake(&mut self, stream: UnixStream) {
        let slot = self.table.insert(|_| Entry {
            stream: Some(stream),
            armed: None,
            ticks_left: None,
            stage: Stage::Handshake {
                line: [0; LINE_BYTES_MAX],
                len: 0,
            },
        });
        if let Some(slot) = slot {
            self.set_deadline(slot, OPEN_TICKS_MAX);
            self.rearm(slot);
        }
    }

    /// Reads the line and nothing behind it, which is the connection's data already.
    fn shake_hands(&mut self, slot: u32) {
        let Some(Entry {
            stage: Stage::Handshake { line, len },
            stream: Some(stream),
            ..
        }) = self.table.get_mut(slot)
        else {
            return;
        };
        let flags = MsgFlags::MSG_DONTWAIT;
        let descriptor = stream.as_raw_fd();
        let peeked = match recv(descriptor, &mut line[*len..], flags | MsgFlags::MSG_PEEK) {
            Ok(0) => return self.refuse_handshake(slot),
            Ok(count) => *len + count,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return,
            Err(_) => return self.refuse_handshake(slot),
        };
        let (taken, port) = match handshake::parse(&line[..peeked]) {
            Line::Port { port, bytes } => (bytes, Some(port)),
            Line::Partial => (peeked, None),
            Line::Invalid => return self.refuse_handshake(slot),
        };
        // The bytes were just seen, so they are there.
        if recv(descriptor, &mut line[*len..taken], flags) != Ok(taken - *len) {
            return self.refuse_handshake(slot);
        }
        *len = taken;
        if let Some(port) = port {
            self.host_connects(slot, port);
        }
    }

    fn refuse_handshake(&mut self, slot: u32) {
        self.counters.refused += 1;
        self.remove(slot);
    }

    fn host_connects(&mut self, slot: u32, guest_port: u32) {
        let key = Key {
            host_port: self.free_host_port(guest_port),
            guest_port,
        };
        let connection = Connection::requested_by_host(room_bytes(slot));
        if let Some(entry) = self.table.get_mut(slot) {
            entry.stage = Stage::Linked(Link::new(key, connection, true));
            self.keys.insert(key, slot);
            self.set_deadline(slot, OPEN_TICKS_MAX);
            self.settle(slot);
        }
    }

    /// A host port that no connection to `guest_port` uses. One more candidate than connections is
    /// enough.
    fn free_host_port(&mut self, guest_port: u32) -> u32 {
        for _ in 0..=SLOTS_MAX {
            let host_port = self.next_host_port;
            self.next_host_port = host_port.checked_add(1).unwrap_or(HOST_PORTS_FIRST);
            let key = Key {
                host_port,
                guest_port,
            };
            if !self.keys.contains_key(&key) {
                return host_port;
            }
        }
        unreachable!("more candidates than connections")
    }

    pub(super) fn socket_ready(&mut self, slot: u32, readiness: Readiness) {
        let Some(entry) = self.table.get_mut(slot) else {
            return;
        };
        let gone = readiness & GONE != 0;
        match &mut entry.stage {
            Stage::Handshake { .. } if readiness & READABLE != 0 => self.shake_hands(slot),
            Stage::Handshake { .. } => self.refuse_handshake(slot),
            Stage::Linked(_) => self.link_ready(slot, readiness),
            Stage::Draining(backlog) => {
                let sent = entry
                    .stream
                    .as_ref()
                    .map(|stream| backlog.send(stream.as_fd()));
                let stuck = !matches!(&sent, Some(Err(error)) if is_transient(error))
                    && !matches!(sent, Some(Ok(_)));
                if gone || stuck || backlog.is_empty() {
                    self.remove(slot);
                }
            }
        }
    }

    fn link_ready(&mut self, slot: u32, readiness: Readiness) {
        let Some(Entry {
            stage: Stage::Linked(link),
            stream: Some(stream),
            ..
        }) = self.table.get_mut(slot)
        else {
            return;
        };
        if readiness & WRITABLE != 0 {
            link.flush(stream);
        }
        if readiness & READABLE != 0 {
            link.readable = true;
        }
        if readiness & GONE != 0 {
            if link.connection.phase() == Phase::Requested {
                self.counters.refused += 1;
                return self.reset(slot);
            }
            link.hung_up = true;
            link.stop_forwarding();
            // What is left in the socket is read before the guest hears of the end, unless it has
            // heard or wants nothing.
            link.readable = true;
            if link.connection.host_ended().send || link.connection.guest_ended().receive {
                link.connection.end_by_host(Ended::BOTH);
            }
        }
        self.settle(slot);
    }

    /// Waits on a slot's socket for what could be acted on, and for nothing else.
    pub(super) fn rearm(&mut self, slot: u32) {
        let token = self.table.token(slot);
        let (Some(poller), Some(entry)) = (&self.poller, self.table.get_mut(slot)) else {
            return;
        };
        let wanted = entry.wanted();
        let Some(stream) = &entry.stream else {
            return;
        };
        let descriptor = stream.as_raw_fd();
        let outcome = match (entry.armed, wanted) {
            (None, Some(readiness)) => poller.add(descriptor, token, readiness),
            (Some(_), None) => poller.remove(descriptor),
            (Some(old), Some(new)) if old != new => poller.modify(descriptor, token, new),
            _ => Ok(()),
        };
        entry.armed = wanted;
        if outcome.is_err() {
            // Out of memory or of epoll watches: this connection cannot be served.
            entry.armed = None;
            self.expire(slot);
        }
    }

    /// Closes a slot's socket; the guest may still have to hear of it.
    pub(super) fn close_socket(&mut self, slot: u32) {
        let Some(entry) = self.table.get_mut(slot) else {
            return;
        };
        if let (Some(stream), Some(_), Some(poller)) = (&entry.stream, entry.armed, &self.poller) {
            // Fails only when it is not there, and then it is gone as wished.
            let _ = poller.remove(stream.as_raw_fd());
        }
        entry.armed = None;
        entry.stream = None;
        if let Stage::Linked(link) = &mut entry.stage {
            link.readable = false;
            link.stop_forwarding();
        }
    }

    /// Frees a slot.
    pub(super) fn remove(&mut self, slot: u32) {
        self.close_socket(slot);
        let Some(entry) = self.table.remove(slot) else {
            return;
        };
        if let Stage::Linked(link) = &entry.stage {
            self.keys.remove(&link.key);
            if link.queued {
                self.ready.retain(|other| *other != slot);
            }
        }
        // A poller that refuses the listener now is asked again with the next tick or freed slot.
        if self.listen().is_err() {
            self.start_timer();
        }
    }
}

impl Entry {
    /// What could be acted on; `None` when the socket must not be waited for at all.
    fn wanted(&self) -> Option<Readiness> {
        match &self.stage {
            Stage::Handshake { .. } => Some(READABLE),
            Stage::Draining(_) => Some(WRITABLE),
            Stage::Linked(link) if link.hung_up => None,
            Stage::Linked(link) => {
                let reads = link.connection.phase() == Phase::Open
                    && !link.readable
                    && !link.connection.host_ended().send
                    && !link.connection.guest_ended().receive;
                let read = if reads { READABLE } else { 0 };
                let write = if link.backlog.is_empty() { 0 } else { WRITABLE };
                Some(read | write)
            }
        }
    }
}
