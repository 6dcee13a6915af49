//! PCI functions of the host for one container, or for all of a pod: from the group that its
//! specification names, or the pod's settings, to the function in the guest, and back.
//!
//! ```text
//! /dev/vfio/7 --check--> open group, container, functions --AddDevice--> in the guest, by address
//!                        or iommufd and functions                           | container is gone
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
    guest::{Empty, RemoveDeviceRequest},
    limits::DRIVER_SECONDS_MAX,
    machine::{Descriptor, Device, DeviceKind, FieldError, Function, List, Text},
};
use pericarp_runtime_config::{PciSelector, keys::Settings};
use pericarp_sys::vfio::{Container, Group};
use tracing::{info, warn};

use self::group::{Host, HostFunction, IOMMUFD, VfioPath, Wanted};
use crate::{
    errors::CallError,
    guest::agent_client::{Agent, agent_call},
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
    view: Mutex<Option<View>>,
    /// Functions that are the whole pod's, until its end.
    of_pod: Mutex<Vec<Plugged>>,
}

/// A function in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plugged {
    name: String,
    /// Its address on the host, and what asked for its group.
    host: (String, Wanted),
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
    let (address, Wanted { field, .. }) = host;
    CallError::Agent(code, format!("{field}: function {address}: {reason}"))
}

/// How functions are opened and reach memory.
#[derive(Debug, Clone)]
enum View {
    /// By groups in a container.
    Container(Arc<Container>),
    /// By their own nodes.
    Iommufd(Arc<OwnedFd>),
}

/// A function that is open.
struct Opened {
    function: HostFunction,
    /// Its own, that of the view, and that of its group if there is one.
    descriptors: Vec<OwnedFd>,
}

impl Passthrough {
    /// For a pod whose VM has `memory_bytes` and lives in `cgroup`.
    pub(crate) fn new(allowed: &[PciSelector], memory_bytes: u64, cgroup: Option<&Path>) -> Self {
        Self {
            allowed: allowed.to_vec(),
            memory_bytes,
            cgroup: cgroup.map(Path::to_owned),
            view: Mutex::default(),
            of_pod: Mutex::default(),
        }
    }

