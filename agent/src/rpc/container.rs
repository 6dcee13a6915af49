//! Containers as a whole: create, update, pause, resume, pids.

use std::{
    fs::File,
    os::fd::OwnedFd,
    sync::{Arc, PoisonError, RwLock},
};

use oci_spec::runtime::{LinuxDevice, LinuxResources, Spec};
use pericarp_protocol::{
    guest::{
        ContainerRequest, CreateContainerRequest, CreateContainerResponse, Empty, PidsResponse,
        ProcessInfo, UpdateContainerRequest,
    },
    limits::OCI_SPEC_BYTES_MAX,
};
use serde::de::DeserializeOwned;

use super::check_id;
use crate::{
    container::{Container, ContainerError, CreateOptions, Created, Stdio},
    drivers::Additions,
    ground::{errors::RpcError, log, paths},
    machine::devices::{self, Model},
    pod::{Contained, Pod, blocking},
    processes::{Process, reaper::Hold, stdio::Prepared},
    storage,
};

/// Storages of one container.
const STORAGES_MAX: usize = 1024;

/// Passed-through functions of one container.
const DEVICES_MAX: usize = 64;

/// Builds a container up to its user's program.
pub(super) async fn create(
    pod: Arc<Pod>,
    request: CreateContainerRequest,
) -> Result<CreateContainerResponse, RpcError> {
    check_id("container_id", &request.container_id)?;
    check_counts(&request)?;
    let spec: Spec = parse_json("oci_spec", &request.oci_spec)?;
    let place = pod.containers.reserve(&request.container_id)?;
    let terminal = spec
        .process()
        .as_ref()
        .is_some_and(|process| process.terminal() == Some(true));
    let streams = request.streams.get_or_default();
    let (prepared, stdio) = Prepared::new(&pod.streams, streams, terminal)?;

    let id = request.container_id.clone();
    let builder = Arc::clone(&pod);
    // From here on the container's process may end at any time; its registration ends the hold.
    let built = blocking(move || {
        let hold = builder.reaper.hold();
        build(&builder, &request, spec, stdio).map(|built| (built, hold))
    })
    .await??;
    let (contained, pid) = adopt(&pod, built, prepared).await?;
    pod.oom.add(&id, &contained.cgroup);
    tokio::spawn(end_with_init(Arc::clone(&contained)));
    place.fill(contained);
    Ok(CreateContainerResponse {
        pid: pid.unsigned_abs(),
        ..Default::default()
    })
}

fn check_counts(request: &CreateContainerRequest) -> Result<(), RpcError> {
    for (field, count, limit) in [
        ("storages", request.storages.len(), STORAGES_MAX),
        (
            "device_pci_addresses",
            request.device_pci_addresses.len(),
            DEVICES_MAX,
        ),
    ] {
        if count > limit {
            return Err(RpcError::Invalid {
                field,
                reason: format!("there are more than {limit}"),
            });
        }
    }
    Ok(())
}

/// A container that no task of the agent knows yet.
struct Built {
    container: Container,
    created: Created,
    storages: Vec<storage::Attached>,
    additions: Additions,
}

/// Mounts storages and builds the container; blocks.
fn build(
    pod: &Pod,
    request: &CreateContainerRequest,
    mut spec: Spec,
    stdio: Stdio,
) -> Result<Built, RpcError> {
    // The host may have added memory for this container.
    pod.limits.follow();
    let (devices, additions) = passed_through(pod, &request.device_pci_addresses, &mut spec)?;
    let console_size = (request.terminal_width != 0 && request.terminal_height != 0)
        .then_some((request.terminal_width, request.terminal_height));
    let mut options = CreateOptions {
        console_size,
        pid_namespace: pid_namespace(pod, request)?,
        cgroup_parent: Pod::cgroup()
            .map_err(RpcError::kernel("make the pod's cgroup"))?
            .into(),
        devices,
        default_limits: pod.limits.of_processes(),
        pod_files: Some(paths::RUN.into()),
    };
    pod.bound_threads();
    let storages = storage::attach_all(&request.storages)?;
    match storage::nodes(&request.storages) {
        Ok(nodes) => options.devices.extend(nodes),
        Err(error) => {
            storage::detach_all(&storages);
            return Err(error.into());
        }
    }
    match Container::create(&request.container_id, spec, options, stdio) {
        Ok((container, created)) => Ok(Built {
            container,
            created,
            storages,
            additions,
        }),
        Err(error) => {
            storage::detach_all(&storages);
            Err(error.into())
        }
    }
}

/// The PID namespace that the container joins although its specification asks for one of its own.
fn pid_namespace(pod: &Pod, request: &CreateContainerRequest) -> Result<Option<OwnedFd>, RpcError> {
    const FIELD: &str = "pid_namespace_of";
    match (request.sandbox_pid_namespace, &request.pid_namespace_of) {
        (false, target) if target.is_empty() => Ok(None),
        (true, target) if target.is_empty() => pod.shared_pid_namespace().map(Some),
        (true, _) => Err(RpcError::Invalid {
            field: FIELD,
            reason: "sandbox_pid_namespace is asked for too".to_owned(),
        }),
        (false, target) => {
            let process = pod.containers.get(target)?.init.pid;
            let namespace = File::open(format!("/proc/{process}/ns/pid"));
            // While it is not collected, the number is its own.
            if pod.reaper.signal(process, 0).is_err() {
                return Err(RpcError::State {
                    object: format!("{FIELD}: container {target:?}"),
                    reason: "it has ended",
                });
            }
            let namespace = namespace.map_err(RpcError::kernel(format!(
                "open the PID namespace of {target:?}"
            )))?;
            Ok(Some(namespace.into()))
        }
    }
}

