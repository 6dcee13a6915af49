//! The requests of `protocol/guest.proto`, one file a family.
//!
//! A request that changes something runs as a task of its own: when the host gives up waiting, the
//! change is completed or rolled back all the same, and never left half-way.

use std::sync::Arc;

use async_trait::async_trait;
use pericarp_protocol::{
    guest::{
        ConfigureSandboxRequest, ContainerRequest, CreateContainerRequest, CreateContainerResponse,
        DiagnosticsResponse, Empty, Event, EventsRequest, ExecRequest, OnlineResourcesRequest,
        OnlineResourcesResponse, PidsResponse, ProcessRequest, RemoveDeviceRequest, RescanResponse,
        ResizeTerminalRequest, SetClockRequest, SignalRequest, StartResponse, StatsRequest,
        StatsResponse, Storage, UpdateContainerRequest, UpdateNetworkRequest, WaitResponse,
    },
    guest_ttrpc::Agent,
};
use ttrpc::r#async::{ServerStreamSender, TtrpcContext};

use crate::{
    ground::{errors::RpcError, ids},
    pod::Pod,
};

pub(crate) mod connection;
mod container;
mod errors;
mod machine;
mod process;
mod sandbox;
mod stats;

/// The server.
#[derive(Debug)]
pub(crate) struct Service {
    pod: Arc<Pod>,
}

impl Service {
    /// Serves requests about `pod`.
    pub(crate) fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }

    fn pod(&self) -> Arc<Pod> {
        Arc::clone(&self.pod)
    }
}

/// Completes `work` even when the host does not wait for it.
async fn complete<T: Send + 'static>(
    work: impl Future<Output = Result<T, RpcError>> + Send + 'static,
) -> ttrpc::Result<T> {
    let result = tokio::spawn(work).await.unwrap_or(Err(RpcError::Crashed));
    result.map_err(ttrpc::Error::from)
}

/// Checks the id in the field `field` of a request.
fn check_id(field: &'static str, id: &str) -> Result<(), RpcError> {
    ids::check(id).map_err(|reason| RpcError::Invalid { field, reason })
}

#[async_trait]
impl Agent for Service {
    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        request: ConfigureSandboxRequest,
    ) -> ttrpc::Result<Empty> {
        complete(sandbox::configure(self.pod(), request)).await
    }

    async fn update_network(
        &self,
        _: &TtrpcContext,
        request: UpdateNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        complete(sandbox::update_network(request)).await
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        complete(container::create(self.pod(), request)).await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<Empty> {
        complete(process::exec(self.pod(), request)).await
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<StartResponse> {
        complete(process::start(self.pod(), request)).await
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<WaitResponse> {
        Ok(process::wait(&self.pod, &request).await?)
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalRequest,
    ) -> ttrpc::Result<Empty> {
        complete(process::signal(self.pod(), request)).await
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        Ok(process::resize_terminal(&self.pod, &request)?)
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        Ok(process::close_stdin(&self.pod, &request)?)
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<WaitResponse> {
        complete(process::delete(self.pod(), request)).await
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        complete(container::update(self.pod(), request)).await
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<PidsResponse> {
        complete(container::pids(self.pod(), request)).await
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        complete(container::pause(self.pod(), request)).await
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        complete(container::resume(self.pod(), request)).await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        complete(stats::stats(self.pod(), request)).await
    }

    async fn add_storage(&self, _: &TtrpcContext, request: Storage) -> ttrpc::Result<Empty> {
        complete(sandbox::add_storage(self.pod(), request)).await
    }

    async fn remove_storage(&self, _: &TtrpcContext, request: Storage) -> ttrpc::Result<Empty> {
        complete(sandbox::remove_storage(self.pod(), request)).await
    }

    async fn rescan_devices(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<RescanResponse> {
        complete(machine::rescan()).await
    }

    async fn remove_device(
        &self,
        _: &TtrpcContext,
        request: RemoveDeviceRequest,
    ) -> ttrpc::Result<Empty> {
        complete(machine::remove_device(request)).await
    }

    async fn online_resources(
        &self,
        _: &TtrpcContext,
        request: OnlineResourcesRequest,
    ) -> ttrpc::Result<OnlineResourcesResponse> {
        complete(machine::online(self.pod(), request)).await
    }

    async fn set_clock(&self, _: &TtrpcContext, request: SetClockRequest) -> ttrpc::Result<Empty> {
        Ok(machine::set_clock(&request)?)
    }

    async fn diagnostics(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<DiagnosticsResponse> {
        complete(stats::diagnostics()).await
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: EventsRequest,
        sender: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        // Ends with the connection, or with a host that no longer listens.
        loop {
            let event = self.pod.events.next().await;
            sender.send(&event).await?;
        }
    }

    async fn power_off(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        complete(machine::power_off(self.pod())).await
    }
}
