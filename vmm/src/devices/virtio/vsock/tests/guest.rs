//! A guest kernel's vsock as far as the tests need it: sockets with credit on the driver's side of
//! the queues, and the host programs' way in.

use std::{
    collections::{HashMap, VecDeque},
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
};

use super::super::{
    super::{
        device::VirtioDevice,
        driver::{BUFFERS, Driver, EVENT_IDX, Part},
    },
    Parameters, Vsock,
    packet::{HEADER_BYTES, HOST_CID, Header, Operation, TYPE_STREAM},
};

/// The guest's context id.
pub(crate) const CID: u64 = 3;
/// Room of each socket of the guest, as Linux has it.
pub(crate) const GUEST_ROOM: u32 = 256 << 10;
/// Size of the buffers in the receive queue, as Linux has it.
const RECEIVE_BYTES: u32 = 4096;
/// Largest packet that Linux sends.
pub(crate) const PACKET_BYTES_MAX: usize = 64 << 10;
const QUEUE_SIZE: u16 = 256;
const TRANSMIT_BUFFERS: u64 = BUFFERS + 0x20_0000;
const TRANSMIT_STRIDE: u64 = 0x2_0000;

/// (guest port, host port)
pub(crate) type Ports = (u32, u32);

/// A socket of the guest.
#[derive(Debug, Default)]
pub(crate) struct Socket {
    /// Bytes read by the guest's program.
    pub(crate) read: Vec<u8>,
    /// Bytes received and not read.
    pub(crate) unread: Vec<u8>,
    /// Flags of the host's shutdowns.
    pub(crate) host_shutdown: u32,
    /// The host accepted or asked.
    pub(crate) open: bool,
    /// RST of the host.
    pub(crate) reset: bool,
    forwarded: u32,
    forwarded_told: u32,
    host_room: u32,
    host_forwarded: u32,
    sent: u32,
}

impl Socket {
    /// Bytes that may be sent.
    pub(crate) fn credit(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.host_forwarded);
        (self.host_room - in_flight) as usize
    }
}

