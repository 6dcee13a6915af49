//! The table of fuzz targets: one for each parser of bytes that somebody distrusted wrote.
//!
//! A target is a function of bytes that panics when what must hold does not. `tests/fuzz/run` lets
//! libFuzzer look for such bytes ([`docs/fuzzing.md`](../../../docs/fuzzing.md)); this crate's own
//! test plays the seeds and a few pseudo-random inputs, without any fuzzer.

mod guest;
mod machine_messages;

use pericarp_agent::fuzzing as agent;
use pericarp_vmm::fuzzing as vmm;

/// One target.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name on the command line.
    pub name: &'static str,
    /// Whose bytes they are, and what reads them.
    pub about: &'static str,
    /// Plays an input.
    pub run: fn(&[u8]),
    /// Inputs to begin with, where random bytes would not get past the first check.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

const fn target(name: &'static str, about: &'static str, run: fn(&[u8])) -> Target {
    Target {
        name,
        about,
        run,
        seeds: Vec::new,
    }
}

/// Every target.
pub const TARGETS: &[Target] = &[
    target(
        "queue",
        "guest: rings, descriptors, indirect tables",
        vmm::queue,
    ),
    target(
        "registers",
        "guest: the transport's registers and PCI configuration space",
        vmm::registers,
    ),
    target(
        "machine",
        "guest: the whole bus with MSI-X, BARs that move, and every device at once",
        vmm::machine,
    ),
    Target {
        name: "passthrough",
        about: "a function of the host that the last guest may have misled, and the guest: \
            configuration space",
        run: vmm::passthrough,
        seeds: guest::functions,
    },
    target("blk", "guest: disk requests", vmm::blk),
    target("net", "guest: packets and control commands", vmm::net),
    target("vsock", "guest: packets of its connections", vmm::vsock),
    target("balloon", "guest: pages and figures", vmm::balloon),
    target("mem", "guest: plug and unplug requests", vmm::mem),
    target("pmem", "guest: flush requests", vmm::pmem),
    target("rng", "guest: buffers to fill", vmm::rng),
    target("console", "guest: text", vmm::console),
    target(
        "relay",
        "file-system daemon: answers and rings, with requests of the guest",
        vmm::relay,
    ),
    target("saved", "file: a saved machine", vmm::saved),
    Target {
        name: "machine-request",
        about: "shim: requests to the VMM",
        run: machine_messages::request,
        seeds: machine_messages::request_seeds,
    },
    Target {
        name: "machine-message",
        about: "VMM, which a guest may have taken over: answers and events to the shim",
        run: machine_messages::message,
        seeds: machine_messages::message_seeds,
    },
    Target {
        name: "agent-paths",
        about: "image: links and paths that are resolved and made beneath its root",
        run: agent::paths,
        seeds: guest::paths,
    },
    Target {
        name: "agent-passwd",
        about: "image: /etc/passwd",
        run: agent::passwd,
        seeds: guest::passwd,
    },
    Target {
        name: "agent-spec",
        about: "tenant: the runtime specification, its seccomp profile included",
        run: agent::specification,
        seeds: guest::specification,
    },
    Target {
        name: "agent-resources",
        about: "tenant: limits and device rules",
        run: agent::resources,
        seeds: guest::resources,
    },
    Target {
        name: "agent-drivers",
        about: "operator: the list of modules and CDI specifications of an image of drivers",
        run: agent::drivers,
        seeds: guest::drivers,
    },
    Target {
        name: "agent-uevent",
        about: "container with CAP_SYS_ADMIN: announcements of devices",
        run: agent::uevent,
        seeds: guest::uevent,
    },
    Target {
        name: "agent-cgroup",
        about: "container: names of its cgroups in /proc/<pid>/cgroup",
        run: agent::cgroup_of_process,
        seeds: guest::cgroup,
    },
    Target {
        name: "agent-report",
        about: "privileged container: what its helper says",
        run: agent::report,
        seeds: guest::report,
    },
    Target {
        name: "agent-figures",
        about: "container: names in files of statistics",
        run: agent::figures,
        seeds: guest::figures,
    },
    Target {
        name: "agent-kernel-log",
        about: "container: records of the kernel's log",
        run: agent::kernel_log,
        seeds: guest::kernel_log,
    },
    Target {
        name: "stream-header",
        about: "host: first lines of stream connections",
        run: guest::stream_header,
        seeds: guest::stream_headers,
    },
    Target {
        name: "agent-answer",
        about: "guest: the hello frame and the agent's answers and events to the shim",
        run: guest::answer,
        seeds: guest::answers,
    },
];

/// The target of a name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Inputs of pseudo-random bytes for each target.
    const INPUTS: u64 = 32;

    #[test]
    fn every_target_takes_its_seeds_and_any_bytes() {
        for target in TARGETS {
            for seed in (target.seeds)() {
                (target.run)(&seed);
            }
            let mut state = 0x9e37_79b9_7f4a_7c15_u64;
            for input in 0..INPUTS {
                let bytes: Vec<u8> = (0..input * 16)
                    .map(|_| {
                        // Knuth's constants for a linear congruential generator.
                        state = state
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407);
                        state.to_be_bytes()[0]
                    })
                    .collect();
                (target.run)(&bytes);
            }
        }
    }

    #[test]
    fn names_are_unique() {
        for target in TARGETS {
            assert_eq!(
                find(target.name).map(|found| found.about),
                Some(target.about)
            );
        }
    }
}
