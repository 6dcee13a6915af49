//! containerd's task service: translates between its messages and [`crate::pod::container`],
//! nothing else.
//!
//! Versions 2 and 3 of the service have the same messages under two names (containerd
//! `docs/runtime-v2.md`), so one implementation is registered twice.

use std::{collections::HashMap, sync::Arc, sync::atomic::Ordering};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim_async::{Task, create_task},
};
use ttrpc::asynchronous::{Service, TtrpcContext};

use crate::{
    containerd::daemon::Daemon,
    errors::CallError,
    pod::{container::timestamp, create, ending, exec, lifecycle, process::Phase, resize, stats},
};

type Answer<T> = ttrpc::Result<T>;

/// The service of one daemon.
#[derive(Debug, Clone)]
pub(crate) struct TaskService(pub(crate) Arc<Daemon>);

/// The service under both of its names.
pub(crate) fn services(daemon: &Arc<Daemon>) -> HashMap<String, Service> {
    let mut all = HashMap::new();
    for name in ["containerd.task.v3.Task", "containerd.task.v2.Task"] {
        let service: Arc<dyn Task + Send + Sync> = Arc::new(TaskService(Arc::clone(daemon)));
        all.extend(
            create_task(service)
                .into_values()
                .map(|service| (name.to_owned(), service)),
        );
    }
    all
}

