//! PCI functions of the host for one container: from the group that its specification names to the
//! function in the guest, and back.
//!
//! ```text
//! /dev/vfio/7 --check--> open group, container, functions --AddDevice--> in the guest, by address
//!                                                                           | container is gone
//! the kernel resets it <--- VMM gives it back <--- the agent lets go <------+
//! ```
//!
//! Nothing of it outlives the VMM: when that ends, however it ends, the kernel takes the function
//! back and resets it. So the journal of undo steps has no entry for it but the VMM's own.

pub(crate) mod group;

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use pericarp_protocol::{
    guest::RemoveDeviceRequest,
    limits::DRIVER_SECONDS_MAX,
    machine::{Descriptor, Device, DeviceKind, FieldError, Function, Text},
};
use pericarp_runtime_config::PciSelector;
use pericarp_sys::vfio::{Container, Group};
use tracing::{info, warn};

use self::group::{Host, HostFunction};
use crate::{
    agent_client::{Agent, agent_call},
    errors::CallError,
    pod::Pod,
};

/// Node of the host from which containers of VFIO come.
const CONTAINER: &str = "/dev/vfio/vfio";

/// Memory of the VMM and the file-system daemon beside the guest's, which the pod's limit must
/// leave.
const PROCESSES_BYTES: u64 = 16 << 20;

/// What a pod needs to be given functions.
#[derive(Debug)]
pub(crate) struct Passthrough {
    allowed: Vec<PciSelector>,
    memory_bytes: u64,
    cgroup: Option<std::path::PathBuf>,
    /// The view of memory that all functions of the VM share, open from the first on.
    container: Mutex<Option<Arc<Container>>>,
}

/// A function in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plugged {
    name: String,
    /// Its address on the host, and its group.
    host: (String, u32),
    /// Where the guest finds it.
    pub(crate) address: String,
}

/// The agent, with the time that the drivers of `functions` may take.
pub(crate) fn patient(agent: &Agent, functions: &[Plugged]) -> Agent {
    if functions.is_empty() {
        return agent.clone();
    }
    agent.with_more_time(Duration::from_secs(DRIVER_SECONDS_MAX))
}

/// Names the host's functions in what the agent says of them by the guest's addresses.
pub(crate) fn explain(error: CallError, functions: &[Plugged]) -> CallError {
    let CallError::Agent(code, reason) = error else {
        return error;
    };
    let named = functions.iter().find(|one| reason.contains(&one.address));
    let Some(Plugged { host, .. }) = named else {
        return CallError::Agent(code, reason);
    };
    let field = group::field(host.1);
    CallError::Agent(code, format!("{field}: function {}: {reason}", host.0))
}

/// A function that is open.
struct Opened {
    function: HostFunction,
    descriptors: [OwnedFd; 3],
}

impl Passthrough {
    /// For a pod whose VM has `memory_bytes` and lives in `cgroup`.
    pub(crate) fn new(allowed: &[PciSelector], memory_bytes: u64, cgroup: Option<&Path>) -> Self {
        Self {
            allowed: allowed.to_vec(),
            memory_bytes,
            cgroup: cgroup.map(Path::to_owned),
            container: Mutex::default(),
        }
    }

    fn container(&self) -> Result<Arc<Container>, CallError> {
        let mut container = self
            .container
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(container) = &*container {
            return Ok(Arc::clone(container));
        }
        let failed = |error| CallError::host(CONTAINER, error);
        let made = Container::new(open(CONTAINER).map_err(failed)?).map_err(failed)?;
        let made = Arc::new(made);
        *container = Some(Arc::clone(&made));
        Ok(made)
    }

