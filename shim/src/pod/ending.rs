//! How processes of a pod and its VM end: what the guest tells of it, what containerd is told, and
//! `Kill`.
//!
//! Removal is bounded whatever state guest, agent and VMM are in:
//!
//! ```text
//! SIGKILL to a container ──> its end is told within timeouts.kill_ms ──> done
//!            │ the agent does not answer, or processes are left
//!            v
//!      the VM is ended (SIGKILL to the VMM) ──> every process ends with 137, every call fails
//! ```
//!
//! SIGKILL ends a stopped VMM and one in a frozen cgroup (version 2) too. A VMM that does not end
//! within [`VMM_ENDS_MAX`] waits for the host's kernel; the pod goes on without it.

use std::{
    sync::Arc,
    sync::atomic::Ordering,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    events::task::{TaskExit, TaskOOM},
    topics,
};
use pericarp_protocol::guest::{ContainerRequest, SignalRequest};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, warn};

use crate::{
    errors::CallError,
    guest::agent_client::agent_call,
    host::child::Watched,
    pod::{
        Pod,
        container::{Container, request_of, timestamp},
        process::{Exit, LOST_STATUS, Phase, Process},
        undo,
    },
};

/// The one signal that a dead guest has obeyed.
const SIGKILL: u32 = 9;
/// How a process ended that could not be started and whose guest does not say more: runc's init
/// exits with this status then.
const START_FAILED_STATUS: u32 = 255;
/// How long a process that could not be started may take to end.
const FAILED_START_ENDS_MAX: Duration = Duration::from_secs(2);
/// How long a VMM may take to end when it is asked to.
const SHUT_DOWN_MAX: Duration = Duration::from_secs(2);
/// How long a VMM may take to end after SIGKILL before the pod goes on without it.
const VMM_ENDS_MAX: Duration = Duration::from_secs(2);
/// How long the kernel may take to free the memory of a killed VMM before its cgroup and directory
/// are removed.
const VMM_EXITS_MAX: Duration = Duration::from_secs(30);
/// How long an agent that is about to be given up may take for a small question.
const PROBE_MAX: Duration = Duration::from_secs(1);
/// Time in which a VMM whose guest has hung up ends: the connection's end is the first sign of it,
/// and not its reason.
pub(crate) const LAST_WORDS_MAX: Duration = Duration::from_secs(2);

impl Pod {
    /// Notes how the sandbox ended; false when it had ended before.
    pub(crate) fn note_end(&self, exit: Exit) -> bool {
        self.exit
            .send_if_modified(|known| known.is_none() && known.replace(exit).is_none())
    }

    /// Ends the VM; what is on the host stays until [`Self::tear_down`].
    pub(crate) async fn stop(&self) {
        self.note_end(Exit::now(0));
        if timeout(SHUT_DOWN_MAX, self.machine.shut_down())
            .await
            .is_err()
        {
            debug!("the VMM does not answer and is killed");
        }
        self.end_vm().await;
    }

    /// Ends the VM and removes everything of the pod.
    pub(crate) async fn tear_down(&self) {
        self.stop().await;
        // Its cgroup is busy until the memory is free, which takes seconds for a large VM.
        if self.vmm.is_exiting() && timeout(VMM_EXITS_MAX, self.vmm.ended()).await.is_err() {
            warn!(pid = self.vmm.pid, "the VMM is still ending");
        }
        undo(self.state.clone()).await;
    }

    /// Kills the VMM and waits for its end, for a bounded time. From then on no call waits for the
    /// agent or the VMM.
    async fn end_vm(&self) {
        self.vmm.kill();
        self.agent.hang_up();
        if timeout(VMM_ENDS_MAX, self.vmm.ended()).await.is_err() {
            warn!(
                pid = self.vmm.pid,
                "the VMM does not end at once after SIGKILL"
            );
        }
        self.machine.give_up("the VM was ended");
    }

    /// Ends the VM because it does not work any more. `why` names the container where it matters.
    pub(crate) async fn give_up(&self, why: &str) {
        if self.note_end(Exit::now(LOST_STATUS)) {
            warn!(why, "the VM is ended");
        }
        self.end_vm().await;
    }

    /// The agent's connection broke. A guest that ended by itself says why on the VMM's socket.
    pub(crate) async fn agent_lost(&self) {
        if timeout(LAST_WORDS_MAX, self.machine.ended()).await.is_err() {
            self.give_up("the connection to its agent broke").await;
        }
    }

