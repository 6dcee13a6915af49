//! Events of a pod, queued for containerd in the order in which they happened.
//!
//! `containerd/events.rs` takes them from the queue and sends them. The queue is bounded: while
//! containerd is away events wait here and then in their producers.

use containerd_shim_protos::{protobuf::well_known_types::any::Any, shim::event::Envelope};
use protobuf::{Message, well_known_types::timestamp::Timestamp};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, warn};

/// Package of the messages, which containerd knows them by.
const PACKAGE: &str = "containerd.events";

/// Events that wait for containerd.
const QUEUE_MAX: usize = 1024;

/// Queues events.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

/// One entry of the queue.
#[derive(Debug)]
pub(crate) enum Item {
    /// An event.
    Event(Envelope),
    /// Everything before it has been sent.
    Mark(oneshot::Sender<()>),
}

impl Publisher {
    /// Returns a publisher of events in containerd's `namespace`, and the end of its queue, which
    /// closes when the last publisher is dropped.
    pub(crate) fn new(namespace: String) -> (Self, mpsc::Receiver<Item>) {
        let (queue, receiver) = mpsc::channel(QUEUE_MAX);
        (Self { namespace, queue }, receiver)
    }

    /// Waits until containerd has everything that was published before.
    pub(crate) async fn flush(&self) {
        let (mark, reached) = oneshot::channel();
        if self.queue.send(Item::Mark(mark)).await.is_ok() {
            let _ = reached.await;
        }
    }

    /// Queues one event; waits when the queue is full.
    pub(crate) async fn publish<M: Message>(&self, topic: &str, event: M) {
        let Ok(value) = event.write_to_bytes() else {
            warn!(topic, "event cannot be encoded");
            return;
        };
        let mut any = Any::new();
        // Not by the message's descriptor: that would parse the descriptions of all messages.
        any.type_url = format!("{PACKAGE}.{}", M::NAME);
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

#[cfg(test)]
mod tests {
    use containerd_shim_protos::events::task::TaskExit;
    use protobuf::MessageFull;

    use super::*;

    #[tokio::test]
    async fn events_have_the_names_of_their_messages() {
        let (publisher, mut queue) = Publisher::new("k8s.io".to_owned());
        publisher.publish("/tasks/exit", TaskExit::new()).await;
        let Some(Item::Event(envelope)) = queue.recv().await else {
            panic!("no event");
        };
        let known = TaskExit::descriptor();
        assert_eq!(envelope.event().type_url, known.full_name());
    }
}
