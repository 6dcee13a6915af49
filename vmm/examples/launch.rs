//! Plays the shim for one machine: opens the descriptors, starts the VMM, prints what it says and
//! what the guest logs.
//!
//! ```text
//! launch VMM KERNEL [key=value ...]
//!   memory=MiB max=MiB vcpus=N vcpus-max=N cpu=LIST pages=base|transparent|2m|1g
//!   initramfs=FILE pmem=FILE disk=FILE cmdline=TEXT
//!   agent=SOCKET the guest's connection to the agent's port of the host goes to this unix socket
//!   vsock=SOCKET made here: connections to it reach the guest's ports
//!   seconds=N    how long it waits at most
//!   later=FILE   a disk that is added when the guest's log says HOT-PLUG and removed when it
//!                says HOT-UNPLUG; when it says
//!                MEM-PLUG, memory grows to max, and when it says CPU-PLUG, vCPUs to vcpus-max
//!   pause=MS     how long the machine stands still when its log says VM-PAUSE
//!   until=TEXT   end when the guest's log has this text
//!   exits=1      print KVM's counters at that moment
//! ```

#![expect(clippy::print_stdout, reason = "what it finds out is its output")]

use std::{
    collections::BTreeMap,
    error::Error,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pericarp_protocol::{
    AGENT_PORT,
    machine::{
        Balloon, Blk, Bytes, CONTROL_DESCRIPTOR, CacheMode, Console, CpuMode, Descriptor, Device,
        DeviceKind, Event, List, MESSAGE_BYTES, Machine, Mem, Message, Named, Nothing, PageKind,
        Pmem, RateLimit, Request, Rng, Text, Vcpus, Vsock, VsockPort, decode_message,
        encode_request,
    },
};
use pericarp_sys::{
    memory_file::{self, Pages},
    process::{Placement, spawn_placed},
    seqpacket,
};

type Anything<T> = Result<T, Box<dyn Error>>;

struct Options(BTreeMap<String, String>);

impl Options {
    fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    fn number(&self, key: &str, default: u64) -> Anything<u64> {
        Ok(self
            .text(key)
            .map(str::parse)
            .transpose()?
            .unwrap_or(default))
    }
}

struct Shim {
    socket: OwnedFd,
    number: u32,
}

impl Shim {
    fn send(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Anything<()> {
        self.number += 1;
        let bytes = encode_request(self.number, request);
        Ok(seqpacket::send(self.socket.as_fd(), &bytes, descriptors)?)
    }

    fn add(
        &mut self,
        name: &str,
        kind: DeviceKind,
        descriptors: &[BorrowedFd<'_>],
    ) -> Anything<()> {
        let name = Text::new("name", name)?;
        self.send(&Request::AddDevice(Device { name, kind }), descriptors)
    }
}

fn at(position: u8) -> Descriptor {
    Descriptor { position }
}

fn main() -> Anything<()> {
    let mut arguments = std::env::args().skip(1);
    let vmm = arguments.next().ok_or("which VMM?")?;
    let kernel = arguments.next().ok_or("which kernel?")?;
    let mut options = Options(BTreeMap::new());
    for argument in arguments {
        let (key, value) = argument.split_once('=').ok_or("key=value")?;
        options.0.insert(key.to_owned(), value.to_owned());
    }
    let (ours, theirs) = seqpacket::pair()?;
    let start = Instant::now();
    let placement = Placement {
        descriptors: &[(theirs.as_raw_fd(), CONTROL_DESCRIPTOR)],
        cgroups: &[],
        new_pid_namespace: true,
    };
    let mut child = spawn_placed(&mut Command::new(&vmm), &placement)?;
    drop(theirs);
    let mut shim = Shim {
        socket: ours,
        number: 0,
    };
    let (log, output) = io::pipe()?;
    describe(&mut shim, &kernel, &options)?;
    add_devices(&mut shim, &options, output.as_fd())?;
    drop(output);
    shim.send(&Request::Run(Nothing {}), &[])?;
    watch(&mut shim, log, &mut child, &options, start)?;
    let _ = child.kill();
    println!("launch: the VMM ended with {}", child.wait()?);
    Ok(())
}

fn describe(shim: &mut Shim, kernel: &str, options: &Options) -> Anything<()> {
    let memory_bytes = options.number("memory", 128)? << 20;
    let memory_max_bytes = (options.number("max", 0)? << 20).max(memory_bytes);
    let (kind, pages) = match options.text("pages") {
        None | Some("transparent") => (PageKind::Transparent, Pages::Transparent),
        Some("2m") => (PageKind::Huge2M, Pages::Huge2M),
        Some("1g") => (PageKind::Huge1G, Pages::Huge1G),
        Some(_) => (PageKind::Base, Pages::Base),
    };
    let memory = memory_file::create(memory_bytes, pages)?;
    let pluggable = (memory_max_bytes > memory_bytes)
        .then(|| memory_file::create(memory_max_bytes - memory_bytes, pages))
        .transpose()?;
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    let kernel = File::open(kernel)?;
    let initramfs = options.text("initramfs").map(File::open).transpose()?;
    let vcpus = u16::try_from(options.number("vcpus", 1)?)?;
    let vcpus_max = u16::try_from(options.number("vcpus-max", u64::from(vcpus))?)?;
    let mut command_line = "quiet panic=-1 pci=noearly console=hvc0".to_owned();
    if options.text("pmem").is_some() {
        command_line += " root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro";
    }
    command_line = format!(
        "{command_line} {}",
        options.text("cmdline").unwrap_or_default()
    );
    let last = at(if initramfs.is_some() { 4 } else { 3 });
    let machine = Machine {
        vcpus,
        vcpus_max,
        memory_bytes,
        memory_max_bytes,
        pages: kind,
        cpu: CpuMode::Host,
        cpu_features: Text::new("cpu", options.text("cpu").unwrap_or_default())?,
        kvm: at(0),
        memory: at(1),
        kernel: at(2),
        initramfs: List::new("initramfs", initramfs.iter().map(|_| at(3)).collect())?,
        pluggable: List::new("pluggable", pluggable.iter().map(|_| last).collect())?,
        saved: List::default(),
        command_line: Text::new("cmdline", command_line)?,
        uid: 65534,
        gid: 65534,
    };
    let mut descriptors = vec![kvm.as_fd(), memory.as_fd(), kernel.as_fd()];
    descriptors.extend(initramfs.iter().map(AsFd::as_fd));
    descriptors.extend(pluggable.iter().map(AsFd::as_fd));
    shim.send(&Request::Start(machine), &descriptors)
}

fn add_devices(shim: &mut Shim, options: &Options, output: BorrowedFd<'_>) -> Anything<()> {
    shim.add(
        "console",
        DeviceKind::Console(Console { output: at(0) }),
        &[output],
    )?;
    shim.add("rng", DeviceKind::Rng(Rng {}), &[])?;
    add_vsock(shim, options)?;
    let balloon = Balloon {
        deflate_on_oom: true,
        free_page_reporting: true,
    };
    if options.text("balloon") != Some("0") {
        shim.add("balloon", DeviceKind::Balloon(balloon), &[])?;
    }
    if let Some(path) = options.text("pmem") {
        let file = File::open(path)?;
        let pmem = Pmem { file: at(0) };
        shim.add("image", DeviceKind::Pmem(pmem), &[file.as_fd()])?;
    }
    if options.text("max").is_some() {
        let mem = Mem {
            block_bytes: 2 << 20,
            requested_bytes: 0,
        };
        shim.add("mem", DeviceKind::Mem(mem), &[])?;
    }
    if let Some(path) = options.text("disk") {
        add_disk(shim, "disk", path)?;
    }
    Ok(())
}

/// Prints log and messages until the wanted text, the end of the guest, or a time-out.
fn watch(
    shim: &mut Shim,
    mut log: io::PipeReader,
    child: &mut Child,
    options: &Options,
    start: Instant,
) -> Anything<()> {
    let seconds = options.number("seconds", 60)?;
    let deadline = start + Duration::from_secs(seconds);
    let mut text = String::new();
    let mut heard = 0;
    let mut log_open = true;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            println!("launch: nothing more to wait for after {seconds} s");
            return Ok(());
        }
        let mut set = vec![PollFd::new(shim.socket.as_fd(), PollFlags::POLLIN)];
        if log_open {
            set.push(PollFd::new(log.as_fd(), PollFlags::POLLIN));
        }
        poll(&mut set, PollTimeout::try_from(left)?)?;
        let any = |set: &[PollFd<'_>], index: usize| {
            set.get(index)
                .is_some_and(|entry| entry.any().unwrap_or(false))
        };
        let (message, output) = (any(&set, 0), any(&set, 1));
        if output {
            let mut buffer = [0; 4096];
            let count = log.read(&mut buffer)?;
            log_open = count > 0;
            io::stdout().write_all(&buffer[..count])?;
            let new = String::from_utf8_lossy(&buffer[..count]);
            text += &new;
            // A console writes a few bytes at a time: only whole lines say something.
            let lines_end = text.rfind('\n').map_or(0, |newline| newline + 1);
            react(shim, &text[heard..lines_end], options)?;
            heard = lines_end;
            let wanted = options.text("until");
            if wanted.is_some_and(|wanted| text.contains(wanted)) {
                println!("launch: after {} ms", start.elapsed().as_millis());
                report(child.id(), options)?;
                return Ok(());
            }
        }
        if message && !output && !print_message(shim, start)? {
            return Ok(());
        }
    }
}

/// Does what the guest's log asks for.
fn react(shim: &mut Shim, log: &str, options: &Options) -> Anything<()> {
    if log.contains("VM-PAUSE") {
        shim.send(&Request::Pause(Nothing {}), &[])?;
        let pause = PollTimeout::try_from(options.number("pause", 1000)?)?;
        // Nothing is to happen but the end of the VMM, which the next look sees too.
        let socket = PollFd::new(shim.socket.as_fd(), PollFlags::empty());
        poll(&mut [socket], pause)?;
        shim.send(&Request::Resume(Nothing {}), &[])?;
    }
    let Some(path) = options.text("later") else {
        return Ok(());
    };
    if log.contains("HOT-PLUG") {
        add_disk(shim, "later", path)?;
    }
    if log.contains("HOT-UNPLUG") {
        let device = Text::new("device", "later")?;
        shim.send(&Request::RemoveDevice(Named { device }), &[])?;
    }
    if log.contains("MEM-PLUG") {
        let bytes = options.number("max", 0)? << 20;
        shim.send(&Request::ResizeMemory(Bytes { bytes }), &[])?;
    }
    if log.contains("CPU-PLUG") {
        let count = u16::try_from(options.number("vcpus-max", 1)?)?;
        shim.send(&Request::ResizeVcpus(Vcpus { count }), &[])?;
    }
    Ok(())
}

fn add_vsock(shim: &mut Shim, options: &Options) -> Anything<()> {
    let folder = tempfile::tempdir()?;
    let path = options
        .text("vsock")
        .map_or_else(|| folder.path().join("vsock"), PathBuf::from);
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    let agent = options.text("agent").map(UnixStream::connect).transpose()?;
    let ports = agent.iter().map(|_| VsockPort {
        port: AGENT_PORT,
        socket: at(1),
    });
    let vsock = Vsock {
        cid: 3,
        listener: at(0),
        ports: List::new("ports", ports.collect())?,
    };
    let mut descriptors = vec![listener.as_fd()];
    descriptors.extend(agent.iter().map(AsFd::as_fd));
    shim.add("vsock", DeviceKind::Vsock(vsock), &descriptors)
}

fn add_disk(shim: &mut Shim, name: &str, path: &str) -> Anything<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let blk = Blk {
        file: at(0),
        read_only: false,
        serial: Text::new("serial", "launch")?,
        queues: 1,
        cache: CacheMode::WriteBack,
        limit: RateLimit::default(),
    };
    shim.add(name, DeviceKind::Blk(blk), &[file.as_fd()])
}

