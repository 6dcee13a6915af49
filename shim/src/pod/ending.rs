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
use tracing::debug;

use crate::{
    errors::CallError,
    guest::agent_client::agent_call,
    pod::{
        Pod,
        container::{request_of, timestamp},
        process::{Exit, LOST_STATUS, Process},
    },
};

/// The one signal that a dead guest has obeyed.
const SIGKILL: u32 = 9;

/// Takes note of an end and tells containerd once.
pub(crate) async fn ended(pod: &Pod, id: &str, process: &Process, exit: Exit) -> bool {
    if !process.stop(exit) {
        return false;
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

/// Waits for the guest's word of a process's end.
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
