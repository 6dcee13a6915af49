//! One connection as a state machine without I/O (virtio 1.2 §5.10.6): what the guest may send,
//! what must be sent to it, and the credit of both directions.
//!
//! ```text
//!  host asks: REQUEST ──> Requested ──RESPONSE──┐
//!                                               v
//!  guest asks: REQUEST ─────(RESPONSE)───────> Open ──both ends shut, RST──> Over
//!                                               │                             ^
//!   abort, or a packet against the rules: ──────┴──> Resetting ──(RST sent)───┘
//! ```
//!
//! Each direction of an open connection ends on its own: `guest_ended` is what the guest said by
//! SHUTDOWN, `host_ended` what the unix socket showed. Counts are modulo 2^32, as on the wire.

use super::packet::{Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Where a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The host asked; the guest has not answered.
    Requested,
    /// Data may flow.
    Open,
    /// Nothing counts any more but the RST that the guest must get.
    Resetting,
    /// Nothing will be sent or taken.
    Over,
}

/// What a packet of the guest means for the unix socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// Nothing.
    Nothing,
    /// The guest accepted.
    Opened,
    /// Forward the data of the packet.
    Data,
    /// The guest ended a direction: see [`Connection::guest_ended`].
    Ended,
    /// The guest ended the connection with RST.
    Reset,
    /// The packet broke the rules: the connection is now [`Phase::Resetting`].
    Violation,
}

/// Directions that one side has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Ended {
    /// It sends no more.
    pub(crate) send: bool,
    /// It receives no more.
    pub(crate) receive: bool,
}

impl Ended {
    /// Both directions.
    pub(crate) const BOTH: Self = Self {
        send: true,
        receive: true,
    };

    fn from_flags(flags: u32) -> Self {
        Self {
            send: flags & SHUTDOWN_SEND != 0,
            receive: flags & SHUTDOWN_RECEIVE != 0,
        }
    }

    fn flags(self) -> u32 {
        let send = if self.send { SHUTDOWN_SEND } else { 0 };
        send | if self.receive { SHUTDOWN_RECEIVE } else { 0 }
    }

    fn join(&mut self, other: Self) {
        self.send |= other.send;
        self.receive |= other.receive;
    }
}

/// What the packet's sender knows of the other's buffer, or of its own.
#[derive(Debug, Clone, Copy, Default)]
struct Window {
    /// Size of the receive buffer.
    room: u32,
    /// Bytes sent into it so far.
    sent: u32,
    /// Bytes taken out of it so far.
    forwarded: u32,
}

impl Window {
    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.forwarded)
    }

    /// Room left. A guest that claims to have taken out more than was sent gets none.
    fn free(&self) -> u32 {
        self.room.saturating_sub(self.in_flight())
    }
}

/// One connection.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    phase: Phase,
    request_due: bool,
    response_due: bool,
    /// The guest asked for an update.
    credit_due: bool,
    /// A request for one must go to the guest.
    ask_due: bool,
    /// It was asked, or will be, for the present shortage.
    asked: bool,
    guest_ended: Ended,
    host_ended: Ended,
    told_ended: Ended,
    from_guest: Window,
    /// `from_guest.forwarded` as the guest last heard it.
    forwarded_told: u32,
    to_guest: Window,
}

impl Connection {
    /// The host asks; `room` bytes is what the guest may have in flight.
    pub(crate) fn requested_by_host(room: u32) -> Self {
        Self {
            phase: Phase::Requested,
            request_due: true,
            response_due: false,
            credit_due: false,
            ask_due: false,
            asked: false,
            guest_ended: Ended::default(),
            host_ended: Ended::default(),
            told_ended: Ended::default(),
            from_guest: Window {
                room,
                ..Window::default()
            },
            forwarded_told: 0,
            to_guest: Window::default(),
        }
    }

    /// The guest asked by `request` and is accepted.
    pub(crate) fn requested_by_guest(room: u32, request: &Header) -> Self {
        let mut connection = Self::requested_by_host(room);
        connection.phase = Phase::Open;
        connection.request_due = false;
        connection.response_due = true;
        connection.hear_credit(request);
        connection
    }

    /// Where it is.
    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    /// Directions that the guest has ended.
    pub(crate) fn guest_ended(&self) -> Ended {
        self.guest_ended
    }

    /// Directions that the host's program has ended.
    pub(crate) fn host_ended(&self) -> Ended {
        self.host_ended
    }

    /// Takes a packet of the guest.
    pub(crate) fn receive(&mut self, header: &Header) -> Event {
        let Some(operation) = Operation::from_number(header.operation) else {
            return self.violation();
        };
        if operation == Operation::Reset {
            self.phase = Phase::Over;
            return Event::Reset;
        }
        match self.phase {
            // Packets that crossed our RST.
            Phase::Resetting | Phase::Over => Event::Nothing,
            Phase::Requested => {
                if operation != Operation::Response || self.request_due {
                    return self.violation();
                }
                self.hear_credit(header);
                self.phase = Phase::Open;
                Event::Opened
            }
            Phase::Open => {
                self.hear_credit(header);
                self.receive_open(operation, header)
            }
        }
    }