/// Prints one message; false at the end.
fn print_message(shim: &Shim, start: Instant) -> Anything<bool> {
    let mut buffer = [0; MESSAGE_BYTES];
    let received = match seqpacket::receive(shim.socket.as_fd(), &mut buffer) {
        Ok(received) => received,
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    if received.length == 0 {
        return Ok(false);
    }
    let (number, message) = decode_message(&buffer[..received.length])?;
    let elapsed = start.elapsed().as_millis();
    match &message {
        Message::Failure(failure) => println!("launch: {elapsed} ms: request {number}: {failure}"),
        other => println!("launch: {elapsed} ms: {other:?}"),
    }
    let ended = matches!(message, Message::Event(Event::GuestShutdown(_)));
    Ok(!ended && !matches!(message, Message::Failure(_)))
}

/// Prints what the host knows about the VMM now.
fn report(pid: u32, options: &Options) -> Anything<()> {
    for line in std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?.lines() {
        if line.starts_with("Pss") || line.starts_with("Private") || line.starts_with("Rss") {
            println!("launch: {line}");
        }
    }
    let debug = Path::new("/sys/kernel/debug/kvm");
    if options.text("exits").is_some() {
        for entry in std::fs::read_dir(debug)?.flatten() {
            if !entry
                .file_name()
                .to_string_lossy()
                .starts_with(&format!("{pid}-"))
            {
                continue;
            }
            for name in [
                "exits",
                "io_exits",
                "mmio_exits",
                "pf_taken",
                "irq_exits",
                "halt_exits",
            ] {
                let value = std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
                println!("launch: {name} {}", value.trim());
            }
        }
    }
    Ok(())
}
