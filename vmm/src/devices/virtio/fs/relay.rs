//! The thread that passes requests on: from the guest's queues to those of the daemon, and answers
//! back. It copies bytes and knows nothing of FUSE.
//!
//! ```text
//! event loop ──commands──> relay thread <──kicks── guest      (Start: queues; Stop: queues back)
//!            <──trouble───              <──calls── daemon
//! ```
//!
//! The thread never blocks, neither on the daemon, whose answers may never come, nor on the event
//! loop. A fault of the driver or the daemon is recorded and reported to the event loop; nothing is
//! passed on until the driver resets the device.

use std::{
    io,
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use virtio_queue::QueueT;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};

use super::{
    super::{
        chain,
        device::{Activation, ActiveQueue},
        segments::SegmentChain,
    },
    shadow::{Bounce, Full, Lie, Shadow},
};

/// Stack of the thread: no recursion, no large arrays.
const STACK_BYTES: usize = 128 << 10;

/// How long the thread may take for a command, none of which waits for the daemon.
const COMMAND_MAX: Duration = Duration::from_secs(5);

/// How long requests in flight may take when the device is saved.
const DRAIN_MAX: Duration = Duration::from_secs(5);

/// How long the thread idles before it gives room back, in milliseconds.
const IDLE_MS: i32 = 1000;

/// How often one queue is polled for answers before the others have their turn, so that a fast or
/// malicious daemon cannot starve them.
const TURNS_MAX: usize = 8;

/// Tokens of the thread's own epoll: commands; kicks of the guest and calls of the daemon by queue.
const COMMAND: u64 = 0;
const KICK: u64 = 1 << 32;
const CALL: u64 = 2 << 32;

/// What the event loop asks.
enum Command {
    /// Serve these queues.
    Start(Box<Activation>),
    /// Give them back at once or, with a deadline, when nothing is in flight any more.
    Stop(Option<Instant>, SyncSender<Stopped>),
    /// The device goes.
    End,
}

/// The queues of a driver, and whether everything that was taken from them has been answered.
#[derive(Debug)]
pub(super) struct Stopped {
    /// The queues with where they stand.
    pub(super) active: Option<Activation>,
    /// Requests that the daemon has not answered.
    pub(super) in_flight: usize,
}

impl Stopped {
    /// The thread does not answer, so the number of requests in flight is unknown.
    fn lost() -> Self {
        Self {
            active: None,
            in_flight: usize::MAX,
        }
    }
}

/// The event loop's handle of the thread.
#[derive(Debug)]
pub(super) struct Relay {
    commands: SyncSender<Command>,
    bell: EventFd,
    trouble: Arc<Trouble>,
    thread: Option<JoinHandle<()>>,
}

/// Why nothing is passed on any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// A fault of the driver, until it resets the device.
    Driver(String),
    /// A fault of the daemon or of the thread itself, which is final.
    Daemon(String),
}

/// The first fault, and a notification of it for the event loop.
#[derive(Debug)]
pub(super) struct Trouble {
    fault: Mutex<Option<Fault>>,
    /// Readable when there is a fault.
    pub(super) bell: EventFd,
}

impl Trouble {
    fn tell(&self, fault: Fault) {
        let mut known = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        known.get_or_insert(fault);
        // The counter overflows only when nobody reads it, and is readable then.
        let _ = self.bell.write(1);
    }

    /// Takes the fault, if there is one.
    pub(super) fn take(&self) -> Option<Fault> {
        // The counter may have been read already.
        let _ = self.bell.read();
        let mut known = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        known.take()
    }
}

/// The eventfds of a queue to the daemon.
#[derive(Debug)]
pub(super) struct Line {
    /// Notifies the daemon of requests.
    pub(super) kick: EventFd,
    /// Notifies the thread of answers.
    pub(super) call: EventFd,
}

fn eventfd() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

impl Line {
    /// Creates both.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            kick: eventfd()?,
            call: eventfd()?,
        })
    }
}

impl Relay {
    /// Starts the thread, which serves nothing yet. `confine` puts its system call filter on.
    pub(super) fn start(
        bounce: Bounce,
        lines: Vec<Line>,
        confine: fn() -> io::Result<()>,
    ) -> io::Result<Self> {
        let (commands, receiver) = sync_channel(1);
        let bell = eventfd()?;
        let trouble = Arc::new(Trouble {
            fault: Mutex::default(),
            bell: eventfd()?,
        });
        let mut worker = Worker {
            epoll: Epoll::new()?,
            commands: receiver,
            bell: bell.try_clone()?,
            trouble: Arc::clone(&trouble),
            queues: Vec::new(),
            bounce,
            active: None,
            generation: 0,
            draining: None,
        };
        worker.watch(&worker.bell, COMMAND)?;
        for (index, line) in (0_u64..).zip(lines) {
            worker.watch(&line.call, CALL | index)?;
            worker.queues.push(Passage {
                shadow: Shadow::new(worker.queues.len()),
                line,
                stalled: false,
            });
        }
        let thread = thread::Builder::new()
            .name("fs".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || match confine() {
                Ok(()) => worker.run(),
                Err(error) => worker.trouble.tell(Fault::Daemon(error.to_string())),
            })?;
        Ok(Self {
            commands,
            bell,
            trouble,
            thread: Some(thread),
        })
    }

