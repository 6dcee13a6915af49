//! `Start`, `Delete`, `Pause`, `Resume` and `ResizePty` of containers and execs. `ending.rs` tells
//! how they end.

use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use containerd_shim_protos::{
    events::task::{TaskDelete, TaskExecStarted, TaskPaused, TaskResumed, TaskStart},
    topics,
};
use pericarp_protocol::guest::ResizeTerminalRequest;
use tokio::time::timeout;
use tracing::warn;

use crate::{
    errors::CallError,
    guest::agent_client::agent_call,
    pod::{
        Pod,
        container::{Container, request_of, timestamp},
        create::forget,
        ending::{ended, exited_at, start_failed},
        process::{Exit, LOST_STATUS, Process},
    },
    storage::share,
};

/// How long taking a container's mounts away may take.
const UNMOUNT_MAX: Duration = Duration::from_secs(3);

/// `Start`, of a container or an exec.
pub(crate) async fn start(pod: &Arc<Pod>, id: &str, exec_id: &str) -> Result<u32, CallError> {
    let container = pod.container(id)?;
    let process = container.process(exec_id)?;
    process.begin_start()?;
    if !container.pause {
        let started = agent_call!(pod.agent, start_process, &request_of(id, exec_id));
        if let Err(error) = started {
            start_failed(pod, id, &process, &error).await;
            return Err(error);
        }
    }
    // The start is told before the end: `watch` waits for `end_start`.
    if exec_id.is_empty() {
        let mut event = TaskStart::new();
        event.container_id = id.to_owned();
        event.pid = process.pid;
        pod.publisher
            .publish(topics::TASK_START_EVENT_TOPIC, event)
            .await;
    } else {
        let mut event = TaskExecStarted::new();
        event.container_id = id.to_owned();
        event.exec_id = exec_id.to_owned();
        event.pid = process.pid;
        pod.publisher
            .publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, event)
            .await;
    }
    process.end_start(true);
    Ok(process.pid)
}

/// `Delete`, of a container or an exec. The answer is its PID and how it had ended.
pub(crate) async fn delete(
    pod: &Arc<Pod>,
    id: &str,
    exec_id: &str,
) -> Result<(u32, Exit), CallError> {
    let container = pod.container(id)?;
    let process = container.process(exec_id)?;
    // A caller that gave up on Create deletes what it does not know the fate of.
    process.creation_over().await;
    let exit = process.begin_delete()?;
    let deleted = delete_claimed(pod, &container, &process).await;
    let last = match deleted {
        Ok(last) => last,
        Err(error) => {
            process.undo_delete();
            return Err(error);
        }
    };
    // What never ran was ended by this delete, and whoever waits for its end hears of it.
    let exit = exit.unwrap_or(last);
    ended(pod, id, &process, exit).await;
    if exec_id.is_empty() {
        forget(pod, id);
        let mut event = TaskDelete::new();
        event.container_id = id.to_owned();
        event.pid = process.pid;
        event.exit_status = exit.status;
        event.exited_at = Some(timestamp(exit.at)).into();
        pod.publisher
            .publish(topics::TASK_DELETE_EVENT_TOPIC, event)
            .await;
    } else {
        container.execs().remove(exec_id);
    }
    Ok((process.pid, exit))
}

/// Deletes a process from the guest and answers how the guest says that it ended.
async fn delete_claimed(
    pod: &Arc<Pod>,
    container: &Container,
    process: &Process,
) -> Result<Exit, CallError> {
    if container.pause {
        return Ok(Exit::now(LOST_STATUS));
    }
    let request = request_of(&container.id, &process.exec_id);
    let mut call = pin!(async { agent_call!(pod.agent, delete_process, &request) });
    let deleted = match timeout(pod.kill_limit, &mut call).await {
        Ok(deleted) => deleted,
        Err(_) => {
            // It may unmount a large disk; but nothing is waited for that a dead guest would do.
            if !pod.agent_answers(&container.id).await {
                let id = &container.id;
                pod.give_up(&format!(
                    "container {id} cannot be deleted: its agent is silent"
                ))
                .await;
            }
            call.await
        }
    };
    let exit = match deleted {
        Ok(response) => Exit {
            status: response.exit_status,
            at: exited_at(response.exited_at_ns),
        },
        // A guest that is gone has nothing left to delete.
        Err(CallError::Gone(_)) => Exit::now(LOST_STATUS),
        Err(error) if error.is_not_found() => Exit::now(LOST_STATUS),
        Err(error) => return Err(error),
    };
    process.finish_copying().await;
    if process.exec_id.is_empty() {
        release(pod, container).await?;
    }
    Ok(exit)
}

/// Takes back what of the host the container had; the guest has let go of it.
pub(super) async fn release(pod: &Arc<Pod>, container: &Container) -> Result<(), CallError> {
    // A guest that does not let go of one device lets go of none: its kernel takes them one by one.
    let mut lets_go = true;
    let functions = std::mem::take(&mut *container.functions());
    for function in functions {
        lets_go = pod.passthrough.unplug(&function, lets_go).await;
    }
    let disk = container.disk().take();
    let volumes = std::mem::take(&mut *container.volumes());
    for disk in disk.into_iter().chain(volumes) {
        lets_go = pod.disks.unplug(&disk, lets_go).await;
    }
    let shared = pod.shared.clone();
    let id = container.id.clone();
    let object = format!("shared directory of container {}", container.id);
    let removal = tokio::task::spawn_blocking(move || shared.remove(&id));
    match timeout(UNMOUNT_MAX, removal).await {
        Ok(removed) => {
            let gone = removed
                .map_err(|error| CallError::host("unmounting", error))?
                .map_err(|error| CallError::host(object, error))?;
            let _ = timeout(UNMOUNT_MAX, share::forget(&pod.agent, gone)).await;
            Ok(())
        }
        Err(_) => {
            // A file system of the host hangs. What is left goes with the pod.
            warn!(object, limit = ?UNMOUNT_MAX, "unmounting takes too long and is left alone");
            Ok(())
        }
    }
}

/// `ResizePty`.
pub(crate) async fn resize_terminal(
    pod: &Pod,
    id: &str,
    exec_id: &str,
    width: u32,
    height: u32,
) -> Result<(), CallError> {
    pod.container(id)?.process(exec_id)?;
    let request = ResizeTerminalRequest {
        container_id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        width,
        height,
        ..Default::default()
    };
    agent_call!(pod.agent, resize_terminal, &request).map(drop)
}

/// `Pause` and `Resume`.
pub(crate) async fn freeze(pod: &Pod, id: &str, frozen: bool) -> Result<(), CallError> {
    let container = pod.container(id)?;
    container
        .init
        .expect_alive(if frozen { "pause" } else { "resume" })?;
    let mut request = pericarp_protocol::guest::ContainerRequest::new();
    request.container_id = id.to_owned();
    if !container.pause {
        if frozen {
            agent_call!(pod.agent, pause, &request)?;
        } else {
            agent_call!(pod.agent, resume, &request)?;
        }
    }
    container.paused.store(frozen, Ordering::Relaxed);
    if frozen {
        let event = TaskPaused {
            container_id: id.to_owned(),
            ..Default::default()
        };
        pod.publisher
            .publish(topics::TASK_PAUSED_EVENT_TOPIC, event)
            .await;
    } else {
        let event = TaskResumed {
            container_id: id.to_owned(),
            ..Default::default()
        };
        pod.publisher
            .publish(topics::TASK_RESUMED_EVENT_TOPIC, event)
            .await;
    }
    Ok(())
}
