//! The device: set-up, activation, and who runs when.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
};

use pericarp_sys::tap;
use virtio_queue::QueueT;

use super::{
    open::{Error, Parameters, check, set_up_taps, set_up_vhosts},
    receive::{self, Receiver, Turn},
    request::{
        self, CONFIG_BYTES, CONTROL_BYTES_MAX, CONTROL_ERR, CONTROL_OK, Control, F_CTRL_VQ, F_MAC,
        F_MQ, F_MRG_RXBUF, F_MTU,
    },
    transmit::Sender,
    vhost::{Vhost, VhostError},
};
use crate::devices::virtio::{
    chain::ChainError,
    device::{
        Activation, ActiveQueue, Broken, Command, CommandError, GuestMemory, Interrupt, Poller,
        Readiness, VirtioDevice, read_config,
    },
    rate_limiter::{RateLimiter, Rates},
    saved::{DeviceState, Position, RestoreError, Saved},
    segments::SegmentChain,
};

/// Entries of the control queue: the driver sends one command at a time.
const CONTROL_QUEUE_SIZE: u16 = 64;
/// VIRTIO_F_VERSION_1: with it vhost-net expects the 12-byte header.
const F_VERSION_1: u64 = 1 << 32;

const READABLE: Readiness = libc::EPOLLIN as Readiness;
/// What a tap shows whose interface is gone (Linux `tun_chr_poll`). It is shown whatever is waited
/// for, and for ever.
const GONE: Readiness = libc::EPOLLERR as Readiness;

/// Tokens on the event loop: below, the tap of a pair.
const TOKEN_RECEIVE_TIMER: u32 = 0x1_0000;
const TOKEN_TRANSMIT_TIMER: u32 = 0x1_0001;
const TOKEN_CONTROL_KICK: u32 = 0x1_0002;
/// The error signal of a pair's vhost-net, plus its number.
const TOKEN_VHOST_ERROR: u32 = 0x2_0000;

/// The interface behind a tap does not exist any more.
#[derive(Debug, thiserror::Error)]
#[error("the tap's interface is gone")]
pub(super) struct TapGone;

/// What the statistics show.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) receive_packets: u64,
    pub(super) receive_bytes: u64,
    pub(super) receive_refused: u64,
    pub(super) transmit_packets: u64,
    pub(super) transmit_bytes: u64,
    pub(super) transmit_refused: u64,
}

/// A pair's backend and its queues while the device runs.
#[derive(Debug)]
enum Pair {
    InProcess {
        receiver: Option<Receiver>,
        sender: Option<Sender>,
        /// What the event loop waits for on the tap; `None` before it is added.
        waits_for: Option<Readiness>,
    },
    Kernel {
        queues: [Option<ActiveQueue>; 2],
    },
}

#[derive(Debug)]
struct Running {
    memory: GuestMemory,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
    poller: Arc<dyn Poller>,
    pairs: Vec<Pair>,
    control: Option<ActiveQueue>,
}

/// A network device.
#[derive(Debug)]
pub(crate) struct Net {
    name: String,
    config: [u8; CONFIG_BYTES],
    features: u64,
    queue_sizes: Vec<u16>,
    taps: Vec<OwnedFd>,
    /// Whether the tap's queue takes part in its interface.
    attached: Vec<bool>,
    vhosts: Vec<Vhost>,
    receive_limiter: RateLimiter,
    transmit_limiter: RateLimiter,
    counters: Counters,
    /// Queue pairs in use from the next activation on: more than one only when it goes on.
    pairs_due: u16,
    running: Option<Running>,
}

