//! The shim's part, for one machine with a tiny guest: a few instructions in a PVH ELF.

#![expect(clippy::unwrap_used, reason = "a failure here is the test's")]

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{FileExt, MetadataExt},
            net::UnixListener,
        },
    },
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::unistd::Pid;
use pericarp_protocol::machine::{
    CONTROL_DESCRIPTOR, Console, CpuMode, Descriptor, Device, DeviceKind, Event, Failure, List,
    MESSAGE_BYTES, Machine, Message, Nothing, PageKind, Request, Rng, Success, Text, Vsock,
    decode_message, encode_request,
};
use pericarp_sys::{
    memory_file::{self, Pages},
    process::{Placement, spawn_placed},
    seqpacket,
};

/// How long anything may take before a test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Why a test cannot run here, if so.
pub(crate) fn missing() -> Option<String> {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Some(format!("/dev/kvm: {error}"));
    }
    (!nix::unistd::geteuid().is_root()).then(|| "the jail needs root to be built".to_owned())
}

/// Ends the calling test with a printed reason where it cannot run.
#[macro_export]
macro_rules! need_kvm {
    () => {
        if let Some(reason) = $crate::support::missing() {
            println!("skipped: {reason}");
            return;
        }
    };
}

pub(crate) fn at(position: u8) -> Descriptor {
    Descriptor { position }
}

/// A running VMM and our end of its socket.
pub(crate) struct Vmm {
    pub(crate) child: Child,
    socket: Option<OwnedFd>,
    number: u32,
    events: Vec<Event>,
    memory: Option<File>,
}

impl Vmm {
    /// Starts the VMM.
    pub(crate) fn spawn() -> Self {
        Self::spawn_by(&mut Command::new(env!("CARGO_BIN_EXE_pericarp-vmm")))
    }

    /// Starts the VMM by a command of the test's own.
    pub(crate) fn spawn_by(command: &mut Command) -> Self {
        let (ours, theirs) = seqpacket::pair().unwrap();
        let placement = Placement {
            descriptors: &[(theirs.as_raw_fd(), CONTROL_DESCRIPTOR)],
            cgroups: &[],
            new_pid_namespace: true,
        };
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = spawn_placed(command, &placement).unwrap();
        Self {
            child,
            socket: Some(ours),
            number: 0,
            events: Vec::new(),
            memory: None,
        }
    }

    fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_ref().expect("not hung up").as_fd()
    }

    /// Sends a request.
    pub(crate) fn send(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> u32 {
        self.number += 1;
        let bytes = encode_request(self.number, request);
        seqpacket::send(self.socket(), &bytes, descriptors).unwrap();
        self.number
    }

    /// Sends bytes as they are.
    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        seqpacket::send(self.socket(), bytes, &[]).unwrap();
    }

    /// The next message; `None` at the end.
    pub(crate) fn receive(&mut self) -> Option<(u32, Message)> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut set = [PollFd::new(self.socket(), PollFlags::POLLIN)];
        let ready = poll(&mut set, PollTimeout::try_from(PATIENCE).unwrap()).unwrap();
        assert_eq!(ready, 1, "no message within {PATIENCE:?}");
        let mut buffer = [0; MESSAGE_BYTES];
        match seqpacket::receive(self.socket(), &mut buffer) {
            Ok(received) if received.length > 0 => {
                assert!(received.descriptors.is_empty(), "descriptors go down only");
                Some(decode_message(&buffer[..received.length]).unwrap())
            }
            Ok(_) => None,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// The reply to a request; events that come first are kept.
    pub(crate) fn reply(&mut self, number: u32) -> Result<Success, Failure> {
        loop {
            match self.receive().expect("a reply comes before the end") {
                (_, Message::Event(event)) => self.events.push(event),
                (found, Message::Success(success)) if found == number => return Ok(success),
                (found, Message::Failure(failure)) if found == number => return Err(failure),
                other => panic!("unexpected: {other:?}"),
            }
        }
    }

    /// Sends a request and takes its reply.
    pub(crate) fn ask(
        &mut self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Success, Failure> {
        let number = self.send(request, descriptors);
        self.reply(number)
    }

    /// The next event.
    pub(crate) fn event(&mut self) -> Event {
        if !self.events.is_empty() {
            return self.events.remove(0);
        }
        match self.receive().expect("an event comes before the end") {
            (0, Message::Event(event)) => event,
            other => panic!("unexpected: {other:?}"),
        }
    }

    /// Hangs up and waits for the process; tells how long that took.
    pub(crate) fn hang_up(&mut self) -> (ExitStatus, Duration) {
        self.socket = None;
        let start = Instant::now();
        (self.wait(), start.elapsed())
    }

    /// Waits for the process.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// A machine with `code` as its kernel, with console, random numbers and vsock, about to run.
    pub(crate) fn with_guest(code: &[u8]) -> Self {
        Self::described(Start::new(code)).unwrap()
    }

    /// As [`Self::with_guest`], by a description of the test's own.
    pub(crate) fn described(start: Start) -> Result<Self, Failure> {
        let mut vmm = Self::spawn();
        vmm.ask(&Request::Start(start.machine.clone()), &start.descriptors())?;
        vmm.memory = Some(start.memory.into());
        let (_, output) = io::pipe().unwrap();
        let console = DeviceKind::Console(Console { output: at(0) });
        vmm.add("console", console, &[output.as_fd()]).unwrap();
        vmm.add("rng", DeviceKind::Rng(Rng {}), &[]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("vsock")).unwrap();
        let vsock = Vsock {
            cid: 3,
            listener: at(0),
            ports: List::default(),
        };
        vmm.add("vsock", DeviceKind::Vsock(vsock), &[listener.as_fd()])
            .unwrap();
        Ok(vmm)
    }

    /// As [`Self::with_guest`], running.
    pub(crate) fn running(code: &[u8]) -> Self {
        Self::with_guest(code).run().unwrap()
    }

    /// Lets it run.
    pub(crate) fn run(mut self) -> Result<Self, Failure> {
        self.ask(&Request::Run(Nothing {}), &[])?;
        assert_eq!(self.event(), Event::Started(Nothing {}));
        Ok(self)
    }

    /// The file of its memory.
    pub(crate) fn memory(&self) -> &File {
        self.memory.as_ref().expect("a machine was described")
    }

    /// A number in the memory of a machine that goes on from a saved one: where it has the page of
    /// the file mapped.
    pub(crate) fn read_private_u32(&self, address: u32) -> u32 {
        let inode = self.memory().metadata().unwrap().ino().to_string();
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.child.id())).unwrap();
        let place = maps.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (start, end) = words[0].split_once('-')?;
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            let (start, length) = (number(start), number(end) - number(start));
            let within = u64::from(address).checked_sub(number(words[2]))?;
            (words[4] == inode && within < length).then_some(start + within)
        });
        let mut bytes = [0; 4];
        let memory = File::open(format!("/proc/{}/mem", self.child.id())).unwrap();
        memory
            .read_exact_at(&mut bytes, place.expect("a mapped page"))
            .unwrap();
        u32::from_le_bytes(bytes)
    }

    /// A number in guest memory.
    pub(crate) fn read_u32(&self, address: u32) -> u32 {
        let mut bytes = [0; 4];
        self.memory()
            .read_exact_at(&mut bytes, address.into())
            .unwrap();
        u32::from_le_bytes(bytes)
    }

    /// How often the process has a file mapped.
    pub(crate) fn mappings_of(&self, file: &File) -> usize {
        let inode = file.metadata().unwrap().ino().to_string();
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.child.id())).unwrap();
        let inodes = maps
            .lines()
            .filter_map(|line| line.split_whitespace().nth(4));
        inodes.filter(|found| *found == inode).count()
    }

    /// The process.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().unwrap())
    }

    /// Adds a device.
    pub(crate) fn add(
        &mut self,
        name: &str,
        kind: DeviceKind,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Success, Failure> {
        let name = Text::new("name", name).unwrap();
        self.ask(&Request::AddDevice(Device { name, kind }), descriptors)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The first request with its descriptors.
pub(crate) struct Start {
    pub(crate) machine: Machine,
    pub(crate) kvm: File,
    pub(crate) memory: OwnedFd,
    pub(crate) kernel: File,
    /// What it goes on from, if so.
    pub(crate) saved: Option<File>,
}

impl Start {
    /// One vCPU, 32 MiB.
    pub(crate) fn new(code: &[u8]) -> Self {
        let bytes = 32 << 20;
        let machine = Machine {
            vcpus: 1,
            vcpus_max: 1,
            memory_bytes: bytes,
            memory_max_bytes: bytes,
            pages: PageKind::Base,
            cpu: CpuMode::Host,
            cpu_features: Text::default(),
            kvm: at(0),
            memory: at(1),
            pluggable: List::default(),
            saved: List::default(),
            kernel: at(2),
            initramfs: List::default(),
            command_line: Text::default(),
            uid: 65534,
            gid: 65534,
        };
        Self {
            machine,
            kvm: OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .unwrap(),
            memory: memory_file::create(bytes, Pages::Base).unwrap(),
            kernel: kernel(code),
            saved: None,
        }
    }

    /// The machine that goes on from `saved` with that memory.
    pub(crate) fn from_saved(memory: &File, saved: &[u8]) -> Self {
        let mut start = Self::new(&[]);
        let read_only = format!("/proc/self/fd/{}", memory.as_raw_fd());
        start.memory = File::open(read_only).unwrap().into();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(saved).unwrap();
        file.rewind().unwrap();
        start.saved = Some(file);
        start.machine.saved = List::new("saved", vec![at(3)]).unwrap();
        start
    }

    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let mut descriptors = vec![self.kvm.as_fd(), self.memory.as_fd(), self.kernel.as_fd()];
        descriptors.extend(self.saved.as_ref().map(File::as_fd));
        descriptors
    }
}

/// How often each thread of a process has been given a processor.
pub(crate) fn switches(pid: u32) -> Vec<u64> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let count = |task: io::Result<std::fs::DirEntry>| {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let lines = status
            .lines()
            .filter(|line| line.contains("ctxt_switches:"));
        let numbers = lines.map(|line| line.split_whitespace().nth(1).unwrap());
        numbers.map(|number| number.parse::<u64>().unwrap()).sum()
    };
    tasks.map(count).collect()
}

