//! Limits of the node that a container has under runc although nobody sets them for it.
//!
//! containerd starts its shims with the limits that it was started with itself, and runc's
//! containers inherit them. Neither this process nor its parent, `start`, changes any of its own
//! limits, so what is read here is what containerd handed down.

use std::fs;

use pericarp_protocol::{
    guest::{NodeLimits, ResourceLimit},
    limits::RESOURCE_LIMITS_MAX,
};
use pericarp_sys::attributes;

/// Reads the limits. What cannot be read is left to the guest.
pub(crate) fn read() -> NodeLimits {
    let kinds = 0..u32::try_from(RESOURCE_LIMITS_MAX).unwrap_or_default();
    let resources = kinds.filter_map(|resource| {
        let (soft, hard) = attributes::own_limit(resource).ok()?;
        Some(ResourceLimit {
            resource,
            soft,
            hard,
            ..Default::default()
        })
    });
    NodeLimits {
        resources: resources.collect(),
        threads_max: number("kernel/threads-max"),
        pid_max: number("kernel/pid_max"),
        file_max: number("fs/file-max"),
        nr_open: number("fs/nr_open"),
        ..Default::default()
    }
}

fn number(sysctl: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/sys/{sysctl}")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use nix::sys::resource::{Resource, getrlimit};

    use super::*;

    #[test]
    fn the_limits_are_those_of_this_process() {
        let limits = read();
        assert_eq!(limits.resources.len(), RESOURCE_LIMITS_MAX);
        for (kind, number) in [(Resource::RLIMIT_NPROC, 6), (Resource::RLIMIT_NOFILE, 7)] {
            let limit = &limits.resources[number];
            assert_eq!(limit.resource, u32::try_from(number).unwrap());
            assert_eq!((limit.soft, limit.hard), getrlimit(kind).unwrap());
        }
        assert!(limits.threads_max > 0 && limits.pid_max > 0);
        assert!(limits.file_max > 0 && limits.nr_open > 0);
    }
}