impl Net {
    /// A device on `taps`, one queue pair each; with one vhost-net descriptor per tap the kernel
    /// moves the packets.
    pub(crate) fn new(
        name: String,
        parameters: &Parameters,
        taps: Vec<OwnedFd>,
        vhosts: Vec<OwnedFd>,
    ) -> Result<Self, Error> {
        check(&name, parameters, taps.len(), vhosts.len())?;
        let pairs = u16::try_from(taps.len()).expect("checked against PAIRS_MAX");
        let mut offloads = set_up_taps(&name, &taps)?;
        if !parameters.offloads {
            offloads = 0;
        }
        let vhosts = set_up_vhosts(&name, vhosts)?;
        let mut features = F_MAC | F_MRG_RXBUF | request::offload_features(offloads);
        for vhost in &vhosts {
            features &= vhost.features() | !F_MRG_RXBUF;
        }
        if parameters.mtu != 0 {
            features |= F_MTU;
        }
        let mut queue_sizes = vec![parameters.queue_size; taps.len() * 2];
        if pairs > 1 {
            features |= F_CTRL_VQ | F_MQ;
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        let timer = |source| Error::Timer {
            name: name.clone(),
            source,
        };
        let receive_limiter = RateLimiter::new(parameters.receive).map_err(timer)?;
        let transmit_limiter = RateLimiter::new(parameters.transmit).map_err(timer)?;
        let mut net = Self {
            config: request::config(parameters.mac, pairs, parameters.mtu),
            features,
            queue_sizes,
            attached: vec![true; taps.len()],
            taps,
            vhosts,
            receive_limiter,
            transmit_limiter,
            counters: Counters::default(),
            pairs_due: 1,
            running: None,
            name,
        };
        for index in 1..net.taps.len() {
            net.attach(index, false).map_err(|source| Error::Tap {
                name: net.name.clone(),
                index,
                step: "detaching its queue",
                source,
            })?;
        }
        Ok(net)
    }

    fn pairs(&self) -> u16 {
        u16::try_from(self.taps.len()).expect("checked against PAIRS_MAX")
    }

    fn attach(&mut self, index: usize, attached: bool) -> io::Result<()> {
        if self.attached[index] != attached {
            tap::set_queue_attached(self.taps[index].as_fd(), attached)?;
            self.attached[index] = attached;
        }
        Ok(())
    }

    /// Stops serving and says why.
    fn broken(&mut self, reason: impl std::fmt::Display) -> Broken {
        self.stop();
        Broken {
            device: self.name(),
            reason: reason.to_string(),
        }
    }

    fn stop(&mut self) {
        let Some(mut running) = self.running.take() else {
            return;
        };
        for (index, pair) in running.pairs.iter_mut().enumerate() {
            match pair {
                Pair::InProcess { waits_for, .. } => {
                    if waits_for.is_some() {
                        let _ = running.poller.remove(self.taps[index].as_raw_fd());
                    }
                }
                Pair::Kernel { queues } => {
                    let vhost = &mut self.vhosts[index];
                    vhost.stop(queues);
                    let _ = running.poller.remove(vhost.error.as_raw_fd());
                }
            }
        }
        for descriptor in [
            self.receive_limiter.descriptor(),
            self.transmit_limiter.descriptor(),
        ] {
            let _ = running.poller.remove(descriptor);
        }
        if let (false, Some(control)) = (self.vhosts.is_empty(), &running.control) {
            let _ = running.poller.remove(control.kick.as_raw_fd());
        }
        for index in 1..self.taps.len() {
            // A queue that stays attached gets packets that nobody reads: the next activation tries
            // again.
            let _ = self.attach(index, false);
        }
    }

    /// Sets the tap to what was negotiated, starts waiting, and starts the first pair.
    fn start(&mut self) -> Result<(), StartError> {
        let Some(running) = &self.running else {
            return Ok(());
        };
        let offloads = request::negotiated_offloads(running.features);
        tap::set_offload(self.taps[0].as_fd(), offloads).map_err(StartError::Offload)?;
        let poller = running.poller.clone();
        let poll = |descriptor, token| {
            poller
                .add(descriptor, token, READABLE)
                .map_err(StartError::Poller)
        };
        poll(self.receive_limiter.descriptor(), TOKEN_RECEIVE_TIMER)?;
        poll(self.transmit_limiter.descriptor(), TOKEN_TRANSMIT_TIMER)?;
        if let (false, Some(control)) = (self.vhosts.is_empty(), &running.control) {
            poll(control.kick.as_raw_fd(), TOKEN_CONTROL_KICK)?;
        }
        for (vhost, token) in self.vhosts.iter().zip(TOKEN_VHOST_ERROR..) {
            poll(vhost.error.as_raw_fd(), token)?;
        }
        let pairs = std::mem::replace(&mut self.pairs_due, 1);
        self.use_pairs(pairs)
    }

    /// Lets the first `count` pairs take part, and no others.
    fn use_pairs(&mut self, count: u16) -> Result<(), StartError> {
        for index in 0..self.taps.len() {
            if index < usize::from(count) {
                self.attach(index, true).map_err(StartError::Attach)?;
                self.start_pair(index)?;
            } else {
                self.stop_pair(index);
                self.attach(index, false).map_err(StartError::Attach)?;
            }
        }
        Ok(())
    }

    fn start_pair(&mut self, index: usize) -> Result<(), StartError> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        match &mut running.pairs[index] {
            Pair::InProcess { waits_for, .. } => {
                if waits_for.is_none() {
                    let token = u32::try_from(index).expect("checked against PAIRS_MAX");
                    running
                        .poller
                        .add(self.taps[index].as_raw_fd(), token, READABLE)
                        .map_err(StartError::Poller)?;
                    *waits_for = Some(READABLE);
                }
                Ok(())
            }
            Pair::Kernel { queues } => Ok(self.vhosts[index].start(
                &running.memory,
                running.features | F_VERSION_1,
                self.taps[index].as_fd(),
                queues,
                running.interrupt.as_ref(),
            )?),
        }
    }