/// Where the code is loaded and entered.
pub(crate) const ENTRY: u64 = 1 << 20;

/// An ELF with a PVH note around 32-bit code.
fn kernel(code: &[u8]) -> File {
    const NOTE_OFFSET: u64 = 0x200;
    const CODE_OFFSET: u64 = 0x1000;
    let mut note = Vec::new();
    // Size of name, size of description, type XEN_ELFNOTE_PHYS32_ENTRY.
    for word in [4_u32, 8, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&ENTRY.to_le_bytes());
    let mut elf = Vec::new();
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01");
    elf.resize(16, 0);
    elf.extend_from_slice(&2_u16.to_le_bytes()); // executable
    elf.extend_from_slice(&62_u16.to_le_bytes()); // x86-64
    elf.extend_from_slice(&1_u32.to_le_bytes());
    for word in [ENTRY, 64, 0] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 0, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    // Two program headers: LOAD and NOTE.
    let segments = [
        (1_u32, CODE_OFFSET, ENTRY, code.len() as u64),
        (4, NOTE_OFFSET, 0, note.len() as u64),
    ];
    for (kind, offset, address, length) in segments {
        elf.extend_from_slice(&kind.to_le_bytes());
        elf.extend_from_slice(&7_u32.to_le_bytes());
        for word in [offset, address, address, length, length, 4096] {
            elf.extend_from_slice(&word.to_le_bytes());
        }
    }
    let mut file = tempfile::tempfile().unwrap();
    for (offset, bytes) in [(0, &elf[..]), (NOTE_OFFSET, &note), (CODE_OFFSET, code)] {
        file.seek(io::SeekFrom::Start(offset)).unwrap();
        file.write_all(bytes).unwrap();
    }
    file
}
