//! The guest's side: the first process of a guest that does nothing but obey.
//!
//! An order is a line of words; the answer is `ok` with text or `error` with a reason, and for some
//! orders `more` lines before it. Orders are in [`obey`]. When the host hangs up the guest switches
//! itself off.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount, umount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use pericarp_sys::vsock;

use super::duplex::{self, Side};
use super::{DATA_PORT, NET_PORT, NODE_ADDRESS, ORDERS_PORT, disk, pattern};

/// The host's context id (virtio 1.2 §5.10.4).
const HOST_CID: u32 = 2;

/// Descriptors of this process: a thousand connections and some.
const DESCRIPTORS_MAX: u64 = 4096;

/// The host answers soon, on a busy computer later.
const DIAL_MAX: Duration = Duration::from_secs(60);

/// A socket that takes nothing for so long is full.
const FULL_AFTER_MS: u16 = 2000;

/// Runs the guest; does not return while the host wants something.
pub fn main() -> Result<()> {
    let outcome = live();
    if let Err(error) = &outcome {
        // The console is standard error.
        eprintln!("payload: {error:#}");
    }
    nix::unistd::sync();
    reboot(RebootMode::RB_POWER_OFF)?;
    outcome
}

fn live() -> Result<()> {
    for (kind, place) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
    ] {
        mount(
            Some(kind),
            place,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("cannot mount {place}"))?;
    }
    setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS_MAX, DESCRIPTORS_MAX)?;
    let host = UnixStream::from(vsock::connect_to(HOST_CID, ORDERS_PORT, DIAL_MAX)?);
    let mut answers = host.try_clone()?;
    for line in BufReader::new(host).lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match obey(&words, &mut answers) {
            Ok(text) => format!("ok {text}\n"),
            Err(error) => format!("error {}\n", format!("{error:#}").replace('\n', " ")),
        };
        answers.write_all(answer.as_bytes())?;
    }
    Ok(())
}

fn obey(words: &[&str], answers: &mut UnixStream) -> Result<String> {
    match *words {
        ["write", path, seed, unit, count, every] => {
            let plan = disk::writes(number(seed)?, number(unit)?, number(count)?);
            write(path, &plan, number(unit)?, number(every)?, answers)
        }
        ["check", path, seed, unit, count, settled] => {
            let plan = disk::writes(number(seed)?, number(unit)?, number(count)?);
            std::fs::write("/proc/sys/vm/drop_caches", "3")?;
            let settled = usize::try_from(number(settled)?)?;
            let bytes = disk::check(&File::open(path)?, &plan, settled);
            Ok(format!("{} bytes", bytes.context(path.to_owned())?))
        }
        ["mount", device, place, kind] => {
            std::fs::create_dir_all(place)?;
            mount(
                Some(device),
                place,
                Some(kind),
                MsFlags::empty(),
                None::<&str>,
            )?;
            Ok(String::new())
        }
        ["unmount", place] => {
            umount(place)?;
            Ok(String::new())
        }
        ["length", path] => Ok(std::fs::metadata(path)?.len().to_string()),
        ["truncate", path, bytes] => {
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            file.set_len(number(bytes)?)?;
            file.sync_all()?;
            Ok(String::new())
        }
        ["capacity", device] => {
            let path = format!("/sys/class/block/{device}/size");
            let sectors: u64 = std::fs::read_to_string(path)?.trim().parse()?;
            Ok((sectors * 512).to_string())
        }
        ["stream", path, seed, bytes] => check_stream(path, number(seed)?, number(bytes)?),
        ["serve", count, bytes] => serve(number(count)?, number(bytes)?),
        ["flood", bytes] => flood(number(bytes)?, answers),
        ["net-up", mtu, address] => net_up(mtu, address),
        ["net-queues"] => Ok(queues()?.to_string()),
        ["tcp", count, bytes] => tcp(number(count)?, number(bytes)?),
        ["udp", bytes] => udp(usize::try_from(number(bytes)?)?),
        ["memory"] => memory(),
        ["touch", mib] => {
            let mut bytes = vec![0_u8; usize::try_from(number(mib)? << 20)?];
            for page in bytes.chunks_mut(4096) {
                page[0] = 1;
            }
            Ok(bytes.len().to_string())
        }
        ["files", count] => {
            for number in 0..number(count)? {
                File::create(format!("/{number}"))?;
            }
            Ok(String::new())
        }
        _ => bail!("no such order: {}", words.join(" ")),
    }
}

fn number(word: &str) -> Result<u64> {
    word.parse().with_context(|| format!("{word} is no number"))
}

/// Writes a plan, makes it durable after every `every` writes and tells so.
fn write(
    path: &str,
    plan: &[disk::Write],
    unit: u64,
    every: u64,
    answers: &mut UnixStream,
) -> Result<String> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if !path.starts_with("/dev/") {
        options.create(true).truncate(true);
    }
    if unit >= 512 {
        // Past the page cache: the disk sees these very sizes.
        options.custom_flags(OFlag::O_DIRECT.bits());
    }
    let file = options.open(path).with_context(|| path.to_owned())?;
    if !path.starts_with("/dev/") {
        file.set_len(disk::DISK_BYTES)?;
    }
    // O_DIRECT wants the memory aligned too.
    let mut buffer = vec![0; (1 << 20) + 8192];
    let skip = buffer.as_ptr().align_offset(4096);
    for (written, one) in (1_u64..).zip(plan) {
        disk::write(&file, one, &mut buffer[skip..])
            .with_context(|| format!("{one:?} of {path}"))?;
        if written % every == 0 || written == plan.len() as u64 {
            file.sync_data()?;
            answers.write_all(format!("more {written}\n").as_bytes())?;
        }
    }
    Ok(format!("{} writes", plan.len()))
}

