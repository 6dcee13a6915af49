//! `hostile-guest`: what a container with every right in its VM does to a function that was passed
//! through. It runs in the guest and reaches the function as the guest's kernel lets it: by
//! configuration space and BARs in sysfs. The test beside it judges what the host makes of it
//! (`tests/node_passthrough.rs`).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use pericarp_sys::mapping::{DeviceMapping, SharedWords};
use pericarp_tests::bars::pattern::Numbers;

/// Does one thing to a function.
#[derive(Debug, Parser)]
#[command(name = "hostile-guest")]
enum Cli {
    /// Has the teaching device interrupt by MSI, `count` times, and counts what arrives.
    Msi { address: String, count: u64 },
    /// Has it copy a page of our own, then reach for memory that is not the guest's.
    Dma { address: String },
    /// Has it read the registers of another function, where they are and where they are moved to.
    Peer { address: String, peer: String },
    /// Has it read what `peer` has told, when nobody's registers are there any more.
    Reach {
        address: String,
        place: u64,
        word: u64,
    },
    /// Writes to configuration space and BARs: every size at every alignment.
    Scribble {
        address: String,
        seed: u64,
        rounds: u64,
    },
    /// Rewrites the table of MSI-X.
    Table {
        address: String,
        seed: u64,
        rounds: u64,
    },
}

/// Vector of the kernel's rescheduling interrupt, which does nothing on a machine that has nothing
/// to reschedule, and is counted as RES (`arch/x86/include/asm/irq_vectors.h`).
const VECTOR: u16 = 0xfd;

/// Registers of the teaching device (QEMU's `docs/specs/edu.rst`).
const RAISE: usize = 0x60;
const ACKNOWLEDGE: usize = 0x64;
const SOURCE: usize = 0x80;
const DESTINATION: usize = 0x88;
const COUNT: usize = 0x90;
const COMMAND: usize = 0x98;
/// Its own memory.
const BUFFER: u64 = 0x4_0000;
const RUN: u64 = 1;
const TO_GUEST: u64 = 2;

const PAGE_BYTES: usize = 4096;

/// How long an interrupt or a copy may take in emulation on a busy computer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A function in sysfs.
struct Function {
    folder: PathBuf,
    config: File,
}

impl Function {
    /// Opens it and lets it decode its BARs and reach memory, whether it has a driver or not.
    fn open(address: &str) -> Result<Self> {
        let folder = PathBuf::from("/sys/bus/pci/devices").join(address);
        let config = folder.join("config");
        let config = OpenOptions::new().read(true).write(true).open(&config);
        let config = config.with_context(|| format!("function {address}"))?;
        let command = read_config(&config, 4)? | 0b110;
        config.write_all_at(&command.to_le_bytes(), 4)?;
        Ok(Self { folder, config })
    }

    /// Maps a BAR; None when it has none.
    fn bar(&self, index: usize) -> Result<Option<(DeviceMapping, usize)>> {
        let path = self.folder.join(format!("resource{index}"));
        let Ok(file) = OpenOptions::new().read(true).write(true).open(&path) else {
            return Ok(None);
        };
        let length = usize::try_from(file.metadata()?.len())?;
        let mapping = DeviceMapping::new(file.as_fd(), 0, length.next_multiple_of(PAGE_BYTES));
        let mapping = mapping.with_context(|| format!("map {}", path.display()))?;
        Ok(Some((mapping, length)))
    }

    /// Where the kernel has put a BAR, and the bytes of its address; None when it has none.
    fn place(&self, index: usize) -> Result<Option<(u64, usize)>> {
        let text = std::fs::read_to_string(self.folder.join("resource"))?;
        let line = text.lines().nth(index).unwrap_or_default();
        let words: Vec<&str> = line.split_whitespace().collect();
        let word = |at: usize| {
            let digits = words
                .get(at)
                .map_or("", |word| word.trim_start_matches("0x"));
            u64::from_str_radix(digits, 16).unwrap_or(0)
        };
        let (start, flags) = (word(0), word(2));
        // IORESOURCE_MEM and IORESOURCE_MEM_64 (include/linux/ioport.h).
        let length = if flags & 0x10_0000 != 0 { 8 } else { 4 };
        Ok((flags & 0x200 != 0).then_some((start, length)))
    }

