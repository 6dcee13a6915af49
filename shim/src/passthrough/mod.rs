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

use self::group::{Host, HostFunction, Wanted};
use crate::{
    errors::CallError,
    guest::{
        agent_client::{Agent, agent_call},
        vfio::{IOMMUFD, VfioPath},
    },
    host::cgroup,
    machine::client::Machine,
};

/// Node of the host from which containers of VFIO come.
const CONTAINER: &str = "/dev/vfio/vfio";

/// What a pod needs to be given functions.
#[derive(Debug)]
pub(crate) struct Passthrough {
    machine: Machine,
    agent: Agent,
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
    /// For the VM behind `machine` and `agent`, which has `memory_bytes` and lives in `cgroup`.
    pub(crate) fn new(
        machine: &Machine,
        agent: &Agent,
        allowed: &[PciSelector],
        memory_bytes: u64,
        cgroup: Option<&Path>,
    ) -> Self {
        Self {
            machine: machine.clone(),
            agent: agent.clone(),
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
        let below = cgroup::memory_limit_below(self.cgroup.as_deref()?, self.memory_bytes)?;
        Some(format!(
            "all memory of the VM is pinned while it has a device: {below}"
        ))
    }

    /// Gives a pod that has no container yet the functions of its settings, for all of them.
    pub(crate) async fn plug_for_pod(self: &Arc<Self>, groups: &[Wanted]) -> Result<(), CallError> {
        for wanted in groups {
            let plugged = self.plug(wanted).await?;
            self.keep(plugged);
        }
        if !groups.is_empty() {
            // Drivers begin now, not with the first container.
            let agent = patient(&self.agent, &self.of_pod());
            agent_call!(agent, rescan_devices, &Empty::new())?;
        }
        Ok(())
    }

    /// Plugs in the functions that `node` of the host means, for a container that has the functions
    /// `own` already. Returns the new ones.
    pub(crate) async fn plug_for_container(
        self: &Arc<Self>,
        node: VfioPath,
        own: &[Plugged],
    ) -> Result<Vec<Plugged>, CallError> {
        let wanted = Host::default().wanted(node)?;
        // Nodes of two functions of a group mean the same.
        let has = |functions: &[Plugged]| functions.iter().any(|one| one.is_of(wanted.group));
        if has(&self.of_pod()) || has(own) {
            return Ok(Vec::new());
        }
        self.plug(&wanted).await
    }

    /// Gives the guest every function of a group. On failure it has none of them.
    async fn plug(self: &Arc<Self>, wanted: &Wanted) -> Result<Vec<Plugged>, CallError> {
        let (opener, asked) = (Arc::clone(self), wanted.clone());
        // Opening resets the functions, which takes its time.
        let opened = tokio::task::spawn_blocking(move || opener.open(&asked)).await;
        let opened = opened.map_err(|error| CallError::host(&wanted.field, error))??;
        let mut plugged = Vec::new();
        for one in opened {
            match self.plug_one(wanted, one).await {
                Ok(function) => plugged.push(function),
                Err(error) => {
                    let mut lets_go = true;
                    for function in &plugged {
                        lets_go = self.unplug(function, lets_go).await;
                    }
                    return Err(error);
                }
            }
        }
        Ok(plugged)
    }

    async fn plug_one(&self, wanted: &Wanted, opened: Opened) -> Result<Plugged, CallError> {
        let host_address = &opened.function.address;
        let name = device_name(host_address);
        let by_group = opened.descriptors.len() > 2;
        let device = describe(&name, wanted.group, by_group)
            .map_err(|error| CallError::Host(format!("function {host_address}: {error}")))?;
        let machine = self.machine.with_more_time(self.pinning());
        let added = machine.add_device(device, opened.descriptors);
        let address = added.await.map_err(|error| match error {
            CallError::Host(reason) => {
                wanted.refuse(format_args!("function {host_address}: {reason}"))
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
            host: (host_address.clone(), wanted.clone()),
            address,
        })
    }

    /// Takes the function back, also from a guest that does not let go. False when the guest did
    /// not answer; then it is not asked again.
    pub(crate) async fn unplug(&self, function: &Plugged, lets_go: bool) -> bool {
        let lets_go = lets_go && self.ask(function).await;
        let function_name = &function.name;
        match self.machine.remove_device(function_name).await {
            Ok(()) => info!(function_name, "a function is the host's again"),
            Err(CallError::Gone(_)) => {}
            Err(error) => warn!(function_name, %error, "a function stays until the VM ends"),
        }
        lets_go
    }

    /// Asks the guest to let go; false when it did not answer.
    async fn ask(&self, function: &Plugged) -> bool {
        let request = RemoveDeviceRequest {
            pci_address: function.address.clone(),
            ..Default::default()
        };
        match agent_call!(self.agent, remove_device, &request) {
            Ok(_) | Err(CallError::Gone(_)) => true,
            // A guest that never looked has nothing to let go of.
            Err(error) if error.is_not_found() => true,
            // It is taken all the same: the function is the host's.
            Err(error) => {
                warn!(function = function.name, %error, "the guest keeps a function");
                !error.is_deadline()
            }
        }
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

impl Plugged {
    /// Whether it came with this group.
    fn is_of(&self, group: u32) -> bool {
        self.host.1.group == group
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
}
