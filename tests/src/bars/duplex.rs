//! Many stream connections at once, each with bytes both ways, in one thread.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::pattern;

/// Bytes of one read or write.
const PIECE_BYTES: usize = 64 << 10;

/// No byte for so long is a failure, also in emulation on a busy computer.
const PATIENCE: Duration = Duration::from_secs(60);

/// One connection. The stream's type is that of unix sockets, which all stream sockets obey.
#[derive(Debug)]
pub struct Side {
    stream: UnixStream,
    seeds: (u64, u64),
    bytes: u64,
    sent: u64,
    received: u64,
    ended: bool,
}

impl Side {
    /// Sends `bytes` of the stream `seeds.0` and wants as many of `seeds.1`, then the end.
    pub fn new(socket: impl Into<OwnedFd>, seeds: (u64, u64), bytes: u64) -> Result<Self> {
        let stream = UnixStream::from(socket.into());
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            seeds,
            bytes,
            sent: 0,
            received: 0,
            ended: false,
        })
    }

    fn is_done(&self) -> bool {
        self.ended && self.sent == self.bytes
    }

    fn send(&mut self) -> Result<()> {
        let left = usize::try_from(self.bytes - self.sent)?.min(PIECE_BYTES);
        let mut piece = vec![0; left];
        pattern::fill(self.seeds.0, self.sent, &mut piece);
        match self.stream.write(&piece) {
            Ok(count) => self.sent += count as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => {
                return Err(error).with_context(|| format!("after {} bytes sent", self.sent));
            }
        }
        if self.sent == self.bytes {
            self.stream.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        let mut piece = vec![0; PIECE_BYTES];
        let count = match self.stream.read(&mut piece) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => {
                return Err(error).with_context(|| format!("after {} received", self.received));
            }
        };
        if count == 0 {
            self.ended = true;
            if self.received != self.bytes {
                bail!("it ended after {} of {} bytes", self.received, self.bytes);
            }
            return Ok(());
        }
        if let Some(at) = pattern::difference(self.seeds.1, self.received, &piece[..count]) {
            bail!("byte {at} is wrong");
        }
        self.received += count as u64;
        Ok(())
    }
}

/// Moves everything; fails with the number of the connection that did not get what it should.
pub fn run(sides: &mut [Side]) -> Result<()> {
    let mut last = Instant::now();
    loop {
        let waiting: Vec<usize> = (0..sides.len())
            .filter(|at| !sides[*at].is_done())
            .collect();
        if waiting.is_empty() {
            return Ok(());
        }
        let mut set: Vec<PollFd<'_>> = waiting
            .iter()
            .map(|at| {
                let side = &sides[*at];
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::POLLIN, !side.ended);
                flags.set(PollFlags::POLLOUT, side.sent < side.bytes);
                PollFd::new(side.stream.as_fd(), flags)
            })
            .collect();
        poll(&mut set, PollTimeout::from(1000_u16))?;
        let ready: Vec<(usize, PollFlags)> = waiting
            .iter()
            .zip(&set)
            .filter_map(|(at, entry)| Some((*at, entry.revents()?)))
            .filter(|(_, flags)| !flags.is_empty())
            .collect();
        if ready.is_empty() && last.elapsed() > PATIENCE {
            let side = &sides[waiting[0]];
            let name = waiting[0];
            let (sent, received) = (side.sent, side.received);
            bail!("connection {name} stands still: {sent} bytes sent, {received} received");
        }
        for (at, flags) in ready {
            last = Instant::now();
            let side = &mut sides[at];
            if flags.contains(PollFlags::POLLOUT) && side.sent < side.bytes {
                side.send().with_context(|| format!("connection {at}"))?;
            }
            if !side.ended && flags.intersects(PollFlags::POLLIN | PollFlags::POLLHUP) {
                side.receive().with_context(|| format!("connection {at}"))?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(bytes: (u64, u64), seeds: (u64, u64)) -> Vec<Side> {
        let (a, b) = UnixStream::pair().unwrap();
        vec![
            Side::new(a, (1, 2), bytes.0).unwrap(),
            Side::new(b, seeds, bytes.1).unwrap(),
        ]
    }

    #[test]
    fn both_ways_arrive_and_what_does_not_is_told() {
        run(&mut pair((1 << 20, 1 << 20), (2, 1))).unwrap();
        let wrong = run(&mut pair((4096, 4096), (3, 1))).unwrap_err();
        assert!(format!("{wrong:#}").contains("is wrong"), "{wrong:#}");
        let short = run(&mut pair((4096, 4095), (2, 1))).unwrap_err();
        assert!(format!("{short:#}").contains("ended after"), "{short:#}");
    }
}
