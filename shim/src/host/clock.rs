//! The node's wall clock: its offset from a monotonic clock, and a notification when it is set.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
};

use nix::{
    errno::Errno,
    sys::{
        time::TimeSpec,
        timerfd::{ClockId as TimerClock, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
    time::{ClockId, clock_gettime},
};
use tokio::io::unix::AsyncFd;

/// Nanoseconds that the wall clock is ahead of `CLOCK_MONOTONIC_RAW` (clock_gettime(2)), which is
/// never set or slewed. The offset changes by as much as the wall clock was set or slewed.
pub(crate) fn offset_ns() -> i64 {
    let now = |clock| {
        // Cannot fail: every kernel has both clocks.
        clock_gettime(clock).map_or(0, |time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
    };
    now(ClockId::CLOCK_REALTIME) - now(ClockId::CLOCK_MONOTONIC_RAW)
}

/// Notifies when the wall clock is set.
#[derive(Debug)]
pub(crate) struct Steps {
    timer: AsyncFd<Timer>,
}

/// A timer that tokio can wait for.
#[derive(Debug)]
struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// `TFD_TIMER_CANCEL_ON_SET` of timerfd_create(2), which nix has no name for.
const CANCEL_ON_SET: i32 = 1 << 1;

/// An expiration that is never reached, in seconds since the epoch.
const NEVER_S: i64 = i64::MAX / 1_000_000_000;

impl Steps {
    /// Begins to watch.
    #[expect(
        deprecated,
        reason = "its successor is unsafe for owners that close early; a timer closes when dropped"
    )]
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = TimerFd::new(TimerClock::CLOCK_REALTIME, flags)?;
        arm(&timer)?;
        Ok(Self {
            timer: AsyncFd::new(Timer(timer))?,
        })
    }

    /// Waits until the clock is set.
    pub(crate) async fn next(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.timer.readable().await?;
            // After a step of the clock, one read fails with this error.
            let read = ready.try_io(|timer| match timer.get_ref().0.wait() {
                Err(Errno::ECANCELED) => Ok(()),
                other => other.map_err(io::Error::from),
            });
            if let Ok(read) = read {
                return read;
            }
        }
    }
}

fn arm(timer: &TimerFd) -> nix::Result<()> {
    let flags =
        TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::from_bits_retain(CANCEL_ON_SET);
    timer.set(Expiration::OneShot(TimeSpec::new(NEVER_S, 0)), flags)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn nothing_is_told_while_nobody_sets_the_clock() {
        let mut steps = Steps::new().unwrap();
        let waited = timeout(Duration::from_millis(50), steps.next()).await;
        assert!(waited.is_err());
        let before = offset_ns();
        assert!((offset_ns() - before).abs() < 1_000_000_000);
    }
}