    fn stop_pair(&mut self, index: usize) {
        let Some(running) = &mut self.running else {
            return;
        };
        match &mut running.pairs[index] {
            Pair::InProcess { waits_for, .. } => {
                if waits_for.take().is_some() {
                    let _ = running.poller.remove(self.taps[index].as_raw_fd());
                }
            }
            Pair::Kernel { queues } => self.vhosts[index].stop(queues),
        }
    }

    fn receive(&mut self, index: usize) -> Result<(), Broken> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let Some(Pair::InProcess {
            receiver: Some(receiver),
            waits_for: Some(waits_for),
            ..
        }) = running.pairs.get_mut(index)
        else {
            return Ok(());
        };
        let outcome = receiver.run(&mut Turn {
            tap: self.taps[index].as_fd(),
            memory: &running.memory,
            interrupt: running.interrupt.as_ref(),
            limiter: &mut self.receive_limiter,
            counters: &mut self.counters,
        });
        let wanted = match outcome {
            Ok(receive::Next::Packet) => READABLE,
            Ok(receive::Next::Buffers | receive::Next::Limiter) => 0,
            Err(error) => return Err(self.broken(error)),
        };
        if *waits_for != wanted {
            *waits_for = wanted;
            let token = u32::try_from(index).expect("checked against PAIRS_MAX");
            let descriptor = self.taps[index].as_raw_fd();
            if let Err(error) = running.poller.modify(descriptor, token, wanted) {
                return Err(self.broken(StartError::Poller(error)));
            }
        }
        Ok(())
    }

    fn transmit(&mut self, index: usize) -> Result<(), Broken> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let Some(Pair::InProcess {
            sender: Some(sender),
            ..
        }) = running.pairs.get_mut(index)
        else {
            return Ok(());
        };
        let outcome = sender.run(
            self.taps[index].as_fd(),
            &running.memory,
            running.interrupt.as_ref(),
            &mut self.transmit_limiter,
            &mut self.counters,
        );
        outcome.map_err(|error| self.broken(error))
    }

    /// Serves the control queue: as many commands as it has entries, then the next turn.
    fn control(&mut self) -> Result<(), Broken> {
        for _ in 0..CONTROL_QUEUE_SIZE {
            match self.control_step() {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => return Err(self.broken(error)),
            }
        }
        let again = match &self.running {
            Some(Running {
                control: Some(control),
                ..
            }) => control.kick.write(1),
            _ => Ok(()),
        };
        again.map_err(|error| self.broken(error))
    }

    /// Serves one command; false when there is none.
    fn control_step(&mut self) -> Result<bool, ChainError> {
        let pairs = self.pairs();
        let Some(Running {
            memory,
            control: Some(control),
            ..
        }) = &mut self.running
        else {
            return Ok(false);
        };
        let Some(chain) = SegmentChain::take(&mut control.queue, memory)? else {
            return Ok(control.queue.enable_notification(memory.as_ref())?);
        };
        let memory = memory.clone();
        let mut bytes = [0; CONTROL_BYTES_MAX];
        let command = (chain.readable_len() == CONTROL_BYTES_MAX as u64
            && chain.read_at(&memory, 0, &mut bytes))
        .then(|| request::parse_control(&bytes, pairs))
        .flatten();
        let done = match command {
            Some(Control::SetPairs(count)) => self.use_pairs(count).is_ok(),
            None => false,
        };
        let answer = if done { CONTROL_OK } else { CONTROL_ERR };
        if !chain.write_at(&memory, 0, &[answer]) {
            return Err(ChainError::Malformed(chain.head));
        }
        let Some(Running {
            interrupt,
            control: Some(control),
            ..
        }) = &mut self.running
        else {
            return Ok(false);
        };
        control.queue.add_used(memory.as_ref(), chain.head, 1)?;
        if control.queue.needs_notification(memory.as_ref())? {
            interrupt.signal_queue(control.index);
        }
        Ok(true)
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        request::DEVICE_TYPE
    }

    fn name(&self) -> String {
        format!("virtio-net {}", self.name)
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
        let features = activation.features & self.features;
        let pairs = if features & F_MQ == 0 {
            1
        } else {
            self.pairs()
        };
        let control_index =
            (features & F_CTRL_VQ != 0).then(|| request::control_queue(features, self.pairs()));
        let mut queues: Vec<Option<ActiveQueue>> = Vec::new();
        queues.resize_with(usize::from(pairs) * 2, || None);
        let mut control = None;
        for queue in activation.queues {
            if Some(queue.index) == control_index {
                control = Some(queue);
            } else if let Some(slot) = queues.get_mut(usize::from(queue.index)) {
                *slot = Some(queue);
            }
        }
        let mergeable = features & F_MRG_RXBUF != 0;
        let kernel = !self.vhosts.is_empty();
        let mut queues = queues.into_iter();
        let pairs = (0..self.taps.len())
            .map(|_| {
                let [receive, transmit] = [queues.next().flatten(), queues.next().flatten()];
                if kernel {
                    Pair::Kernel {
                        queues: [receive, transmit],
                    }
                } else {
                    Pair::InProcess {
                        receiver: receive.map(|queue| Receiver::new(queue, mergeable)),
                        sender: transmit.map(Sender::new),
                        waits_for: None,
                    }
                }
            })
            .collect();
        self.running = Some(Running {
            memory: activation.memory,
            features: activation.features,
            interrupt: activation.interrupt,
            poller: activation.poller,
            pairs,
            control,
        });
        self.start().map_err(|error| self.broken(error))
    }

    fn owns_kicks(&self) -> bool {
        !self.vhosts.is_empty()
    }

    fn queue_kicked(&mut self, queue: u16) -> Result<(), Broken> {
        let control = match &self.running {
            Some(running) => running.control.as_ref().map(|control| control.index),
            None => return Ok(()),
        };
        let pair = usize::from(queue / 2);
        if control == Some(queue) {
            self.control()
        } else if queue.is_multiple_of(2) {
            self.receive(pair)
        } else {
            self.transmit(pair)
        }
    }

    fn descriptor_ready(&mut self, token: u32, readiness: Readiness) -> Result<(), Broken> {
        match token {
            TOKEN_RECEIVE_TIMER => {
                self.receive_limiter.wait_ended();
                (0..self.taps.len()).try_for_each(|index| self.receive(index))
            }
            TOKEN_TRANSMIT_TIMER => {
                self.transmit_limiter.wait_ended();
                (0..self.taps.len()).try_for_each(|index| self.transmit(index))
            }
            TOKEN_CONTROL_KICK => {
                if let Some(Running {
                    control: Some(control),
                    ..
                }) = &self.running
                {
                    // Nothing to read means that another turn has read it.
                    let _ = control.kick.read();
                }
                self.control()
            }
            token if token >= TOKEN_VHOST_ERROR => {
                Err(self.broken("vhost-net met a malformed ring"))
            }
            _ if readiness & GONE != 0 => Err(self.broken(TapGone)),
            token => self.receive(token as usize),
        }
    }

    fn reset(&mut self) {
        self.stop();
    }

    /// A packet that no buffer was found for is lost, as packets may be.
    fn save(&mut self) -> Saved {
        let pairs = u16::try_from(self.attached.iter().filter(|attached| **attached).count());
        let state = DeviceState::Net {
            pairs: pairs.expect("checked against PAIRS_MAX").max(1),
        };
        let mut queues = Vec::new();
        if let Some(running) = &mut self.running {
            for (index, pair) in running.pairs.iter_mut().enumerate() {
                match pair {
                    Pair::InProcess {
                        receiver, sender, ..
                    } => {
                        queues.extend(receiver.as_ref().map(Receiver::position));
                        queues.extend(sender.as_ref().map(Sender::position));
                    }
                    Pair::Kernel { queues: active } => {
                        self.vhosts[index].stop(active);
                        let active = active.iter().flatten();
                        queues.extend(active.map(|queue| queue.kernel_position(&running.memory)));
                    }
                }
            }
            queues.extend(running.control.as_ref().map(Position::of));
        }
        self.stop();
        Saved { queues, state }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match *state {
            DeviceState::Net { pairs } if (1..=self.pairs()).contains(&pairs) => {
                self.pairs_due = pairs;
                Ok(())
            }
            _ => Err(self.cannot_restore(state)),
        }
    }

    fn command(&mut self, command: Command) -> Result<(), CommandError> {
        let (limiter, rates) = match command {
            Command::ReceiveLimit(rates) => (&mut self.receive_limiter, rates),
            Command::TransmitLimit(rates) => (&mut self.transmit_limiter, rates),
            _ => return Err(CommandError::Unsupported(self.name())),
        };
        if !self.vhosts.is_empty() && rates != Rates::NONE {
            return Err(CommandError::Invalid {
                device: self.name(),
                reason: "the kernel moves its packets (vhost-net): limit the tap instead".into(),
            });
        }
        limiter.set(rates);
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.counters;
        vec![
            ("receive_packets", counters.receive_packets),
            ("receive_bytes", counters.receive_bytes),
            ("receive_refused", counters.receive_refused),
            ("transmit_packets", counters.transmit_packets),
            ("transmit_bytes", counters.transmit_bytes),
            ("transmit_refused", counters.transmit_refused),
        ]
    }
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("setting the tap's offloads: {0}")]
    Offload(io::Error),
    #[error("attaching or detaching a queue of the tap: {0}")]
    Attach(io::Error),
    #[error("the event loop refuses a descriptor: {0}")]
    Poller(io::Error),
    #[error(transparent)]
    Vhost(#[from] VhostError),
}
