//! Events to containerd, in the order in which they happened.
//!
//! One task owns the connection to containerd's ttrpc socket. An event is tried until containerd
//! takes it, because a lost `TaskExit` leaves a pod that never ends; while containerd restarts,
//! events wait in a bounded queue and then in their producers.

use std::time::Duration;

use containerd_shim_protos::{
    protobuf::{MessageDyn, well_known_types::any::Any},
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::EventsClient,
};
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, warn};

/// Events that wait for containerd.
const QUEUE_MAX: usize = 1024;
/// How long one attempt may take.
const ATTEMPT_MS: u64 = 5_000;
/// Pause before the next attempt when containerd is away.
const RETRY_MS: u64 = 500;
/// Attempts per event: ten minutes of a containerd that is away.
const ATTEMPTS_MAX: u32 = 1200;

/// Sends events.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

/// What waits in the queue.
#[derive(Debug)]
enum Item {
    Event(Envelope),
    /// Everything before it has been sent.
    Mark(oneshot::Sender<()>),
}

impl Publisher {
    /// Starts the task that sends to `address` (`TTRPC_ADDRESS`); it ends when the last publisher
    /// is dropped.
    pub(crate) fn start(address: String, namespace: String) -> Self {
        let (queue, receiver) = mpsc::channel(QUEUE_MAX);
        tokio::spawn(send_all(address, receiver));
        Self { namespace, queue }
    }

    /// Waits until containerd has everything that was published before.
    pub(crate) async fn flush(&self) {
        let (mark, reached) = oneshot::channel();
        if self.queue.send(Item::Mark(mark)).await.is_ok() {
            let _ = reached.await;
        }
    }

    /// Queues one event; waits when the queue is full.
    pub(crate) async fn publish(&self, topic: &str, event: Box<dyn MessageDyn>) {
        let descriptor = event.descriptor_dyn();
        let Ok(value) = event.write_to_bytes_dyn() else {
            warn!(topic, "event cannot be encoded");
            return;
        };
        let mut any = Any::new();
        any.type_url = descriptor.full_name().to_owned();
        any.value = value;
        let mut envelope = Envelope::new();
        envelope.set_namespace(self.namespace.clone());
        envelope.set_topic(topic.to_owned());
        envelope.set_timestamp(Timestamp::now());
        envelope.set_event(any);
        if self.queue.send(Item::Event(envelope)).await.is_err() {
            debug!(topic, "the publisher has ended");
        }
    }
}

async fn send_all(address: String, mut receiver: mpsc::Receiver<Item>) {
    let mut client = None;
    while let Some(item) = receiver.recv().await {
        let envelope = match item {
            Item::Event(envelope) => envelope,
            Item::Mark(mark) => {
                let _ = mark.send(());
                continue;
            }
        };
        let mut request = ForwardRequest::new();
        request.set_envelope(envelope);
        for _ in 0..ATTEMPTS_MAX {
            if client.is_none() {
                client = connect(&address).await;
            }
            if let Some(connected) = &client {
                let context = ttrpc::context::with_duration(Duration::from_millis(ATTEMPT_MS));
                match connected.forward(context, &request).await {
                    Ok(_) => break,
                    Err(error) => debug!(%error, "containerd did not take an event"),
                }
                client = None;
            }
            let pause = tokio::time::Instant::now() + Duration::from_millis(RETRY_MS);
            tokio::time::sleep_until(pause).await;
        }
    }
}

async fn connect(address: &str) -> Option<EventsClient> {
    let address = if address.contains("://") {
        address.to_owned()
    } else {
        format!("unix://{address}")
    };
    match ttrpc::asynchronous::Client::connect(&address).await {
        Ok(client) => Some(EventsClient::new(client)),
        Err(error) => {
            debug!(%error, address, "containerd's event socket cannot be reached");
            None
        }
    }
}
