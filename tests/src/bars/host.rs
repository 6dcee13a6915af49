//! The node's side: one function a scenario. Each prints what it saw; a failure is an error.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{Resource, setrlimit};
use pericarp_protocol::machine::{
    Balloon, Blk, Bytes, CacheMode, DeviceKind, Event, Fs, List, Mem, Named, Net, Pmem, RateLimit,
    Request, ShutdownKind, Success, Text,
};
use pericarp_sys::tap;

use super::disk::{self, DISK_BYTES};
use super::duplex::{self, Side};
use super::machine::{Attach, Plan, Vmm, at};
use super::{DATA_PORT, GUEST_ADDRESS, NET_PORT, NODE_ADDRESS, TAG, initramfs, pattern};

/// vsock connections at once.
const CONNECTIONS: u64 = 1000;

/// Least of the memory that a VMM may gain by a reader that stopped: what a connection may have
/// under way, and the allocator's rounding.
const GROWTH_KIB_MAX: u64 = 2048;

/// What every scenario needs.
#[derive(Debug)]
pub struct Setting {
    /// The VMM.
    pub vmm: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest image, for `boot`.
    pub image: PathBuf,
    /// virtiofsd.
    pub daemon: PathBuf,
    /// Bytes each way of a transfer, in MiB.
    pub mib: u64,
    /// CPU features, as the protocol has them.
    pub cpu_features: String,
}

/// What a scenario runs.
type Scenario = fn(&Setting) -> Result<()>;

/// Name, scenario.
pub const SCENARIOS: &[(&str, Scenario)] = &[
    ("boot", boot),
    ("bzimage", bzimage),
    ("blk", blk),
    ("net-vhost", net_vhost),
    ("net", net),
    ("net-plain", net_plain),
    ("vsock", vsock),
    ("memory", memory),
    ("fs", fs),
];

impl Setting {
    fn plan<'a>(&'a self, initramfs: &'a [u8], devices: Vec<Attach>) -> Plan<'a> {
        Plan {
            vmm: &self.vmm,
            kernel: &self.kernel,
            initramfs: Some(initramfs),
            vcpus: 1,
            memory_mib: (256, 256),
            cpu_features: &self.cpu_features,
            command_line: "",
            devices,
        }
    }
}

fn say(text: impl std::fmt::Display) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

fn numbers<const N: usize>(text: &str) -> Result<[u64; N]> {
    let words = text.split_whitespace().map(str::parse::<u64>);
    let found: Vec<u64> = words.collect::<Result<_, _>>()?;
    found
        .try_into()
        .map_err(|found| anyhow::anyhow!("{found:?} are not {N} numbers"))
}

/// The guest image with the agent: time and exits until the agent's first word, and what the
/// process holds beyond the guest's memory.
fn boot(setting: &Setting) -> Result<()> {
    let image = File::open(&setting.image)?;
    let inode = image.metadata()?.ino();
    let pmem = Attach {
        name: "image",
        kind: DeviceKind::Pmem(Pmem { file: at(0) }),
        descriptors: vec![image.into()],
    };
    let mut vmm = Vmm::start(Plan {
        initramfs: None,
        memory_mib: (128, 128),
        command_line: "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro \
            init=/sbin/pericarp-agent",
        ..setting.plan(&[], vec![pmem])
    })?;
    let time = vmm.first_word()?;
    let exits = vmm.kvm_counter("exits")?;
    let interrupted = vmm.kvm_counter("irq_exits")?;
    let mut others = String::new();
    for name in [
        "io_exits",
        "mmio_exits",
        "halt_exits",
        "pf_taken",
        "insn_emulation",
    ] {
        others += &format!(" {name}={}", vmm.kvm_counter(name).unwrap_or(0));
    }
    let (proportional, private) = vmm.own_memory_kib(Some(inode))?;
    say(format_args!(
        "ms={} exits={exits} irq_exits={interrupted} pss_kib={proportional} \
        private_kib={private}{others}",
        time.as_millis()
    ))
}

