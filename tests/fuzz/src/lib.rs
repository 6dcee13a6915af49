//! The table of fuzz targets: one for each parser of bytes that somebody distrusted wrote.
//!
//! A target is a function of bytes that panics when what must hold does not. `tests/fuzz/run` lets
//! libFuzzer look for such bytes ([`docs/fuzzing.md`](../../../docs/fuzzing.md)); this crate's own
//! test plays the seeds and a few pseudo-random inputs, without any fuzzer.

mod machine_messages;

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
    target("blk", "guest: disk requests", vmm::blk),
    target("net", "guest: packets and control commands", vmm::net),
    target("vsock", "guest: packets of its connections", vmm::vsock),
    target("balloon", "guest: pages and figures", vmm::balloon),
    target("mem", "guest: plug and unplug requests", vmm::mem),
    target("pmem", "guest: flush requests", vmm::pmem),
    target("rng", "guest: buffers to fill", vmm::rng),
    target("console", "guest: text", vmm::console),
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