/// Runs `work` to its end although the caller may hang up: a call is dropped with its connection,
/// and containerd closes connections whenever it restarts or gives a pod up. Every call that speaks
/// to the agent runs like this: ttrpc closes the agent's connection when a call is dropped while
/// its request is being written.
pub(crate) async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, CallError>> + Send + 'static,
) -> Answer<T> {
    let ended = tokio::spawn(work).await;
    let result = ended.unwrap_or_else(|error| Err(CallError::host("the call", error)));
    result.map_err(Into::into)
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> Answer<CreateTaskResponse> {
        let pod = self.0.pod().await?;
        let daemon = Arc::clone(&self.0);
        let work = async move {
            let created = create::create(&pod, &request).await;
            if created.is_err() {
                daemon.shut_down_if_wanted().await;
            }
            created
        };
        let pid = to_the_end(work).await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Answer<StartResponse> {
        let pod = self.0.pod_of(&request.id)?;
        let work = async move { lifecycle::start(&pod, &request.id, &request.exec_id).await };
        let pid = to_the_end(work).await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Answer<DeleteResponse> {
        let pod = self.0.pod_of(&request.id)?;
        let daemon = Arc::clone(&self.0);
        let work = async move {
            let deleted = lifecycle::delete(&pod, &request.id, &request.exec_id).await;
            daemon.shut_down_if_wanted().await;
            deleted
        };
        let (pid, exit) = to_the_end(work).await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Answer<Empty> {
        let pod = self.0.pod_of(&request.id)?;
        to_the_end(async move { exec::exec(&pod, &request).await }).await?;
        Ok(Empty::new())
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Answer<StateResponse> {
        let pod = self.0.pod_of(&request.id)?;
        let container = pod.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let phase = process.phase();
        let mut answer = StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: container.bundle.display().to_string(),
            pid: process.pid,
            stdin: process.paths.stdin.clone(),
            stdout: process.paths.stdout.clone(),
            stderr: process.paths.stderr.clone(),
            terminal: process.paths.terminal,
            ..Default::default()
        };
        answer.status = status(phase, container.paused.load(Ordering::Relaxed)).into();
        if let Phase::Stopped(exit) | Phase::Deleting(Some(exit)) = phase {
            answer.exit_status = exit.status;
            answer.exited_at = Some(timestamp(exit.at)).into();
        }
        Ok(answer)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Answer<PidsResponse> {
        let pod = self.0.pod_of(&request.id)?;
        let container = pod.container(&request.id)?;
        // PIDs of the guest mean nothing on the host.
        let process = ProcessInfo {
            pid: container.init.pid,
            ..Default::default()
        };
        Ok(PidsResponse {
            processes: vec![process],
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Answer<Empty> {
        let pod = self.0.pod_of(&request.id)?;
        to_the_end(async move { lifecycle::freeze(&pod, &request.id, true).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Answer<Empty> {
        let pod = self.0.pod_of(&request.id)?;
        to_the_end(async move { lifecycle::freeze(&pod, &request.id, false).await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Answer<Empty> {
        Err(CallError::Unimplemented("checkpoint").into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Answer<Empty> {
        let pod = self.0.pod_of(&request.id)?;
        to_the_end(async move {
            let (id, exec_id) = (&request.id, &request.exec_id);
            ending::kill(&pod, id, exec_id, request.signal, request.all).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        let pod = self.0.pod_of(&request.id)?;
        to_the_end(async move {
            let (id, exec_id) = (&request.id, &request.exec_id);
            lifecycle::resize_terminal(&pod, id, exec_id, request.width, request.height).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Answer<Empty> {
        let pod = self.0.pod_of(&request.id)?;
        let process = pod.container(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Answer<Empty> {
        let pod = self.0.pod_of(&request.id)?;
        let work = async move { resize::update(&pod, &request.id, &request.resources.value).await };
        to_the_end(work).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Answer<WaitResponse> {
        let pod = self.0.pod_of(&request.id)?;
        let process = pod.container(&request.id)?.process(&request.exec_id)?;
        let exit = process.wait().await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Answer<StatsResponse> {
        let pod = self.0.pod_of(&request.id)?;
        let container = pod.container(&request.id)?;
        let counters =
            to_the_end(async move { stats::of_container(&pod, &container).await }).await?;
        Ok(StatsResponse {
            stats: Some(counters).into(),
            ..Default::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Answer<ConnectResponse> {
        // When containerd starts it asks each shim, by the id of its sandbox too, and runs `delete`
        // where the answer is an error or takes 5 s. So this neither waits nor fails, as in
        // containerd's own shim: the PID of what is unknown is 0.
        let pod = self.0.pod_now();
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: pod.map_or(0, |pod| pod.pid_of(&request.id)),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Answer<Empty> {
        // containerd calls it after each container; the last one ends the pod.
        let daemon = Arc::clone(&self.0);
        to_the_end(async move {
            daemon.shut_down_if_empty().await;
            Ok(Empty::new())
        })
        .await
    }
}

fn status(phase: Phase, paused: bool) -> Status {
    match phase {
        Phase::Reserved | Phase::Created | Phase::Starting => Status::CREATED,
        Phase::Running if paused => Status::PAUSED,
        Phase::Running => Status::RUNNING,
        Phase::Stopped(_) | Phase::Deleting(_) => Status::STOPPED,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::{containerd::args::Args, pod::events::Publisher};

    fn service() -> TaskService {
        let words = ["-namespace", "k8s.io", "-id", "pod", "daemon"];
        let args = Args::parse(words.map(str::to_owned)).unwrap();
        let (publisher, _events) = Publisher::new("k8s.io".to_owned());
        TaskService(Arc::new(Daemon::booting(&args, publisher)))
    }

    #[tokio::test]
    async fn containerd_reaches_a_daemon_by_the_id_of_its_sandbox_before_the_pod_has_booted() {
        let service = service();
        let request = ConnectRequest {
            id: "pod".to_owned(),
            ..Default::default()
        };
        let context = TtrpcContext::default();
        let answer = timeout(Duration::from_secs(5), service.connect(&context, request));
        let answer = answer.await.unwrap().unwrap();
        assert_eq!((answer.shim_pid, answer.task_pid), (std::process::id(), 0));
    }

    #[tokio::test]
    async fn a_delete_does_not_wait_for_the_boot() {
        let service = service();
        let request = DeleteRequest {
            id: "pod".to_owned(),
            ..Default::default()
        };
        let context = TtrpcContext::default();
        let answer = timeout(Duration::from_secs(5), service.delete(&context, request));
        let error = answer.await.unwrap().unwrap_err();
        assert!(error.to_string().contains("has not booted"), "{error}");
    }
}