/// The node's own kernel, as its distribution packs it: it has none of our devices built in, so
/// all that its init can do is to switch the machine off.
fn bzimage(setting: &Setting) -> Result<()> {
    let release = nix::sys::utsname::uname()?
        .release()
        .to_string_lossy()
        .into_owned();
    let kernel = PathBuf::from(format!("/boot/vmlinuz-{release}"));
    let archive = initramfs::build()?;
    let mut vmm = Vmm::start(Plan {
        kernel: &kernel,
        ..setting.plan(&archive, Vec::new())
    })?;
    let event = vmm.event()?;
    let Event::GuestShutdown(shutdown) = event else {
        bail!("{}: {event:?}", kernel.display());
    };
    if shutdown.kind != ShutdownKind::PowerOff {
        bail!("{}: {shutdown:?}", kernel.display());
    }
    say(format_args!(
        "{}: booted, its init switched it off",
        kernel.display()
    ))
}

fn disk_device(name: &'static str, file: &Path) -> Result<Attach> {
    let file = OpenOptions::new().read(true).write(true).open(file)?;
    Ok(Attach {
        name,
        kind: DeviceKind::Blk(Blk {
            file: at(0),
            read_only: false,
            serial: Text::lossy(name),
            queues: 1,
            cache: CacheMode::WriteBack,
            limit: RateLimit::default(),
        }),
        descriptors: vec![file.into()],
    })
}

/// Every size and alignment, through and past the guest's page cache and through a file system;
/// then a killed VMM between flushes.
fn blk(setting: &Setting) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let [raw, ext4] = ["raw", "ext4"].map(|name| folder.path().join(name));
    File::create(&raw)?.set_len(DISK_BYTES)?;
    File::create(&ext4)?.set_len(DISK_BYTES * 4)?;
    let made = Command::new("mkfs.ext4").arg("-q").arg(&ext4).status()?;
    if !made.success() {
        bail!("mkfs.ext4: {made}");
    }
    let archive = initramfs::build()?;
    let devices =
        || Ok::<_, anyhow::Error>(vec![disk_device("raw", &raw)?, disk_device("ext4", &ext4)?]);
    let mut vmm = Vmm::start(setting.plan(&archive, devices()?))?;
    for (seed, unit) in [(1, 1), (2, 512), (3, 4096)] {
        let plan = disk::writes(seed, unit, 120);
        vmm.order(&format!("write /dev/vda {seed} {unit} 120 7"))?;
        while vmm.line()?.starts_with("more") {}
        vmm.obey(&format!("check /dev/vda {seed} {unit} 120 120"))?;
        let bytes = disk::check(&File::open(&raw)?, &plan, plan.len())?;
        say(format_args!(
            "raw, unit {unit}: 120 writes, {bytes} bytes on the host's file"
        ))?;
    }
    vmm.obey("mount /dev/vdb /mnt ext4")?;
    vmm.order("write /mnt/file 4 1 120 11")?;
    while vmm.line()?.starts_with("more") {}
    vmm.obey("unmount /mnt")?;
    vmm.obey("mount /dev/vdb /mnt ext4")?;
    let checked = vmm.obey("check /mnt/file 4 1 120 120")?;
    say(format_args!(
        "ext4 after unmount and mount: {checked} as written"
    ))?;
    let settled = kill_while_writing(vmm, &raw)?;
    // What was durable is there for the next machine, journal and all.
    let mut vmm = Vmm::start(setting.plan(&archive, devices()?))?;
    vmm.obey("mount /dev/vdb /mnt ext4")?;
    vmm.obey("check /mnt/file 4 1 120 120")?;
    let checked = vmm.obey(&format!("check /mnt/killed 6 1 400 {settled}"))?;
    say(format_args!(
        "after kill -9, next machine: {settled} settled writes, {checked}"
    ))?;
    resize(vmm, &raw)
}

