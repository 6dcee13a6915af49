//! The disk: set-up, requests in flight, and their answers.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pericarp_sys::{
    disk_io::{DiskIo, Operation, PUNCH_HOLE, ZERO_DATA_BYTES_MAX, ZERO_RANGE},
    guest_io::Segment,
    interrupted,
};
use virtio_queue::QueueT;

use super::{
    open::{Cache, Error, Parameters, can_punch, check_file, size},
    request::{
        self, CONFIG_BYTES, Disk, F_BLK_SIZE, F_DISCARD, F_FLUSH, F_MQ, F_RO, F_SEG_MAX,
        F_TOPOLOGY, F_WRITE_ZEROES, HEADER_BYTES, QUEUES_MAX, RANGE_BYTES, Request, SERIAL_BYTES,
        Shape, Status,
    },
};
use crate::devices::virtio::{
    chain::ChainError,
    device::{
        Activation, ActiveQueue, Broken, Command, CommandError, GuestMemory, Interrupt, Poller,
        Readiness, VirtioDevice, read_config,
    },
    rate_limiter::RateLimiter,
    saved::{DeviceState, Position, Saved},
    segments::{self, SegmentChain},
};

/// Entries of each queue.
pub(crate) const QUEUE_SIZE: u16 = 256;
/// Requests in flight over all queues of a disk. Each costs at most a queue's length of segments,
/// 10 KiB.
pub(crate) const IN_FLIGHT_MAX: u16 = 128;
/// Segments of one request: a queue's length without header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Logical block size: what every file and nearly every device takes.
const BLOCK_BYTES: u32 = 512;
/// Bytes of one discard or write-zeroes request where the file system does it by its tables alone.
const RANGE_BYTES_MAX: u64 = 1 << 30;

const READABLE: Readiness = libc::EPOLLIN as Readiness;

const TOKEN_COMPLETED: u32 = 0;
const TOKEN_TIMER: u32 = 1;

#[derive(Debug, Default)]
struct Counters {
    reads: u64,
    read_bytes: u64,
    writes: u64,
    written_bytes: u64,
    flushes: u64,
    cleared_bytes: u64,
    errors: u64,
}

/// A request that the kernel works on.
#[derive(Debug)]
struct InFlight {
    /// Position in `Running::queues`.
    queue: usize,
    chain: SegmentChain,
    request: Request,
    /// Data of a read or write, and how much of it is done: the kernel may do less than it was
    /// asked.
    data: Vec<Segment>,
    done: u64,
}

#[derive(Debug)]
struct Running {
    memory: GuestMemory,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
    poller: Arc<dyn Poller>,
    queues: Vec<ActiveQueue>,
    /// Queues that may hold requests which no kick will announce again.
    pending: Vec<bool>,
    /// Requests in flight; the token of the kernel is the position here.
    in_flight: Vec<Option<InFlight>>,
    /// Positions that are free there.
    free: Vec<usize>,
}

/// The disk.
#[derive(Debug)]
pub(crate) struct Blk {
    name: String,
    parameters: Parameters,
    disk_io: DiskIo,
    bytes: u64,
    shape: Shape,
    config: [u8; CONFIG_BYTES],
    features: u64,
    queue_sizes: Vec<u16>,
    limiter: RateLimiter,
    counters: Counters,
    running: Option<Running>,
}

impl Blk {
    /// A disk on an open file or block device.
    pub(crate) fn new(name: String, parameters: &Parameters, file: OwnedFd) -> Result<Self, Error> {
        let queues = parameters.queues;
        if queues == 0 || queues > QUEUES_MAX {
            return Err(Error::Queues { name, queues });
        }
        if parameters.serial.len() > SERIAL_BYTES {
            return Err(Error::Serial { name });
        }
        let is_file = check_file(&name, &file, parameters.read_only)?;
        let bytes = match size(&file) {
            Ok(bytes) => bytes,
            Err(source) => return Err(Error::Size { name, source }),
        };
        let can_clear = !parameters.read_only && (!is_file || can_punch(&file));
        let shape = Shape {
            segments_max: SEGMENTS_MAX,
            block_bytes: BLOCK_BYTES,
            queues,
            range_bytes_max: if is_file {
                RANGE_BYTES_MAX
            } else {
                ZERO_DATA_BYTES_MAX
            },
        };
        let mut features = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY;
        for (wanted, feature) in [
            (parameters.read_only, F_RO),
            (queues > 1, F_MQ),
            (can_clear, F_DISCARD | F_WRITE_ZEROES),
            (parameters.cache != Cache::WriteThrough, F_FLUSH),
        ] {
            if wanted {
                features |= feature;
            }
        }
        let failed = |source| Error::Descriptor {
            name: name.clone(),
            source,
        };
        Ok(Self {
            disk_io: DiskIo::new(file, IN_FLIGHT_MAX).map_err(failed)?,
            limiter: RateLimiter::new(parameters.limit).map_err(failed)?,
            parameters: parameters.clone(),
            bytes,
            shape,
            config: request::config(bytes, shape),
            features,
            queue_sizes: vec![QUEUE_SIZE; usize::from(queues)],
            counters: Counters::default(),
            running: None,
            name,
        })
    }