/// Registers the process and starts copying its streams.
async fn adopt(
    pod: &Arc<Pod>,
    (built, hold): (Built, Hold),
    prepared: Prepared,
) -> Result<(Arc<Contained>, i32), RpcError> {
    let Built {
        container,
        created,
        storages,
        additions,
    } = built;
    let pid = created.pid;
    let exit = pod.reaper.register(pid);
    drop(hold);
    match prepared.run(created.terminal, &exit) {
        Ok(streams) => {
            let contained = Contained {
                cgroup: container.cgroup().to_owned(),
                container: Arc::new(RwLock::new(Some(container))),
                init: Process::new(pid, exit, streams),
                execs: Contained::exec_table(),
                storages,
                additions,
            };
            Ok((Arc::new(contained), pid))
        }
        Err(error) => {
            let undone = blocking(move || {
                if let Err(error) = container.delete() {
                    log::warn(format_args!(
                        "cannot undo a container: {}",
                        log::chain(&error)
                    ));
                }
                storage::detach_all(&storages);
            });
            undone.await?;
            Err(RpcError::kernel("attach the streams of a container")(error))
        }
    }
}

/// Ends what a container's init leaves behind. In a PID namespace of its own the kernel
/// does that.
async fn end_with_init(contained: Arc<Contained>) {
    contained.init.ended().await;
    let ended = blocking(move || {
        let guard = contained
            .container
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        match guard.as_ref() {
            Some(container) if !container.has_own_pid_namespace() => {
                container.signal_all(libc::SIGKILL)
            }
            _ => Ok(()),
        }
    });
    if let Ok(Err(error)) = ended.await {
        log::warn(format_args!(
            "cannot end a container's processes: {}",
            log::chain(&error)
        ));
    }
}

/// The nodes of a container's functions; what the driver image adds goes into `spec`.
fn passed_through(
    pod: &Pod,
    addresses: &[String],
    spec: &mut Spec,
) -> Result<(Vec<LinuxDevice>, Additions), RpcError> {
    let mut found = Vec::new();
    let mut functions = Vec::new();
    for address in addresses {
        let address = devices::address("device_pci_addresses", address)?;
        found.extend(devices::passed_through(&address)?);
        functions.push(Model::of(&address)?);
    }
    let drivers = pod.drivers.lock().unwrap_or_else(PoisonError::into_inner);
    let additions = match drivers.as_ref() {
        Some(drivers) => drivers.edit(spec, &mut found, &functions)?,
        None => Additions::default(),
    };
    Ok((found, additions))
}

/// Reads a JSON document of the request.
pub(super) fn parse_json<T: DeserializeOwned>(
    field: &'static str,
    bytes: &[u8],
) -> Result<T, RpcError> {
    if bytes.len() > OCI_SPEC_BYTES_MAX {
        return Err(RpcError::Invalid {
            field,
            reason: format!("it has more than {OCI_SPEC_BYTES_MAX} bytes"),
        });
    }
    serde_json::from_slice(bytes).map_err(|error| RpcError::Invalid {
        field,
        reason: error.to_string(),
    })
}

/// Does something with a container on a thread that may block.
pub(super) async fn with_container<T: Send + 'static>(
    contained: &Contained,
    work: impl FnOnce(&Container) -> Result<T, ContainerError> + Send + 'static,
) -> Result<T, RpcError> {
    let handle = Arc::clone(&contained.container);
    let result = blocking(move || {
        let guard = handle.read().unwrap_or_else(PoisonError::into_inner);
        guard.as_ref().map(work)
    })
    .await?;
    match result {
        Some(result) => Ok(result?),
        None => Err(RpcError::Ended("the container".to_owned())),
    }
}

/// Changes limits.
pub(super) async fn update(
    pod: Arc<Pod>,
    request: UpdateContainerRequest,
) -> Result<Empty, RpcError> {
    let resources: LinuxResources = parse_json("oci_resources", &request.oci_resources)?;
    let contained = pod.containers.get(&request.container_id)?;
    with_container(&contained, move |container| {
        // The host has added the memory that the container may use from now on.
        pod.limits.follow();
        container.update(resources)
    })
    .await?;
    Ok(Empty::new())
}

/// Freezes every process.
pub(super) async fn pause(pod: Arc<Pod>, request: ContainerRequest) -> Result<Empty, RpcError> {
    let contained = pod.containers.get(&request.container_id)?;
    with_container(&contained, Container::pause).await?;
    Ok(Empty::new())
}

/// Thaws every process.
pub(super) async fn resume(pod: Arc<Pod>, request: ContainerRequest) -> Result<Empty, RpcError> {
    let contained = pod.containers.get(&request.container_id)?;
    with_container(&contained, Container::resume).await?;
    Ok(Empty::new())
}

/// Every process, with the name of the exec that it is.
pub(super) async fn pids(
    pod: Arc<Pod>,
    request: ContainerRequest,
) -> Result<PidsResponse, RpcError> {
    let contained = pod.containers.get(&request.container_id)?;
    let pids = with_container(&contained, |container| Ok(container.pids())).await?;
    let execs = contained.execs.all();
    let exec_id = |pid: i32| {
        let found = execs.iter().find(|(_, exec)| exec.process.pid == pid);
        found.map(|(name, _)| name.clone()).unwrap_or_default()
    };
    let processes = pids
        .into_iter()
        .map(|pid| ProcessInfo {
            pid: pid.unsigned_abs(),
            exec_id: exec_id(pid),
            ..Default::default()
        })
        .collect();
    Ok(PidsResponse {
        processes,
        ..Default::default()
    })
}