    /// Opens every function of `number` after all that could be against it has been looked at.
    fn open(&self, number: u32) -> Result<Vec<Opened>, CallError> {
        let functions = Host::default().functions(number, &self.allowed)?;
        let first = functions.first().map_or("", |one| one.address.as_str());
        let refuse = |reason: String| {
            let field = group::field(number);
            CallError::Invalid(format!("{field}: function {first}: {reason}"))
        };
        if let Some(limit) = self.limit_below() {
            return Err(refuse(limit));
        }
        let path = format!("/dev/vfio/{number}");
        let opened = open(&path).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => refuse(
                "it is in use by another pod or process: a function belongs to one at a time"
                    .to_owned(),
            ),
            _ => CallError::host(&path, error),
        })?;
        let group = Group::from(opened);
        let failed = |step: &'static str| {
            let path = &path;
            move |error| CallError::host(format!("{step} of {path}"), error)
        };
        if !group.is_viable().map_err(failed("state"))? {
            return Err(refuse(
                "another function of its group is in use by the host: give all of them to vfio-pci"
                    .to_owned(),
            ));
        }
        let container = self.container()?;
        if !container.has_iommu().map_err(failed("IOMMU"))? {
            return Err(refuse(
                "the kernel has no translation for devices: load the module vfio_iommu_type1"
                    .to_owned(),
            ));
        }
        group.enter(&container).map_err(failed("container"))?;
        container
            .set_iommu()
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EPERM) => refuse(
                    "this host cannot keep a device from sending any interrupt it likes: switch \
                    interrupt remapping on in the firmware"
                        .to_owned(),
                ),
                _ => failed("IOMMU")(error),
            })?;
        let mut all = Vec::new();
        for function in functions {
            let opened = group.open(&function.address);
            let object = format!("function {}", function.address);
            let failed = |error| CallError::host(&object, error);
            let descriptors = [
                opened.map_err(failed)?,
                group.as_fd().try_clone_to_owned().map_err(failed)?,
                container.as_fd().try_clone_to_owned().map_err(failed)?,
            ];
            all.push(Opened {
                function,
                descriptors,
            });
        }
        Ok(all)
    }

    /// How long it may take until all memory is there and pinned: the host clears each page of it.
    fn pinning(&self) -> Duration {
        const SECONDS_PER_GIB: u64 = 2;
        Duration::from_secs(SECONDS_PER_GIB * (1 + (self.memory_bytes >> 30)))
    }

    /// Why the pod's own limit would end it once all of its memory is pinned.
    fn limit_below(&self) -> Option<String> {
        let below = limit_below(self.cgroup.as_deref()?, self.memory_bytes)?;
        Some(format!(
            "all memory of the VM is pinned while it has a device: {below}"
        ))
    }
}

/// Why a limit of `cgroup`, or above it, would end a VM that has used all of its memory.
pub(crate) fn limit_below(cgroup: &Path, memory_bytes: u64) -> Option<String> {
    let needed = memory_bytes + PROCESSES_BYTES;
    let (limit, place) = lowest_limit(cgroup, Path::new("/sys/fs/cgroup"))?;
    (limit < needed).then(|| {
        format!(
            "{} MiB with its processes, but {} allows {} MiB: raise overhead.podFixed.memory of \
             the RuntimeClass",
            needed >> 20,
            place.display(),
            limit >> 20
        )
    })
}

/// The lowest limit of memory from `cgroup` up to `root`, and whose it is.
fn lowest_limit(cgroup: &Path, root: &Path) -> Option<(u64, std::path::PathBuf)> {
    let above = cgroup.ancestors().take_while(|path| *path != root);
    let limits = above.filter_map(|path| {
        let file = path.join("memory.max");
        let text = std::fs::read_to_string(&file).ok()?;
        Some((text.trim().parse().ok()?, file))
    });
    limits.min_by_key(|(limit, _)| *limit)
}

fn open(path: &str) -> io::Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.map(|file: File| file.into())
}

/// Gives the guest every function of a group. On failure it has none of them.
pub(crate) async fn plug(pod: &Arc<Pod>, number: u32) -> Result<Vec<Plugged>, CallError> {
    let opener = Arc::clone(pod);
    // Opening resets the functions, which takes its time.
    let opened = tokio::task::spawn_blocking(move || opener.passthrough.open(number)).await;
    let opened = opened.map_err(|error| CallError::host(group::field(number), error))??;
    let mut plugged = Vec::new();
    for one in opened {
        match plug_one(pod, number, one).await {
            Ok(function) => plugged.push(function),
            Err(error) => {
                for function in &plugged {
                    function.unplug(pod).await;
                }
                return Err(error);
            }
        }
    }
    Ok(plugged)
}

