//! The guest's wall clock follows the node's, as a container's under runc does.
//!
//! A step of the node's clock is passed on at once. Slewing (NTP) is checked each minute, on the
//! node alone: an idle guest is woken only when its clock is wrong by more than [`DRIFT_MAX_NS`].

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use pericarp_protocol::guest::SetClockRequest;
use tokio::time::{Instant, timeout};
use tracing::{debug, info, warn};

use crate::{
    errors::CallError,
    guest::agent_client::{Agent, agent_call},
    host::clock::{self, Steps},
    pod::{Pod, boot::nanoseconds},
};

/// How far the clocks may differ before the guest's is set, in nanoseconds.
const DRIFT_MAX_NS: i64 = 50_000_000;

/// How often the node's clock is checked for slewing.
const LOOK: Duration = Duration::from_secs(60);

/// A call that takes longer sets the clock too inexactly and is repeated.
const QUICK: Duration = Duration::from_millis(20);

/// How many calls are made at most.
const TRIES: u32 = 3;

/// Follows the node's clock until the pod ends.
pub(super) async fn follow(pod: Arc<Pod>) {
    tokio::select! {
        () = follow_node(&pod) => {}
        _ = pod.ended() => {}
    }
}

async fn follow_node(pod: &Pod) {
    let mut steps = match Steps::new() {
        Ok(steps) => steps,
        Err(error) => {
            warn!(%error, "the guest's clock will not follow the node's");
            return;
        }
    };
    let mut known = clock::offset_ns();
    loop {
        if let Ok(Err(error)) = timeout(LOOK, steps.next()).await {
            warn!(%error, "the guest's clock follows the node's no more");
            return;
        }
        let now = clock::offset_ns();
        if now.abs_diff(known) < DRIFT_MAX_NS.unsigned_abs() {
            continue;
        }
        match set(&pod.agent).await {
            Ok(()) => {
                info!(
                    by_ms = (now - known) / 1_000_000,
                    "the guest's clock is set"
                );
                known = now;
            }
            // Tried again at the next check.
            Err(error) => debug!(%error, "the guest's clock cannot be set"),
        }
    }
}

/// Sets the guest's clock to the node's, allowing for the time that the call takes.
pub(super) async fn set(agent: &Agent) -> Result<(), CallError> {
    let mut delay = Duration::ZERO;
    for _ in 0..TRIES {
        let sent = Instant::now();
        let request = SetClockRequest {
            wall_clock_ns: nanoseconds(SystemTime::now() + delay),
            ..Default::default()
        };
        agent_call!(agent, set_clock, &request)?;
        let took = sent.elapsed();
        if took <= QUICK {
            break;
        }
        delay = took / 2;
    }
    Ok(())
}
