//! The fuzzer for one target, chosen by the variable `PERICARP_FUZZ_TARGET`; see `run` beside this
//! folder. The arguments are libFuzzer's.
//!
//! Before it reads the corpus it writes the target's seeds to the folder that
//! `PERICARP_FUZZ_CORPUS` names.

#![no_main]

use std::{env, fs, path::Path, sync::OnceLock};

use libfuzzer_sys::fuzz_target;
use pericarp_fuzz::{TARGETS, Target, find};

static CHOSEN: OnceLock<&'static Target> = OnceLock::new();

fn chosen() -> &'static Target {
    let name = env::var("PERICARP_FUZZ_TARGET").unwrap_or_default();
    find(&name).unwrap_or_else(|| {
        let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        panic!(
            "PERICARP_FUZZ_TARGET={name}: give one of {}",
            names.join(" ")
        )
    })
}

fn write_seeds(target: &Target) {
    let Some(folder) = env::var_os("PERICARP_FUZZ_CORPUS") else {
        return;
    };
    for (number, seed) in (target.seeds)().iter().enumerate() {
        let path = Path::new(&folder).join(format!("seed-{number}"));
        fs::write(&path, seed).expect("the corpus can be written to");
    }
}

fuzz_target!(
    init: {
        let target = CHOSEN.get_or_init(chosen);
        write_seeds(target);
    },
    |data: &[u8]| (CHOSEN.get_or_init(chosen).run)(data)
);
