//! The machine: devices, vCPUs and memory, clock, power.

use std::sync::Arc;

use pericarp_protocol::guest::{
    Empty, OnlineResourcesRequest, OnlineResourcesResponse, RemoveDeviceRequest, RescanResponse,
    SetClockRequest,
};

use crate::{
    ground::{clock, errors::RpcError},
    machine::devices,
    pod::{Pod, blocking},
};

/// Finds functions that the host added.
pub(super) async fn rescan() -> Result<RescanResponse, RpcError> {
    let addresses = blocking(devices::rescan).await??;
    Ok(RescanResponse {
        pci_addresses: addresses.iter().map(ToString::to_string).collect(),
        ..Default::default()
    })
}

/// Gives a function up, so that the host may take it away.
pub(super) async fn remove_device(request: RemoveDeviceRequest) -> Result<Empty, RpcError> {
    let address = devices::address("pci_address", &request.pci_address)?;
    blocking(move || devices::remove(&address)).await??;
    Ok(Empty::new())
}

/// Brings vCPUs and memory online or offline.
pub(super) async fn online(
    pod: Arc<Pod>,
    request: OnlineResourcesRequest,
) -> Result<OnlineResourcesResponse, RpcError> {
    let online = blocking(move || {
        let online = devices::online(request.vcpus, request.memory);
        pod.limits.follow();
        pod.bound_threads();
        online
    })
    .await??;
    Ok(OnlineResourcesResponse {
        vcpus: online.vcpus,
        memory_bytes: online.memory_bytes,
        ..Default::default()
    })
}

/// Sets the wall clock, after a pause of the machine.
pub(super) fn set_clock(request: &SetClockRequest) -> Result<Empty, RpcError> {
    if request.wall_clock_ns <= 0 {
        return Err(RpcError::Invalid {
            field: "wall_clock_ns",
            reason: format!("{} is not a time after the epoch", request.wall_clock_ns),
        });
    }
    clock::set_wall_clock_ns(request.wall_clock_ns)
        .map_err(|error| RpcError::kernel("set the clock")(error.into()))?;
    Ok(Empty::new())
}

/// Ends everything; the power goes once the host has its answer.
pub(super) async fn power_off(pod: Arc<Pod>) -> Result<Empty, RpcError> {
    pod.end_everything().await;
    pod.powering_off.notify_one();
    Ok(Empty::new())
}
