//! The device: chains of the transmit queue go to the output.

use std::{io, os::fd::OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_memory::WriteVolatile;

use super::super::{
    buffers::Buffers,
    device::{Activation, Broken, VirtioDevice},
    queue_worker,
    saved::{DeviceState, Saved},
};

/// Entries of each queue. The driver of Linux keeps one or two buffers in flight.
const QUEUE_SIZE: u16 = 64;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE, QUEUE_SIZE];
const TRANSMIT: u16 = 1;

/// Chains served by one notification before the event loop turns to other devices.
pub(crate) const CHAINS_PER_TURN_MAX: usize = 256;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The output's mode.
    #[error("console output cannot be made non-blocking; give a pipe or socket that is open")]
    Output(#[source] nix::Error),
}

/// The console.
#[derive(Debug)]
pub(crate) struct Console {
    name: String,
    output: Output,
    active: Option<Activation>,
}

/// Where the text goes.
#[derive(Debug)]
struct Output {
    descriptor: OwnedFd,
    reader_gone: bool,
    bytes_written: u64,
    bytes_dropped: u64,
}

impl Console {
    /// A console that writes to `output`.
    ///
    /// # Errors
    /// `output` is no open descriptor.
    pub(crate) fn new(name: String, output: OwnedFd) -> Result<Self, Error> {
        let flags = fcntl(&output, FcntlArg::F_GETFL).map_err(Error::Output)?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(&output, FcntlArg::F_SETFL(flags)).map_err(Error::Output)?;
        let output = Output {
            descriptor: output,
            reader_gone: false,
            bytes_written: 0,
            bytes_dropped: 0,
        };
        Ok(Self {
            name,
            output,
            active: None,
        })
    }

    fn broken(&self, reason: impl ToString) -> Broken {
        Broken {
            device: self.name(),
            reason: reason.to_string(),
        }
    }

    fn transmit(&mut self) -> Result<(), Broken> {
        let output = &mut self.output;
        let outcome =
            queue_worker::serve(&mut self.active, TRANSMIT, CHAINS_PER_TURN_MAX, |chain| {
                if chain.writable.len() > 0 {
                    return Err("transmit buffer is device-writable".to_owned());
                }
                output.write(&chain.readable);
                Ok(0)
            });
        outcome.map_err(|reason| self.broken(reason))
    }
}

impl Output {
    /// Writes what the output takes now, and drops the rest.
    fn write(&mut self, text: &Buffers<'_>) {
        for range in text.ranges() {
            let mut rest = *range;
            while !self.reader_gone && !rest.is_empty() {
                let Some(count) = self.write_once(&rest) else {
                    break;
                };
                self.bytes_written += count as u64;
                rest = rest.offset(count).expect("at most what was given");
            }
            self.bytes_dropped += rest.len() as u64;
        }
    }

    fn write_once(&mut self, range: &vm_memory::VolatileSlice<'_>) -> Option<usize> {
        match self.descriptor.write_volatile(range) {
            Ok(count) if count > 0 => Some(count),
            Ok(_) => None,
            Err(vm_memory::VolatileMemoryError::IOError(error)) => match error.kind() {
                io::ErrorKind::Interrupted => Some(0),
                io::ErrorKind::WouldBlock => None,
                _ => {
                    self.reader_gone = true;
                    None
                }
            },
            Err(_) => None,
        }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u16 {
        u16::try_from(VIRTIO_ID_CONSOLE).expect("device ids are small")
    }

    fn name(&self) -> String {
        format!("virtio-console {}", self.name)
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        self.active = Some(activation);
        self.queue_kicked(TRANSMIT)
    }

    fn queue_kicked(&mut self, queue: u16) -> Result<(), Broken> {
        // Buffers of the receive queue stay with the device: nothing is ever sent to the guest.
        if queue == TRANSMIT {
            self.transmit()?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn save(&mut self) -> Saved {
        Saved::stopped(self.active.take(), DeviceState::Nothing)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("bytes_written", self.output.bytes_written),
            ("bytes_dropped", self.output.bytes_dropped),
        ]
    }
}
