//! The life of the process: requests before the machine runs, the jail, and the event loop.
//!
//! ```text
//!  waiting for Start --> assembling (AddDevice) --> Run: boot, jail, threads --> serving --> end
//!        |                     |                        |
//!        +---------------------+------------------------+--> failed: every later request
//!                                                                  fails, until the shim hangs up
//! ```

use std::{io, os::fd::AsRawFd, sync::Arc};

use pericarp_protocol::machine::{
    Bytes, DeviceBroken, DeviceName, ErrorCode, Event, Failure, GuestShutdown, Nothing, PeersApart,
    Reason, Request, ShutdownKind, Success, VcpuError,
};
use pericarp_sys::interrupted;

use crate::{
    control::{Control, Incoming},
    devices::virtio::device::{Broken, Command, Readiness},
    event_loop::{End, Source, Waiter},
    filters::{self, Kind},
    jail,
    machine::{Machine, descriptors::Descriptors, errors::failure},
};

/// Requests read at one turn of the loop.
const REQUESTS_PER_TURN_MAX: usize = 16;

/// How long the last messages may take to go, in milliseconds.
const FAREWELL_MS: u16 = 1000;

const READABLE: Readiness = libc::EPOLLIN.cast_unsigned();
const WRITABLE: Readiness = libc::EPOLLOUT.cast_unsigned();
const GONE: Readiness = libc::EPOLLHUP.cast_unsigned() | libc::EPOLLERR.cast_unsigned();

/// Something of our own failed; the shim is told by the end of the socket and by standard error.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub(crate) struct SessionError {
    step: &'static str,
    #[source]
    source: io::Error,
}

fn at(step: &'static str) -> impl Fn(io::Error) -> SessionError {
    move |source| SessionError { step, source }
}

/// Why the loop ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Not yet.
    GoOn,
    /// The machine ended or was told to.
    Ended,
    /// The shim is gone: nobody is there to be told.
    Alone,
}

/// Everything.
#[derive(Debug)]
pub(crate) struct Session {
    control: Control,
    waiter: Arc<Waiter>,
    machine: Option<Machine>,
    failed: bool,
}

impl Session {
    /// Nothing has been asked yet.
    pub(crate) fn new(control: Control) -> Result<Self, SessionError> {
        Ok(Self {
            control,
            waiter: Arc::new(Waiter::new().map_err(at("epoll"))?),
            machine: None,
            failed: false,
        })
    }

    /// Lives until the machine or the shim ends.
    pub(crate) fn run(mut self) -> Result<(), SessionError> {
        if !self.assemble()? {
            return Ok(());
        }
        let Some(mut machine) = self.machine.take() else {
            return Ok(());
        };
        self.control.stop_blocking().map_err(at("control socket"))?;
        let control = self.control.as_raw_fd();
        self.waiter
            .add(control, Source::Control, READABLE)
            .map_err(at("epoll"))?;
        let doorbell = machine.doorbell().as_raw_fd();
        self.waiter
            .add(doorbell, Source::Doorbell, READABLE)
            .map_err(at("epoll"))?;
        let confined = filters::confine(Kind::Loop).map_err(io::Error::other);
        confined.map_err(at("event loop"))?;
        let started = machine.resume().map_err(io::Error::other);
        started.map_err(at("vCPUs"))?;
        self.control
            .send_event(Event::Started(Nothing {}))
            .map_err(at("control socket"))?;
        let outcome = self.serve(&mut machine)?;
        if outcome == Outcome::Ended {
            self.say_farewell();
        }
        Ok(())
    }

    /// Serves requests until the machine runs; false when the shim is gone or wants no machine.
    fn assemble(&mut self) -> Result<bool, SessionError> {
        loop {
            match self.control.receive().map_err(at("control socket"))? {
                None => {}
                Some(Incoming::End) => return Ok(false),
                Some(Incoming::Invalid(number, error)) => {
                    self.failed = true;
                    self.answer(number, Err(failure(ErrorCode::Invalid, error)))?;
                }
                Some(Incoming::Request(number, request, mut descriptors)) => {
                    let runs = matches!(*request, Request::Run(_));
                    let ends = matches!(*request, Request::Shutdown(_));
                    let result = self.before_run(*request, &mut descriptors);
                    let succeeded = result.is_ok();
                    self.failed |= !succeeded;
                    self.answer(number, result)?;
                    if ends {
                        return Ok(false);
                    }
                    if runs && succeeded {
                        return Ok(true);
                    }
                }
            }
        }
    }