    /// As on a host without io_uring.
    #[cfg(test)]
    pub(super) fn without_ring(mut self) -> Self {
        let file = self.disk_io.file().try_clone_to_owned();
        self.disk_io = file
            .and_then(|file| DiskIo::without_ring(file, IN_FLIGHT_MAX))
            .unwrap();
        self
    }

    fn broken(&mut self, reason: impl std::fmt::Display) -> Broken {
        self.stop();
        Broken {
            device: self.name(),
            reason: reason.to_string(),
        }
    }

    fn stop(&mut self) {
        let Some(running) = self.running.take() else {
            return;
        };
        // Nothing may touch guest memory afterwards.
        self.disk_io.drain();
        let _ = running.poller.remove(self.disk_io.event().as_raw_fd());
        let _ = running.poller.remove(self.limiter.descriptor());
    }

    /// Takes requests off all queues that may have some, as far as there is room and the limiter
    /// admits.
    fn serve(&mut self) -> Result<(), Broken> {
        let count = self
            .running
            .as_ref()
            .map_or(0, |running| running.queues.len());
        for queue in 0..count {
            if let Err(error) = self.serve_queue(queue) {
                return Err(self.broken(error));
            }
        }
        match self.disk_io.submit() {
            Ok(()) => Ok(()),
            Err(error) => Err(self.broken(format!("io_uring: {error}"))),
        }
    }

    /// As many requests as may be in flight, then another queue's turn: what is left is announced
    /// by an answer.
    fn serve_queue(&mut self, queue: usize) -> Result<(), ChainError> {
        let mut answered = false;
        for _ in 0..IN_FLIGHT_MAX {
            let Some(running) = &mut self.running else {
                return Ok(());
            };
            let has_room = !running.free.is_empty() && self.disk_io.has_room();
            if !running.pending[queue] || !has_room || !self.limiter.admits() {
                break;
            }
            let active = &mut running.queues[queue].queue;
            let Some(chain) = SegmentChain::take(active, &running.memory)? else {
                running.pending[queue] = active.enable_notification(running.memory.as_ref())?;
                continue;
            };
            answered |= self.begin(queue, chain)?;
        }
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        if answered {
            signal(running, queue)?;
            if running.pending[queue] && running.free.len() == usize::from(IN_FLIGHT_MAX) {
                // No answer of the kernel will bring us back.
                let again = running.queues[queue].kick.write(1);
                running.pending[queue] = again.is_ok();
            }
        }
        Ok(())
    }

    /// Checks a request and begins it; true when it was answered at once.
    fn begin(&mut self, queue: usize, chain: SegmentChain) -> Result<bool, ChainError> {
        let Some(running) = &mut self.running else {
            return Ok(false);
        };
        if chain.writable_len() == 0 {
            // Not even a status can be given.
            return Err(ChainError::Malformed(chain.head));
        }
        let disk = Disk {
            bytes: self.bytes,
            read_only: self.parameters.read_only,
            features: running.features,
            range_bytes_max: self.shape.range_bytes_max,
        };
        let (request, data) = match parse(&chain, &running.memory, &disk) {
            Ok(parsed) => parsed,
            Err(status) => return self.answer(queue, &chain, status, 0).map(|()| true),
        };
        self.limiter.spend(segments::total(&data));
        let in_flight = InFlight {
            queue,
            chain,
            request,
            data,
            done: 0,
        };
        match request {
            Request::Nothing => self
                .answer(queue, &in_flight.chain, Status::Ok, 0)
                .map(|()| true),
            Request::Flush if self.parameters.cache != Cache::WriteBack => self
                .answer(queue, &in_flight.chain, Status::Ok, 0)
                .map(|()| true),
            Request::GetId => {
                let mut serial = [0; SERIAL_BYTES];
                serial[..self.parameters.serial.len()]
                    .copy_from_slice(self.parameters.serial.as_bytes());
                let memory = running.memory.clone();
                let status = if in_flight.chain.write_at(&memory, 0, &serial) {
                    Status::Ok
                } else {
                    Status::IoError
                };
                let written = SERIAL_BYTES as u64;
                self.answer(queue, &in_flight.chain, status, written)
                    .map(|()| true)
            }
            _ => self.submit(in_flight),
        }
    }