    /// Where the thread reports faults.
    pub(super) fn trouble(&self) -> &Trouble {
        &self.trouble
    }

    fn send(&self, command: Command) -> bool {
        let sent = self.commands.send(command).is_ok();
        // The counter overflows only when it is readable anyway.
        let _ = self.bell.write(1);
        sent
    }

    /// Hands the queues to the thread; false when the thread has ended.
    pub(super) fn serve(&self, activation: Activation) -> bool {
        self.send(Command::Start(Box::new(activation)))
    }

    /// Takes the queues back. With `drain`, requests in flight get some time to be answered.
    pub(super) fn stop(&self, drain: bool) -> Stopped {
        let (reply, stopped) = sync_channel(1);
        let until = drain.then(|| Instant::now() + DRAIN_MAX);
        if !self.send(Command::Stop(until, reply)) {
            return Stopped::lost();
        }
        let patience = COMMAND_MAX + until.map_or(Duration::ZERO, |_| DRAIN_MAX);
        stopped
            .recv_timeout(patience)
            .unwrap_or_else(|_| Stopped::lost())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.send(Command::End);
        if let Some(thread) = self.thread.take() {
            // The thread ends at once. A panic has printed its message already.
            let _ = thread.join();
        }
    }
}

/// One queue of the guest and the matching queue to the daemon.
#[derive(Debug)]
struct Passage {
    shadow: Shadow,
    line: Line,
    /// The guest's next request waits for room.
    stalled: bool,
}

/// The guest's queue of this number, if its driver enabled it.
fn queue(active: &mut Activation, index: usize) -> Option<&mut ActiveQueue> {
    let mut queues = active.queues.iter_mut();
    queues.find(|queue| usize::from(queue.index) == index)
}

/// The state of the thread.
struct Worker {
    epoll: Epoll,
    commands: Receiver<Command>,
    bell: EventFd,
    trouble: Arc<Trouble>,
    queues: Vec<Passage>,
    bounce: Bounce,
    active: Option<Box<Activation>>,
    /// Counts activations. Answers to requests of an earlier one are dropped.
    generation: u64,
    draining: Option<(Instant, SyncSender<Stopped>)>,
}