    fn answer(
        &mut self,
        number: u32,
        result: Result<Success, Failure>,
    ) -> Result<(), SessionError> {
        self.control
            .reply(number, result)
            .map_err(at("control socket"))
    }

    fn before_run(
        &mut self,
        request: Request,
        descriptors: &mut Descriptors,
    ) -> Result<Success, Failure> {
        let wrong = |text: &str| Err(failure(ErrorCode::WrongState, text));
        if self.failed && !matches!(request, Request::Shutdown(_)) {
            return wrong("an earlier request failed");
        }
        match (request, &mut self.machine) {
            (Request::Shutdown(_), _) => Ok(Success::Done(Nothing {})),
            (Request::Start(description), None) => {
                let waiter = Arc::clone(&self.waiter);
                self.machine = Some(Machine::new(description, descriptors, waiter)?);
                Ok(Success::Done(Nothing {}))
            }
            (Request::AddDevice(device), Some(machine)) => {
                Ok(Success::Added(machine.add(&device, descriptors)?))
            }
            (Request::Run(_), Some(machine)) => {
                boot(machine)?;
                Ok(Success::Done(Nothing {}))
            }
            (_, None) => wrong("the first request is Start"),
            (_, Some(_)) => wrong("the machine does not run yet"),
        }
    }

    fn serve(&mut self, machine: &mut Machine) -> Result<Outcome, SessionError> {
        let mut ready = Vec::new();
        loop {
            self.waiter.wait(&mut ready).map_err(at("epoll"))?;
            for (source, readiness) in ready.drain(..) {
                match source {
                    Source::Control => match self.serve_control(machine, readiness)? {
                        Outcome::GoOn => {}
                        outcome => return Ok(outcome),
                    },
                    Source::Doorbell => {
                        if self.answer_doorbell(machine)? == Outcome::Ended {
                            return Ok(Outcome::Ended);
                        }
                    }
                    Source::Function(slot, token) => {
                        if let Some(broken) = machine.ready(slot, token, readiness) {
                            self.send_broken(broken)?;
                        }
                    }
                }
            }
            if let Some(bytes) = machine.take_reached() {
                self.send_event(Event::MemoryReached(Bytes { bytes }))?;
            }
            if let Some((name, reason)) = machine.take_peer_failure() {
                self.send_event(Event::PeersApart(PeersApart {
                    device: DeviceName::lossy(&name),
                    reason: Reason::lossy(&reason),
                }))?;
            }
        }
    }

    fn send_event(&mut self, event: Event) -> Result<(), SessionError> {
        let sent = self.control.send_event(event);
        self.watch_control()?;
        sent.map_err(at("control socket"))
    }

    fn send_broken(&mut self, (name, broken): (String, Broken)) -> Result<(), SessionError> {
        self.send_event(Event::DeviceBroken(DeviceBroken {
            device: DeviceName::lossy(&name),
            reason: Reason::lossy(&broken.to_string()),
        }))
    }

    /// Waits for what the control socket is good for now.
    fn watch_control(&self) -> Result<(), SessionError> {
        let mut readiness = 0;
        if self.control.takes_requests() {
            readiness |= READABLE;
        }
        if self.control.has_waiting() {
            readiness |= WRITABLE;
        }
        let control = self.control.as_raw_fd();
        self.waiter
            .modify(control, Source::Control, readiness)
            .map_err(at("epoll"))
    }

    fn serve_control(
        &mut self,
        machine: &mut Machine,
        readiness: Readiness,
    ) -> Result<Outcome, SessionError> {
        if readiness & WRITABLE != 0 && self.control.flush().is_err() {
            return Ok(Outcome::Alone);
        }
        for _ in 0..REQUESTS_PER_TURN_MAX {
            let Ok(incoming) = self.control.receive() else {
                return Ok(Outcome::Alone);
            };
            let (number, result, ends) = match incoming {
                None => break,
                Some(Incoming::End) => return Ok(Outcome::Alone),
                Some(Incoming::Invalid(number, error)) => {
                    (number, Err(failure(ErrorCode::Invalid, error)), false)
                }
                Some(Incoming::Request(number, request, mut descriptors)) => {
                    let ends = matches!(*request, Request::Shutdown(_));
                    (
                        number,
                        while_running(machine, *request, &mut descriptors),
                        ends,
                    )
                }
            };
            if self.control.reply(number, result).is_err() {
                return Ok(Outcome::Alone);
            }
            if ends {
                return Ok(Outcome::Ended);
            }
        }
        if readiness & GONE != 0 {
            return Ok(Outcome::Alone);
        }
        self.watch_control()?;
        Ok(Outcome::GoOn)
    }

