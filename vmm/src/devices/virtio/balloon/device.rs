//! The balloon: its queues and its goal.

use std::sync::Arc;

use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::request::{
    self, F_DEFLATE_ON_OOM, F_REPORTING, F_STATS, PAGE_BYTES, PFNS_MAX, Role, Run,
    STATISTICS_BYTES_MAX,
};
use crate::devices::virtio::{
    chain::ChainError,
    device::{
        Activation, ActiveQueue, Broken, Command, CommandError, GuestMemory, Interrupt, Poller,
        Progress, Readiness, VirtioDevice, read_config,
    },
    discard::{Discard, DiscardError},
    saved::{DeviceState, Position, RestoreError, Saved},
    segments::SegmentChain,
};

/// Entries of each queue. Reporting sends as many ranges at once as its queue has, up to 32.
const QUEUE_SIZE: u16 = 128;
/// Buffers served in one turn of the event loop: with full lists of scattered pages some 16,000
/// system calls.
pub(super) const BATCH_MAX: usize = 16;

/// `num_pages` and `actual`; the fields behind belong to features that are not offered (§5.5.4).
const CONFIG_ACTUAL: u64 = 4;

const READABLE: Readiness = libc::EPOLLIN as Readiness;
const TOKEN_STATISTICS: u32 = 0;

/// What a balloon is made from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parameters {
    /// The guest may take pages back when it is out of memory.
    pub(crate) deflate_on_oom: bool,
    /// The guest tells which pages are free, and the host gets them.
    pub(crate) free_page_reporting: bool,
}

/// Why a balloon could not be made.
#[derive(Debug, thiserror::Error)]
#[error("balloon {name}: eventfd: {source}")]
pub(crate) struct Error {
    name: String,
    source: std::io::Error,
}

/// Why serving a buffer failed.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("a list of {0} bytes is longer than {PFNS_MAX} pages")]
    TooLong(u64),
    #[error(transparent)]
    Discard(#[from] DiscardError),
}

#[derive(Debug, Default)]
struct Counters {
    inflated_pages: u64,
    deflated_pages: u64,
    reported_bytes: u64,
    kept_bytes: u64,
}

#[derive(Debug)]
struct Running {
    memory: GuestMemory,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
    poller: Arc<dyn Poller>,
    queues: Vec<ActiveQueue>,
    /// The driver's buffer for figures: giving it back asks for fresh ones (§5.5.6.3).
    figures_buffer: Option<SegmentChain>,
}

/// The balloon.
#[derive(Debug)]
pub(crate) struct Balloon {
    name: String,
    features: u64,
    queue_sizes: Vec<u16>,
    discard: Discard,
    /// Pages that the host wants.
    goal_pages: u32,
    /// Pages that the driver says it has given.
    actual_pages: u32,
    figures: Vec<(&'static str, u64)>,
    figures_wanted: EventFd,
    counters: Counters,
    running: Option<Running>,
}

impl Balloon {
    /// An empty balloon.
    pub(crate) fn new(
        name: String,
        parameters: Parameters,
        discard: Discard,
    ) -> Result<Self, Error> {
        let mut features = F_STATS;
        let mut queue_sizes = vec![QUEUE_SIZE; 3];
        if parameters.deflate_on_oom {
            features |= F_DEFLATE_ON_OOM;
        }
        if parameters.free_page_reporting {
            features |= F_REPORTING;
            queue_sizes.push(QUEUE_SIZE);
        }
        let figures_wanted = match EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC) {
            Ok(eventfd) => eventfd,
            Err(source) => return Err(Error { name, source }),
        };
        Ok(Self {
            name,
            features,
            queue_sizes,
            discard,
            goal_pages: 0,
            actual_pages: 0,
            figures: Vec::new(),
            figures_wanted,
            counters: Counters::default(),
            running: None,
        })
    }

    fn broken(&mut self, reason: impl std::fmt::Display) -> Broken {
        self.stop();
        Broken {
            device: self.name(),
            reason: reason.to_string(),
        }
    }

    fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            let descriptor = std::os::fd::AsRawFd::as_raw_fd(&self.figures_wanted);
            let _ = running.poller.remove(descriptor);
        }
    }

    /// Serves up to [`BATCH_MAX`] buffers of a queue.
    fn serve(&mut self, position: usize, role: Role) -> Result<(), ServeError> {
        let mut used = false;
        for _ in 0..BATCH_MAX {
            let Some(running) = &mut self.running else {
                return Ok(());
            };
            let queue = &mut running.queues[position].queue;
            let memory = running.memory.clone();
            let Some(chain) = SegmentChain::take(queue, &memory)? else {
                if queue
                    .enable_notification(memory.as_ref())
                    .map_err(ChainError::from)?
                {
                    continue;
                }
                return self.notify(position, used);
            };
            match role {
                Role::Inflate => self.inflate(&memory, &chain)?,
                Role::Deflate => self.counters.deflated_pages += chain.readable_len() / 4,
                Role::Reporting => self.take_free(&memory, &chain)?,
                Role::Statistics => {
                    self.take_figures(&memory, chain)?;
                    continue;
                }
            }
            self.give_back(position, chain.head)?;
            used = true;
        }
        self.notify(position, used)?;
        if let Some(running) = &self.running {
            // More may be waiting: another turn, behind all other devices. A failure leaves it to
            // the driver's next kick.
            let _ = running.queues[position].kick.write(1);
        }
        Ok(())
    }

    fn give_back(&mut self, position: usize, head: u16) -> Result<(), ServeError> {
        if let Some(running) = &mut self.running {
            let queue = &mut running.queues[position].queue;
            queue
                .add_used(running.memory.as_ref(), head, 0)
                .map_err(ChainError::from)?;
        }
        Ok(())
    }

    fn notify(&mut self, position: usize, used: bool) -> Result<(), ServeError> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let active = &mut running.queues[position];
        if used
            && active
                .queue
                .needs_notification(running.memory.as_ref())
                .map_err(ChainError::from)?
        {
            running.interrupt.signal_queue(active.index);
        }
        Ok(())
    }

    fn inflate(&mut self, memory: &GuestMemory, chain: &SegmentChain) -> Result<(), ServeError> {
        let len = chain.readable_len();
        let mut bytes = match usize::try_from(len) {
            Ok(len) if len <= PFNS_MAX * 4 => vec![0; len],
            _ => return Err(ServeError::TooLong(len)),
        };
        if !chain.read_at(memory, 0, &mut bytes) {
            return Err(ChainError::OutsideMemory(chain.head).into());
        }
        self.counters.inflated_pages += len / 4;
        for run in request::runs(&bytes) {
            self.discard(memory, run)?;
        }
        Ok(())
    }

    fn take_free(&mut self, memory: &GuestMemory, chain: &SegmentChain) -> Result<(), ServeError> {
        for segment in &chain.writable {
            let Some(run) = request::whole_pages(segment.address.0, segment.len as u64) else {
                continue;
            };
            self.counters.reported_bytes += run.len;
            self.discard(memory, run)?;
        }
        Ok(())
    }

    /// Discards, or keeps the pages when the host cannot or may not: the guest's view is the same.
    fn discard(&mut self, memory: &GuestMemory, run: Run) -> Result<(), ServeError> {
        match self.discard.discard(memory, run.address, run.len) {
            Ok(()) => Ok(()),
            Err(error @ DiscardError::Outside(_)) => Err(error.into()),
            Err(DiscardError::Pinned | DiscardError::Host { .. }) => {
                self.counters.kept_bytes += run.len;
                Ok(())
            }
        }
    }

    fn take_figures(
        &mut self,
        memory: &GuestMemory,
        chain: SegmentChain,
    ) -> Result<(), ServeError> {
        let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len.min(STATISTICS_BYTES_MAX)];
        if !chain.read_at(memory, 0, &mut bytes) {
            return Err(ChainError::OutsideMemory(chain.head).into());
        }
        self.figures = request::parse_statistics(&bytes);
        if let Some(running) = &mut self.running {
            // A driver has one buffer; a second one takes the place of the first, which stays
            // unused.
            running.figures_buffer = Some(chain);
        }
        Ok(())
    }

    /// Gives the figures' buffer back, so that the driver fills it anew.
    fn ask_for_figures(&mut self) -> Result<(), ServeError> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let position = running.queues.iter().position(|queue| {
            request::role(queue.index, running.features) == Some(Role::Statistics)
        });
        let Some((position, chain)) = position.zip(running.figures_buffer.take()) else {
            return Ok(());
        };
        self.give_back(position, chain.head)?;
        self.notify(position, true)
    }

    fn config(&self) -> [u8; 8] {
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.goal_pages.to_le_bytes());
        config[4..].copy_from_slice(&self.actual_pages.to_le_bytes());
        config
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u16 {
        request::DEVICE_TYPE
    }

    fn name(&self) -> String {
        format!("virtio-balloon {}", self.name)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (CONFIG_ACTUAL, Ok(actual)) = (offset, data.try_into()) {
            self.actual_pages = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        self.stop();
        let descriptor = std::os::fd::AsRawFd::as_raw_fd(&self.figures_wanted);
        let added = activation
            .poller
            .add(descriptor, TOKEN_STATISTICS, READABLE);
        self.running = Some(Running {
            memory: activation.memory,
            features: activation.features & self.features,
            interrupt: activation.interrupt,
            poller: activation.poller,
            queues: activation.queues,
            figures_buffer: None,
        });
        added.map_err(|error| self.broken(format!("the event loop refuses a descriptor: {error}")))
    }

    fn queue_kicked(&mut self, queue: u16) -> Result<(), Broken> {
        let Some(running) = &self.running else {
            return Ok(());
        };
        let role = request::role(queue, running.features);
        let position = running
            .queues
            .iter()
            .position(|active| active.index == queue);
        let Some((position, role)) = position.zip(role) else {
            return Ok(());
        };
        self.serve(position, role)
            .map_err(|error| self.broken(error))
    }

    fn descriptor_ready(&mut self, _token: u32, _readiness: Readiness) -> Result<(), Broken> {
        // Non-blocking; nothing to read means that another turn has read it.
        let _ = self.figures_wanted.read();
        self.ask_for_figures().map_err(|error| self.broken(error))
    }

    fn reset(&mut self) {
        self.stop();
        // A driver starts with an empty balloon (§5.5.5).
        self.actual_pages = 0;
    }

    fn save(&mut self) -> Saved {
        let state = DeviceState::Balloon {
            goal_pages: self.goal_pages,
            actual_pages: self.actual_pages,
        };
        let mut queues = Vec::new();
        if let Some(running) = &self.running {
            let features = running.features;
            queues.extend(running.queues.iter().map(|active| {
                // The buffer for figures is kept for long: the next device takes it again.
                let figures = request::role(active.index, features) == Some(Role::Statistics);
                let held = figures && running.figures_buffer.is_some();
                Position::of(active).without(usize::from(held))
            }));
        }
        self.stop();
        Saved { queues, state }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Balloon {
            goal_pages,
            actual_pages,
        } = *state
        else {
            return Err(self.cannot_restore(state));
        };
        self.goal_pages = goal_pages;
        self.actual_pages = actual_pages;
        Ok(())
    }

    fn command(&mut self, command: Command) -> Result<(), CommandError> {
        let Command::Resize(bytes) = command else {
            return Err(CommandError::Unsupported(self.name()));
        };
        let pages = u32::try_from(bytes / PAGE_BYTES).map_err(|_| CommandError::Invalid {
            device: self.name(),
            reason: format!("{bytes} bytes are more than a balloon can hold"),
        })?;
        self.goal_pages = pages;
        if let Some(running) = &self.running {
            running.interrupt.signal_config();
        }
        Ok(())
    }

    /// Counted by the queues: the driver writes its own figure into the configuration later,
    /// without a notification.
    fn progress(&self) -> Option<Progress> {
        let counters = &self.counters;
        let held_pages = counters
            .inflated_pages
            .saturating_sub(counters.deflated_pages);
        Some(Progress {
            goal_bytes: u64::from(self.goal_pages) * PAGE_BYTES,
            actual_bytes: held_pages * PAGE_BYTES,
        })
    }

    /// The driver's own figures are those of its last answer; asking for the counters asks the
    /// driver for new ones.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.counters;
        let mut all = vec![
            ("goal_bytes", u64::from(self.goal_pages) * PAGE_BYTES),
            ("actual_bytes", u64::from(self.actual_pages) * PAGE_BYTES),
            ("inflated_pages", counters.inflated_pages),
            ("deflated_pages", counters.deflated_pages),
            ("reported_bytes", counters.reported_bytes),
            ("kept_bytes", counters.kept_bytes),
        ];
        all.extend(&self.figures);
        // A full eventfd already says so.
        let _ = self.figures_wanted.write(1);
        all
    }
}