    fn receive_open(&mut self, operation: Operation, header: &Header) -> Event {
        match operation {
            Operation::Data => {
                if self.guest_ended.send || header.len > self.from_guest.free() {
                    return self.violation();
                }
                self.from_guest.sent = self.from_guest.sent.wrapping_add(header.len);
                Event::Data
            }
            Operation::Shutdown => {
                self.guest_ended.join(Ended::from_flags(header.flags));
                Event::Ended
            }
            Operation::CreditUpdate => Event::Nothing,
            Operation::CreditRequest => {
                self.credit_due = true;
                Event::Nothing
            }
            Operation::Request | Operation::Response | Operation::Reset => self.violation(),
        }
    }

    fn hear_credit(&mut self, header: &Header) {
        self.to_guest.room = header.buf_alloc;
        self.to_guest.forwarded = header.fwd_cnt;
        if self.to_guest.free() > 0 {
            (self.ask_due, self.asked) = (false, false);
        }
    }

    fn violation(&mut self) -> Event {
        self.reset();
        Event::Violation
    }

    /// Ends it from this side at once: the guest gets RST, unless it never heard of the connection.
    pub(crate) fn reset(&mut self) {
        self.phase = match self.phase {
            Phase::Over => Phase::Over,
            Phase::Requested if self.request_due => Phase::Over,
            _ => Phase::Resetting,
        };
    }

    /// `count` bytes of the guest's data have left the VMM (or were dropped because nobody reads
    /// them).
    pub(crate) fn forwarded(&mut self, count: u32) {
        debug_assert!(count <= self.from_guest.in_flight());
        self.from_guest.forwarded = self.from_guest.forwarded.wrapping_add(count);
    }

    /// The host's program has ended directions.
    pub(crate) fn end_by_host(&mut self, ended: Ended) {
        self.host_ended.join(ended);
    }

    /// Bytes that may be sent to the guest now.
    pub(crate) fn credit(&self) -> u32 {
        let may_send = self.phase == Phase::Open
            && !self.response_due
            && !self.guest_ended.receive
            && !self.told_ended.send;
        if may_send { self.to_guest.free() } else { 0 }
    }

    /// Data waits: when there is no credit for it, the guest will be asked, once per shortage.
    pub(crate) fn want_credit(&mut self) {
        if self.phase == Phase::Open && !self.asked && self.to_guest.free() == 0 {
            (self.ask_due, self.asked) = (true, true);
        }
    }

    /// The next packet without data, with its flags; it counts as sent.
    pub(crate) fn next_control(&mut self) -> Option<(Operation, u32)> {
        match self.phase {
            Phase::Over => return None,
            Phase::Resetting => {
                self.phase = Phase::Over;
                return Some((Operation::Reset, 0));
            }
            Phase::Requested => {
                return std::mem::take(&mut self.request_due).then_some((Operation::Request, 0));
            }
            Phase::Open => {}
        }
        if std::mem::take(&mut self.response_due) {
            return Some((Operation::Response, 0));
        }
        if self.told_ended != self.host_ended {
            self.told_ended = self.host_ended;
            return Some((Operation::Shutdown, self.told_ended.flags()));
        }
        if std::mem::take(&mut self.credit_due) || self.is_update_due() {
            return Some((Operation::CreditUpdate, 0));
        }
        std::mem::take(&mut self.ask_due).then_some((Operation::CreditRequest, 0))
    }

    /// Whether [`Self::next_control`] has something to send.
    pub(crate) fn has_control(&self) -> bool {
        match self.phase {
            Phase::Over => false,
            Phase::Resetting => true,
            Phase::Requested => self.request_due,
            Phase::Open => {
                self.response_due
                    || self.told_ended != self.host_ended
                    || self.credit_due
                    || self.ask_due
                    || self.is_update_due()
            }
        }
    }

    /// The guest believes that more than half of its room is used, and some of it is free again.
    fn is_update_due(&self) -> bool {
        let believed = self.from_guest.sent.wrapping_sub(self.forwarded_told);
        self.forwarded_told != self.from_guest.forwarded && believed > self.from_guest.room / 2
    }

    /// `count` bytes were sent to the guest.
    pub(crate) fn sent(&mut self, count: u32) {
        debug_assert!(count <= self.to_guest.free());
        self.to_guest.sent = self.to_guest.sent.wrapping_add(count);
    }

    /// Room and count for a header that is sent now.
    pub(crate) fn tell_credit(&mut self) -> (u32, u32) {
        self.forwarded_told = self.from_guest.forwarded;
        (self.from_guest.room, self.from_guest.forwarded)
    }

    /// Bytes that the guest has in flight towards the host.
    #[cfg(test)]
    pub(crate) fn in_flight(&self) -> u32 {
        self.from_guest.in_flight()
    }
}

#[cfg(test)]
mod tests;