    /// Whether the agent answers at all: a question about container `id` that takes it no time.
    pub(crate) async fn agent_answers(&self, id: &str) -> bool {
        let agent = self.agent.within(PROBE_MAX);
        let answer = agent_call!(agent, pids, &container_request(id));
        !matches!(&answer, Err(error) if error.is_deadline() || error.is_gone())
    }
}

fn container_request(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.to_owned(),
        ..Default::default()
    }
}

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
        .publish(topics::TASK_EXIT_EVENT_TOPIC, event)
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
            if !matches!(error, ttrpc::Error::RpcStatus(_)) {
                // The process lives until the VM ends, which a broken connection brings about.
                pod.ended().await;
            }
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
        .publish(topics::TASK_OOM_EVENT_TOPIC, event)
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
    if signal == SIGKILL && exec_id.is_empty() {
        return kill_for_sure(pod, &container, &request).await;
    }
    match agent_call!(pod.agent, signal_process, &request) {
        Err(error) if error.is_gone() && signal == SIGKILL => {
            // A broken connection ends the VM, and its end is the process's.
            pod.ended().await;
            ended(pod, id, &process, Exit::now(LOST_STATUS)).await;
            Ok(())
        }
        other => other.map(drop),
    }
}

/// SIGKILL to a container: what does not obey within the limit ends with its VM.
async fn kill_for_sure(
    pod: &Arc<Pod>,
    container: &Arc<Container>,
    request: &SignalRequest,
) -> Result<(), CallError> {
    let deadline = Instant::now() + pod.kill_limit;
    let agent = pod.agent.within(pod.kill_limit);
    let answered = agent_call!(agent, signal_process, request);
    match answered {
        Err(error) if error.is_deadline() || error.is_gone() => {
            if error.is_gone() {
                pod.agent_lost().await;
            } else {
                let id = &container.id;
                pod.give_up(&format!("container {id} cannot be killed: {error}"))
                    .await;
            }
            let exit = Exit::now(LOST_STATUS);
            ended(pod, &container.id, &container.init, exit).await;
            Ok(())
        }
        answered => {
            if !container.doomed.swap(true, Ordering::Relaxed) {
                tokio::spawn(expect_end(Arc::clone(pod), Arc::clone(container), deadline));
            }
            answered.map(drop)
        }
    }
}

/// Ends the VM of a container that is not gone at `deadline`, after SIGKILL.
async fn expect_end(pod: Arc<Pod>, container: Arc<Container>, deadline: Instant) {
    if timeout_at(deadline, container.init.wait()).await.is_ok() {
        return;
    }
    let id = &container.id;
    let agent = pod.agent.within(PROBE_MAX);
    let left = match agent_call!(agent, pids, &container_request(id)) {
        Ok(left) => left.processes.len(),
        Err(error) if error.is_not_found() => 0,
        Err(error) => {
            pod.give_up(&format!(
                "container {id} did not end after SIGKILL: {error}"
            ))
            .await;
            return;
        }
    };
    if left == 0 {
        // Output that nobody reads holds back the guest's word.
        ended(&pod, id, &container.init, Exit::now(LOST_STATUS)).await;
        return;
    }
    let limit = pod.kill_limit;
    pod.give_up(&format!(
        "container {id} still has {left} processes {limit:?} after SIGKILL"
    ))
    .await;
}

/// How much later than its file-system daemon a VMM may be seen to end that ended first.
const VMM_GOES_FIRST_MAX: Duration = Duration::from_millis(500);

/// Without its file-system daemon a guest hangs in every access to its files, its agent included:
/// such a pod is ended at once, so that its end is seen and its removal does not wait for it.
pub(crate) async fn end_without_files(daemon: Watched, vmm: Watched) {
    let how = daemon.ended().await;
    // It ends with the VMM too, and may be seen to end first.
    if timeout(VMM_GOES_FIRST_MAX, vmm.ended()).await.is_err() {
        warn!(
            how,
            "the file-system daemon ended, and the VM is ended with it"
        );
        vmm.kill();
    }
}

/// The end of the VM is the end of every process in it.
pub(crate) async fn watch_vm(pod: Arc<Pod>) {
    let reason = pod.machine.ended().await;
    pod.vmm.kill();
    pod.agent.hang_up();
    pod.note_end(Exit::now(LOST_STATUS));
    for container in pod.containers() {
        if container.lost(&pod).await {
            warn!(
                container = container.id,
                reason, "a container ended with its VM"
            );
        }
    }
}
