//! containerd's sandbox service (`sandboxer = "shim"`): the pod without a pause container.

use std::{collections::HashMap, sync::Arc, time::SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::{
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
        StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
        WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::{Sandbox, create_sandbox},
    types::platform::Platform,
};
use pericarp_protocol::guest;
use ttrpc::asynchronous::{Service, TtrpcContext};

use crate::{
    containerd::{daemon::Daemon, task_service::to_the_end},
    guest::agent_client::agent_call,
    pod::{Request, container::timestamp, files, stats},
};

type Answer<T> = ttrpc::Result<T>;

/// The service of one daemon.
#[derive(Debug)]
struct SandboxService(Arc<Daemon>);

/// The service under its name.
pub(crate) fn services(daemon: &Arc<Daemon>) -> HashMap<String, Service> {
    let service: Arc<dyn Sandbox + Send + Sync> = Arc::new(SandboxService(Arc::clone(daemon)));
    create_sandbox(service)
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> Answer<CreateSandboxResponse> {
        let (bundle, files) = files::pod(&request, &self.0.namespace)?;
        let netns = request.netns_path;
        self.0.boot(Request {
            id: request.sandbox_id,
            network_namespace: (!netns.is_empty()).then(|| netns.into()),
            annotations: bundle.annotations(),
            bundle: Some(bundle),
            files: Some(files),
            options: self.0.options.clone(),
            namespace: self.0.namespace.clone(),
        })?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        _: StartSandboxRequest,
    ) -> Answer<StartSandboxResponse> {
        let pod = self.0.pod().await?;
        Ok(StartSandboxResponse {
            pid: pod.pid(),
            created_at: Some(timestamp(pod.ready_at)).into(),
            ..Default::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> Answer<PlatformResponse> {
        let platform = Platform {
            os: "linux".to_owned(),
            architecture: "amd64".to_owned(),
            ..Default::default()
        };
        Ok(PlatformResponse {
            platform: Some(platform).into(),
            ..Default::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        _: StopSandboxRequest,
    ) -> Answer<StopSandboxResponse> {
        let daemon = Arc::clone(&self.0);
        to_the_end(async move {
            if let Some(pod) = daemon.pod_to_end().await {
                pod.stop().await;
            }
            Ok(StopSandboxResponse::new())
        })
        .await
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        _: WaitSandboxRequest,
    ) -> Answer<WaitSandboxResponse> {
        let pod = self.0.pod().await?;
        let exit = pod.ended().await;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> Answer<SandboxStatusResponse> {
        let pod = self.0.pod().await?;
        let exit = pod.exit();
        let state = if exit.is_none() {
            "SANDBOX_READY"
        } else {
            "SANDBOX_NOTREADY"
        };
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: pod.pid(),
            state: state.to_owned(),
            created_at: Some(timestamp(pod.ready_at)).into(),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, _: PingRequest) -> Answer<PingResponse> {
        self.0.pod().await?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> Answer<ShutdownSandboxResponse> {
        let daemon = Arc::clone(&self.0);
        to_the_end(async move {
            daemon.shut_down().await;
            Ok(ShutdownSandboxResponse::new())
        })
        .await
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Answer<SandboxMetricsResponse> {
        let pod = self.0.pod().await?;
        let work = async move { agent_call!(pod.agent, stats, &guest::StatsRequest::new()) };
        let counters = to_the_end(work).await?;
        let mut answer = SandboxMetricsResponse::new();
        let metrics = answer.metrics.mut_or_insert_default();
        metrics.id = request.sandbox_id;
        metrics.timestamp = Some(timestamp(SystemTime::now())).into();
        metrics.data = Some(stats::metrics(&counters)).into();
        Ok(answer)
    }
}