/// Kills the VMM while its guest writes, and tells how many writes to ext4 were flushed before.
fn kill_while_writing(mut vmm: Vmm, raw: &Path) -> Result<u64> {
    let settled = |line: &str| -> Result<u64> {
        let count = line
            .strip_prefix("more ")
            .context("the guest stopped writing")?;
        Ok(count.parse()?)
    };
    // Two orders: the guest is still busy with the first when it is killed, or with the second.
    vmm.order("write /mnt/killed 6 1 400 3")?;
    let mut durable = 0;
    while durable < 60 {
        durable = settled(&vmm.line()?)?;
    }
    let told = vmm.kill()?;
    if told > Duration::from_secs(1) {
        bail!("the death of the VMM was told after {told:?}");
    }
    say(format_args!(
        "killed after {durable} settled writes, told after {told:?}"
    ))?;
    // Nothing of the earlier plan was touched.
    disk::check(&File::open(raw)?, &disk::writes(3, 4096, 120), 120)?;
    Ok(durable)
}

/// A disk grows and shrinks while the guest has it.
fn resize(mut vmm: Vmm, raw: &Path) -> Result<()> {
    for bytes in [DISK_BYTES * 2, DISK_BYTES] {
        OpenOptions::new().write(true).open(raw)?.set_len(bytes)?;
        let device = Text::new("device", "raw")?;
        vmm.ask(&Request::ResizeDisk(Named { device }), &[])?;
        until(|| Ok(vmm.obey("capacity vda")? == bytes.to_string()))
            .context("the guest sees the disk's new size")?;
    }
    say("the disk grew and shrank")
}