    /// Offset of a capability.
    fn capability(&self, id: u8) -> Result<usize> {
        let mut next = read_config(&self.config, 0x34)?.to_le_bytes()[0];
        for _ in 0..64 {
            let [found, following] = read_config(&self.config, usize::from(next))?.to_le_bytes();
            if found == id {
                return Ok(usize::from(next));
            }
            next = following;
        }
        bail!("no capability {id:#x}")
    }
}

fn read_config(config: &File, at: usize) -> Result<u16> {
    let mut bytes = [0; 2];
    config.read_exact_at(&mut bytes, at as u64)?;
    Ok(u16::from_le_bytes(bytes))
}

fn say(text: impl std::fmt::Display) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

/// Waits, busily, because nothing else tells.
fn until(mut reached: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !reached()? {
        ensure!(Instant::now() < deadline, "it did not come in time");
        std::thread::yield_now();
    }
    Ok(())
}

fn rescheduled() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/interrupts")?;
    let line = text.lines().find(|line| line.trim().starts_with("RES:"));
    let words = line.context("no RES")?.split_whitespace().skip(1);
    Ok(words.map_while(|word| word.parse::<u64>().ok()).sum())
}

fn msi(address: &str, count: u64) -> Result<()> {
    let function = Function::open(address)?;
    let (registers, _) = function.bar(0)?.context("no BAR 0")?;
    let at = function.capability(5)?;
    let write = |offset: usize, bytes: &[u8]| {
        let written = function.config.write_all_at(bytes, (at + offset) as u64);
        written.context("MSI")
    };
    let switch = |on: u16| -> Result<()> {
        let control = read_config(&function.config, at + 2)? & !1 | on;
        write(2, &control.to_le_bytes())
    };
    write(4, &0xfee0_0000_u64.to_le_bytes())?;
    write(12, &VECTOR.to_le_bytes())?;
    let mut counted = 0;
    // Off and on again: the second time as good as the first.
    for half in [count / 2, count - count / 2] {
        switch(1)?;
        for _ in 0..half {
            let before = rescheduled()?;
            registers.store(RAISE, 4, 1);
            until(|| Ok(rescheduled()? > before)).context("no interrupt")?;
            registers.store(ACKNOWLEDGE, 4, 1);
            counted += 1;
        }
        switch(0)?;
    }
    say(format_args!("{counted} interrupts"))
}

/// Where a page of ours lies in the guest's memory (Documentation/admin-guide/mm/pagemap.rst).
fn physical(page: &SharedWords) -> Result<u64> {
    let entry = page.as_ptr().addr() / PAGE_BYTES * 8;
    let mut bytes = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut bytes, entry as u64)?;
    let number = u64::from_le_bytes(bytes) & ((1 << 55) - 1);
    ensure!(number != 0, "the kernel does not say where the page is");
    Ok(number * PAGE_BYTES as u64)
}

fn copy(registers: &DeviceMapping, memory: u64, bytes: u64, direction: u64) -> Result<()> {
    let (source, destination) = match direction {
        TO_GUEST => (BUFFER, memory),
        _ => (memory, BUFFER),
    };
    registers.store(SOURCE, 8, source);
    registers.store(DESTINATION, 8, destination);
    registers.store(COUNT, 8, bytes);
    registers.store(COMMAND, 8, RUN | direction);
    until(|| {
        Ok(registers
            .load(COMMAND, 8)
            .is_some_and(|value| value & RUN == 0))
    })
}