/// The guest, the device and the path of its listener.
pub(crate) struct Guest {
    pub(crate) driver: Driver,
    pub(crate) device: Vsock,
    pub(crate) sockets: HashMap<Ports, Socket>,
    /// Packets of no socket, and all RSTs.
    pub(crate) others: VecDeque<Header>,
    /// The guest's programs read what arrives.
    pub(crate) reads: bool,
    /// The driver refills its receive queue.
    pub(crate) refills: bool,
    addresses: HashMap<u16, u64>,
    free_transmit: Vec<u64>,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Guest {
    /// A guest that may dial each of `ports` once; the host's ends come along.
    pub(crate) fn new(ports: &[u32]) -> (Self, Vec<UnixStream>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let (near, far): (Vec<_>, Vec<_>) = ports
            .iter()
            .map(|port| {
                let (near, far) = UnixStream::pair().unwrap();
                (near, (*port, far))
            })
            .unzip();
        let parameters = Parameters { guest_cid: CID };
        let device = Vsock::new("vsock0".to_owned(), parameters, Some(listener), far).unwrap();
        let mut guest = Self {
            driver: Driver::new(&[QUEUE_SIZE; 3]),
            device,
            sockets: HashMap::new(),
            others: VecDeque::new(),
            reads: true,
            refills: true,
            addresses: HashMap::new(),
            free_transmit: Vec::new(),
            path,
            _folder: folder,
        };
        guest.boot();
        (guest, near)
    }

    /// (Re)starts the driver.
    pub(crate) fn boot(&mut self) {
        self.device.reset();
        self.driver = Driver::new(&[QUEUE_SIZE; 3]);
        self.sockets.clear();
        self.others.clear();
        self.addresses.clear();
        self.free_transmit = (0..u64::from(QUEUE_SIZE) / 2)
            .map(|slot| TRANSMIT_BUFFERS + slot * TRANSMIT_STRIDE)
            .collect();
        self.device
            .activate(self.driver.activation(EVENT_IDX))
            .unwrap();
        if self.refills {
            self.refill();
        }
    }

    /// Fills the empty receive queue with buffers.
    pub(crate) fn refill(&mut self) {
        for slot in 0..u64::from(QUEUE_SIZE) {
            self.give_buffer(BUFFERS + slot * u64::from(RECEIVE_BYTES));
        }
    }

    fn give_buffer(&mut self, address: u64) {
        let head = self.driver.queues[0].offer(&[Part::Write(address, RECEIVE_BYTES)]);
        self.addresses.insert(head.unwrap(), address);
    }

    /// A host program dials the guest.
    pub(crate) fn dial(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// Dials `port`, lets the guest accept, and returns the host's end and the ports.
    pub(crate) fn connect(&mut self, port: u32) -> (UnixStream, Ports) {
        let mut stream = self.dial();
        writeln!(stream, "CONNECT {port}").unwrap();
        let known: Vec<Ports> = self.sockets.keys().copied().collect();
        self.run();
        let mut line = [0; 64];
        let count = stream.read(&mut line).unwrap();
        let line = std::str::from_utf8(&line[..count]).unwrap();
        let host_port = line
            .strip_prefix("OK ")
            .unwrap()
            .trim_end()
            .parse()
            .unwrap();
        assert!(!known.contains(&(port, host_port)));
        (stream, (port, host_port))
    }

    /// The header of a packet of the guest.
    pub(crate) fn header(&mut self, ports: Ports, operation: Operation) -> Header {
        let forwarded = self.sockets.get_mut(&ports).map_or(0, |socket| {
            socket.forwarded_told = socket.forwarded;
            socket.forwarded
        });
        Header {
            source_cid: CID,
            destination_cid: HOST_CID,
            source_port: ports.0,
            destination_port: ports.1,
            socket_type: TYPE_STREAM,
            operation: operation.number(),
            buf_alloc: GUEST_ROOM,
            fwd_cnt: forwarded,
            ..Header::default()
        }
    }

    /// Puts a packet into the transmit queue; false when it is full.
    pub(crate) fn offer(&mut self, header: &Header, data: &[u8]) -> bool {
        let Some(address) = self.free_transmit.pop() else {
            return false;
        };
        self.driver.put(address, &header.to_bytes());
        self.driver.put(address + 0x1000, data);
        let len = u32::try_from(data.len()).unwrap();
        let header_part = Part::Read(address, u32::try_from(HEADER_BYTES).unwrap());
        let parts = [header_part, Part::Read(address + 0x1000, len)];
        let parts = if len == 0 { &parts[..1] } else { &parts[..] };
        let head = self.driver.queues[1].offer(parts).unwrap();
        self.addresses_transmit(head, address);
        true
    }

    fn addresses_transmit(&mut self, head: u16, address: u64) {
        // Heads of the two queues do not mix: the transmit queue's are kept above the receive
        // queue's.
        self.addresses.insert(head + 0x8000, address);
    }

    /// Sends a packet and lets the device work.
    pub(crate) fn send(&mut self, header: &Header, data: &[u8]) {
        assert!(self.offer(header, data), "transmit queue is full");
        self.device.queue_kicked(1).unwrap();
        self.collect();
    }

    /// Sends a packet without data.
    pub(crate) fn control(&mut self, ports: Ports, operation: Operation, flags: u32) {
        let mut header = self.header(ports, operation);
        header.flags = flags;
        self.send(&header, &[]);
    }

    /// Sends as much of `data` as credit and queue allow now.
    pub(crate) fn write(&mut self, ports: Ports, data: &[u8]) -> usize {
        let mut written = 0;
        while written < data.len() {
            let credit = self.sockets[&ports].credit();
            let count = credit.min(PACKET_BYTES_MAX).min(data.len() - written);
            let mut header = self.header(ports, Operation::Data);
            header.len = u32::try_from(count).unwrap();
            if count == 0 || !self.offer(&header, &data[written..written + count]) {
                break;
            }
            let socket = self.sockets.get_mut(&ports).unwrap();
            socket.sent = socket.sent.wrapping_add(header.len);
            written += count;
        }
        self.device.queue_kicked(1).unwrap();
        self.collect();
        written
    }

    /// Lets device and guest work until neither has anything to do.
    pub(crate) fn run(&mut self) {
        for _ in 0..100_000 {
            let busy = self.driver.turn(&mut self.device, 0).unwrap();
            if !self.collect() && !busy {
                return;
            }
        }
        panic!("the device is never idle");
    }

    /// Takes what the device has used; true when there was something.
    pub(crate) fn collect(&mut self) -> bool {
        let mut any = false;
        while let Some((head, _)) = self.driver.queues[1].take_used() {
            any = true;
            let address = self.addresses.remove(&(head + 0x8000)).unwrap();
            self.free_transmit.push(address);
        }
        while let Some((head, len)) = self.driver.queues[0].take_used() {
            any = true;
            let address = self.addresses.remove(&head).unwrap();
            let bytes = self.driver.get(address, len as usize);
            if self.refills {
                self.give_buffer(address);
            }
            let (header, data) = bytes.split_first_chunk().unwrap();
            let header = Header::parse(header);
            assert_eq!(header.len as usize, data.len());
            self.receive(&header, data);
        }
        if any {
            self.device.queue_kicked(0).unwrap();
        }
        any
    }

    fn receive(&mut self, header: &Header, data: &[u8]) {
        assert_eq!((header.source_cid, header.destination_cid), (HOST_CID, CID));
        let ports = (header.destination_port, header.source_port);
        let operation = Operation::from_number(header.operation).unwrap();
        if operation == Operation::Request {
            self.sockets.insert(ports, Socket::default());
        }
        let Some(socket) = self.sockets.get_mut(&ports) else {
            self.others.push_back(*header);
            return;
        };
        (socket.host_room, socket.host_forwarded) = (header.buf_alloc, header.fwd_cnt);
        match operation {
            Operation::Request => {
                socket.open = true;
                self.reply(ports, Operation::Response);
            }
            Operation::Response => socket.open = true,
            Operation::Reset => {
                socket.reset = true;
                self.others.push_back(*header);
            }
            Operation::Shutdown => {
                socket.host_shutdown = header.flags;
                if header.flags == 3 && socket.unread.is_empty() {
                    self.reply(ports, Operation::Reset);
                }
            }
            Operation::Data => {
                socket.unread.extend(data);
                if self.reads {
                    self.read(ports);
                }
            }
            Operation::CreditUpdate => {}
            Operation::CreditRequest => self.reply(ports, Operation::CreditUpdate),
        }
    }

    /// The guest's program reads all that has arrived; the room is told as Linux does.
    pub(crate) fn read(&mut self, ports: Ports) {
        let socket = self.sockets.get_mut(&ports).unwrap();
        let count = u32::try_from(socket.unread.len()).unwrap();
        assert!(count <= GUEST_ROOM, "the device sent more than its credit");
        socket.read.append(&mut socket.unread);
        socket.forwarded = socket.forwarded.wrapping_add(count);
        if socket.forwarded.wrapping_sub(socket.forwarded_told) > GUEST_ROOM / 2 {
            self.reply(ports, Operation::CreditUpdate);
        }
    }

    /// Answers; a full transmit queue is worked off first.
    fn reply(&mut self, ports: Ports, operation: Operation) {
        let header = self.header(ports, operation);
        while !self.offer(&header, &[]) {
            self.device.queue_kicked(1).unwrap();
            while let Some((head, _)) = self.driver.queues[1].take_used() {
                let address = self.addresses.remove(&(head + 0x8000)).unwrap();
                self.free_transmit.push(address);
            }
        }
        self.device.queue_kicked(1).unwrap();
    }

    /// A guest program dials the host; true when the host accepts.
    pub(crate) fn dial_host(&mut self, ports: Ports) -> bool {
        self.sockets.insert(ports, Socket::default());
        self.control(ports, Operation::Request, 0);
        self.run();
        self.sockets[&ports].open
    }

    /// One of the device's counters.
    pub(crate) fn counter(&self, name: &str) -> u64 {
        let counters = self.device.counters();
        counters.iter().find(|(key, _)| *key == name).unwrap().1
    }
}

/// Reads what a non-blocking stream has; `None` at its end.
pub(crate) fn drain(stream: &mut UnixStream) -> Option<Vec<u8>> {
    let mut all = Vec::new();
    let mut piece = [0; 1 << 16];
    loop {
        match stream.read(&mut piece) {
            Ok(0) if all.is_empty() => return None,
            Ok(0) => return Some(all),
            Ok(count) => all.extend(&piece[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Some(all),
            Err(error) => panic!("{error}"),
        }
    }
}

/// Bytes that tell their position and their stream.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
