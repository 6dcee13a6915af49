//! The VMM, as the shim sees it: requests with descriptors down, replies and events up.
//!
//! One task owns the socket. The VMM may have been taken over by its guest, so whatever it sends is
//! decoded by `protocol::machine` and believed only as far as the types go; it can send no
//! descriptors. The end of the socket is the end of the machine: every request under way fails at
//! once and [`Machine::ended`] tells why.

use std::{
    collections::HashMap,
    io::{self, IoSlice},
    os::fd::{AsRawFd, OwnedFd, RawFd},
    time::Duration,
};

use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
use pericarp_protocol::machine::{
    self, Device, DeviceName, Event, MESSAGE_BYTES, Message, Named, Nothing, PciAddress, Request,
    ShutdownKind, Success,
};
use tokio::{
    io::Interest,
    net::UnixDatagram,
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tracing::{debug, warn};

use crate::errors::CallError;

/// Requests that wait to be sent.
const QUEUE_MAX: usize = 64;

/// A request on its way.
#[derive(Debug)]
struct Outgoing {
    request: Request,
    descriptors: Vec<OwnedFd>,
    reply: oneshot::Sender<Result<Success, CallError>>,
}

/// The machine of a pod.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    requests: mpsc::Sender<Outgoing>,
    ended: watch::Sender<Option<String>>,
    /// The size of memory that the guest reached last, in bytes.
    memory: watch::Receiver<u64>,
    limit: Duration,
}

impl Machine {
    /// Takes the shim's end of the control socket.
    pub(crate) fn new(socket: OwnedFd, limit: Duration) -> io::Result<Self> {
        let socket = UnixDatagram::from_std(socket.into())?;
        let (requests, receiver) = mpsc::channel(QUEUE_MAX);
        let ended = watch::Sender::new(None);
        let end = ended.clone();
        let (memory_sender, memory) = watch::channel(0);
        tokio::spawn(async move {
            let mut owner = Owner {
                socket,
                pending: HashMap::new(),
                next: 1,
                last_words: None,
                memory: memory_sender,
            };
            let reason = owner.run(receiver).await;
            for (_, reply) in owner.pending.drain() {
                let _ = reply.send(Err(CallError::Gone(reason.clone())));
            }
            note_end(&end, reason);
        });
        Ok(Self {
            requests,
            ended,
            memory,
            limit,
        })
    }

    /// The same machine, whose answers may take `more` time.
    pub(crate) fn with_more_time(&self, more: Duration) -> Self {
        Self {
            limit: self.limit + more,
            ..self.clone()
        }
    }

    /// Sends `request` and waits for its answer.
    pub(crate) async fn request(
        &self,
        request: Request,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Success, CallError> {
        let (reply, answer) = oneshot::channel();
        let gone = || CallError::Gone(self.end_reason());
        let exchange = async {
            let outgoing = Outgoing {
                request,
                descriptors,
                reply,
            };
            self.requests.send(outgoing).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())?
        };
        tokio::select! {
            biased;
            exchanged = timeout(self.limit, exchange) => exchanged.map_err(|_| CallError::Deadline {
                peer: "the VMM",
                call: "request",
                limit: self.limit,
            })?,
            reason = self.ended() => Err(CallError::Gone(reason)),
        }
    }

    /// Counts the machine as ended although the VMM's end of the socket is still open.
    pub(crate) fn give_up(&self, reason: &str) {
        note_end(&self.ended, reason.to_owned());
    }

    /// Attaches a device and tells where the guest finds it.
    pub(crate) async fn add_device(
        &self,
        device: Device,
        descriptors: Vec<OwnedFd>,
    ) -> Result<PciAddress, CallError> {
        match self
            .request(Request::AddDevice(device), descriptors)
            .await?
        {
            Success::Added(address) => Ok(address),
            other => Err(CallError::Gone(format!(
                "the VMM answered AddDevice with {other:?}"
            ))),
        }
    }

    /// Takes a device away that the guest has let go of.
    pub(crate) async fn remove_device(&self, name: &str) -> Result<(), CallError> {
        let device = DeviceName::new("device", name)
            .map_err(|error| CallError::Host(format!("device {name}: {error}")))?;
        let request = Request::RemoveDevice(Named { device });
        self.request(request, Vec::new()).await.map(drop)
    }

