//! What must differ between two machines that went on from one template, and the clock: read before
//! anything else is done.

use std::{fs, io::Read as _};

use anyhow::Result;
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

/// Random bytes of each kind.
const BYTES: usize = 16;

/// Everything, as text.
pub(crate) fn look() -> Result<Value> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
    let mut random = [0; BYTES];
    fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned());
    let maps = fs::read_to_string("/proc/self/maps")?;
    let start_of = |name: &str| {
        let line = maps.lines().find(|line| line.ends_with(name));
        line.and_then(|line| line.split('-').next())
            .unwrap_or_default()
    };
    let mut addresses = Vec::new();
    for entry in fs::read_dir("/sys/class/net")? {
        let entry = entry?;
        if entry.file_name() != "lo" {
            addresses.push(read(&entry.path().join("address").to_string_lossy())?);
        }
    }
    Ok(json!({
        "clock_s": now.tv_sec(),
        "differs": {
            "random": format!("{random:02x?}"),
            "at_random": at_random()?,
            "boot_id": read("/proc/sys/kernel/random/boot_id")?,
            "stack": start_of("[stack]"),
            "mappings": start_of("[vdso]"),
            "hostname": read("/proc/sys/kernel/hostname")?,
            "addresses": addresses.join(" "),
        },
    }))
}

/// The bytes that the kernel gave this process for its own secrets (getauxval(3), `AT_RANDOM`), by
/// way of /proc.
fn at_random() -> Result<String> {
    use std::os::unix::fs::FileExt as _;
    const AT_RANDOM: u64 = 25;
    let vector = fs::read("/proc/self/auxv")?;
    let (words, _) = vector.as_chunks::<8>();
    let words: Vec<u64> = words.iter().map(|word| u64::from_ne_bytes(*word)).collect();
    let address = words.chunks(2).find(|pair| pair[0] == AT_RANDOM);
    let mut bytes = [0; BYTES];
    if let Some([_, address]) = address {
        fs::File::open("/proc/self/mem")?.read_exact_at(&mut bytes, *address)?;
    }
    Ok(format!("{bytes:02x?}"))
}