fn dma(address: &str) -> Result<()> {
    use std::sync::atomic::Ordering::Relaxed;
    let function = Function::open(address)?;
    let (registers, _) = function.bar(0)?.context("no BAR 0")?;
    let [from, to] = [SharedWords::new(PAGE_BYTES)?, SharedWords::new(PAGE_BYTES)?];
    for (index, word) in (0..).zip(from.iter()) {
        word.store(index ^ 0xa5a5_5a5a, Relaxed);
    }
    to[0].store(1, Relaxed);
    copy(&registers, physical(&from)?, PAGE_BYTES as u64, 0)?;
    copy(&registers, physical(&to)?, PAGE_BYTES as u64, TO_GUEST)?;
    let same = |(a, b): (&_, &_)| -> bool {
        let [a, b]: [&std::sync::atomic::AtomicU32; 2] = [a, b];
        a.load(Relaxed) == b.load(Relaxed)
    };
    ensure!(from.iter().zip(to.iter()).all(same), "another page came");
    say("own memory: copied")?;
    // Beyond the guest's memory, the hole below 4 GiB, a BAR of its own, far above.
    for target in [0xb000_0000, 0xc000_0000, 0x1_0000_0000, 0x40_0000_0000] {
        copy(&registers, target, PAGE_BYTES as u64, 0)?;
        copy(&registers, target, PAGE_BYTES as u64, TO_GUEST)?;
    }
    // The window of interrupts: one that the host did not grant.
    copy(&registers, 0xfee0_0000, 4, TO_GUEST)?;
    say("not our memory: tried")
}

/// The BAR of a virtio function with its registers, and where among them a disk says how large it
/// is: so it is in QEMU's devices. Reading changes nothing there.
const PEER_BAR: usize = 4;
const PEER_OFFSET: usize = 0x2000;

/// How far away its registers are moved: no other function is there.
const MOVE_BYTES: u64 = 64 << 20;

/// What the teaching device reads at `place`: 8 bytes, by way of a page of ours.
fn read_as_device(registers: &DeviceMapping, place: u64) -> Result<u64> {
    use std::sync::atomic::Ordering::Relaxed;
    let page = SharedWords::new(PAGE_BYTES)?;
    // Not what an earlier copy has left in the device.
    page[0].store(0x5eed, Relaxed);
    let memory = physical(&page)?;
    copy(registers, memory, 8, 0)?;
    copy(registers, place, 8, 0)?;
    copy(registers, memory, 8, TO_GUEST)?;
    let [low, high] = [0, 1].map(|index: usize| u64::from(page[index].load(Relaxed)));
    Ok(low | high << 32)
}

fn peer(address: &str, peer: &str) -> Result<()> {
    let function = Function::open(address)?;
    let (registers, _) = function.bar(0)?.context("no BAR 0")?;
    let peer = Function::open(peer)?;
    let (peers, _) = peer.bar(PEER_BAR)?.context("the peer has no such BAR")?;
    let load = |offset: usize| peers.load(PEER_OFFSET + offset, 4);
    let (low, high) = load(0).zip(load(4)).context("the peer's BAR is small")?;
    let word = low | high << 32;
    ensure!(word != 0, "the peer has nothing to tell");
    let (start, _) = peer.place(PEER_BAR)?.context("the peer is nowhere")?;
    let read = |start: u64| read_as_device(&registers, start + PEER_OFFSET as u64);
    let seen = read(start)?;
    ensure!(seen == word, "{seen:#x} at {start:#x}, not {word:#x}");
    say(format_args!("there: {} {word}", start + PEER_OFFSET as u64))?;
    let put = |start: u64| {
        let at = 0x10 + PEER_BAR as u64 * 4;
        peer.config.write_all_at(&start.to_le_bytes(), at)
    };
    // The VMM learns of it a moment later.
    put(start + MOVE_BYTES)?;
    until(|| Ok(read(start + MOVE_BYTES)? == word)).context("they did not move along")?;
    let left = read(start)?;
    ensure!(left != word, "they are still at {start:#x}");
    put(start)?;
    until(|| Ok(read(start)? == word)).context("they did not come back")?;
    say("moved: read")
}