    /// Makes `requests` and waits until the guest has reached `bytes` of memory.
    pub(crate) async fn resize_memory(
        &self,
        requests: Vec<Request>,
        bytes: u64,
        limit: Duration,
    ) -> Result<(), CallError> {
        let mut memory = self.memory.clone();
        for request in requests {
            self.request(request, Vec::new()).await?;
        }
        match timeout(limit, memory.wait_for(|reached| *reached == bytes)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(CallError::Gone(self.end_reason())),
            Err(_) => Err(CallError::Deadline {
                peer: "the guest",
                call: "the new size of its memory",
                limit,
            }),
        }
    }

    /// Ends the machine; a machine that is gone already is fine.
    pub(crate) async fn shut_down(&self) {
        if let Err(error) = self
            .request(Request::Shutdown(Nothing {}), Vec::new())
            .await
        {
            debug!(%error, "the VMM was gone before it was told to go");
        }
    }

    /// Waits for the end of the machine and tells why it ended.
    pub(crate) async fn ended(&self) -> String {
        let mut ended = self.ended.subscribe();
        match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "the VMM's owner ended".to_owned(),
        }
    }

    fn end_reason(&self) -> String {
        self.ended
            .borrow()
            .clone()
            .unwrap_or_else(|| "the VMM is gone".to_owned())
    }
}

/// The first reason stays.
fn note_end(ended: &watch::Sender<Option<String>>, reason: String) {
    ended.send_if_modified(|known| {
        let first = known.is_none();
        known.get_or_insert(reason);
        first
    });
}

struct Owner {
    /// A SEQPACKET socket: to tokio any socket of packets is a datagram's.
    socket: UnixDatagram,
    pending: HashMap<u32, oneshot::Sender<Result<Success, CallError>>>,
    next: u32,
    last_words: Option<String>,
    memory: watch::Sender<u64>,
}

impl Owner {
    /// Runs until the socket ends; the answer is why.
    async fn run(&mut self, mut requests: mpsc::Receiver<Outgoing>) -> String {
        let mut open = true;
        loop {
            tokio::select! {
                outgoing = requests.recv(), if open => match outgoing {
                    // What the VMM said before it closed its end is still to be read: the end of
                    // the socket ends this.
                    Some(outgoing) => if let Err(error) = self.send(outgoing).await {
                        debug!(%error, "the VMM takes no more requests");
                        open = false;
                    },
                    None => open = false,
                },
                received = self.receive() => match received {
                    Ok(Some((number, message))) => self.take(number, message),
                    Ok(None) => return self.reason("the VMM ended"),
                    Err(error) => return self.reason(&format!("receiving from the VMM: {error}")),
                },
            }
        }
    }

    fn reason(&self, plain: &str) -> String {
        self.last_words.clone().unwrap_or_else(|| plain.to_owned())
    }

    async fn send(&mut self, outgoing: Outgoing) -> io::Result<()> {
        let number = self.next;
        self.next = self.next.checked_add(1).unwrap_or(1);
        let bytes = machine::encode_request(number, &outgoing.request);
        let raw: Vec<RawFd> = outgoing
            .descriptors
            .iter()
            .map(AsRawFd::as_raw_fd)
            .collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        self.socket
            .async_io(Interest::WRITABLE, || {
                let parts = [IoSlice::new(&bytes)];
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                sendmsg::<()>(self.socket.as_raw_fd(), &parts, control, flags, None)
                    .map_err(io::Error::from)
            })
            .await?;
        self.pending.insert(number, outgoing.reply);
        Ok(())
    }