    fn answer_doorbell(&mut self, machine: &mut Machine) -> Result<Outcome, SessionError> {
        machine.doorbell().answer();
        for broken in machine.work() {
            self.send_broken(broken)?;
        }
        if machine.doorbell().take_panicked() {
            self.send_event(Event::GuestPanicked(Nothing {}))?;
        }
        let Some(end) = machine.ended() else {
            return Ok(Outcome::GoOn);
        };
        let shutdown = |kind| Event::GuestShutdown(GuestShutdown { kind });
        self.send_event(match end {
            End::PowerOff => shutdown(ShutdownKind::PowerOff),
            End::Reset => shutdown(ShutdownKind::Reset),
            End::Vcpu(vcpu, reason) => Event::VcpuError(VcpuError {
                vcpu,
                reason: Reason::lossy(&reason),
            }),
        })?;
        Ok(Outcome::Ended)
    }

    /// Gives the shim a moment to take the last messages.
    fn say_farewell(&mut self) {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        while self.control.has_waiting() {
            let mut set = [PollFd::new(self.control.as_fd(), PollFlags::POLLOUT)];
            let ready = interrupted::retry(|| poll(&mut set, PollTimeout::from(FAREWELL_MS)));
            if !matches!(ready, Ok(1..)) || self.control.flush().is_err() {
                break;
            }
        }
    }
}

/// Everything between the description and the gate: the jail is closed before any thread of the
/// guest's exists.
fn boot(machine: &mut Machine) -> Result<(), Failure> {
    let host = |error: &dyn std::error::Error| failure(ErrorCode::Host, error.to_string());
    filters::prepare().map_err(|error| host(&error))?;
    let vcpus = machine.boot()?;
    let (uid, gid) = machine.ids();
    jail::enter(uid, gid, machine.memory_max_bytes()).map_err(|error| host(&error))?;
    machine.start_threads(filters::confine_relay)?;
    machine.restore_devices()?;
    machine.spawn(vcpus, filters::confine_vcpu)?;
    Ok(())
}

fn while_running(
    machine: &mut Machine,
    request: Request,
    descriptors: &mut Descriptors,
) -> Result<Success, Failure> {
    let harmless = matches!(request, Request::Statistics(_) | Request::Shutdown(_));
    if machine.was_saved() && !harmless {
        return Err(failure(ErrorCode::WrongState, "the machine was saved"));
    }
    match request {
        Request::Start(_) | Request::Run(_) => {
            return Err(failure(ErrorCode::WrongState, "the machine runs already"));
        }
        Request::AddDevice(device) => {
            return Ok(Success::Added(machine.add(&device, descriptors)?));
        }
        Request::Statistics(_) => return Ok(Success::Statistics(machine.statistics()?)),
        Request::DeviceStatistics(named) => {
            let statistics = machine.device_statistics(named.device.as_str())?;
            return Ok(Success::DeviceStatistics(statistics));
        }
        Request::Save(save) => {
            let state = descriptors.take("Save.state", save.state);
            machine.save(state.map_err(|error| failure(ErrorCode::Invalid, error))?)?;
        }
        Request::Pause(_) => machine.pause()?,
        Request::Resume(_) => machine.resume()?,
        Request::RemoveDevice(named) => machine.remove(named.device.as_str())?,
        Request::ResizeMemory(new) => machine.resize_memory(new.bytes)?,
        Request::ResizeVcpus(new) => machine.resize_vcpus(new.count)?,
        Request::SetBalloon(new) => machine.set_balloon(new.bytes)?,
        Request::SetRateLimit(new) => machine.set_limit(&new)?,
        Request::ResizeDisk(named) => {
            machine.command(named.device.as_str(), Command::FileResized)?;
        }
        Request::Shutdown(_) => {}
    }
    Ok(Success::Done(Nothing {}))
}
