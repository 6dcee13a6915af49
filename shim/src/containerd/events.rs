//! Sends a pod's events to containerd.
//!
//! One task owns the connection to containerd's ttrpc socket. An event is tried until containerd
//! takes it, because a lost `TaskExit` leaves a pod that never ends.

use std::time::Duration;

use containerd_shim_protos::{shim::events::ForwardRequest, shim_async::EventsClient};
use tokio::sync::mpsc;
use tracing::debug;

use crate::pod::events::Item;

/// How long one attempt may take.
const ATTEMPT_MS: u64 = 5_000;
/// Pause before the next attempt when containerd is away.
const RETRY_MS: u64 = 500;
/// Attempts per event: ten minutes of a containerd that is away.
const ATTEMPTS_MAX: u32 = 1200;

/// Sends what is queued to `address` (`TTRPC_ADDRESS`) until the queue is closed.
pub(crate) async fn send_all(address: String, mut queue: mpsc::Receiver<Item>) {
    let mut client = None;
    while let Some(item) = queue.recv().await {
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