    /// Gives a request, or what is left of it, to the kernel; true when it had to be answered with
    /// an error instead.
    fn submit(&mut self, in_flight: InFlight) -> Result<bool, ChainError> {
        let durable = self.is_durable();
        let Some(running) = &mut self.running else {
            return Ok(false);
        };
        let done = usize::try_from(in_flight.done).expect("bounded by the data");
        let left = segments::part(&in_flight.data, done, usize::MAX);
        let operation = match in_flight.request {
            Request::Read { offset, .. } => Operation::Read {
                offset: offset + in_flight.done,
                segments: &left,
            },
            Request::Write { offset, .. } => Operation::Write {
                offset: offset + in_flight.done,
                segments: &left,
                durable,
            },
            Request::Clear {
                offset, len, mode, ..
            } => Operation::Allocate { mode, offset, len },
            _ => Operation::Flush,
        };
        let Some(slot) = running.free.pop() else {
            return self
                .answer(in_flight.queue, &in_flight.chain, Status::IoError, 0)
                .map(|()| true);
        };
        match self.disk_io.begin(slot as u64, &running.memory, operation) {
            Ok(()) => {
                running.in_flight[slot] = Some(in_flight);
                Ok(false)
            }
            Err(_) => {
                running.free.push(slot);
                self.answer(in_flight.queue, &in_flight.chain, Status::IoError, 0)
                    .map(|()| true)
            }
        }
    }

    /// Takes the kernel's answers and gives them on.
    fn complete(&mut self) -> Result<(), ChainError> {
        let mut answered = [false; QUEUES_MAX as usize];
        for (token, result) in self.disk_io.take_completed() {
            let taken = self.running.as_mut().and_then(|running| {
                let slot = usize::try_from(token).ok()?;
                let in_flight = running.in_flight.get_mut(slot)?.take()?;
                running.free.push(slot);
                Some(in_flight)
            });
            let Some(mut in_flight) = taken else { continue };
            let queue = in_flight.queue;
            match outcome(&in_flight, result) {
                Outcome::More(bytes) => {
                    in_flight.done += bytes;
                    answered[queue] |= self.submit(in_flight)?;
                }
                Outcome::Instead(operation) => {
                    answered[queue] |= self.submit_instead(in_flight, operation)?;
                }
                Outcome::Done(status) => {
                    let written = match in_flight.request {
                        Request::Read { len, .. } if status == Status::Ok => len,
                        _ => 0,
                    };
                    if status == Status::Ok {
                        self.count(&in_flight.request);
                        let moved_no_data = match in_flight.request {
                            Request::Clear { .. } => true,
                            Request::Write { .. } => in_flight.data.is_empty(),
                            _ => false,
                        };
                        if moved_no_data && self.is_durable() {
                            in_flight.request = Request::Flush;
                            answered[queue] |= self.submit(in_flight)?;
                            continue;
                        }
                    }
                    self.answer(queue, &in_flight.chain, status, written)?;
                    answered[queue] = true;
                }
            }
        }
        if let Some(running) = &mut self.running {
            for (queue, answered) in answered.into_iter().enumerate() {
                if answered {
                    signal(running, queue)?;
                }
            }
        }
        Ok(())
    }

    /// Begins a range request again in another way.
    fn submit_instead(
        &mut self,
        mut in_flight: InFlight,
        mode: Option<i32>,
    ) -> Result<bool, ChainError> {
        let Request::Clear {
            offset, len, zero, ..
        } = in_flight.request
        else {
            return Ok(false);
        };
        if let Some(mode) = mode {
            in_flight.request = Request::Clear {
                offset,
                len,
                mode,
                zero,
            };
            return self.submit(in_flight);
        }
        let Some(running) = &mut self.running else {
            return Ok(false);
        };
        let Some(slot) = running.free.pop() else {
            return self
                .answer(in_flight.queue, &in_flight.chain, Status::IoError, 0)
                .map(|()| true);
        };
        let operation = Operation::WriteZeroData { offset, len };
        match self.disk_io.begin(slot as u64, &running.memory, operation) {
            Ok(()) => {
                // From here on it is a write: its answer is a count of bytes, its data is not the
                // guest's.
                in_flight.request = Request::Write { offset, len };
                running.in_flight[slot] = Some(in_flight);
                Ok(false)
            }
            Err(_) => {
                running.free.push(slot);
                self.answer(in_flight.queue, &in_flight.chain, Status::IoError, 0)
                    .map(|()| true)
            }
        }
    }

