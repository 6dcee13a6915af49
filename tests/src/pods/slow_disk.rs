//! A disk of the node with a class of block I/O, by which containers read and write 1 MiB a second.

use anyhow::{Context, Result, ensure};

use crate::node::Node;

/// Where it is mounted in the node, and in containers.
pub const FOLDER: &str = "/run/slow";

/// The file with the class (goresctrl, `pkg/blockio`).
pub const CLASSES: &str = "/run/slow.yaml";

/// The name of the class.
pub const CLASS: &str = "slow";

/// Seconds that 8 MiB take at the least, whatever is let through at first.
const SECONDS_MIN: u64 = 6;

/// Makes it, with a file.
const MAKE: &str = "set -e; modprobe loop
truncate -s 64M /run/slow.img
mkfs.ext4 -q -F /run/slow.img
disk=$(losetup --find --show /run/slow.img)
mkdir -p FOLDER
mount $disk FOLDER
cat >CLASSES <<END
Classes:
  CLASS:
  - Devices: [$disk]
    ThrottleReadBps: 1048576
    ThrottleWriteBps: 1048576
END
dd if=/dev/urandom of=FOLDER/read bs=1M count=8 conv=fsync 2>/dev/null";

/// Reads that file, writes another, and says how many seconds each took.
const MOVE: &str = "a=$(date +%s); cat FOLDER/read >/dev/null
b=$(date +%s); dd if=/dev/zero of=FOLDER/write bs=64k count=128 conv=fsync 2>/dev/null
echo $((b - a)) $(($(date +%s) - b))";

fn line(text: &str) -> String {
    let text = text.replace("FOLDER", FOLDER).replace("CLASSES", CLASSES);
    text.replace("CLASS", CLASS)
}

/// Makes the disk and the class.
pub fn make(node: &Node) -> Result<()> {
    node.shell(&line(MAKE)).map(drop)
}

/// A container, which `exec` runs lines in, moves no more than its class lets it.
pub fn holds(node: &Node, exec: impl FnOnce(&str) -> Result<String>) -> Result<()> {
    node.shell("sync; echo 3 >/proc/sys/vm/drop_caches")?;
    let said = exec(&line(MOVE))?;
    let seconds = said.split_whitespace().map(str::parse);
    let seconds = seconds.collect::<Result<Vec<u64>, _>>();
    let seconds = seconds.with_context(|| format!("{said:?} are no seconds"))?;
    ensure!(
        seconds.len() == 2 && seconds.iter().all(|taken| *taken >= SECONDS_MIN),
        "8 MiB were read and written in {seconds:?} s"
    );
    Ok(())
}

/// Takes both away.
pub fn remove(node: &Node) -> Result<()> {
    let remove = "umount FOLDER; losetup -d $(losetup -n -O NAME -j /run/slow.img)
        rm -r FOLDER CLASSES /run/slow.img";
    node.shell(&line(remove)).map(drop)
}
