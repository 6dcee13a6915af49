//! Plays the shim for one machine: describes it, starts the VMM, and holds its sockets.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pericarp_protocol::machine::{
    CONTROL_DESCRIPTOR, Console, CpuMode, Descriptor, Device, DeviceKind, Event, List,
    MESSAGE_BYTES, Machine, Message, Named, Nothing, PageKind, Request, Success, Text, Vsock,
    VsockPort, decode_message, encode_request,
};
use pericarp_sys::memory_file::{self, Pages};
use pericarp_sys::process::{Placement, spawn_placed};
use pericarp_sys::seqpacket;

use super::ORDERS_PORT;

/// How long an answer may take in emulation on a busy computer.
const PATIENCE: Duration = Duration::from_secs(120);

/// A device to attach, with its descriptors in the order of their positions.
#[derive(Debug)]
pub struct Attach {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub kind: DeviceKind,
    /// Its descriptors.
    pub descriptors: Vec<OwnedFd>,
}

/// What to start.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The VMM.
    pub vmm: &'a Path,
    /// The guest's kernel.
    pub kernel: &'a Path,
    /// The initramfs, if any.
    pub initramfs: Option<&'a [u8]>,
    /// vCPUs.
    pub vcpus: u16,
    /// Memory at the start and at most, in MiB.
    pub memory_mib: (u64, u64),
    /// CPU features, as the protocol has them.
    pub cpu_features: &'a str,
    /// Words for the kernel behind those that every guest gets.
    pub command_line: &'a str,
    /// Devices beside console and vsock.
    pub devices: Vec<Attach>,
}

/// Position of a descriptor.
#[must_use]
pub fn at(position: u8) -> Descriptor {
    Descriptor { position }
}

/// A running VMM.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    socket: OwnedFd,
    number: u32,
    /// The stream that the guest dials first.
    orders: BufReader<UnixStream>,
    folder: tempfile::TempDir,
    memory_inodes: Vec<u64>,
    started: Instant,
}

impl Vmm {
    /// Starts it. The guest's log goes to a file of the machine's folder.
    pub fn start(plan: Plan<'_>) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let memory_bytes = plan.memory_mib.0 << 20;
        let memory_max_bytes = plan.memory_mib.1.max(plan.memory_mib.0) << 20;
        let memory = File::from(memory_file::create(memory_bytes, Pages::Transparent)?);
        let memory_inodes = vec![memory.metadata()?.ino()];
        let (ours, theirs) = seqpacket::pair()?;
        let (orders, dialled) = UnixStream::pair()?;
        orders.set_read_timeout(Some(PATIENCE))?;
        let started = Instant::now();
        let placement = Placement {
            descriptors: &[(theirs.as_raw_fd(), CONTROL_DESCRIPTOR)],
            cgroups: &[],
            new_pid_namespace: true,
        };
        let mut command = Command::new(plan.vmm);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = spawn_placed(&mut command, &placement)
            .with_context(|| format!("cannot start {}", plan.vmm.display()))?;
        drop(theirs);
        let mut vmm = Self {
            child,
            socket: ours,
            number: 0,
            orders: BufReader::new(orders),
            folder,
            memory_inodes,
            started,
        };
        vmm.describe(&plan, &memory, (memory_bytes, memory_max_bytes))?;
        vmm.attach_own(dialled)?;
        for device in plan.devices {
            vmm.attach(device)?;
        }
        vmm.ask(&Request::Run(Nothing {}), &[])?;
        Ok(vmm)
    }

    fn describe(&mut self, plan: &Plan<'_>, memory: &File, sizes: (u64, u64)) -> Result<()> {
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
        let kernel = File::open(plan.kernel)
            .with_context(|| format!("cannot open {}", plan.kernel.display()))?;
        let mut initramfs = None;
        if let Some(bytes) = plan.initramfs {
            let mut file = tempfile::tempfile()?;
            file.write_all(bytes)?;
            initramfs = Some(file);
        }
        let command_line = format!(
            "quiet panic=-1 pci=noearly 8250.nr_uarts=0 console=hvc0 \
             memory_hotplug.online_policy=auto-movable {}",
            plan.command_line
        );
        let pluggable = (sizes.1 > sizes.0)
            .then(|| memory_file::create(sizes.1 - sizes.0, Pages::Transparent))
            .transpose()?
            .map(File::from);
        if let Some(pluggable) = &pluggable {
            self.memory_inodes.push(pluggable.metadata()?.ino());
        }
        let last = at(if initramfs.is_some() { 4 } else { 3 });
        let machine = Machine {
            vcpus: plan.vcpus,
            vcpus_max: plan.vcpus,
            memory_bytes: sizes.0,
            memory_max_bytes: sizes.1,
            pages: PageKind::Transparent,
            cpu: CpuMode::Host,
            cpu_features: Text::new("cpu", plan.cpu_features)?,
            kvm: at(0),
            memory: at(1),
            kernel: at(2),
            initramfs: List::new("initramfs", initramfs.iter().map(|_| at(3)).collect())?,
            pluggable: List::new("pluggable", pluggable.iter().map(|_| last).collect())?,
            saved: List::default(),
            command_line: Text::new("command line", command_line)?,
            uid: 65534,
            gid: 65534,
        };
        let mut descriptors = vec![kvm.as_fd(), memory.as_fd(), kernel.as_fd()];
        descriptors.extend(initramfs.iter().map(AsFd::as_fd));
        descriptors.extend(pluggable.iter().map(AsFd::as_fd));
        self.ask(&Request::Start(machine), &descriptors)?;
        Ok(())
    }

