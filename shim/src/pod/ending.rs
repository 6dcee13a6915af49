//! How processes of a pod end: what the guest tells of it, what containerd is told, and `Kill`.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    events::task::{TaskExit, TaskOOM},
    topics,
};
use pericarp_protocol::guest::SignalRequest;
use tokio::time::timeout;
use tracing::debug;

use crate::{
    errors::CallError,
    guest::agent_client::agent_call,
    pod::{
        Pod,
        container::{request_of, timestamp},
        process::{Exit, LOST_STATUS, Phase, Process},
    },
};

/// The one signal that a dead guest has obeyed.
const SIGKILL: u32 = 9;
/// How a process ended that could not be started and whose guest does not say more: runc's init
/// exits with this status then.
const START_FAILED_STATUS: u32 = 255;
/// How long a process that could not be started may take to end.
const FAILED_START_ENDS_MAX: Duration = Duration::from_secs(2);

/// Takes note of an end and tells containerd once.
pub(crate) async fn ended(pod: &Pod, id: &str, process: &Process, exit: Exit) -> bool {
    if !process.stop(exit) {
        return false;
    }
    if !process.tells_its_end() {
        return true;
    }
    let mut event = TaskExit::new();
    event.container_id = id.to_owned();
    event.id = if process.exec_id.is_empty() {
        id.to_owned()
    } else {
        process.exec_id.clone()
    };
    event.pid = process.pid;
    event.exit_status = exit.status;
    event.exited_at = Some(timestamp(exit.at)).into();
    pod.publisher
        .publish(topics::TASK_EXIT_EVENT_TOPIC, Box::new(event))
        .await;
    true
}

/// Ends a process that could not be started: as under runc, it is stopped before containerd hears
/// of the failure, so that it can be deleted at once.
pub(crate) async fn start_failed(pod: &Pod, id: &str, process: &Process, error: &CallError) {
    // Without an answer it may run yet: a kill must reach it, and its end will be told.
    process.end_start(error.is_deadline());
    let CallError::Agent(..) = error else { return };
    let kill = SignalRequest {
        container_id: id.to_owned(),
        exec_id: process.exec_id.clone(),
        signal: SIGKILL,
        ..Default::default()
    };
    // It ends by itself in most cases, and then this finds nothing.
    let _ = agent_call!(pod.agent, signal_process, &kill);
    if timeout(FAILED_START_ENDS_MAX, process.wait())
        .await
        .is_err()
    {
        ended(pod, id, process, Exit::now(START_FAILED_STATUS)).await;
    }
}

/// Tells how a process ended as soon as the guest does; from Create on.
pub(crate) async fn watch(pod: Arc<Pod>, id: String, process: Arc<Process>) {
    let request = request_of(&id, &process.exec_id);
    // No deadline: a process may run for years. The end of the VM ends the wait.
    let waited = pod
        .agent
        .client()
        .wait_process(ttrpc::context::Context::default(), &request)
        .await;
    let exit = match waited {
        Ok(response) => {
            // containerd marks the container as killed for its memory only when it is told before
            // the end.
            if response.oom_killed && process.exec_id.is_empty() {
                out_of_memory(&pod, &id).await;
            }
            Exit {
                status: response.exit_status,
                at: exited_at(response.exited_at_ns),
            }
        }
        Err(error) => {
            debug!(%error, process = process.name, "the agent cannot tell how a process ended");
            Exit::now(LOST_STATUS)
        }
    };
    process.start_over().await;
    ended(&pod, &id, &process, exit).await;
}

/// Tells containerd that something in the container was killed for its memory.
pub(crate) async fn out_of_memory(pod: &Pod, id: &str) {
    let event = TaskOOM {
        container_id: id.to_owned(),
        ..Default::default()
    };
    pod.publisher
        .publish(topics::TASK_OOM_EVENT_TOPIC, Box::new(event))
        .await;
}

/// The guest's clock is not trusted further than to order ends in the past.
pub(crate) fn exited_at(nanoseconds: i64) -> SystemTime {
    let now = SystemTime::now();
    u64::try_from(nanoseconds)
        .ok()
        .filter(|nanoseconds| *nanoseconds > 0)
        .and_then(|nanoseconds| {
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(nanoseconds))
        })
        .map_or(now, |at| at.min(now))
}

/// `Kill`.
pub(crate) async fn kill(
    pod: &Arc<Pod>,
    id: &str,
    exec_id: &str,
    signal: u32,
    all: bool,
) -> Result<(), CallError> {
    let container = pod.container(id)?;
    let process = container.process(exec_id)?;
    if process.expect_alive("kill").is_err() {
        return Err(CallError::NotFound(format!(
            "process of {}: it has ended already",
            process.name
        )));
    }
    if container.pause {
        ended(pod, id, &process, Exit::now(128 + signal)).await;
        return Ok(());
    }
    if !exec_id.is_empty() && process.phase() == Phase::Created {
        // As in containerd's own shim; containerd then goes on to the delete.
        return Err(CallError::WrongState(format!(
            "kill {}: it has not been started",
            process.name
        )));
    }
    let request = SignalRequest {
        container_id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        signal,
        all,
        ..Default::default()
    };
    match agent_call!(pod.agent, signal_process, &request) {
        Err(CallError::Gone(_)) if signal == SIGKILL => {
            ended(pod, id, &process, Exit::now(LOST_STATUS)).await;
            Ok(())
        }
        other => other.map(drop),
    }
}