fn reach(address: &str, place: u64, word: u64) -> Result<()> {
    let function = Function::open(address)?;
    let (registers, _) = function.bar(0)?.context("no BAR 0")?;
    let seen = read_as_device(&registers, place)?;
    ensure!(seen != word, "{place:#x} is still read");
    say("nothing there")
}

const SIZES: [usize; 4] = [1, 2, 4, 8];

fn scribble(address: &str, seed: u64, rounds: u64) -> Result<()> {
    let function = Function::open(address)?;
    let mut numbers = Numbers::new(seed);
    let identity = [0, 8, 0x2c].map(|at| read_config(&function.config, at).ok());
    let mut bars = Vec::new();
    for index in 0..6 {
        bars.extend(function.bar(index)?);
    }
    for offset in 0..256 {
        for size in &SIZES[..3] {
            let value = numbers.number().to_le_bytes();
            // The kernel refuses what lies beyond.
            let _ = function.config.write_at(&value[..*size], offset);
        }
    }
    let after = [0, 8, 0x2c].map(|at| read_config(&function.config, at).ok());
    ensure!(identity == after, "the identity changed: {after:?}");
    say("configuration space: written")?;
    // Where the BARs were, so that what follows reaches them.
    restore(&function)?;
    for _ in 0..rounds {
        for (bar, length) in &bars {
            let size = SIZES[usize::try_from(numbers.below(4))?];
            let offset = usize::try_from(numbers.below(*length as u64))?;
            let _ = std::hint::black_box(bar.load(offset, size));
            bar.store(offset, size, numbers.number());
        }
    }
    say(format_args!("{} BARs: written", bars.len()))
}

/// Writes the BARs' addresses, as the kernel knows them, and switches decoding on.
fn restore(function: &Function) -> Result<()> {
    for index in 0..6 {
        if let Some((start, length)) = function.place(index)? {
            let bytes = start.to_le_bytes();
            let at = 0x10 + index as u64 * 4;
            function.config.write_all_at(&bytes[..length], at)?;
        }
    }
    function.config.write_all_at(&6_u16.to_le_bytes(), 4)?;
    Ok(())
}

fn table(address: &str, seed: u64, rounds: u64) -> Result<()> {
    let function = Function::open(address)?;
    let mut numbers = Numbers::new(seed);
    let at = function.capability(0x11)?;
    let count = u64::from(read_config(&function.config, at + 2)? & 0x7ff) + 1;
    let place = read_config(&function.config, at + 4)?;
    let (bar, length) = function.bar(usize::from(place & 7))?.context("no BAR")?;
    let start = usize::from(place & !7);
    for round in 0..rounds {
        let entry = start + usize::try_from(numbers.below(count))? * 16;
        // Whole entries, then any part of any of them.
        let (offset, size) = match round % 4 {
            0 => (entry, 8),
            1 => (entry + 8, 8),
            2 => (entry + 12, 4),
            _ => {
                let size = SIZES[usize::try_from(numbers.below(4))?];
                (entry + usize::try_from(numbers.below(16))?, size)
            }
        };
        if offset + size <= length {
            bar.store(offset, size, numbers.number());
        }
        if round % 16 == 0 {
            // The whole function masked and not, on and off.
            let control = numbers.number().to_le_bytes()[0];
            function.config.write_all_at(&[control], (at + 3) as u64)?;
        }
    }
    say("table of MSI-X: written")
}

fn main() -> Result<()> {
    match Cli::parse() {
        Cli::Msi { address, count } => msi(&address, count),
        Cli::Dma { address } => dma(&address),
        Cli::Peer { address, peer: of } => peer(&address, &of),
        Cli::Reach {
            address,
            place,
            word,
        } => reach(&address, place, word),
        Cli::Scribble {
            address,
            seed,
            rounds,
        } => scribble(&address, seed, rounds),
        Cli::Table {
            address,
            seed,
            rounds,
        } => table(&address, seed, rounds),
    }
}
