//! Pluggable memory: its queue, its goal, and what goes back to the host.

use std::sync::Arc;

use virtio_queue::QueueT;

use super::{
    blocks::{BLOCKS_MAX, Blocks, Range},
    request::{self, ANSWER_BYTES, Answer, Config, REQUEST_BYTES, Request},
};
use crate::devices::virtio::{
    chain::ChainError,
    device::{
        Activation, ActiveQueue, Broken, Command, CommandError, GuestMemory, Interrupt, Progress,
        VirtioDevice, read_config,
    },
    discard::{Discard, DiscardError},
    saved::{DeviceState, Position, RestoreError, Saved},
    segments::SegmentChain,
};

const QUEUE_SIZES: [u16; 1] = [64];
/// Requests served in one turn of the event loop: each may give back 128 GiB.
pub(super) const BATCH_MAX: usize = 16;
/// Smallest block: a huge page of x86-64, and what Linux plugs and unplugs at the least.
const BLOCK_BYTES_MIN: u64 = 2 << 20;

/// What pluggable memory is made from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parameters {
    /// Guest-physical start of the region; a multiple of the block size.
    pub(crate) address: u64,
    /// Size of the region; a multiple of the block size.
    pub(crate) region_bytes: u64,
    /// Granularity: a power of two, at least 2 MiB, and a multiple of the pages that back the
    /// memory.
    pub(crate) block_bytes: u64,
    /// What the driver should plug at the start.
    pub(crate) requested_bytes: u64,
}

/// Why pluggable memory could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The granularity is impossible.
    #[error("memory {name}: block_bytes {block_bytes} is not a power of two of at least 2 MiB")]
    Block { name: String, block_bytes: u64 },
    /// The region is no whole number of blocks, is empty, wraps around, or has too many.
    #[error(
        "memory {name}: {region_bytes} bytes at {address:#x} are not 1 to {BLOCKS_MAX} blocks of \
         {block_bytes}"
    )]
    Region {
        name: String,
        address: u64,
        region_bytes: u64,
        block_bytes: u64,
    },
    /// More is wanted than there is, or a part of a block.
    #[error("memory {name}: requested_bytes {requested_bytes} is not whole blocks of the region")]
    Requested { name: String, requested_bytes: u64 },
}

#[derive(Debug, Default)]
struct Counters {
    plugs: u64,
    unplugs: u64,
    refused: u64,
}

#[derive(Debug)]
struct Running {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    queue: Option<ActiveQueue>,
}

/// Pluggable memory.
#[derive(Debug)]
pub(crate) struct Mem {
    name: String,
    parameters: Parameters,
    requested_bytes: u64,
    blocks: Blocks,
    discard: Discard,
    counters: Counters,
    running: Option<Running>,
}

impl Mem {
    /// A region without a plugged block.
    pub(crate) fn new(
        name: String,
        parameters: Parameters,
        discard: Discard,
    ) -> Result<Self, Error> {
        let Parameters {
            address,
            region_bytes,
            block_bytes,
            requested_bytes,
        } = parameters;
        if !block_bytes.is_power_of_two() || block_bytes < BLOCK_BYTES_MIN {
            return Err(Error::Block { name, block_bytes });
        }
        let whole = address.is_multiple_of(block_bytes)
            && region_bytes.is_multiple_of(block_bytes)
            && (1..=BLOCKS_MAX).contains(&(region_bytes / block_bytes))
            && address.checked_add(region_bytes).is_some();
        if !whole {
            return Err(Error::Region {
                name,
                address,
                region_bytes,
                block_bytes,
            });
        }
        if requested_bytes > region_bytes || !requested_bytes.is_multiple_of(block_bytes) {
            return Err(Error::Requested {
                name,
                requested_bytes,
            });
        }
        Ok(Self {
            name,
            parameters,
            requested_bytes,
            blocks: Blocks::new(address, block_bytes, region_bytes),
            discard,
            counters: Counters::default(),
            running: None,
        })
    }

    fn broken(&mut self, reason: impl std::fmt::Display) -> Broken {
        self.running = None;
        Broken {
            device: self.name(),
            reason: reason.to_string(),
        }
    }

    /// Serves up to [`BATCH_MAX`] requests.
    fn serve(&mut self) -> Result<(), ChainError> {
        for _ in 0..BATCH_MAX {
            let Some(Running {
                memory,
                queue: Some(active),
                ..
            }) = &mut self.running
            else {
                return Ok(());
            };
            let memory = memory.clone();
            let Some(chain) = SegmentChain::take(&mut active.queue, &memory)? else {
                if active.queue.enable_notification(memory.as_ref())? {
                    continue;
                }
                return Ok(());
            };
            let mut bytes = [0; REQUEST_BYTES];
            let answer = if chain.read_at(&memory, 0, &mut bytes) {
                request::parse(&bytes).map_or(Answer::Error, |request| self.obey(request, &memory))
            } else {
                Answer::Error
            };
            if !matches!(answer, Answer::Ack | Answer::State(_)) {
                self.counters.refused += 1;
            }
            self.answer(&chain, &memory, answer)?;
        }
        if let Some(Running {
            queue: Some(active),
            ..
        }) = &self.running
        {
            // More may be waiting: another turn, behind all other devices. A failure leaves it to
            // the driver's next kick.
            let _ = active.kick.write(1);
        }
        Ok(())
    }

