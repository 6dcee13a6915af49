//! Events of the agent, passed on to containerd.

use std::sync::Arc;

use pericarp_protocol::guest::{EventsRequest, event};
use tracing::debug;

use crate::pod::{Pod, ending};

/// Passes the agent's events on. The stream ends with the agent's connection, and the VM with it:
/// nobody could ask anything of such a guest any more.
pub(crate) async fn pass_on(pod: Arc<Pod>) {
    pass_events_on(&pod).await;
    pod.agent_lost().await;
}

async fn pass_events_on(pod: &Pod) {
    let subscribed = pod
        .agent
        .client()
        .events(ttrpc::context::Context::default(), &EventsRequest::new())
        .await;
    let Ok(mut events) = subscribed else { return };
    while let Ok(Some(event)) = events.recv().await {
        match event.event {
            // The guest names the container, so it is believed only if there is one.
            Some(event::Event::OutOfMemory(oom)) if pod.container(&oom.container_id).is_ok() => {
                ending::out_of_memory(pod, &oom.container_id).await;
            }
            Some(event::Event::DeviceGone(device)) => {
                debug!(
                    pci_address = device.pci_address,
                    "the guest let go of a device"
                );
            }
            _ => {}
        }
    }
}
