//! `Create` of a container: everything that it needs is given to the guest, in order, and taken
//! back when a step fails.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool},
};

use containerd_shim_protos::{
    api::CreateTaskRequest,
    events::task::{TaskCreate, TaskIO},
    topics,
};
use pericarp_protocol::{
    guest::{CreateContainerRequest, Streams},
    limits::OCI_SPEC_BYTES_MAX,
    machine::CacheMode,
    stream::Header,
};
use tokio::net::UnixStream;

use crate::{
    errors::CallError,
    guest::{agent_client::agent_call, spec},
    host::placement::HostResources,
    passthrough,
    pod::{
        Pod,
        bundle::{Bundle, Role},
        container::Container,
        demand::ContainerLimits,
        devices,
        ending::watch,
        files,
        lifecycle::release,
        placeholder::{self, Placeholder},
        process::Process,
        stdio::{Copying, HostEnds, Paths},
    },
    storage::{
        huge_pages,
        rootfs::{self, Rootfs},
    },
};

/// `Create`.
pub(crate) async fn create(pod: &Arc<Pod>, request: &CreateTaskRequest) -> Result<u32, CallError> {
    let paths = Paths {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    };
    if !request.checkpoint.is_empty() {
        return Err(CallError::Unimplemented("restoring from a checkpoint"));
    }
    let bundle = Bundle::read(request.bundle.as_ref())
        .map_err(|error| CallError::Invalid(error.to_string()))?;
    let pause = bundle.role() == Role::Sandbox;
    let placeholder = if pause {
        None
    } else {
        Some(pod.placeholder()?)
    };
    let pid = placeholder.as_ref().map_or(pod.pid(), Placeholder::number);
    let container = Arc::new(Container {
        id: request.id.clone(),
        bundle: request.bundle.clone().into(),
        init: Arc::new(Process::reserve(&request.id, "", pid, paths)),
        pause,
        placeholder,
        paused: AtomicBool::new(false),
        doomed: AtomicBool::new(false),
        limits: Mutex::new(ContainerLimits::of(&bundle.spec)),
        host_resources: Mutex::new(HostResources::of(&bundle.spec)),
        sample: Mutex::default(),
        disk: Mutex::default(),
        volumes: Mutex::default(),
        functions: Mutex::default(),
        execs: Mutex::default(),
    });
    reserve(pod, &container)?;
    if pod.exit().is_some() {
        // The sweep over the containers of a VM that ended has not seen this one.
        forget(pod, &container.id);
        return Err(CallError::Gone("the VM has ended".to_owned()));
    }
    let built = if container.pause {
        container.init.created(None);
        Ok(())
    } else {
        build(pod, &container, bundle, request).await
    };
    if let Err(error) = built {
        forget(pod, &container.id);
        let _ = release(pod, &container).await;
        container.init.creation_failed();
        return Err(error);
    }
    tell_creation(pod, request, pid).await;
    if !container.pause {
        let init = Arc::clone(&container.init);
        tokio::spawn(watch(Arc::clone(pod), container.id.clone(), init));
    }
    Ok(pid)
}

async fn tell_creation(pod: &Pod, request: &CreateTaskRequest, pid: u32) {
    let mut event = TaskCreate::new();
    event.container_id = request.id.clone();
    event.bundle = request.bundle.clone();
    event.rootfs = request.rootfs.clone();
    event.io = Some(TaskIO {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
        ..Default::default()
    })
    .into();
    event.pid = pid;
    pod.publisher
        .publish(topics::TASK_CREATE_EVENT_TOPIC, event)
        .await;
}

pub(super) fn reserve(pod: &Pod, container: &Arc<Container>) -> Result<(), CallError> {
    let mut containers = pod
        .containers
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if containers.contains_key(&container.id) {
        return Err(CallError::AlreadyExists(format!(
            "container {}",
            container.id
        )));
    }
    containers.insert(container.id.clone(), Arc::clone(container));
    Ok(())
}

/// The pod has a container no more, nor what it wanted of its place on the host.
pub(super) fn forget(pod: &Pod, id: &str) {
    pod.containers
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .remove(id);
    pod.reapply_placement();
}

