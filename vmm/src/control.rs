//! The control socket: requests in, replies and events out, never blocking on the shim once the
//! machine runs.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use pericarp_protocol::machine::{
    Event, Failure, FieldError, Message, REQUEST_BYTES, Request, Success, decode_request,
    encode_message,
};
use pericarp_sys::seqpacket;

use crate::machine::descriptors::Descriptors;

/// Messages that wait for a shim that does not read. Beyond it no request is read, and events are
/// dropped: a shim that let this many lie will find the machine's state by asking.
const WAITING_MAX: usize = 64;

/// What came in.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// A request with its number and descriptors.
    Request(u32, Box<Request>, Descriptors),
    /// Bytes that are no request; the number is 0 when even that could not be read.
    Invalid(u32, FieldError),
    /// The shim is gone.
    End,
}

/// The socket and what waits to be sent.
#[derive(Debug)]
pub(crate) struct Control {
    socket: OwnedFd,
    waiting: VecDeque<Vec<u8>>,
}

impl AsRawFd for Control {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Control {
    /// Takes the socket over. It blocks until [`Self::stop_blocking`].
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            waiting: VecDeque::new(),
        }
    }

    /// From here on nothing waits for the shim.
    pub(crate) fn stop_blocking(&self) -> io::Result<()> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let flags = OFlag::from_bits_retain(fcntl(&self.socket, FcntlArg::F_GETFL)?);
        fcntl(&self.socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(())
    }

    /// Receives; `None` when nothing is there (after [`Self::stop_blocking`]) or too much waits to
    /// be sent.
    pub(crate) fn receive(&mut self) -> io::Result<Option<Incoming>> {
        if self.waiting.len() >= WAITING_MAX {
            return Ok(None);
        }
        let mut buffer = [0; REQUEST_BYTES];
        let received = match seqpacket::receive(self.socket.as_fd(), &mut buffer) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Ok(Some(Incoming::End));
            }
            Err(error) => return Err(error),
        };
        if received.length == 0 {
            return Ok(Some(Incoming::End));
        }
        Ok(Some(interpret(&buffer, received)))
    }

    /// Queues a reply.
    pub(crate) fn reply(
        &mut self,
        number: u32,
        result: Result<Success, Failure>,
    ) -> io::Result<()> {
        let message = match result {
            Ok(success) => Message::Success(success),
            Err(failure) => Message::Failure(failure),
        };
        self.waiting.push_back(encode_message(number, &message));
        self.flush()
    }

    /// Queues an event; drops it when too much waits.
    pub(crate) fn send_event(&mut self, event: Event) -> io::Result<()> {
        if self.waiting.len() < WAITING_MAX {
            self.waiting
                .push_back(encode_message(0, &Message::Event(event)));
        }
        self.flush()
    }

    /// Sends what goes now.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        while let Some(message) = self.waiting.front() {
            match seqpacket::send(self.socket.as_fd(), message, &[]) {
                Ok(()) => drop(self.waiting.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether something waits to be sent.
    pub(crate) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether the next request may be read.
    pub(crate) fn takes_requests(&self) -> bool {
        self.waiting.len() < WAITING_MAX
    }
}

fn interpret(buffer: &[u8], received: seqpacket::Received) -> Incoming {
    let bytes = &buffer[..received.length];
    if received.truncated {
        let reason = "it is longer than a request, or its descriptors could not be taken";
        return Incoming::Invalid(number_of(bytes), FieldError::new("length", reason));
    }
    let descriptors = Descriptors::new(received.descriptors);
    match decode_request(bytes) {
        Ok((number, request)) => Incoming::Request(number, Box::new(request), descriptors),
        Err(error) => Incoming::Invalid(number_of(bytes), error),
    }
}

/// The number of a request that could not be read as a whole, so that its sender knows which it
/// was.
fn number_of(bytes: &[u8]) -> u32 {
    match bytes {
        [_, _, a, b, c, d, ..] => u32::from_le_bytes([*a, *b, *c, *d]),
        _ => 0,
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