/// Asks until the answer is yes; the guest obeys in its own time and tells nobody.
fn until(mut ask: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !ask()? {
        if Instant::now() > deadline {
            bail!("it did not come to that within 60 s");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// A thousand connections with data both ways; then a reader that stops.
fn vsock(setting: &Setting) -> Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, 8192, 8192)?;
    let archive = initramfs::build()?;
    // Each socket of the guest holds up to 256 KiB that its program has not read.
    let mut vmm = Vmm::start(Plan {
        memory_mib: (1024, 1024),
        ..setting.plan(&archive, Vec::new())
    })?;
    let bytes = (setting.mib << 20) / CONNECTIONS;
    vmm.order(&format!("serve {CONNECTIONS} {bytes}"))?;
    let start = Instant::now();
    let mut sides = Vec::new();
    for name in 0..CONNECTIONS {
        let mut stream = dial(&vmm)?;
        stream.write_all(&name.to_le_bytes())?;
        stream.read_exact(&mut [0])?;
        sides.push(Side::new(stream, (name << 1 | 1, name << 1), bytes)?);
    }
    let open = vmm.counter("vsock", "connections")?;
    let opened = start.elapsed();
    move_all(&mut vmm, &mut sides)?;
    let answer = vmm.line()?;
    if !answer.starts_with("ok") || open < CONNECTIONS {
        bail!("{open} connections were open; {answer}");
    }
    drop(sides);
    say(format_args!(
        "{open} connections at once in {opened:?}, then {} bytes each way in {:?}",
        bytes * CONNECTIONS,
        start.elapsed() - opened
    ))?;
    stalled_reader(&mut vmm)
}

/// The guest listens only once it has read the order.
fn dial(vmm: &Vmm) -> Result<UnixStream> {
    let mut last = None;
    until(|| {
        last = vmm.dial(DATA_PORT).ok();
        Ok(last.is_some())
    })
    .context("the guest listens")?;
    last.context("a connection")
}

fn stalled_reader(vmm: &mut Vmm) -> Result<()> {
    let bytes: u64 = 64 << 20;
    vmm.order(&format!("flood {bytes}"))?;
    let mut stream = dial(vmm)?;
    stream.read_exact(&mut [0])?;
    let before = vmm.own_memory_kib(None)?.1;
    let line = vmm.line()?;
    let sent: u64 = line
        .strip_prefix("more ")
        .context("the guest is never stopped")?
        .parse()?;
    let grown = vmm.own_memory_kib(None)?.1.saturating_sub(before);
    let buffered = vmm.counter("vsock", "bytes_buffered")?;
    if grown > GROWTH_KIB_MAX || sent >= bytes {
        bail!("the VMM grew by {grown} KiB while the guest sent {sent} bytes to nobody");
    }
    let (mut position, mut piece) = (0, vec![0; 64 << 10]);
    while position < bytes {
        let count = stream.read(&mut piece)?;
        if count == 0 || pattern::difference(5, position, &piece[..count]).is_some() {
            bail!("the stream is wrong at byte {position}");
        }
        position += count as u64;
    }
    let answer = vmm.line()?;
    say(format_args!(
        "stopped reader: {sent} bytes sent, {buffered} held, VMM grew by {grown} KiB; then {answer}"
    ))
}

/// The kernel moves the packets.
fn net_vhost(setting: &Setting) -> Result<()> {
    net_once(setting, true, true).context("vhost-net")
}

/// The VMM does, with segmentation and checksums left to the other side.
fn net(setting: &Setting) -> Result<()> {
    net_once(setting, false, true).context("in process")
}

/// And without, so that every packet is finished and no longer than a frame.
fn net_plain(setting: &Setting) -> Result<()> {
    net_once(setting, false, false).context("in process, no offloads")
}

fn net_device(vhost: bool, offloads: bool, mtu: u16) -> Result<Attach> {
    let mut descriptors: Vec<OwnedFd> = (0..4)
        .map(|_| tap::open("bars0", true))
        .collect::<Result<_, _>>()
        .context("a tap with four queues")?;
    if vhost {
        for _ in 0..4 {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/vhost-net")?;
            descriptors.push(file.into());
        }
    }
    let positions = |from: u8| (from..from + 4).map(at).collect();
    let vhosts = if vhost { positions(4) } else { Vec::new() };
    Ok(Attach {
        name: "net",
        kind: DeviceKind::Net(Net {
            mac: [2, 0, 0, 0, 0, 2],
            mtu,
            taps: List::new("taps", positions(0))?,
            vhosts: List::new("vhosts", vhosts)?,
            offloads,
            receive_limit: RateLimit::default(),
            transmit_limit: RateLimit::default(),
        }),
        descriptors,
    })
}

fn ip(words: &str) -> Result<()> {
    let status = Command::new("ip").args(words.split(' ')).status()?;
    if !status.success() {
        bail!("ip {words}: {status}");
    }
    Ok(())
}

/// Jumbo frames and four queues, both ways.
fn net_once(setting: &Setting, vhost: bool, offloads: bool) -> Result<()> {
    const MTU: u16 = 9000;
    let archive = initramfs::build()?;
    let mut vmm = Vmm::start(Plan {
        vcpus: 4,
        ..setting.plan(&archive, vec![net_device(vhost, offloads, MTU)?])
    })?;
    ip(&format!("link set bars0 mtu {MTU} up"))?;
    ip(&format!("addr add {NODE_ADDRESS}/24 dev bars0"))?;
    let queues = vmm.obey(&format!("net-up {MTU} {GUEST_ADDRESS}"))?;
    if queues != "4" {
        bail!("the guest uses {queues} queues");
    }
    let datagrams = UdpSocket::bind((NODE_ADDRESS, NET_PORT))?;
    datagrams.set_read_timeout(Some(Duration::from_secs(60)))?;
    // The largest datagram of an unfragmented jumbo frame: without IP's and UDP's headers.
    vmm.order(&format!("udp {}", MTU - 28))?;
    let mut datagram = vec![0; usize::from(MTU)];
    let (count, sender) = datagrams.recv_from(&mut datagram)?;
    datagrams.send_to(&datagram[..count], sender)?;
    let echoed = vmm.line()?;
    if echoed != format!("ok {}", MTU - 28) {
        bail!("a jumbo frame: {echoed}");
    }
    transfer(&mut vmm, setting.mib << 20)
}

/// Eight TCP connections with `bytes` in all each way.
fn transfer(vmm: &mut Vmm, bytes: u64) -> Result<()> {
    const STREAMS: u64 = 8;
    let listener = TcpListener::bind((NODE_ADDRESS, NET_PORT))?;
    vmm.order(&format!("tcp {STREAMS} {}", bytes / STREAMS))?;
    let start = Instant::now();
    let mut sides = Vec::new();
    for _ in 0..STREAMS {
        let (mut stream, _) = listener.accept()?;
        let mut name = [0; 8];
        stream.read_exact(&mut name)?;
        let name = u64::from_le_bytes(name);
        sides.push(Side::new(
            stream,
            (name << 1, name << 1 | 1),
            bytes / STREAMS,
        )?);
    }
    move_all(vmm, &mut sides)?;
    let answer = vmm.line()?;
    say(format_args!(
        "4 queues, MTU 9000: {answer} in {:?}",
        start.elapsed()
    ))?;
    if answer.starts_with("ok") {
        Ok(())
    } else {
        bail!("{answer}")
    }
}

/// Bytes of guest memory that the host holds.
fn resident(vmm: &mut Vmm) -> Result<u64> {
    match vmm.ask(&Request::Statistics(Default::default()), &[])? {
        Success::Statistics(statistics) => Ok(statistics.guest_resident_bytes),
        other => bail!("no statistics: {other:?}"),
    }
}

/// Balloon, pluggable memory, and a file as persistent memory.
fn memory(setting: &Setting) -> Result<()> {
    const MIB: u64 = 1 << 20;
    let pmem_bytes: u64 = 8 << 20;
    let mut stream = vec![0; usize::try_from(pmem_bytes)?];
    pattern::fill(21, 0, &mut stream);
    let mut file = tempfile::tempfile()?;
    file.write_all(&stream)?;
    let attach = |name, kind, descriptors| Attach {
        name,
        kind,
        descriptors,
    };
    let balloon = Balloon {
        deflate_on_oom: true,
        free_page_reporting: true,
    };
    let mem = Mem {
        block_bytes: 2 << 20,
        requested_bytes: 0,
    };
    let pmem = Pmem { file: at(0) };
    let devices = vec![
        attach("balloon", DeviceKind::Balloon(balloon), Vec::new()),
        attach("mem", DeviceKind::Mem(mem), Vec::new()),
        attach("pmem", DeviceKind::Pmem(pmem), vec![file.into()]),
    ];
    let archive = initramfs::build()?;
    let mut vmm = Vmm::start(Plan {
        memory_mib: (256, 768),
        ..setting.plan(&archive, devices)
    })?;
    let read = vmm.obey(&format!("stream /dev/pmem0 21 {pmem_bytes}"))?;
    say(format_args!(
        "pmem: {read} bytes read as they are in the file"
    ))?;
    let [total, _] = numbers(&vmm.obey("memory")?)?;
    vmm.ask(&Request::ResizeMemory(Bytes { bytes: 768 * MIB }), &[])?;
    until(|| Ok(numbers::<2>(&vmm.obey("memory")?)?[0] > total + 400 * MIB))
        .context("the guest sees more memory")?;
    vmm.obey("touch 400")?;
    // What the kernel cannot move, and keeps, must not be where memory is taken away.
    vmm.obey("files 20000")?;
    let grown = vmm.counter("mem", "plugged_bytes")?;
    vmm.ask(&Request::ResizeMemory(Bytes { bytes: 256 * MIB }), &[])?;
    let reached = vmm.memory_reached().context("memory is unplugged")?;
    ensure!(reached == 256 * MIB, "{reached} bytes are left");
    let [back, _] = numbers(&vmm.obey("memory")?)?;
    until(|| Ok(resident(&mut vmm)? <= 256 * MIB)).context("the host has it back")?;
    say(format_args!(
        "mem: {grown} bytes plugged and touched; unplugged; guest {total} -> {back}"
    ))?;
    inflate(&mut vmm, 128 * MIB)
}

fn inflate(vmm: &mut Vmm, bytes: u64) -> Result<()> {
    // With deflate-on-oom the guest's total stays: what is in the balloon counts as used.
    let [_, before] = numbers(&vmm.obey("memory")?)?;
    vmm.ask(&Request::SetBalloon(Bytes { bytes }), &[])?;
    let reached = vmm.memory_reached().context("it inflates")?;
    ensure!(reached == (256 << 20) - bytes, "{reached} bytes are left");
    let [_, during] = numbers(&vmm.obey("memory")?)?;
    let held = resident(vmm)?;
    if before.saturating_sub(during) < bytes * 9 / 10 || held > (256 << 20) - bytes {
        bail!("balloon: free in the guest {before} -> {during}, host holds {held}");
    }
    vmm.ask(&Request::SetBalloon(Bytes { bytes: 0 }), &[])?;
    until(|| Ok(vmm.counter("balloon", "actual_bytes")? == 0)).context("it deflates")?;
    // Pages that are being reported count as used for a moment.
    let mut after = 0;
    until(|| {
        [_, after] = numbers(&vmm.obey("memory")?)?;
        Ok(after.saturating_sub(during) > bytes * 9 / 10)
    })
    .context("what the balloon let go is free in the guest")?;
    say(format_args!(
        "balloon: free {before} -> {during} -> {after}, host held {held}"
    ))?;
    // Free page reporting: what a program used and gave back reaches the host by itself.
    vmm.obey("touch 128")?;
    let reported = vmm.counter("balloon", "reported_bytes")?;
    until(|| Ok(vmm.counter("balloon", "reported_bytes")? > reported))
        .context("freed pages are reported")?;
    until(|| Ok(resident(vmm)? < 160 << 20)).context("the host has freed pages back")
}

/// A daemon that ends with its owner.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The node's side of a transfer; a failure tells what the guest has to say too.
fn move_all(vmm: &mut Vmm, sides: &mut Vec<Side>) -> Result<()> {
    duplex::run(sides).map_err(|error| {
        sides.clear();
        let guest = vmm.line().unwrap_or_else(|silence| format!("{silence:#}"));
        error.context(format!("on the node's side, while the guest says: {guest}"))
    })
}

/// A shared folder: written and resized on each side, seen on the other.
fn fs(setting: &Setting) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let shared = folder.path().join("shared");
    std::fs::create_dir(&shared)?;
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path)?;
    let socket = UnixStream::connect(&path)?;
    let mut command = Command::new(&setting.daemon);
    command
        .args([
            "--fd=3",
            "--cache=never",
            "--sandbox=namespace",
            "--log-level=error",
        ])
        .arg(format!("--shared-dir={}", shared.display()))
        .stdin(Stdio::null());
    let daemon =
        pericarp_sys::process::spawn_with_descriptor(&mut command, listener.as_raw_fd(), 3);
    let mut daemon = Daemon(daemon.context("cannot start virtiofsd")?);
    let device = Attach {
        name: "fs",
        kind: DeviceKind::Fs(Fs {
            tag: Text::new("tag", TAG)?,
            socket: List::new("socket", vec![at(0)])?,
            queues: 1,
        }),
        descriptors: vec![socket.into()],
    };
    let archive = initramfs::build()?;
    let mut vmm = Vmm::start(setting.plan(&archive, vec![device]))?;
    vmm.obey(&format!("mount {TAG} /mnt virtiofs"))?;
    vmm.order("write /mnt/file 31 1 60 9")?;
    while vmm.line()?.starts_with("more") {}
    let plan = disk::writes(31, 1, 60);
    let bytes = disk::check(&File::open(shared.join("file"))?, &plan, plan.len())?;
    vmm.obey("check /mnt/file 31 1 60 60")?;
    say(format_args!(
        "fs: 60 writes, {bytes} bytes the same on both sides"
    ))?;
    for length in [5_000_000_u64, 1234] {
        vmm.obey(&format!("truncate /mnt/file {length}"))?;
        if std::fs::metadata(shared.join("file"))?.len() != length {
            bail!("the host does not see {length}");
        }
        let host = OpenOptions::new().write(true).open(shared.join("file"))?;
        host.set_len(length + 77)?;
        host.write_all_at(b"end", length + 74)?;
        let seen = vmm.obey("length /mnt/file")?;
        if seen != (length + 77).to_string() {
            bail!("the guest sees {seen} instead of {}", length + 77);
        }
    }
    say("fs: grew and shrank on both sides")?;
    daemon.0.kill()?;
    broken(&mut vmm)
}

/// The daemon is gone: one event says so, and the machine lives.
fn broken(vmm: &mut Vmm) -> Result<()> {
    let told = vmm.broken_device()?;
    if !told.contains("fs") {
        bail!("the wrong device is broken: {told}");
    }
    vmm.obey("memory")?;
    say(format_args!("fs: daemon killed: {told}"))
}