    /// Console and vsock.
    fn attach_own(&mut self, dialled: UnixStream) -> Result<()> {
        let log = File::create(self.log())?;
        self.attach(Attach {
            name: "console",
            kind: DeviceKind::Console(Console { output: at(0) }),
            descriptors: vec![log.into()],
        })?;
        let listener = UnixListener::bind(self.listener())?;
        let port = VsockPort {
            port: ORDERS_PORT,
            socket: at(1),
        };
        let vsock = Vsock {
            cid: 3,
            listener: at(0),
            ports: List::new("ports", vec![port])?,
        };
        self.attach(Attach {
            name: "vsock",
            kind: DeviceKind::Vsock(vsock),
            descriptors: vec![listener.into(), dialled.into()],
        })
    }

    fn listener(&self) -> PathBuf {
        self.folder.path().join("vsock")
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("console")
    }

    /// For a failure: events that nobody took, and the end of the guest's log.
    fn last_words(&self) -> String {
        let mut words = String::from("events:");
        let mut buffer = [0; MESSAGE_BYTES];
        let mut set = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        while poll(&mut set, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
            match seqpacket::receive(self.socket.as_fd(), &mut buffer) {
                Ok(received) if received.length > 0 => {
                    let message = decode_message(&buffer[..received.length]);
                    words += &format!(" {message:?}");
                }
                _ => {
                    words += " the VMM has ended";
                    break;
                }
            }
        }
        let text = std::fs::read(self.log()).unwrap_or_default();
        let start = text.len().saturating_sub(4000);
        words + "; its log ends with\n" + &String::from_utf8_lossy(&text[start..])
    }

    /// Attaches a device.
    pub fn attach(&mut self, device: Attach) -> Result<()> {
        let name = Text::new("name", device.name)?;
        let kind = device.kind;
        let descriptors: Vec<BorrowedFd<'_>> = device.descriptors.iter().map(AsFd::as_fd).collect();
        self.ask(&Request::AddDevice(Device { name, kind }), &descriptors)
            .with_context(|| format!("cannot attach {}", device.name))?;
        Ok(())
    }

    /// Sends a request and takes its reply; a device that broke meanwhile is a failure.
    pub fn ask(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<Success> {
        self.number += 1;
        let bytes = encode_request(self.number, request);
        seqpacket::send(self.socket.as_fd(), &bytes, descriptors)?;
        loop {
            let mut buffer = [0; MESSAGE_BYTES];
            let received = seqpacket::receive(self.socket.as_fd(), &mut buffer)?;
            if received.length == 0 {
                bail!("the VMM has ended");
            }
            match decode_message(&buffer[..received.length])? {
                (number, Message::Success(success)) if number == self.number => {
                    return Ok(success);
                }
                (_, Message::Failure(failure)) => return Err(failure.into()),
                (_, Message::Event(Event::Started(_) | Event::MemoryReached(_))) => {}
                other => bail!("unexpected: {other:?}"),
            }
        }
    }

    /// Waits for the event that memory has the size that was asked for: the size.
    pub fn memory_reached(&mut self) -> Result<u64> {
        match self.event()? {
            Event::MemoryReached(reached) => Ok(reached.bytes),
            other => bail!("unexpected: {other:?}"),
        }
    }

    /// Waits for the event of a device that broke: its name and the reason.
    pub fn broken_device(&mut self) -> Result<String> {
        match self.event()? {
            Event::DeviceBroken(broken) => Ok(format!("{}: {}", broken.device, broken.reason)),
            other => bail!("unexpected: {other:?}"),
        }
    }

    /// The next event but that of the start.
    pub fn event(&mut self) -> Result<Event> {
        loop {
            let mut buffer = [0; MESSAGE_BYTES];
            let mut set = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            if poll(&mut set, PollTimeout::try_from(PATIENCE)?)? == 0 {
                bail!("no event came");
            }
            let received = seqpacket::receive(self.socket.as_fd(), &mut buffer)?;
            match decode_message(&buffer[..received.length])? {
                (_, Message::Event(Event::Started(_))) => {}
                (_, Message::Event(event)) => return Ok(event),
                other => bail!("unexpected: {other:?}"),
            }
        }
    }

    /// A device's counter.
    pub fn counter(&mut self, device: &str, name: &str) -> Result<u64> {
        let device = Text::new("device", device)?;
        let request = Request::DeviceStatistics(Named { device });
        let Success::DeviceStatistics(statistics) = self.ask(&request, &[])? else {
            bail!("no statistics of the device");
        };
        let mut counters = statistics.counters.as_slice().iter();
        let found = counters.find(|counter| counter.name.as_str() == name);
        found
            .map(|counter| counter.value)
            .with_context(|| format!("there is no counter {name}"))
    }

    /// Sends an order to the guest without waiting.
    pub fn order(&mut self, line: &str) -> Result<()> {
        let stream = self.orders.get_mut();
        Ok(stream.write_all(format!("{line}\n").as_bytes())?)
    }

    /// The next line of the guest: `more` text or the end of an order.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let count = self.orders.read_line(&mut line);
        match count {
            Ok(1..) => {}
            Ok(0) => bail!("the guest hung up; {}", self.last_words()),
            Err(error) => bail!("no answer: {error}; {}", self.last_words()),
        }
        let line = line.trim_end().to_owned();
        match line.strip_prefix("error ") {
            Some(reason) => bail!("in the guest: {reason}; {}", self.last_words()),
            None => Ok(line),
        }
    }

