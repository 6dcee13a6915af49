//! One resource towards the kubelet: its devices as a stream that follows the host, and what a
//! container gets for each.

use std::path::{Path, PathBuf};
use std::pin::Pin;

use anyhow::Context;
use futures::Stream;
use pericarp_runtime_config::{DeviceResource, PciSelector};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::api::{
    self, AllocateRequest, AllocateResponse, ContainerAllocateRequest, ContainerAllocateResponse,
    Device, DevicePluginOptions, DeviceSpec, Empty, ListAndWatchResponse, NumaNode,
    PreStartContainerRequest, PreferredAllocationRequest, PreferredAllocationResponse,
    TopologyInfo,
};
use super::host::{self, Offer};
use super::service::device_plugin_server::{DevicePlugin, DevicePluginServer};

/// What goes before the names of resources.
pub(crate) const DOMAIN: &str = "pericarp.dev";

/// Functions of this host under one name.
#[derive(Debug)]
pub(crate) struct Resource {
    /// As configured.
    pub(crate) resource: DeviceResource,
    allowed: Vec<PciSelector>,
    offers: watch::Sender<Vec<Offer>>,
}

impl Resource {
    /// Nothing was looked at yet.
    pub(crate) fn new(resource: DeviceResource, allowed: Vec<PciSelector>) -> Self {
        Self {
            resource,
            allowed,
            offers: watch::Sender::new(Vec::new()),
        }
    }

    /// Its name for pods.
    pub(crate) fn name(&self) -> String {
        format!("{DOMAIN}/{}", self.resource.name)
    }

    /// Its socket in the kubelet's folder.
    pub(crate) fn socket(&self, folder: &Path) -> PathBuf {
        folder.join(format!("pericarp-{}.sock", self.resource.name))
    }

    /// Looks at the host; whoever watches is told of what changed.
    pub(crate) fn look(&self) -> anyhow::Result<()> {
        let offers = host::offers(Path::new("/sys"), &self.resource, &self.allowed)
            .context("/sys/bus/pci/devices")?;
        self.offers.send_if_modified(|before| {
            let changed = *before != offers;
            *before = offers;
            changed
        });
        Ok(())
    }

    /// Functions that a pod can have now.
    pub(crate) fn healthy(&self) -> usize {
        let offers = self.offers.borrow();
        offers.iter().filter(|offer| offer.healthy).count()
    }
}

/// Serves a resource until dropped.
pub(crate) async fn serve(
    resource: std::sync::Arc<Resource>,
    listener: UnixListener,
) -> Result<(), tonic::transport::Error> {
    let incoming = futures::stream::unfold(listener, |listener| async move {
        let accepted: std::io::Result<UnixStream> =
            listener.accept().await.map(|(stream, _)| stream);
        Some((accepted, listener))
    });
    tonic::transport::Server::builder()
        .serve_with_incoming(DevicePluginServer::new(Served(resource)), incoming)
        .await
}

#[derive(Debug)]
struct Served(std::sync::Arc<Resource>);

#[tonic::async_trait]
impl DevicePlugin for Served {
    async fn get_device_plugin_options(
        &self,
        _: Request<Empty>,
    ) -> Result<Response<DevicePluginOptions>, Status> {
        Ok(Response::new(DevicePluginOptions::default()))
    }

    type ListAndWatchStream =
        Pin<Box<dyn Stream<Item = Result<ListAndWatchResponse, Status>> + Send>>;

    async fn list_and_watch(
        &self,
        _: Request<Empty>,
    ) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let mut offers = self.0.offers.subscribe();
        offers.mark_changed();
        let stream = futures::stream::unfold(offers, |mut offers| async move {
            offers.changed().await.ok()?;
            let devices = offers.borrow_and_update().iter().map(device).collect();
            Some((Ok(ListAndWatchResponse { devices }), offers))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn get_preferred_allocation(
        &self,
        _: Request<PreferredAllocationRequest>,
    ) -> Result<Response<PreferredAllocationResponse>, Status> {
        Err(Status::unimplemented("one function is as good as another"))
    }

    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> Result<Response<AllocateResponse>, Status> {
        let offers = self.0.offers.borrow().clone();
        let requests = request.into_inner().container_requests;
        let responses = requests.iter().map(|request| give(request, &offers));
        let container_responses = responses.collect::<Result<_, _>>()?;
        Ok(Response::new(AllocateResponse {
            container_responses,
        }))
    }

    async fn pre_start_container(
        &self,
        _: Request<PreStartContainerRequest>,
    ) -> Result<Response<Empty>, Status> {
        Ok(Response::new(Empty {}))
    }
}

fn device(offer: &Offer) -> Device {
    let health = if offer.healthy {
        api::HEALTHY
    } else {
        api::UNHEALTHY
    };
    Device {
        id: offer.address.clone(),
        health: health.to_owned(),
        topology: offer.numa_node.map(|node| TopologyInfo {
            nodes: vec![NumaNode { id: node.into() }],
        }),
    }
}

fn give(
    request: &ContainerAllocateRequest,
    offers: &[Offer],
) -> Result<ContainerAllocateResponse, Status> {
    let mut devices = Vec::new();
    for id in &request.devices_ids {
        let offer = offers.iter().find(|offer| offer.address == *id);
        let offer = offer.ok_or_else(|| Status::not_found(format!("there is no function {id}")))?;
        let group = offer.group.filter(|_| offer.healthy).ok_or_else(|| {
            Status::failed_precondition(format!(
                "function {id} has another driver than vfio-pci, no IOMMU group, or is not in \
                    security.passthrough_devices"
            ))
        })?;
        let path = host::node(group).display().to_string();
        devices.push(DeviceSpec {
            container_path: path.clone(),
            host_path: path,
            permissions: "rwm".to_owned(),
        });
    }
    Ok(ContainerAllocateResponse {
        devices,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(address: &str, group: Option<u32>, healthy: bool) -> Offer {
        Offer {
            address: address.to_owned(),
            group,
            numa_node: Some(1),
            healthy,
        }
    }

    #[test]
    fn a_container_gets_the_groups_of_its_functions() {
        let offers = [
            offer("0000:3b:00.0", Some(7), true),
            offer("0000:5e:00.0", Some(9), false),
        ];
        let ask = |ids: &[&str]| {
            let devices_ids = ids.iter().map(|id| (*id).to_owned()).collect();
            give(&ContainerAllocateRequest { devices_ids }, &offers)
        };
        let given = ask(&["0000:3b:00.0"]).unwrap().devices;
        assert_eq!(given.len(), 1);
        assert_eq!(given[0].host_path, "/dev/vfio/7");
        let error = ask(&["0000:5e:00.0"]).unwrap_err();
        assert!(error.message().contains("0000:5e:00.0"), "{error}");
        assert!(ask(&["0000:99:00.0"]).is_err());
        let shown = device(&offers[1]);
        assert_eq!(shown.health, "Unhealthy");
        assert_eq!(shown.topology.unwrap().nodes[0].id, 1);
    }
}