    /// Functions that every container of the pod has.
    pub(crate) fn of_pod(&self) -> Vec<Plugged> {
        let functions = self.of_pod.lock();
        functions.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn keep(&self, functions: Vec<Plugged>) {
        let kept = self.of_pod.lock();
        kept.unwrap_or_else(PoisonError::into_inner)
            .extend(functions);
    }

    /// The VM's view of memory: iommufd where the kernel has it and makes `functions` nodes of
    /// their own.
    fn view(&self, functions: &[HostFunction]) -> Result<View, CallError> {
        let mut view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(view) = &*view {
            return Ok(view.clone());
        }
        let host = Host::default();
        let own = |one: &HostFunction| {
            host.own_node(&one.address)
                .is_some_and(|node| node.exists())
        };
        let made = match open(IOMMUFD) {
            Ok(iommufd) if functions.iter().all(own) => View::Iommufd(Arc::new(iommufd)),
            _ => {
                let failed = |error| CallError::host(CONTAINER, error);
                let made = Container::new(open(CONTAINER).map_err(failed)?);
                View::Container(Arc::new(made.map_err(failed)?))
            }
        };
        *view = Some(made.clone());
        Ok(made)
    }

    /// Opens every function of a group after all that could be against it has been looked at.
    fn open(&self, wanted: &Wanted) -> Result<Vec<Opened>, CallError> {
        let functions = Host::default().functions(wanted, &self.allowed)?;
        if let Some(limit) = self.limit_below() {
            let first = functions.first().map_or("", |one| one.address.as_str());
            return Err(wanted.refuse(format_args!("function {first}: {limit}")));
        }
        match self.view(&functions)? {
            View::Container(container) => open_group(&container, wanted, functions),
            View::Iommufd(iommufd) => functions
                .into_iter()
                .map(|function| open_own(&iommufd, function))
                .collect(),
        }
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

/// Opens a function by its own node. The VMM binds it, and says what is against that.
fn open_own(iommufd: &OwnedFd, function: HostFunction) -> Result<Opened, CallError> {
    let object = format!("function {}", function.address);
    let failed = |error| CallError::host(&object, error);
    let node = Host::default().own_node(&function.address);
    let node = node.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    let own = open(&node).map_err(failed)?;
    let descriptors = vec![own, iommufd.try_clone().map_err(failed)?];
    Ok(Opened {
        function,
        descriptors,
    })
}

/// Opens every function of a group, which goes into `container`.
fn open_group(
    container: &Container,
    wanted: &Wanted,
    functions: Vec<HostFunction>,
) -> Result<Vec<Opened>, CallError> {
    let first = functions.first().map_or("", |one| one.address.as_str());
    let refuse = |reason: &str| wanted.refuse(format_args!("function {first}: {reason}"));
    let path = format!("/dev/vfio/{}", wanted.group);
    let opened = open(&path).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => {
            refuse("it is in use by another pod or process: a function belongs to one at a time")
        }
        _ => CallError::host(&path, error),
    })?;
    let group = Group::from(opened);
    let failed = |step: &'static str| {
        let path = &path;
        move |error| CallError::host(format!("{step} of {path}"), error)
    };
    if !group.is_viable().map_err(failed("state"))? {
        return Err(refuse(
            "another function of its group is in use by the host: give all of them to vfio-pci",
        ));
    }
    if !container.has_iommu().map_err(failed("IOMMU"))? {
        return Err(refuse(
            "the kernel has no translation for devices: load the module vfio_iommu_type1",
        ));
    }
    group.enter(container).map_err(failed("container"))?;
    container
        .set_iommu()
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM) => refuse(
                "this host cannot keep a device from sending any interrupt it likes: switch \
                    interrupt remapping on in the firmware",
            ),
            _ => failed("IOMMU")(error),
        })?;
    let mut all = Vec::new();
    for function in functions {
        let opened = group.open(&function.address);
        let object = format!("function {}", function.address);
        let failed = |error| CallError::host(&object, error);
        let descriptors = vec![
            opened.map_err(failed)?,
            container.as_fd().try_clone_to_owned().map_err(failed)?,
            group.as_fd().try_clone_to_owned().map_err(failed)?,
        ];
        all.push(Opened {
            function,
            descriptors,
        });
    }
    Ok(all)
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

fn open(path: impl AsRef<Path>) -> io::Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.map(|file: File| file.into())
}

/// The groups of the functions that the pod's settings name, each once, all of which it may have.
pub(crate) fn wanted(settings: &Settings) -> Result<Vec<Wanted>, CallError> {
    let host = Host::default();
    let mut groups: Vec<Wanted> = Vec::new();
    for address in &settings.devices.functions {
        let wanted = host.group_of(address)?;
        host.functions(&wanted, &settings.security.passthrough_devices)?;
        if groups.iter().all(|other| other.group != wanted.group) {
            groups.push(wanted);
        }
    }
    Ok(groups)
}

/// Gives a pod that has no container yet the functions of its settings, for all of them.
pub(crate) async fn plug_for_pod(pod: &Arc<Pod>, groups: &[Wanted]) -> Result<(), CallError> {
    for wanted in groups {
        let plugged = plug(pod, wanted).await?;
        pod.passthrough.keep(plugged);
    }
    if !groups.is_empty() {
        // Drivers begin now, not with the first container.
        let agent = patient(&pod.agent, &pod.passthrough.of_pod());
        agent_call!(agent, rescan_devices, &Empty::new())?;
    }
    Ok(())
}

/// Plugs in the functions that `nodes` of the host mean, for a container that has them from then
/// on. Gives them with those that are the whole pod's.
pub(crate) async fn plug_for_container(
    pod: &Arc<Pod>,
    container: &crate::pod::container::Container,
    nodes: Vec<VfioPath>,
) -> Result<Vec<Plugged>, CallError> {
    let of_pod = pod.passthrough.of_pod();
    for node in nodes {
        let wanted = Host::default().wanted(node)?;
        // Nodes of two functions of a group mean the same.
        let has = |functions: &[Plugged]| functions.iter().any(|one| one.is_of(wanted.group));
        if has(&of_pod) || has(&container.functions()) {
            continue;
        }
        let plugged = plug(pod, &wanted).await?;
        container.functions().extend(plugged);
    }
    let own = container.functions().clone();
    Ok(of_pod.into_iter().chain(own).collect())
}