async fn build(
    pod: &Arc<Pod>,
    container: &Arc<Container>,
    mut bundle: Bundle,
    request: &CreateTaskRequest,
) -> Result<(), CallError> {
    let id = &container.id;
    pod.size.join(container.limits()).await?;
    pod.apply_placement()?;
    if pod.by_sandbox_service {
        files::add_mounts(&mut bundle.spec, &pod.state);
    }
    let root = bundle.spec.root().as_ref();
    let rootfs = Rootfs::of(
        &request.rootfs,
        root.map(|root| bundle.path.join(root.path())),
        root.is_some_and(|root| root.readonly() == Some(true)),
    )?;
    let cache = cache_of(&bundle.role());
    if !pod.guest_seccomp {
        spec::drop_seccomp(&mut bundle.spec);
    }
    let memory = pod.memory.attach(&pod.agent, &bundle.spec, id).await?;
    let mut translated = spec::translate(bundle.spec, |source| memory.kind(source))?;
    let (terminal_width, terminal_height) = terminal_size(&translated.spec);
    let places = mount_shares(pod, id, &rootfs, translated.shares.clone()).await?;
    translated.set_sources(places);
    let attached = rootfs::attach(&pod.disks, id, &rootfs, cache).await?;
    *container.disk() = attached.disk;
    huge_pages::attach(&pod.agent, &translated.spec).await?;
    let mut storages = attached.storages;
    storages.extend(memory.storages);
    storages.extend(devices::plug_volumes(pod, container, &translated.disks).await?);
    let functions = devices::plug_functions(pod, container, translated.functions).await?;
    if let Some(root) = translated.spec.root_mut() {
        root.set_path(attached.path);
    }
    let oci_spec = encode(&translated.spec)?;
    let ends = HostEnds::open(&container.init.paths, id, &pod.namespace)
        .await
        .map_err(|error| CallError::Invalid(error.to_string()))?;
    let opened = open_streams(pod, &ends).await?;
    let joined = translated
        .pid_namespace
        .map(|path| joined(pod, &path))
        .transpose()?;
    let create = CreateContainerRequest {
        container_id: id.clone(),
        oci_spec,
        storages,
        streams: Some(opened.numbers).into(),
        terminal_width,
        terminal_height,
        sandbox_pid_namespace: joined == Some(Joined::Pod),
        pid_namespace_of: match joined {
            Some(Joined::Container(target)) => target,
            _ => String::new(),
        },
        device_pci_addresses: functions.iter().map(|one| one.address.clone()).collect(),
        ..Default::default()
    };
    let agent = passthrough::patient(&pod.agent, &functions);
    agent_call!(agent, create_container, &create)
        .map_err(|error| passthrough::explain(error, &functions))?;
    container
        .init
        .created(Some(Copying::start(ends, opened.ends)));
    Ok(())
}

/// Columns and rows; 0 where the specification does not say.
fn terminal_size(spec: &oci_spec::runtime::Spec) -> (u32, u32) {
    let process = spec.process().as_ref();
    let size = process.and_then(oci_spec::runtime::Process::console_size);
    let number = |value: u64| u32::try_from(value).unwrap_or_default();
    size.map_or((0, 0), |size| (number(size.width()), number(size.height())))
}

fn encode(spec: &oci_spec::runtime::Spec) -> Result<Vec<u8>, CallError> {
    let bytes =
        serde_json::to_vec(spec).map_err(|error| CallError::host("OCI specification", error))?;
    if bytes.len() > OCI_SPEC_BYTES_MAX {
        return Err(CallError::Invalid(format!(
            "OCI specification of {} bytes is above {OCI_SPEC_BYTES_MAX}",
            bytes.len()
        )));
    }
    Ok(bytes)
}

/// kubelet starts no container on a snapshot again; other callers may, after a crash of the host
/// too.
fn cache_of(role: &Role) -> CacheMode {
    match role {
        Role::Member(_) => CacheMode::Unsafe,
        Role::Sandbox | Role::Single => CacheMode::WriteBack,
    }
}

/// Whose PID namespace a container joins.
#[derive(Debug, PartialEq, Eq)]
enum Joined {
    Pod,
    Container(String),
}

fn joined(pod: &Pod, path: &Path) -> Result<Joined, CallError> {
    let number = placeholder::number_in(path);
    if number == Some(pod.pid()) {
        return Ok(Joined::Pod);
    }
    let mut containers = pod.containers().into_iter();
    let target = containers.find(|container| {
        let own = container.placeholder.as_ref().map(Placeholder::number);
        own.is_some() && own == number
    });
    target
        .map(|container| Joined::Container(container.id.clone()))
        .ok_or_else(|| {
            CallError::Invalid(format!(
                "linux.namespaces[pid].path: {} is no PID namespace of this pod",
                path.display()
            ))
        })
}

/// Mounting may wait for disks: not on the event loop.
async fn mount_shares(
    pod: &Arc<Pod>,
    id: &str,
    rootfs: &Rootfs,
    shares: Vec<spec::Share>,
) -> Result<Vec<PathBuf>, CallError> {
    let shared = pod.shared.clone();
    let id = id.to_owned();
    let rootfs = rootfs.clone();
    let mounted = tokio::task::spawn_blocking(move || {
        shared.mount_rootfs(&id, &rootfs)?;
        shared.add(&id, &shares)
    });
    mounted
        .await
        .map_err(|error| CallError::host("mounting", error))?
}

/// Streams opened to the guest for one process.
pub(super) struct Opened {
    pub(super) numbers: Streams,
    pub(super) ends: [Option<UnixStream>; 3],
}

pub(super) async fn open_streams(pod: &Pod, ends: &HostEnds) -> Result<Opened, CallError> {
    let mut numbers = [0; 3];
    let mut streams = [None, None, None];
    for (index, wanted) in ends.wanted().into_iter().enumerate() {
        if wanted {
            let number = pod.stream_number();
            let stream = pod.agent.open_stream(&Header::Process(number)).await?;
            if let (Some(slot), Some(place)) = (numbers.get_mut(index), streams.get_mut(index)) {
                *slot = number;
                *place = Some(stream);
            }
        }
    }
    let [stdin, stdout, stderr] = numbers;
    Ok(Opened {
        numbers: Streams {
            stdin,
            stdout,
            stderr,
            ..Default::default()
        },
        ends: streams,
    })
}
