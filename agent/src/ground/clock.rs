//! The guest's clocks.

use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_gettime, clock_settime},
};

/// Time since boot in microseconds.
pub(crate) fn boot_time_us() -> u64 {
    // The call cannot fail for a clock that every kernel has; 0 would only spoil a figure.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
        let nanoseconds = u64::try_from(time.tv_nsec()).unwrap_or(0);
        seconds * 1_000_000 + nanoseconds / 1000
    })
}

/// Nanoseconds since the epoch.
pub(crate) fn wall_clock_ns() -> i64 {
    clock_gettime(ClockId::CLOCK_REALTIME)
        .map_or(0, |time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

/// Sets the wall clock.
pub(crate) fn set_wall_clock_ns(time_ns: i64) -> nix::Result<()> {
    let time = TimeSpec::new(
        time_ns.div_euclid(1_000_000_000),
        time_ns.rem_euclid(1_000_000_000),
    );
    clock_settime(ClockId::CLOCK_REALTIME, time)
}
