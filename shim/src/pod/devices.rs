//! Devices that a container is given when it is created.

use pericarp_protocol::guest::Storage;

use crate::{
    errors::CallError,
    guest::{spec::BlockVolume, vfio::VfioPath},
    passthrough::Plugged,
    pod::{Pod, container::Container},
};

/// Gives the guest the block devices that the container has as volumes. The container owns each as
/// soon as it is plugged in, so that a failure gives it back.
pub(crate) async fn plug_volumes(
    pod: &Pod,
    container: &Container,
    volumes: &[BlockVolume],
) -> Result<Vec<Storage>, CallError> {
    let mut storages = Vec::new();
    for (number, volume) in volumes.iter().enumerate() {
        let (disk, node) = pod.disks.plug_volume(&container.id, number, volume).await?;
        container.volumes().push(disk);
        storages.push(node);
    }
    Ok(storages)
}

/// Gives the guest the PCI functions of the container's specification. Returns them with those that
/// all containers of the pod have.
pub(crate) async fn plug_functions(
    pod: &Pod,
    container: &Container,
    nodes: Vec<VfioPath>,
) -> Result<Vec<Plugged>, CallError> {
    for node in nodes {
        let own = container.functions().clone();
        let plugged = pod.passthrough.plug_for_container(node, &own).await?;
        container.functions().extend(plugged);
    }
    let own = container.functions().clone();
    Ok(pod.passthrough.of_pod().into_iter().chain(own).collect())
}
