//! Device nodes that a container can make and open.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::Result;
use nix::libc::O_NONBLOCK;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::{Map, Value, json};

use super::outcome;

/// Folder for the nodes.
const FOLDER: &str = "/tmp/devices";

/// Name, kind and numbers of each node (Linux `Documentation/admin-guide/devices.txt`). The first
/// nine are allowed by default under runc (`AllowedDevices` in its `libcontainer/specconv`), the
/// others are denied.
const NODES: [(&str, SFlag, u64, u64); 17] = [
    ("null", SFlag::S_IFCHR, 1, 3),
    ("zero", SFlag::S_IFCHR, 1, 5),
    ("full", SFlag::S_IFCHR, 1, 7),
    ("random", SFlag::S_IFCHR, 1, 8),
    ("urandom", SFlag::S_IFCHR, 1, 9),
    ("tty", SFlag::S_IFCHR, 5, 0),
    ("ptmx", SFlag::S_IFCHR, 5, 2),
    ("pts-0", SFlag::S_IFCHR, 136, 0),
    ("tun", SFlag::S_IFCHR, 10, 200),
    ("mem", SFlag::S_IFCHR, 1, 1),
    ("kmsg", SFlag::S_IFCHR, 1, 11),
    ("tty1", SFlag::S_IFCHR, 4, 1),
    ("console", SFlag::S_IFCHR, 5, 1),
    ("fuse", SFlag::S_IFCHR, 10, 229),
    ("kvm", SFlag::S_IFCHR, 10, 232),
    ("loop0", SFlag::S_IFBLK, 7, 0),
    ("vda", SFlag::S_IFBLK, 254, 0),
];

/// Makes each node and opens it for reading and writing.
pub(crate) fn look() -> Result<Value> {
    fs::create_dir_all(FOLDER)?;
    let mut found = Map::new();
    for (name, kind, major, minor) in NODES {
        let path = Path::new(FOLDER).join(name);
        let made = make(&path, kind, major, minor);
        let mut options = OpenOptions::new();
        let opened = options
            .read(true)
            .write(true)
            .custom_flags(O_NONBLOCK)
            .open(&path);
        let both = json!({"mknod": outcome(made), "open": outcome(opened)});
        found.insert(name.to_owned(), both);
    }
    fs::remove_dir_all(FOLDER)?;
    Ok(Value::Object(found))
}

fn make(path: &Path, kind: SFlag, major: u64, minor: u64) -> io::Result<()> {
    let mode = Mode::from_bits_truncate(0o600);
    Ok(mknod(path, kind, mode, makedev(major, minor))?)
}

/// Makes a network interface by `/dev/net/tun`, as a VPN does.
pub(crate) fn tun() -> Result<Value> {
    fs::create_dir_all("/dev/net")?;
    let made = make(Path::new("/dev/net/tun"), SFlag::S_IFCHR, 10, 200);
    let tap = pericarp_sys::tap::open("probe0", false);
    let interfaces = fs::read_to_string("/proc/net/dev")?;
    Ok(json!({
        "mknod": outcome(made),
        "interface_is_there": interfaces.contains("probe0:"),
        "open": outcome(tap),
    }))
}
