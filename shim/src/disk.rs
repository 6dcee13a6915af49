//! Disks that come and go while the guest runs.
//!
//! Plugging: the VMM adds the function, the agent finds it by its address when it mounts it.
//! Unplugging: the agent lets go of it, then the VMM takes it away (docs: architecture, hot-plug).

use std::{fs::File, sync::Arc};

use pericarp_protocol::{
    guest::RemoveDeviceRequest,
    machine::{Blk, CacheMode, Descriptor, Device, DeviceKind, FieldError, RateLimit, Text},
};
use tracing::warn;

use crate::{agent_client::agent_call, errors::CallError, pod::Pod};

/// A file or block device that is open for a guest.
#[derive(Debug)]
pub(crate) struct DiskFile {
    /// Open for reading, and for writing unless `read_only`.
    pub(crate) file: File,
    /// The guest may not write.
    pub(crate) read_only: bool,
}

/// A disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    name: String,
    /// Where the guest finds it.
    pub(crate) address: String,
}

impl Disk {
    /// Gives the guest a disk.
    pub(crate) async fn plug(
        pod: &Arc<Pod>,
        file: DiskFile,
        cache: CacheMode,
    ) -> Result<Self, CallError> {
        let name = format!("disk-{}", pod.disk_number());
        let device = describe(&name, file.read_only, cache, limit(&pod.storage))
            .map_err(|error| CallError::Host(format!("disk {name}: {error}")))?;
        let descriptors = vec![file.file.into()];
        let address = pod.machine.add_device(device, descriptors).await?;
        Ok(Self {
            name,
            address: address.to_string(),
        })
    }

    /// Takes the disk back. What is left of it goes with the VM.
    pub(crate) async fn unplug(&self, pod: &Arc<Pod>) {
        let request = RemoveDeviceRequest {
            pci_address: self.address.clone(),
            ..Default::default()
        };
        let released = match agent_call!(pod.agent, remove_device, &request) {
            // A guest that never looked has nothing to let go of.
            Err(error) if error.is_not_found() => Ok(()),
            other => other.map(drop),
        };
        let removed = match released {
            Ok(()) => pod.machine.remove_device(&self.name).await,
            Err(error) => Err(error),
        };
        match removed {
            Ok(()) | Err(CallError::Gone(_)) => {}
            Err(error) => warn!(disk = self.name, %error, "a disk stays until the VM ends"),
        }
    }
}

fn limit(storage: &pericarp_runtime_config::Storage) -> RateLimit {
    RateLimit {
        operations_per_s: storage.disk_requests_per_s,
        bytes_per_s: storage.disk_kib_per_s << 10,
        ..RateLimit::default()
    }
}

fn describe(
    name: &str,
    read_only: bool,
    cache: CacheMode,
    limit: RateLimit,
) -> Result<Device, FieldError> {
    Ok(Device {
        name: Text::new("name", name)?,
        kind: DeviceKind::Blk(Blk {
            file: Descriptor { position: 0 },
            read_only,
            serial: Text::new("serial", name)?,
            queues: 1,
            cache,
            limit,
        }),
    })
}

#[cfg(test)]
mod tests {
    use pericarp_runtime_config::Config;

    use super::*;

    #[test]
    fn the_operators_limits_reach_the_disk() {
        let mut storage = Config::default().settings.storage;
        assert_eq!(limit(&storage), RateLimit::default());
        storage.disk_kib_per_s = 3;
        storage.disk_requests_per_s = 5;
        let limit = limit(&storage);
        assert_eq!((limit.bytes_per_s, limit.operations_per_s), (3072, 5));
        let device = describe("disk-1", true, CacheMode::Unsafe, limit).unwrap();
        device.check().unwrap();
    }
}