impl Worker {
    fn watch(&self, eventfd: &EventFd, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, token);
        self.epoll
            .ctl(ControlOperation::Add, eventfd.as_raw_fd(), event)
    }

    fn run(&mut self) {
        let mut events = [EpollEvent::default(); 16];
        loop {
            let count = match self.epoll.wait(self.patience(), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return self.trouble.tell(Fault::Daemon(error.to_string())),
            };
            if count == 0 && self.draining.is_none() && self.bounce.is_large() {
                self.bounce.shrink();
            }
            for event in &events[..count] {
                let (kind, index) = (event.data() & !0xffff, event.data() & 0xffff);
                let index = usize::try_from(index).unwrap_or(usize::MAX);
                match kind {
                    KICK => self.kicked(index),
                    CALL => self.called(index),
                    _ => {
                        if !self.obey() {
                            return;
                        }
                    }
                }
            }
            self.finish_draining();
        }
    }

    /// How long to wait at most, in milliseconds.
    fn patience(&self) -> i32 {
        if let Some((until, _)) = &self.draining {
            let left = until.saturating_duration_since(Instant::now()).as_millis();
            return i32::try_from(left).unwrap_or(IDLE_MS).saturating_add(1);
        }
        if self.bounce.is_large() { IDLE_MS } else { -1 }
    }

    /// Carries out the event loop's commands; false when the thread must end.
    fn obey(&mut self) -> bool {
        // An earlier read may have taken the notifications of two commands.
        let _ = self.bell.read();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Start(activation) => self.begin(activation),
                Command::Stop(until, reply) => {
                    self.unwatch_kicks();
                    self.draining = Some((until.unwrap_or_else(Instant::now), reply));
                }
                Command::End => return false,
            }
        }
        true
    }

    fn begin(&mut self, activation: Box<Activation>) {
        self.generation += 1;
        for queue in &activation.queues {
            let token = KICK | u64::from(queue.index);
            if let Err(error) = self.watch(&queue.kick, token) {
                return self.trouble.tell(Fault::Daemon(error.to_string()));
            }
        }
        self.active = Some(activation);
        for index in 0..self.queues.len() {
            self.queues[index].stalled = false;
            self.pass_on(index);
        }
    }

    fn unwatch_kicks(&self) {
        for queue in self.active.iter().flat_map(|active| &active.queues) {
            let event = EpollEvent::default();
            // If this fails: closing the eventfd on reset removes it as well.
            let _ = self
                .epoll
                .ctl(ControlOperation::Delete, queue.kick.as_raw_fd(), event);
        }
    }

    /// Requests of all queues that the daemon has not answered.
    fn in_flight(&self) -> usize {
        let queues = self.queues.iter();
        queues.map(|queue| queue.shadow.in_flight()).sum()
    }

    /// Answers a stop when nothing is in flight any more or its deadline has passed.
    fn finish_draining(&mut self) {
        let in_flight = self.in_flight();
        let over = |(until, _): &mut (Instant, _)| in_flight == 0 || Instant::now() >= *until;
        if let Some((_, reply)) = self.draining.take_if(over) {
            let active = self.active.take().map(|active| *active);
            // The receiver may have given up waiting.
            let _ = reply.send(Stopped { active, in_flight });
        }
    }

    fn kicked(&mut self, index: usize) {
        let active = self.active.as_deref_mut();
        if let Some(queue) = active.and_then(|active| queue(active, index)) {
            // May fail: two waits can report one notification.
            let _ = queue.kick.read();
        }
        self.pass_on(index);
    }

    fn called(&mut self, index: usize) {
        let Some(queue) = self.queues.get(index) else {
            return;
        };
        let _ = queue.line.call.read();
        if let Err(lie) = self.pass_back(index) {
            self.unwatch_kicks();
            self.active = None;
            return self.trouble.tell(Fault::Daemon(lie.to_string()));
        }
        // Any queue may be waiting for the room that was freed.
        for index in 0..self.queues.len() {
            if self.queues[index].stalled {
                self.pass_on(index);
            }
        }
    }

    /// Passes the guest's requests on, as far as there is room.
    fn pass_on(&mut self, index: usize) {
        if self.draining.is_some() {
            return;
        }
        if let Err(reason) = self.try_pass_on(index) {
            self.unwatch_kicks();
            self.active = None;
            self.trouble.tell(Fault::Driver(reason));
        }
    }

    fn try_pass_on(&mut self, index: usize) -> Result<(), String> {
        let in_flight = self.in_flight();
        let (Some(active), Some(passage)) = (&mut self.active, self.queues.get_mut(index)) else {
            return Ok(());
        };
        let memory = Arc::clone(&active.memory);
        let Some(found) = queue(active, index) else {
            return Ok(());
        };
        let queue = &mut found.queue;
        let wrong = |error: &dyn std::fmt::Display| error.to_string();
        passage.stalled = false;
        let mut added = 0;
        loop {
            let taken = SegmentChain::take(queue, &memory).map_err(|error| wrong(&error))?;
            let Some(request) = taken else {
                // Notifications stay off while requests are being taken.
                let more = queue.enable_notification(&*memory);
                if more.map_err(|error| wrong(&error))? {
                    continue;
                }
                break;
            };
            match passage
                .shadow
                .add(&mut self.bounce, &memory, request, self.generation)
            {
                Ok(()) => added += 1,
                Err(Full::Now) if in_flight + added > 0 => {
                    chain::unpop(queue);
                    passage.stalled = true;
                    break;
                }
                Err(Full::Now | Full::Ever) => {
                    return Err("a request is empty or larger than any can be".to_owned());
                }
            }
        }
        if passage.shadow.publish(&self.bounce) {
            // The counter overflows only when the daemon does not read it.
            let _ = passage.line.kick.write(1);
        }
        Ok(())
    }

    /// Passes answers of the daemon back.
    fn pass_back(&mut self, index: usize) -> Result<(), Lie> {
        let passage = &mut self.queues[index];
        let mut queue = self.active.as_deref_mut().map(|active| {
            let memory = Arc::clone(&active.memory);
            let interrupt = Arc::clone(&active.interrupt);
            (memory, interrupt, queue(active, index))
        });
        let mut answered = false;
        let mut waits = false;
        for _ in 0..TURNS_MAX {
            while let Some((request, length)) = passage.shadow.take_used(&self.bounce)? {
                match &mut queue {
                    Some((memory, _, Some(queue))) if request.generation == self.generation => {
                        request.deliver(&mut self.bounce, memory, length);
                        let length = u32::try_from(length).unwrap_or(u32::MAX);
                        // A broken used ring is reported with the next request.
                        let used = queue.queue.add_used(&**memory, request.chain.head, length);
                        answered |= used.is_ok();
                    }
                    _ => request.forget(&mut self.bounce),
                }
            }
            waits = passage.shadow.wait_for_answers(&self.bounce);
            if !waits {
                break;
            }
        }
        if waits {
            // Continues after the other queues had their turn.
            let _ = passage.line.call.write(1);
        }
        if let Some((memory, interrupt, Some(queue))) = &mut queue
            && answered
            && queue.queue.needs_notification(&**memory).unwrap_or(true)
        {
            interrupt.signal_queue(queue.index);
        }
        Ok(())
    }
}
