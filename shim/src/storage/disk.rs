//! Disks that come and go while the guest runs.
//!
//! Plugging: the VMM adds the function, the agent finds it by its address when it mounts it.
//! Unplugging: the agent lets go of it, then the VMM takes it away (docs: architecture, hot-plug).

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::sys::stat;

use pericarp_protocol::{
    guest::{BlockDevice, RemoveDeviceRequest, Storage, storage::Source},
    machine::{Blk, CacheMode, Descriptor, Device, DeviceKind, FieldError, RateLimit, Text},
};
use pericarp_runtime_config::Storage as Settings;
use tracing::warn;

use crate::{
    errors::CallError,
    guest::{
        agent_client::{Agent, agent_call},
        paths,
        spec::BlockVolume,
    },
    machine::client::Machine,
};

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

impl DiskFile {
    /// Opens a block device of the host by its number.
    pub(crate) fn of_host(volume: &BlockVolume) -> Result<Self, CallError> {
        let (major, minor) = volume.number;
        let failed = |error| CallError::host(format!("block device {major}:{minor}"), error);
        // DEVNAME of its uevent is its path beneath /dev (Documentation/core-api/kobject.rst).
        let uevent = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"));
        let uevent = uevent.map_err(failed)?;
        let mut lines = uevent.lines();
        let name = lines.find_map(|line| line.strip_prefix("DEVNAME="));
        let path = Path::new("/dev").join(name.unwrap_or_default());
        let file = File::options()
            .read(true)
            .write(!volume.read_only)
            .open(path)
            .map_err(failed)?;
        let number = file.metadata().map_err(failed)?.rdev();
        let wanted = (u64::try_from(major), u64::try_from(minor));
        if wanted != (Ok(stat::major(number)), Ok(stat::minor(number))) {
            return Err(failed(io::Error::other(
                "/dev has another device in its place",
            )));
        }
        Ok(Self {
            file,
            read_only: volume.read_only,
        })
    }
}

impl Disk {
    /// The disk as a node of a container.
    pub(crate) fn as_node(&self, mount_point: &str, path: &Path) -> Storage {
        Storage {
            mount_point: mount_point.to_owned(),
            source: Some(Source::BlockDevice(BlockDevice {
                pci_address: self.address.clone(),
                raw: true,
                device_path: path.display().to_string(),
                ..Default::default()
            })),
            ..Default::default()
        }
    }
}

/// Plugs disks into one VM and takes them back.
#[derive(Debug, Clone)]
pub(crate) struct Disks {
    machine: Machine,
    agent: Agent,
    settings: Settings,
    /// Number of the next disk: no two disks of a VM have the same name.
    next: Arc<AtomicU64>,
}

impl Disks {
    /// Disks of the VM behind `machine` and `agent`.
    pub(crate) fn new(machine: &Machine, agent: &Agent, settings: &Settings) -> Self {
        Self {
            machine: machine.clone(),
            agent: agent.clone(),
            settings: settings.clone(),
            next: Arc::new(AtomicU64::new(1)),
        }
    }

    /// Size of a container's writable disk.
    pub(crate) fn scratch_bytes(&self) -> u64 {
        self.settings.scratch_size_mib << 20
    }

    /// Gives the guest a disk.
    pub(crate) async fn plug(&self, file: DiskFile, cache: CacheMode) -> Result<Disk, CallError> {
        let name = format!("disk-{}", self.next.fetch_add(1, Ordering::Relaxed));
        let device = describe(&name, file.read_only, cache, limit(&self.settings))
            .map_err(|error| CallError::Host(format!("disk {name}: {error}")))?;
        let descriptors = vec![file.file.into()];
        let address = self.machine.add_device(device, descriptors).await?;
        Ok(Disk {
            name,
            address: address.to_string(),
        })
    }

    /// Gives the guest a block device that container `id` has as its volume of this number.
    pub(crate) async fn plug_volume(
        &self,
        id: &str,
        number: usize,
        volume: &BlockVolume,
    ) -> Result<(Disk, Storage), CallError> {
        let file = DiskFile::of_host(volume)?;
        let disk = self.plug(file, CacheMode::WriteBack).await?;
        let node = disk.as_node(&paths::volume_node(id, number), &volume.path);
        Ok((disk, node))
    }

    /// Takes the disk back from a guest that lets go. What is left of it goes with the VM. False
    /// when the guest did not answer.
    pub(crate) async fn unplug(&self, disk: &Disk, lets_go: bool) -> bool {
        if !lets_go {
            return false;
        }
        let request = RemoveDeviceRequest {
            pci_address: disk.address.clone(),
            ..Default::default()
        };
        let released = match agent_call!(self.agent, remove_device, &request) {
            // A guest that never looked has nothing to let go of.
            Err(error) if error.is_not_found() => Ok(()),
            other => other.map(drop),
        };
        let removed = match released {
            Ok(()) => self.machine.remove_device(&disk.name).await,
            Err(error) => Err(error),
        };
        let lets_go = !removed.as_ref().is_err_and(CallError::is_deadline);
        match removed {
            Ok(()) | Err(CallError::Gone(_)) => {}
            Err(error) => warn!(disk = disk.name, %error, "a disk stays until the VM ends"),
        }
        lets_go
    }
}

fn limit(storage: &Settings) -> RateLimit {
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