/// Gives the guest every function of a group. On failure it has none of them.
async fn plug(pod: &Arc<Pod>, wanted: &Wanted) -> Result<Vec<Plugged>, CallError> {
    let (opener, asked) = (Arc::clone(pod), wanted.clone());
    // Opening resets the functions, which takes its time.
    let opened = tokio::task::spawn_blocking(move || opener.passthrough.open(&asked)).await;
    let opened = opened.map_err(|error| CallError::host(&wanted.field, error))??;
    let mut plugged = Vec::new();
    for one in opened {
        match plug_one(pod, wanted, one).await {
            Ok(function) => plugged.push(function),
            Err(error) => {
                let mut lets_go = true;
                for function in &plugged {
                    lets_go = function.unplug(pod, lets_go).await;
                }
                return Err(error);
            }
        }
    }
    Ok(plugged)
}

async fn plug_one(pod: &Arc<Pod>, wanted: &Wanted, opened: Opened) -> Result<Plugged, CallError> {
    let host_address = &opened.function.address;
    let name = device_name(host_address);
    let by_group = opened.descriptors.len() > 2;
    let device = describe(&name, wanted.group, by_group)
        .map_err(|error| CallError::Host(format!("function {host_address}: {error}")))?;
    let machine = pod.machine.with_more_time(pod.passthrough.pinning());
    let added = machine.add_device(device, opened.descriptors);
    let address = added.await.map_err(|error| match error {
        CallError::Host(reason) => wanted.refuse(format_args!("function {host_address}: {reason}")),
        other => other,
    })?;
    let address = address.to_string();
    info!(
        host_address,
        address, "a function of the host is the guest's"
    );
    Ok(Plugged {
        name,
        host: (host_address.clone(), wanted.clone()),
        address,
    })
}

impl Plugged {
    /// Whether it came with this group.
    fn is_of(&self, group: u32) -> bool {
        self.host.1.group == group
    }

    /// Takes the function back, also from a guest that does not let go. False when the guest did
    /// not answer; then it is not asked again.
    pub(crate) async fn unplug(&self, pod: &Arc<Pod>, lets_go: bool) -> bool {
        let lets_go = lets_go && self.ask(pod).await;
        match pod.machine.remove_device(&self.name).await {
            Ok(()) => info!(function = self.name, "a function is the host's again"),
            Err(CallError::Gone(_)) => {}
            Err(error) => warn!(function = self.name, %error, "a function stays until the VM ends"),
        }
        lets_go
    }

    /// Asks the guest to let go; false when it did not answer.
    async fn ask(&self, pod: &Arc<Pod>) -> bool {
        let request = RemoveDeviceRequest {
            pci_address: self.address.clone(),
            ..Default::default()
        };
        match agent_call!(pod.agent, remove_device, &request) {
            Ok(_) | Err(CallError::Gone(_)) => true,
            // A guest that never looked has nothing to let go of.
            Err(error) if error.is_not_found() => true,
            // It is taken all the same: the function is the host's.
            Err(error) => {
                warn!(function = self.name, %error, "the guest keeps a function");
                !error.is_deadline()
            }
        }
    }
}

/// The device's name: that of the host's function, in the letters that names have.
fn device_name(host_address: &str) -> String {
    format!("pci-{}", host_address.replace(':', "-"))
}

fn describe(name: &str, group_number: u32, by_group: bool) -> Result<Device, FieldError> {
    let at = |position| Descriptor { position };
    Ok(Device {
        name: Text::new("name", name)?,
        kind: DeviceKind::Function(Function {
            function: at(0),
            view: at(1),
            group: List::new("group", by_group.then(|| at(2)).into_iter().collect())?,
            group_number,
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
        describe(&name, 7, true).unwrap().check().unwrap();
        describe(&name, 7, false).unwrap().check().unwrap();
    }

    #[test]
    fn the_guests_addresses_become_the_hosts() {
        let plugged = Plugged {
            name: "pci-0000-3b-00.0".to_owned(),
            host: ("0000:3b:00.0".to_owned(), Wanted::by_device(7)),
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