    /// Whether a write is complete only when it is durable: also for a driver that knows no flush
    /// (§5.2.6.2).
    fn is_durable(&self) -> bool {
        let flushes = self
            .running
            .as_ref()
            .is_some_and(|running| running.features & F_FLUSH != 0);
        match self.parameters.cache {
            Cache::WriteThrough => true,
            Cache::WriteBack => !flushes,
            Cache::Unsafe => false,
        }
    }

    fn count(&mut self, request: &Request) {
        let counters = &mut self.counters;
        match request {
            Request::Read { len, .. } => {
                counters.reads += 1;
                counters.read_bytes += len;
            }
            Request::Write { len, .. } => {
                counters.writes += 1;
                counters.written_bytes += len;
            }
            Request::Flush => counters.flushes += 1,
            Request::Clear { len, .. } => counters.cleared_bytes += len,
            Request::GetId | Request::Nothing => {}
        }
    }

    /// Writes the status, which is the last writable byte (§5.2.6), and puts the chain in the used
    /// ring.
    fn answer(
        &mut self,
        queue: usize,
        chain: &SegmentChain,
        status: Status,
        written: u64,
    ) -> Result<(), ChainError> {
        if status != Status::Ok {
            self.counters.errors += 1;
        }
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let last = chain
            .writable_len()
            .checked_sub(1)
            .and_then(|last| usize::try_from(last).ok())
            .ok_or(ChainError::Malformed(chain.head))?;
        if !chain.write_at(&running.memory, last, &[status as u8]) {
            return Err(ChainError::OutsideMemory(chain.head));
        }
        let len = u32::try_from(written + 1).unwrap_or(u32::MAX);
        let queue = &mut running.queues[queue].queue;
        Ok(queue.add_used(running.memory.as_ref(), chain.head, len)?)
    }

    /// Reads the file's size anew and tells the driver.
    fn resize(&mut self) -> Result<(), CommandError> {
        let bytes = size(self.disk_io.file()).map_err(|error| CommandError::Invalid {
            device: self.name(),
            reason: format!("reading the size of file: {error}"),
        })?;
        self.bytes = bytes;
        self.config = request::config(bytes, self.shape);
        if let Some(running) = &self.running {
            running.interrupt.signal_config();
        }
        Ok(())
    }
}

/// What an answer of the kernel means.
enum Outcome {
    Done(Status),
    /// That many bytes were moved, and not all yet.
    More(u64),
    /// The file system cannot do that: another mode, or zeroes as data.
    Instead(Option<i32>),
}

fn outcome(in_flight: &InFlight, result: io::Result<usize>) -> Outcome {
    let unsupported = |error: &io::Error| {
        matches!(
            error.raw_os_error(),
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
        )
    };
    match (in_flight.request, result) {
        (Request::Read { len, .. } | Request::Write { len, .. }, Ok(bytes)) => {
            let bytes = bytes as u64;
            if in_flight.done + bytes >= len {
                Outcome::Done(Status::Ok)
            } else if bytes == 0 || in_flight.data.is_empty() {
                // The file ends early, or zeroes as data were cut short.
                Outcome::Done(Status::IoError)
            } else {
                Outcome::More(bytes)
            }
        }
        (
            Request::Clear {
                zero, mode, len, ..
            },
            Err(error),
        ) if unsupported(&error) => match (zero, mode) {
            // A discard is a hint.
            (false, _) => Outcome::Done(Status::Ok),
            (true, ZERO_RANGE) => Outcome::Instead(Some(PUNCH_HOLE)),
            (true, _) if len <= ZERO_DATA_BYTES_MAX => Outcome::Instead(None),
            (true, _) => Outcome::Done(Status::IoError),
        },
        (_, Ok(_)) => Outcome::Done(Status::Ok),
        (_, Err(_)) => Outcome::Done(Status::IoError),
    }
}