/// Whether a file or device begins with a stream.
fn check_stream(path: &str, seed: u64, bytes: u64) -> Result<String> {
    let file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let mut position = 0;
    while position < bytes {
        let len = usize::try_from((bytes - position).min(1 << 20))?;
        file.read_exact_at(&mut buffer[..len], position)?;
        if let Some(at) = pattern::difference(seed, position, &buffer[..len]) {
            bail!("{path} is wrong at byte {at}");
        }
        position += len as u64;
    }
    Ok(position.to_string())
}

/// Accepts the next connection of the host.
fn accept(listener: &std::os::fd::OwnedFd) -> Result<UnixStream> {
    use std::os::fd::AsFd;
    let mut set = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    if poll(&mut set, PollTimeout::from(60_000_u16))? == 0 {
        bail!("nobody dials");
    }
    let stream = UnixStream::from(vsock::accept_from(listener)?.0);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Takes `count` connections, each of which names itself, and moves `bytes` each way on all.
fn serve(count: u64, bytes: u64) -> Result<String> {
    let listener = vsock::listen_on(DATA_PORT)?;
    let mut sides = Vec::new();
    for _ in 0..count {
        let mut stream = accept(&listener)?;
        let mut name = [0; 8];
        stream.read_exact(&mut name)?;
        // The host dials the next one only now: a listener's queue is short.
        stream.write_all(b"!")?;
        let name = u64::from_le_bytes(name);
        sides.push(Side::new(stream, (name << 1, name << 1 | 1), bytes)?);
    }
    duplex::run(&mut sides)?;
    Ok(format!(
        "{count} connections, {} bytes each way",
        count * bytes
    ))
}

/// Writes to a host that does not read until nothing more goes, tells how much that was, and
/// writes the rest when it reads again.
fn flood(bytes: u64, answers: &mut UnixStream) -> Result<String> {
    use std::os::fd::AsFd;
    let listener = vsock::listen_on(DATA_PORT)?;
    let mut stream = accept(&listener)?;
    stream.write_all(b"!")?;
    stream.set_nonblocking(true)?;
    let (mut sent, mut told) = (0, false);
    let mut piece = vec![0; 64 << 10];
    while sent < bytes {
        let mut set = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
        let wait = if told { 60_000 } else { FULL_AFTER_MS };
        if poll(&mut set, PollTimeout::from(wait))? == 0 {
            if told {
                bail!("the host reads and still nothing goes");
            }
            told = true;
            answers.write_all(format!("more {sent}\n").as_bytes())?;
            continue;
        }
        let len = usize::try_from((bytes - sent).min(64 << 10))?;
        pattern::fill(5, sent, &mut piece[..len]);
        match stream.write(&piece[..len]) {
            Ok(count) => sent += count as u64,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(sent.to_string())
}

fn busybox(words: &str) -> Result<()> {
    let mut command = Command::new("/bin/busybox");
    let status = command.args(words.split(' ')).status()?;
    if !status.success() {
        bail!("busybox {words}: {status}");
    }
    Ok(())
}

fn net_up(mtu: &str, address: &str) -> Result<String> {
    busybox(&format!("ip link set eth0 mtu {mtu} up"))?;
    busybox(&format!("ip addr add {address}/24 dev eth0"))?;
    queues().map(|queues| queues.to_string())
}

/// Transmit queues that the driver uses.
fn queues() -> Result<usize> {
    let entries = std::fs::read_dir("/sys/class/net/eth0/queues")?;
    let names = entries.flatten().map(|entry| entry.file_name());
    Ok(names
        .filter(|name| name.to_string_lossy().starts_with("tx-"))
        .count())
}

fn tcp(count: u64, bytes: u64) -> Result<String> {
    let mut sides = Vec::new();
    for name in 0..count {
        let mut stream = TcpStream::connect((NODE_ADDRESS, NET_PORT))?;
        stream.write_all(&name.to_le_bytes())?;
        sides.push(Side::new(stream, (name << 1 | 1, name << 1), bytes)?);
    }
    duplex::run(&mut sides)?;
    Ok(format!("{} bytes each way", count * bytes))
}

/// One datagram there and back; the kernel must not have cut it into fragments.
fn udp(bytes: usize) -> Result<String> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    socket.connect((NODE_ADDRESS, NET_PORT))?;
    let mut sent = vec![0; bytes];
    pattern::fill(11, 0, &mut sent);
    socket.send(&sent)?;
    let mut received = vec![0; bytes + 1];
    let count = socket.recv(&mut received)?;
    if received[..count] != sent {
        bail!("{count} bytes came back, not those that were sent");
    }
    let fragments = fragments()?;
    if fragments != 0 {
        bail!("{fragments} fragments were made or put together");
    }
    Ok(count.to_string())
}

/// Packets that IP cut or put together, of `/proc/net/snmp`.
fn fragments() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/net/snmp")?;
    let mut lines = text.lines().filter(|line| line.starts_with("Ip: "));
    let (names, values) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""));
    let pairs = names.split_whitespace().zip(values.split_whitespace());
    let wanted = pairs.filter(|(name, _)| ["FragCreates", "ReasmReqds"].contains(name));
    wanted.map(|(_, value)| number(value)).sum()
}

/// Memory in all and free memory, in bytes.
fn memory() -> Result<String> {
    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| -> Result<u64> {
        let line = text.lines().find(|line| line.starts_with(name));
        let word = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(number(word.with_context(|| format!("no {name}"))?)? << 10)
    };
    Ok(format!("{} {}", field("MemTotal:")?, field("MemFree:")?))
}

/// Whether this process is a guest's first.
#[must_use]
pub fn is_guest() -> bool {
    std::process::id() == 1 && !Path::new("/proc/self").exists()
}