    /// An order and what the guest answers to it, without the `ok`.
    pub fn obey(&mut self, line: &str) -> Result<String> {
        self.order(line)?;
        let answer = self.line().with_context(|| line.to_owned())?;
        let text = answer.strip_prefix("ok").map(str::trim);
        Ok(text
            .with_context(|| format!("{line}: {answer}"))?
            .to_owned())
    }

    /// Waits for the guest's first byte, whatever it is, and tells when it came.
    pub fn first_word(&mut self) -> Result<Duration> {
        if self.orders.fill_buf()?.is_empty() {
            bail!("the guest hung up; {}", self.last_words());
        }
        Ok(self.started.elapsed())
    }

    /// Dials a port of the guest.
    pub fn dial(&self, port: u32) -> Result<UnixStream> {
        let mut stream = UnixStream::connect(self.listener())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
        let mut answer = String::new();
        // Byte by byte: what follows the line is data already.
        while !answer.ends_with('\n') {
            let mut byte = [0];
            std::io::Read::read_exact(&mut stream, &mut byte)
                .with_context(|| format!("port {port} does not answer"))?;
            answer.push(char::from(byte[0]));
        }
        if !answer.starts_with("OK ") {
            bail!("port {port} answers {answer:?}");
        }
        Ok(stream)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A counter of KVM for this machine.
    pub fn kvm_counter(&self, name: &str) -> Result<u64> {
        let prefix = format!("{}-", self.pid());
        for entry in std::fs::read_dir("/sys/kernel/debug/kvm")? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                let text = std::fs::read_to_string(entry.path().join(name))?;
                return Ok(text.trim().parse()?);
            }
        }
        bail!("KVM has no counters of process {}", self.pid())
    }

    /// Proportional and private memory of the process in KiB, without the guest's memory and
    /// without the file `image` that the guest sees as memory.
    pub fn own_memory_kib(&self, image: Option<u64>) -> Result<(u64, u64)> {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps", self.pid()))?;
        let memory = self.memory_inodes.iter().map(|inode| Some(*inode));
        let guests: Vec<_> = memory.chain([image]).collect();
        Ok(own_memory_kib(&text, &guests))
    }

    /// Kills the process at once, and says how long it took until its socket told.
    pub fn kill(mut self) -> Result<Duration> {
        let start = Instant::now();
        self.child.kill()?;
        let mut buffer = [0; MESSAGE_BYTES];
        // Events may still lie in the socket.
        while let Ok(received) = seqpacket::receive(self.socket.as_fd(), &mut buffer) {
            if received.length == 0 {
                break;
            }
        }
        Ok(start.elapsed())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn own_memory_kib(smaps: &str, guests: &[Option<u64>]) -> (u64, u64) {
    let (mut own, mut proportional, mut private) = (true, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if !first.ends_with(':') {
            // A mapping: address, rights, offset, device, inode, name.
            let inode = words.nth(3).and_then(|inode| inode.parse::<u64>().ok());
            own = !guests.contains(&inode) || inode == Some(0);
            continue;
        }
        let kib = words.next().and_then(|word| word.parse::<u64>().ok());
        match (own, first, kib) {
            (true, "Pss:", Some(kib)) => proportional += kib,
            (true, "Private_Dirty:", Some(kib)) => private += kib,
            _ => {}
        }
    }
    (proportional, private)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_guests_memory_is_not_the_vmms() {
        let smaps = "\
            7f00-7f01 rw-s 00000000 00:01 77 /memfd:guest (deleted)\nPss: 100 kB\n\
            7f02-7f03 rw-p 00000000 00:00 0 \nPss: 7 kB\nPrivate_Dirty: 6 kB\nVmFlags: rd\n\
            7f04-7f05 r--s 00000000 08:01 88 /image\nPss: 50 kB\nPrivate_Dirty: 3 kB\n";
        assert_eq!(super::own_memory_kib(smaps, &[Some(77), Some(88)]), (7, 6));
        assert_eq!(super::own_memory_kib(smaps, &[Some(77), None]), (57, 9));
    }
}
