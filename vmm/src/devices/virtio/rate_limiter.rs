//! Token buckets for bytes and operations, and the timer that says when to go on.
//!
//! A bucket may go into debt: whoever finds it above zero may spend any amount, and the debt is
//! paid before the next spends. So a request larger than the bucket is late, never stuck, and the
//! average holds.
//!
//! Thread: the event loop. Descriptor held: one timerfd per limiter, made with the device.

use std::{
    os::fd::{AsRawFd, RawFd},
    time::{Duration, Instant},
};

use vmm_sys_util::timerfd::TimerFd;

/// A limit: zero means none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Rate {
    /// Tokens gained each second.
    pub(crate) per_second: u64,
    /// Tokens that an idle bucket holds: what a burst may spend at once; zero means one second's
    /// worth.
    pub(crate) burst: u64,
}

/// Limits of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Rates {
    /// Payload bytes.
    pub(crate) bytes: Rate,
    /// Requests or packets.
    pub(crate) operations: Rate,
}

impl Rates {
    /// Limits nothing.
    pub(crate) const NONE: Self = Self {
        bytes: Rate {
            per_second: 0,
            burst: 0,
        },
        operations: Rate {
            per_second: 0,
            burst: 0,
        },
    };
}

const NANOSECONDS: i128 = 1_000_000_000;

/// Never wait longer than this at once, so that a limit raised meanwhile takes hold.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Never wait shorter than this, so that timers do not eat what they meter.
const WAIT_MIN: Duration = Duration::from_millis(1);

/// One bucket. The balance is counted in token-nanoseconds: tokens times 10^9, so that slow rates
/// lose nothing to rounding.
#[derive(Debug)]
pub(crate) struct TokenBucket {
    rate: Rate,
    balance: i128,
    updated: Instant,
}

impl TokenBucket {
    /// A full bucket.
    pub(crate) fn new(rate: Rate, now: Instant) -> Self {
        Self {
            rate,
            balance: full(rate),
            updated: now,
        }
    }

    /// How long until something may be spent; `None` when it may be now.
    pub(crate) fn wait(&mut self, now: Instant) -> Option<Duration> {
        if self.rate.per_second == 0 {
            return None;
        }
        let elapsed = now.saturating_duration_since(self.updated).as_nanos();
        self.updated = self.updated.max(now);
        let gained = i128::try_from(elapsed)
            .unwrap_or(i128::MAX)
            .saturating_mul(i128::from(self.rate.per_second));
        self.balance = self.balance.saturating_add(gained).min(full(self.rate));
        if self.balance > 0 {
            return None;
        }
        let nanoseconds = (1 - self.balance) / i128::from(self.rate.per_second) + 1;
        Some(Duration::from_nanos(
            u64::try_from(nanoseconds).unwrap_or(u64::MAX),
        ))
    }

    /// Spends tokens, into debt if need be.
    pub(crate) fn spend(&mut self, tokens: u64) {
        if self.rate.per_second != 0 {
            self.balance = self
                .balance
                .saturating_sub(i128::from(tokens) * NANOSECONDS);
        }
    }
}

/// What an idle bucket holds.
fn full(rate: Rate) -> i128 {
    let tokens = if rate.burst == 0 {
        rate.per_second
    } else {
        rate.burst
    };
    i128::from(tokens) * NANOSECONDS
}

/// Both buckets of one direction and its timer.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    rates: Rates,
    bytes: TokenBucket,
    operations: TokenBucket,
    timer: TimerFd,
    waiting: bool,
}

impl RateLimiter {
    /// A limiter with full buckets.
    ///
    /// # Errors
    /// The kernel gives no timer.
    pub(crate) fn new(rates: Rates) -> std::io::Result<Self> {
        let now = Instant::now();
        Ok(Self {
            rates,
            bytes: TokenBucket::new(rates.bytes, now),
            operations: TokenBucket::new(rates.operations, now),
            timer: TimerFd::new()?,
            waiting: false,
        })
    }

    /// Sets new limits, with full buckets.
    pub(crate) fn set(&mut self, rates: Rates) {
        let now = Instant::now();
        self.rates = rates;
        self.bytes = TokenBucket::new(rates.bytes, now);
        self.operations = TokenBucket::new(rates.operations, now);
    }