/// Takes a request apart and checks it.
fn parse(
    chain: &SegmentChain,
    memory: &GuestMemory,
    disk: &Disk,
) -> Result<(Request, Vec<Segment>), Status> {
    let mut header = [0; HEADER_BYTES];
    if !chain.read_at(memory, 0, &mut header) {
        return Err(Status::IoError);
    }
    let readable = chain.readable_len() - HEADER_BYTES as u64;
    let writable = chain.writable_len() - 1;
    let mut range = [0; RANGE_BYTES];
    let has_range = chain.read_at(memory, HEADER_BYTES, &mut range);
    let range = has_range.then_some(&range);
    let request = request::parse(&header, readable, writable, range, disk)?;
    let data = match request {
        Request::Read { len, .. } => {
            let len = usize::try_from(len).map_err(|_| Status::IoError)?;
            segments::part(&chain.writable, 0, len)
        }
        Request::Write { len, .. } => {
            let len = usize::try_from(len).map_err(|_| Status::IoError)?;
            segments::part(&chain.readable, HEADER_BYTES, len)
        }
        _ => Vec::new(),
    };
    Ok((request, data))
}

fn signal(running: &mut Running, queue: usize) -> Result<(), ChainError> {
    let active = &mut running.queues[queue];
    if active.queue.needs_notification(running.memory.as_ref())? {
        running.interrupt.signal_queue(active.index);
    }
    Ok(())
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u16 {
        request::DEVICE_TYPE
    }

    fn name(&self) -> String {
        format!("virtio-blk {}", self.name)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        self.stop();
        let count = activation.queues.len();
        let poller = activation.poller.clone();
        self.running = Some(Running {
            memory: activation.memory,
            features: activation.features,
            interrupt: activation.interrupt,
            poller: activation.poller,
            queues: activation.queues,
            pending: vec![false; count],
            in_flight: (0..IN_FLIGHT_MAX).map(|_| None).collect(),
            free: (0..usize::from(IN_FLIGHT_MAX)).collect(),
        });
        let event = self.disk_io.event().as_raw_fd();
        let timer = self.limiter.descriptor();
        poller
            .add(event, TOKEN_COMPLETED, READABLE)
            .and_then(|()| poller.add(timer, TOKEN_TIMER, READABLE))
            .map_err(|error| self.broken(format!("the event loop refuses a descriptor: {error}")))
    }

    fn queue_kicked(&mut self, queue: u16) -> Result<(), Broken> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let Some(position) = running
            .queues
            .iter()
            .position(|active| active.index == queue)
        else {
            return Ok(());
        };
        running.pending[position] = true;
        self.serve()
    }

    fn descriptor_ready(&mut self, token: u32, _readiness: Readiness) -> Result<(), Broken> {
        if token == TOKEN_TIMER {
            self.limiter.wait_ended();
        } else if let Err(error) = self.complete() {
            return Err(self.broken(error));
        }
        self.serve()
    }

    fn reset(&mut self) {
        self.stop();
    }

    /// Finishes what the kernel works on; what was not begun stays in the queues.
    fn save(&mut self) -> Saved {
        while self.running.is_some() && self.disk_io.in_flight() > 0 {
            let begun = self.disk_io.submit().is_ok();
            let mut set = [PollFd::new(self.disk_io.event(), PollFlags::POLLIN)];
            let waited = begun && interrupted::retry(|| poll(&mut set, PollTimeout::NONE)).is_ok();
            // Without an answer, or with a driver that broke a rule meanwhile, what is left is
            // dropped, as by a reset.
            if !waited || self.complete().is_err() {
                break;
            }
        }
        let running = self.running.as_ref();
        let queues = running.map_or_else(Vec::new, |running| {
            running.queues.iter().map(Position::of).collect()
        });
        self.stop();
        let state = DeviceState::Nothing;
        Saved { queues, state }
    }

    fn command(&mut self, command: Command) -> Result<(), CommandError> {
        match command {
            Command::Limit(rates) => {
                self.limiter.set(rates);
                Ok(())
            }
            Command::FileResized => self.resize(),
            _ => Err(CommandError::Unsupported(self.name())),
        }
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.counters;
        vec![
            ("reads", counters.reads),
            ("read_bytes", counters.read_bytes),
            ("writes", counters.writes),
            ("written_bytes", counters.written_bytes),
            ("flushes", counters.flushes),
            ("cleared_bytes", counters.cleared_bytes),
            ("errors", counters.errors),
        ]
    }
}