    fn answer(
        &mut self,
        chain: &SegmentChain,
        memory: &GuestMemory,
        answer: Answer,
    ) -> Result<(), ChainError> {
        let Some(Running {
            interrupt,
            queue: Some(active),
            ..
        }) = &mut self.running
        else {
            return Ok(());
        };
        if !chain.write_at(memory, 0, &request::answer(answer)) {
            // Not even an answer fits.
            return Err(ChainError::Malformed(chain.head));
        }
        let len = u32::try_from(ANSWER_BYTES).expect("10");
        active.queue.add_used(memory.as_ref(), chain.head, len)?;
        if active.queue.needs_notification(memory.as_ref())? {
            interrupt.signal_queue(active.index);
        }
        Ok(())
    }

    fn obey(&mut self, request: Request, memory: &GuestMemory) -> Answer {
        match request {
            Request::Plug { address, blocks } => self
                .blocks
                .range(address, blocks)
                .ok_or(Answer::Error)
                .and_then(|range| {
                    self.blocks.may_plug(range, self.requested_bytes)?;
                    self.blocks.set(range, true);
                    self.counters.plugs += 1;
                    Ok(Answer::Ack)
                })
                .unwrap_or_else(|refusal| refusal),
            Request::Unplug { address, blocks } => self
                .blocks
                .range(address, blocks)
                .ok_or(Answer::Error)
                .and_then(|range| {
                    self.blocks.may_unplug(range)?;
                    self.unplug(range, memory)
                })
                .unwrap_or_else(|refusal| refusal),
            Request::UnplugAll => self
                .unplug(self.blocks.all(), memory)
                .unwrap_or_else(|refusal| refusal),
            Request::State { address, blocks } => match self.blocks.range(address, blocks) {
                Some(range) => Answer::State(self.blocks.state(range)),
                None => Answer::Error,
            },
        }
    }

    /// Gives a range back. A plugged block that could not be given back stays plugged.
    fn unplug(&mut self, range: Range, memory: &GuestMemory) -> Result<Answer, Answer> {
        let (address, len) = self.blocks.extent(range);
        match self.discard.discard(memory, address, len) {
            Ok(()) => {
                self.blocks.set(range, false);
                self.counters.unplugs += 1;
                Ok(Answer::Ack)
            }
            Err(DiscardError::Pinned | DiscardError::Host { .. }) => Err(Answer::Busy),
            // The machine gave a region that is not mapped; the driver's request was right all the
            // same.
            Err(DiscardError::Outside(_)) => Err(Answer::Error),
        }
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u16 {
        request::DEVICE_TYPE
    }

    fn name(&self) -> String {
        format!("virtio-mem {}", self.name)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = request::config(Config {
            block_bytes: self.parameters.block_bytes,
            address: self.parameters.address,
            region_bytes: self.parameters.region_bytes,
            plugged_bytes: self.blocks.plugged_bytes(),
            requested_bytes: self.requested_bytes,
        });
        read_config(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        self.running = Some(Running {
            memory: activation.memory,
            interrupt: activation.interrupt,
            queue: activation.queues.into_iter().next(),
        });
        Ok(())
    }

    fn queue_kicked(&mut self, _queue: u16) -> Result<(), Broken> {
        self.serve().map_err(|error| self.broken(error))
    }

    /// Plugged blocks stay plugged: the next driver finds them in the configuration and unplugs
    /// what it does not know (§5.15.5).
    fn reset(&mut self) {
        self.running = None;
    }

    fn save(&mut self) -> Saved {
        let running = self.running.take();
        let queue = running.and_then(|running| running.queue);
        Saved {
            queues: queue.iter().map(Position::of).collect(),
            state: DeviceState::Mem {
                requested_bytes: self.requested_bytes,
                plugged: self.blocks.map().to_vec(),
            },
        }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Mem {
            requested_bytes,
            plugged,
        } = state
        else {
            return Err(self.cannot_restore(state));
        };
        if *requested_bytes > self.parameters.region_bytes || !self.blocks.set_map(plugged) {
            return Err(self.cannot_restore(state));
        }
        self.requested_bytes = *requested_bytes;
        Ok(())
    }

    fn command(&mut self, command: Command) -> Result<(), CommandError> {
        let Command::Resize(bytes) = command else {
            return Err(CommandError::Unsupported(self.name()));
        };
        let Parameters {
            region_bytes,
            block_bytes,
            ..
        } = self.parameters;
        if bytes > region_bytes || !bytes.is_multiple_of(block_bytes) {
            return Err(CommandError::Invalid {
                device: self.name(),
                reason: format!(
                    "{bytes} bytes are not whole blocks of {block_bytes}, up to {region_bytes}"
                ),
            });
        }
        self.requested_bytes = bytes;
        if let Some(running) = &self.running {
            running.interrupt.signal_config();
        }
        Ok(())
    }

    fn progress(&self) -> Option<Progress> {
        Some(Progress {
            goal_bytes: self.requested_bytes,
            actual_bytes: self.blocks.plugged_bytes(),
        })
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("requested_bytes", self.requested_bytes),
            ("plugged_bytes", self.blocks.plugged_bytes()),
            ("plugs", self.counters.plugs),
            ("unplugs", self.counters.unplugs),
            ("refused", self.counters.refused),
        ]
    }
}