async fn plug_one(pod: &Arc<Pod>, number: u32, opened: Opened) -> Result<Plugged, CallError> {
    let host_address = &opened.function.address;
    let name = device_name(host_address);
    let device = describe(&name, number)
        .map_err(|error| CallError::Host(format!("function {host_address}: {error}")))?;
    let machine = pod.machine.with_more_time(pod.passthrough.pinning());
    let added = machine.add_device(device, opened.descriptors.into());
    let address = added.await.map_err(|error| match error {
        CallError::Host(reason) => {
            let field = group::field(number);
            CallError::Invalid(format!("{field}: function {host_address}: {reason}"))
        }
        other => other,
    })?;
    let address = address.to_string();
    info!(
        host_address,
        address, "a function of the host is the guest's"
    );
    Ok(Plugged {
        name,
        host: (host_address.clone(), number),
        address,
    })
}

impl Plugged {
    /// Takes the function back. What the guest does not let go of goes with the VM.
    pub(crate) async fn unplug(&self, pod: &Arc<Pod>) {
        let request = RemoveDeviceRequest {
            pci_address: self.address.clone(),
            ..Default::default()
        };
        match agent_call!(pod.agent, remove_device, &request) {
            Ok(_) | Err(CallError::Gone(_)) => {}
            // A guest that never looked has nothing to let go of.
            Err(error) if error.is_not_found() => {}
            // It is taken all the same: the function is the host's.
            Err(error) => warn!(function = self.name, %error, "the guest keeps a function"),
        }
        match pod.machine.remove_device(&self.name).await {
            Ok(()) => info!(function = self.name, "a function is the host's again"),
            Err(CallError::Gone(_)) => {}
            Err(error) => warn!(function = self.name, %error, "a function stays until the VM ends"),
        }
    }
}

/// The device's name: that of the host's function, in the letters that names have.
fn device_name(host_address: &str) -> String {
    format!("pci-{}", host_address.replace(':', "-"))
}

fn describe(name: &str, group_number: u32) -> Result<Device, FieldError> {
    let at = |position| Descriptor { position };
    Ok(Device {
        name: Text::new("name", name)?,
        kind: DeviceKind::Function(Function {
            function: at(0),
            group: at(1),
            group_number,
            container: at(2),
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_after_functions() {
        let name = device_name("0000:3b:00.0");
        assert_eq!(name, "pci-0000-3b-00.0");
        describe(&name, 7).unwrap().check().unwrap();
    }

    #[test]
    fn the_guests_addresses_become_the_hosts() {
        let plugged = Plugged {
            name: "pci-0000-3b-00.0".to_owned(),
            host: ("0000:3b:00.0".to_owned(), 7),
            address: "0000:00:09.0".to_owned(),
        };
        let error = |reason: &str| CallError::Agent(ttrpc::Code::INTERNAL, reason.to_owned());
        let said =
            |reason: &str| explain(error(reason), std::slice::from_ref(&plugged)).to_string();
        let words = "linux.devices[/dev/vfio/7]: function 0000:3b:00.0: no driver of 0000:00:09.0";
        assert_eq!(said("no driver of 0000:00:09.0"), words);
        assert_eq!(said("something else"), "something else");
    }

    #[test]
    fn the_lowest_limit_counts() {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("kubepods/pod1");
        let sandbox = pod.join("sandbox");
        std::fs::create_dir_all(&sandbox).unwrap();
        std::fs::write(root.path().join("memory.max"), "1\n").unwrap();
        assert_eq!(lowest_limit(&sandbox, root.path()), None);
        std::fs::write(sandbox.join("memory.max"), "max\n").unwrap();
        std::fs::write(pod.join("memory.max"), "268435456\n").unwrap();
        std::fs::write(pod.with_file_name("memory.max"), "536870912\n").unwrap();
        let (limit, place) = lowest_limit(&sandbox, root.path()).unwrap();
        assert_eq!((limit, place), (256 << 20, pod.join("memory.max")));
        // The root of real cgroups has no such file.
        std::fs::remove_file(root.path().join("memory.max")).unwrap();
        let passthrough = |mib: u64| Passthrough::new(&[], mib << 20, Some(&sandbox));
        assert!(passthrough(240).limit_below().is_none());
        let error = passthrough(241).limit_below().unwrap();
        assert!(
            error.contains("257 MiB") && error.contains("overhead"),
            "{error}"
        );
    }
}