    async fn receive(&self) -> io::Result<Option<(u32, Message)>> {
        let mut buffer = [0; MESSAGE_BYTES];
        let count = self
            .socket
            .async_io(Interest::READABLE, || {
                recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)
                    .map_err(io::Error::from)
            })
            .await?;
        if count == 0 {
            return Ok(None);
        }
        let bytes = buffer.get(..count).unwrap_or_default();
        machine::decode_message(bytes)
            .map(Some)
            .map_err(io::Error::other)
    }

    fn take(&mut self, number: u32, message: Message) {
        match message {
            Message::Success(success) => self.answer(number, Ok(success)),
            Message::Failure(failure) => {
                self.answer(
                    number,
                    Err(CallError::Host(format!("the VMM refused: {failure}"))),
                );
            }
            Message::Event(event) => self.note(&event),
        }
    }

    fn answer(&mut self, number: u32, result: Result<Success, CallError>) {
        match self.pending.remove(&number) {
            Some(reply) => drop(reply.send(result)),
            None => warn!(number, "the VMM answered a request that nobody made"),
        }
    }

    /// Events that end the machine become the reason that everybody waiting is told.
    fn note(&mut self, event: &Event) {
        match event {
            Event::Started(_) => debug!("the guest runs"),
            Event::GuestShutdown(shutdown) => {
                let words = match shutdown.kind {
                    ShutdownKind::PowerOff => "the guest switched itself off",
                    ShutdownKind::Reset => "the guest restarted itself",
                };
                self.last_words.get_or_insert_with(|| words.to_owned());
            }
            Event::GuestPanicked(_) => {
                warn!("the guest's kernel panicked");
                self.last_words = Some("the guest's kernel panicked".to_owned());
            }
            Event::VcpuError(error) => {
                let words = format!(
                    "vCPU {} could not go on: {}",
                    error.vcpu,
                    error.reason.as_str()
                );
                warn!("{words}");
                self.last_words = Some(words);
            }
            Event::MemoryReached(reached) => {
                self.memory.send_replace(reached.bytes);
            }
            Event::DeviceBroken(broken) => {
                warn!(
                    device = broken.device.as_str(),
                    reason = broken.reason.as_str(),
                    "a device is broken"
                );
            }
            Event::PeersApart(apart) => {
                warn!(
                    device = apart.device.as_str(),
                    reason = apart.reason.as_str(),
                    "other functions of the pod do not reach this one's registers"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, send, socketpair};
    use pericarp_protocol::machine::{decode_request, encode_message};

    use super::*;

    fn pair() -> (Machine, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        (Machine::new(ours, Duration::from_secs(5)).unwrap(), theirs)
    }

    #[tokio::test]
    async fn answers_go_to_their_requests() {
        let (machine, vmm) = pair();
        let asked = tokio::spawn({
            let machine = machine.clone();
            async move {
                machine
                    .request(Request::Pause(Nothing {}), Vec::new())
                    .await
            }
        });
        let vmm = UnixDatagram::from_std(vmm.into()).unwrap();
        let mut buffer = [0; machine::REQUEST_BYTES];
        let count = vmm
            .async_io(Interest::READABLE, || {
                recv(vmm.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).map_err(io::Error::from)
            })
            .await
            .unwrap();
        let (number, request) = decode_request(&buffer[..count]).unwrap();
        assert_eq!(request, Request::Pause(Nothing {}));
        let done = encode_message(number, &Message::Success(Success::Done(Nothing {})));
        send(vmm.as_raw_fd(), &done, MsgFlags::empty()).unwrap();
        assert_eq!(asked.await.unwrap().unwrap(), Success::Done(Nothing {}));
    }

    #[tokio::test]
    async fn end_of_the_vmm_ends_every_wait() {
        let (machine, vmm) = pair();
        let asked = tokio::spawn({
            let machine = machine.clone();
            async move {
                machine
                    .request(Request::Pause(Nothing {}), Vec::new())
                    .await
            }
        });
        tokio::task::yield_now().await;
        let event = encode_message(0, &Message::Event(Event::GuestPanicked(Nothing {})));
        send(vmm.as_raw_fd(), &event, MsgFlags::empty()).unwrap();
        drop(vmm);
        assert!(matches!(asked.await.unwrap(), Err(CallError::Gone(_))));
        assert_eq!(machine.ended().await, "the guest's kernel panicked");
    }

    #[tokio::test]
    async fn garbage_ends_the_machine() {
        let (machine, vmm) = pair();
        send(vmm.as_raw_fd(), b"garbage", MsgFlags::empty()).unwrap();
        assert!(machine.ended().await.contains("receiving"));
    }
}