    /// The descriptor that becomes readable when a refused caller may try again.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Whether one more operation may begin. When not, the timer is set.
    pub(crate) fn admits(&mut self) -> bool {
        if self.rates == Rates::NONE {
            return true;
        }
        let now = Instant::now();
        let Some(wait) = self.bytes.wait(now).max(self.operations.wait(now)) else {
            return true;
        };
        if !self.waiting {
            // Without a timer the queue would stand still for ever: rather admit too much.
            self.waiting = self
                .timer
                .reset(wait.clamp(WAIT_MIN, WAIT_MAX), None)
                .is_ok();
            return !self.waiting;
        }
        false
    }

    /// Counts an operation of `bytes` bytes.
    pub(crate) fn spend(&mut self, bytes: u64) {
        self.operations.spend(1);
        self.bytes.spend(bytes);
    }

    /// The timer's descriptor was readable, or the wait is over for another reason. Never blocks:
    /// setting a timer clears what it has counted.
    pub(crate) fn wait_ended(&mut self) {
        self.waiting = false;
        // A timer that cannot be cleared stays readable and costs a turn of the loop, no more.
        let _ = self.timer.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn no_limit_never_waits() {
        let now = Instant::now();
        let mut bucket = TokenBucket::new(Rate::default(), now);
        bucket.spend(u64::MAX);
        assert_eq!(bucket.wait(now), None);
    }

    #[test]
    fn debt_is_paid_before_the_next() {
        let now = Instant::now();
        let rate = Rate {
            per_second: 1000,
            burst: 100,
        };
        let mut bucket = TokenBucket::new(rate, now);
        bucket.spend(1100);
        let wait = bucket.wait(now).unwrap();
        assert!((wait.as_secs_f64() - 1.0).abs() < 0.01, "{wait:?}");
        assert!(bucket.wait(now + Duration::from_millis(990)).is_some());
        assert_eq!(bucket.wait(now + Duration::from_millis(1010)), None);
    }

    proptest! {
        /// Over any sequence of steps, no more is spent than burst + rate x time + one operation's
        /// overdraft.
        #[test]
        fn average_holds(
            per_second in 1u64..1_000_000,
            burst in 0u64..1_000_000,
            steps in proptest::collection::vec((0u64..10_000_000, 1u64..100_000), 1..200),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut bucket = TokenBucket::new(Rate { per_second, burst }, now);
            let (mut spent, mut largest) = (0u128, 0u128);
            for (nanoseconds, tokens) in steps {
                now += Duration::from_nanos(nanoseconds);
                if bucket.wait(now).is_none() {
                    bucket.spend(tokens);
                    spent += u128::from(tokens);
                    largest = largest.max(u128::from(tokens));
                }
            }
            let burst = if burst == 0 { per_second } else { burst };
            let earned = (now - start).as_nanos() * u128::from(per_second) / 1_000_000_000;
            prop_assert!(spent <= u128::from(burst) + earned + largest + 1);
        }

        /// A wait that is waited for ends.
        #[test]
        fn wait_is_long_enough(per_second in 1u64..u64::MAX, burst: u64, tokens: u64) {
            let now = Instant::now();
            let mut bucket = TokenBucket::new(Rate { per_second, burst }, now);
            bucket.spend(tokens);
            if let Some(wait) = bucket.wait(now)
                && let Some(later) = now.checked_add(wait)
            {
                prop_assert_eq!(bucket.wait(later), None);
            }
        }
    }

    #[test]
    fn limiter_sets_its_timer_and_opens_again() {
        let mut limiter = RateLimiter::new(Rates {
            operations: Rate {
                per_second: 100,
                burst: 1,
            },
            ..Rates::NONE
        })
        .unwrap();
        assert!(limiter.admits());
        limiter.spend(1);
        limiter.spend(1);
        assert!(!limiter.admits());
        assert!(limiter.timer.is_armed().unwrap());
        limiter.timer.wait().unwrap();
        limiter.wait_ended();
        // The wait may have been cut short by WAIT_MAX only, which is longer than 10 ms.
        assert!(limiter.admits());
    }
}
