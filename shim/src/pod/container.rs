//! The containers of a pod and their processes: what each task call does in the guest and on the
//! host.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    api::{CreateTaskRequest, ExecProcessRequest},
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO, TaskPaused, TaskResumed,
        TaskStart,
    },
    topics,
};
use oci_spec::runtime::Process as OciProcess;
use pericarp_protocol::{
    guest::{
        CreateContainerRequest, ExecRequest, ProcessRequest, ResizeTerminalRequest, StatsRequest,
        Streams,
    },
    limits::OCI_SPEC_BYTES_MAX,
    machine::CacheMode,
    stream::Header,
};
use protobuf::well_known_types::{any::Any, timestamp::Timestamp};
use tokio::{net::UnixStream, time::timeout};
use tracing::warn;

use crate::{
    errors::CallError,
    guest::{agent_client::agent_call, spec},
    host::{cgroup::Meter, placement::Wish},
    passthrough::{self, Plugged},
    pod::{
        Pod,
        bundle::{Bundle, Role},
        demand::ContainerLimits,
        devices,
        ending::{ended, exited_at, start_failed, watch},
        files,
        placeholder::{self, StandIn},
        process::{Exit, LOST_STATUS, Process},
        stats::{self, Sample},
        stdio::{Copying, HostEnds, Paths},
    },
    storage::{
        disk::Disk,
        huge_pages,
        rootfs::{self, Rootfs},
        share,
    },
};

/// How long taking a container's mounts away may take.
const UNMOUNT_MAX: Duration = Duration::from_secs(3);

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    /// Its id.
    pub(crate) id: String,
    /// Its bundle.
    pub(crate) bundle: PathBuf,
    /// Its first process.
    pub(crate) init: Arc<Process>,
    /// It stands for the sandbox and has no process in the guest.
    pub(crate) pause: bool,
    /// Frozen.
    pub(crate) paused: AtomicBool,
    /// Somebody waits for its end after SIGKILL.
    pub(crate) doomed: AtomicBool,
    /// What it may use.
    limits: Mutex<ContainerLimits>,
    /// What it asks of its place on the host.
    wish: Mutex<Wish>,
    /// What stands for it on the host; the pod's own stands for the pause container.
    stand_in: Option<StandIn>,
    sample: Mutex<Option<Sample>>,
    /// The disk that its root file system is on.
    disk: Mutex<Option<Disk>>,
    /// Its volumes that are block devices.
    volumes: Mutex<Vec<Disk>>,
    /// Functions of the host that it has.
    functions: Mutex<Vec<Plugged>>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
}

/// Seconds and nanoseconds since the epoch.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}

impl Container {
    fn sample(&self) -> MutexGuard<'_, Option<Sample>> {
        self.sample.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it asks of its place on the host.
    pub(crate) fn wish(&self) -> MutexGuard<'_, Wish> {
        self.wish.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it may use.
    pub(crate) fn limits(&self) -> ContainerLimits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It may use something else from now on; its limits are among its counters.
    pub(crate) fn note_limits(&self, limits: ContainerLimits) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
        *self.sample() = None;
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its volumes that are block devices.
    pub(crate) fn volumes(&self) -> MutexGuard<'_, Vec<Disk>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn functions(&self) -> MutexGuard<'_, Vec<Plugged>> {
        self.functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn disk(&self) -> MutexGuard<'_, Option<Disk>> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process called `exec_id`; the init when it is empty.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, CallError> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.execs()
            .get(exec_id)
            .cloned()
            .ok_or_else(|| CallError::NotFound(format!("exec {exec_id} of container {}", self.id)))
    }

    /// The VM is gone: every process has ended. True when one had not before.
    pub(crate) async fn lost(&self, pod: &Pod) -> bool {
        let execs: Vec<_> = self.execs().values().cloned().collect();
        let mut news = false;
        for process in execs.into_iter().chain([Arc::clone(&self.init)]) {
            news |= ended(pod, &self.id, &process, Exit::now(LOST_STATUS)).await;
        }
        news
    }
}

/// A request about one process of a container.
pub(crate) fn request_of(id: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        ..Default::default()
    }
}

/// Streams opened to the guest for one process.
struct Opened {
    numbers: Streams,
    ends: [Option<UnixStream>; 3],
}

async fn open_streams(pod: &Pod, ends: &HostEnds) -> Result<Opened, CallError> {
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
    let stand_in = if pause { None } else { Some(pod.stand_in()?) };
    let pid = stand_in.as_ref().map_or(pod.pid(), StandIn::number);
    let container = Arc::new(Container {
        id: request.id.clone(),
        bundle: request.bundle.clone().into(),
        init: Arc::new(Process::reserve(&request.id, "", pid, paths)),
        pause,
        stand_in,
        paused: AtomicBool::new(false),
        doomed: AtomicBool::new(false),
        limits: Mutex::new(ContainerLimits::of(&bundle.spec)),
        wish: Mutex::new(Wish::of(&bundle.spec)),
        sample: Mutex::default(),
        disk: Mutex::default(),
        volumes: Mutex::default(),
        functions: Mutex::default(),
        execs: Mutex::default(),
    });
    reserve(pod, &container)?;
    let built = if container.pause {
        container.init.created(None);
        Ok(())
    } else {
        build(pod, &container, bundle, request).await
    };
    if let Err(error) = built {
        forget(pod, &container.id);
        let _ = release(pod, &container).await;
        return Err(error);
    }
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
        .publish(topics::TASK_CREATE_EVENT_TOPIC, Box::new(event))
        .await;
    if !container.pause {
        let init = Arc::clone(&container.init);
        tokio::spawn(watch(Arc::clone(pod), container.id.clone(), init));
    }
    Ok(pid)
}

#[cfg(test)]
impl Container {
    /// A created container without anything on the host.
    pub(crate) fn made(pod: &Arc<Pod>, id: &str) -> Arc<Self> {
        let container = Arc::new(Self {
            id: id.to_owned(),
            bundle: PathBuf::new(),
            init: Arc::new(Process::reserve(id, "", 1, Paths::default())),
            pause: false,
            paused: AtomicBool::new(false),
            doomed: AtomicBool::new(false),
            limits: Mutex::default(),
            wish: Mutex::default(),
            stand_in: None,
            sample: Mutex::default(),
            disk: Mutex::default(),
            volumes: Mutex::default(),
            functions: Mutex::default(),
            execs: Mutex::default(),
        });
        container.init.created(None);
        reserve(pod, &container).unwrap();
        let init = Arc::clone(&container.init);
        tokio::spawn(watch(Arc::clone(pod), id.to_owned(), init));
        container
    }

    /// A created exec.
    pub(crate) fn exec_made(&self, pod: &Arc<Pod>, exec_id: &str) -> Arc<Process> {
        let exec = Arc::new(Process::reserve(&self.id, exec_id, 1, Paths::default()));
        exec.created(None);
        self.execs().insert(exec_id.to_owned(), Arc::clone(&exec));
        tokio::spawn(watch(Arc::clone(pod), self.id.clone(), Arc::clone(&exec)));
        exec
    }
}

fn reserve(pod: &Pod, container: &Arc<Container>) -> Result<(), CallError> {
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
fn forget(pod: &Pod, id: &str) {
    pod.containers
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .remove(id);
    pod.resettle_place();
}

async fn build(
    pod: &Arc<Pod>,
    container: &Arc<Container>,
    mut bundle: Bundle,
    request: &CreateTaskRequest,
) -> Result<(), CallError> {
    let id = &container.id;
    pod.size.join(container.limits()).await?;
    pod.settle_place()?;
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
        let own = container.stand_in.as_ref().map(StandIn::number);
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

/// `Exec`.
pub(crate) async fn exec(pod: &Arc<Pod>, request: &ExecProcessRequest) -> Result<(), CallError> {
    let container = pod.container(&request.id)?;
    if container.pause {
        return Err(CallError::Unimplemented("exec in the pod's own container"));
    }
    let mut process: OciProcess = serde_json::from_slice(&request.spec.value)
        .map_err(|error| CallError::Invalid(format!("spec: not an OCI process: {error}")))?;
    spec::translate_process_fields(&mut process);
    let paths = Paths {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    };
    let process_entry = Arc::new(Process::reserve(
        &request.id,
        &request.exec_id,
        container.init.pid,
        paths,
    ));
    {
        let mut execs = container.execs();
        if execs.contains_key(&request.exec_id) {
            return Err(CallError::AlreadyExists(process_entry.name.clone()));
        }
        execs.insert(request.exec_id.clone(), Arc::clone(&process_entry));
    }
    if let Err(error) = build_exec(pod, &process_entry, &process, request).await {
        container.execs().remove(&request.exec_id);
        return Err(error);
    }
    let mut event = TaskExecAdded::new();
    event.container_id = request.id.clone();
    event.exec_id = request.exec_id.clone();
    pod.publisher
        .publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, Box::new(event))
        .await;
    tokio::spawn(watch(Arc::clone(pod), container.id.clone(), process_entry));
    Ok(())
}

async fn build_exec(
    pod: &Arc<Pod>,
    entry: &Process,
    process: &OciProcess,
    request: &ExecProcessRequest,
) -> Result<(), CallError> {
    let ends = HostEnds::open(&entry.paths, &entry.exec_id, &pod.namespace)
        .await
        .map_err(|error| CallError::Invalid(error.to_string()))?;
    let opened = open_streams(pod, &ends).await?;
    let console = process.console_size();
    let exec = ExecRequest {
        container_id: request.id.clone(),
        exec_id: request.exec_id.clone(),
        oci_process: serde_json::to_vec(process)
            .map_err(|error| CallError::host("OCI process", error))?,
        streams: Some(opened.numbers).into(),
        terminal_width: console.map_or(0, |size| u32::try_from(size.width()).unwrap_or_default()),
        terminal_height: console.map_or(0, |size| u32::try_from(size.height()).unwrap_or_default()),
        ..Default::default()
    };
    agent_call!(pod.agent, exec, &exec)?;
    entry.created(Some(Copying::start(ends, opened.ends)));
    Ok(())
}

/// `Start`, of a container or an exec.
pub(crate) async fn start(pod: &Arc<Pod>, id: &str, exec_id: &str) -> Result<u32, CallError> {
    let container = pod.container(id)?;
    let process = container.process(exec_id)?;
    process.begin_start()?;
    if !container.pause {
        let started = agent_call!(pod.agent, start_process, &request_of(id, exec_id));
        if let Err(error) = started {
            start_failed(pod, id, &process, &error).await;
            return Err(error);
        }
    }
    // The start is told before the end: `watch` waits for `end_start`.
    if exec_id.is_empty() {
        let mut event = TaskStart::new();
        event.container_id = id.to_owned();
        event.pid = process.pid;
        pod.publisher
            .publish(topics::TASK_START_EVENT_TOPIC, Box::new(event))
            .await;
    } else {
        let mut event = TaskExecStarted::new();
        event.container_id = id.to_owned();
        event.exec_id = exec_id.to_owned();
        event.pid = process.pid;
        pod.publisher
            .publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, Box::new(event))
            .await;
    }
    process.end_start(true);
    Ok(process.pid)
}

/// `Delete`, of a container or an exec. The answer is its PID and how it had ended.
pub(crate) async fn delete(
    pod: &Arc<Pod>,
    id: &str,
    exec_id: &str,
) -> Result<(u32, Exit), CallError> {
    let container = pod.container(id)?;
    let process = container.process(exec_id)?;
    let exit = process.begin_delete()?;
    let deleted = delete_claimed(pod, &container, &process).await;
    let last = match deleted {
        Ok(last) => last,
        Err(error) => {
            process.undo_delete();
            return Err(error);
        }
    };
    // What never ran was ended by this delete, and whoever waits for its end hears of it.
    let exit = exit.unwrap_or(last);
    ended(pod, id, &process, exit).await;
    if exec_id.is_empty() {
        forget(pod, id);
        let mut event = TaskDelete::new();
        event.container_id = id.to_owned();
        event.pid = process.pid;
        event.exit_status = exit.status;
        event.exited_at = Some(timestamp(exit.at)).into();
        pod.publisher
            .publish(topics::TASK_DELETE_EVENT_TOPIC, Box::new(event))
            .await;
    } else {
        container.execs().remove(exec_id);
    }
    Ok((process.pid, exit))
}

/// Deletes a process from the guest and answers how the guest says that it ended.
async fn delete_claimed(
    pod: &Arc<Pod>,
    container: &Container,
    process: &Process,
) -> Result<Exit, CallError> {
    if container.pause {
        return Ok(Exit::now(LOST_STATUS));
    }
    let request = request_of(&container.id, &process.exec_id);
    let mut call = pin!(async { agent_call!(pod.agent, delete_process, &request) });
    let deleted = match timeout(pod.kill_limit, &mut call).await {
        Ok(deleted) => deleted,
        Err(_) => {
            // It may unmount a large disk; but nothing is waited for that a dead guest would do.
            if !pod.agent_answers(&container.id).await {
                let id = &container.id;
                pod.give_up(&format!(
                    "container {id} cannot be deleted: its agent is silent"
                ))
                .await;
            }
            call.await
        }
    };
    let exit = match deleted {
        Ok(response) => Exit {
            status: response.exit_status,
            at: exited_at(response.exited_at_ns),
        },
        // A guest that is gone has nothing left to delete.
        Err(CallError::Gone(_)) => Exit::now(LOST_STATUS),
        Err(error) if error.is_not_found() => Exit::now(LOST_STATUS),
        Err(error) => return Err(error),
    };
    process.finish_copying().await;
    if process.exec_id.is_empty() {
        release(pod, container).await?;
    }
    Ok(exit)
}

/// Takes back what of the host the container had; the guest has let go of it.
async fn release(pod: &Arc<Pod>, container: &Container) -> Result<(), CallError> {
    // A guest that does not let go of one device lets go of none: its kernel takes them one by one.
    let mut lets_go = true;
    let functions = std::mem::take(&mut *container.functions());
    for function in functions {
        lets_go = pod.passthrough.unplug(&function, lets_go).await;
    }
    let disk = container.disk().take();
    let volumes = std::mem::take(&mut *container.volumes());
    for disk in disk.into_iter().chain(volumes) {
        lets_go = pod.disks.unplug(&disk, lets_go).await;
    }
    let shared = pod.shared.clone();
    let id = container.id.clone();
    let object = format!("shared directory of container {}", container.id);
    let removal = tokio::task::spawn_blocking(move || shared.remove(&id));
    match timeout(UNMOUNT_MAX, removal).await {
        Ok(removed) => {
            let gone = removed
                .map_err(|error| CallError::host("unmounting", error))?
                .map_err(|error| CallError::host(object, error))?;
            share::forget(&pod.agent, gone).await;
            Ok(())
        }
        Err(_) => {
            // A file system of the host hangs. What is left goes with the pod.
            warn!(object, limit = ?UNMOUNT_MAX, "unmounting takes too long and is left alone");
            Ok(())
        }
    }
}

/// `ResizePty`.
pub(crate) async fn resize(
    pod: &Pod,
    id: &str,
    exec_id: &str,
    width: u32,
    height: u32,
) -> Result<(), CallError> {
    pod.container(id)?.process(exec_id)?;
    let request = ResizeTerminalRequest {
        container_id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        width,
        height,
        ..Default::default()
    };
    agent_call!(pod.agent, resize_terminal, &request).map(drop)
}

/// `Pause` and `Resume`.
pub(crate) async fn freeze(pod: &Pod, id: &str, frozen: bool) -> Result<(), CallError> {
    let container = pod.container(id)?;
    container
        .init
        .expect_alive(if frozen { "pause" } else { "resume" })?;
    let mut request = pericarp_protocol::guest::ContainerRequest::new();
    request.container_id = id.to_owned();
    if !container.pause {
        if frozen {
            agent_call!(pod.agent, pause, &request)?;
        } else {
            agent_call!(pod.agent, resume, &request)?;
        }
    }
    container.paused.store(frozen, Ordering::Relaxed);
    if frozen {
        let event = TaskPaused {
            container_id: id.to_owned(),
            ..Default::default()
        };
        pod.publisher
            .publish(topics::TASK_PAUSED_EVENT_TOPIC, Box::new(event))
            .await;
    } else {
        let event = TaskResumed {
            container_id: id.to_owned(),
            ..Default::default()
        };
        pod.publisher
            .publish(topics::TASK_RESUMED_EVENT_TOPIC, Box::new(event))
            .await;
    }
    Ok(())
}

/// `Stats`: a container's counters; those of the whole sandbox for the one that stands for it.
pub(crate) async fn stats(pod: &Pod, container: &Container) -> Result<Any, CallError> {
    let used_us = || pod.meter.as_ref().and_then(Meter::used_us);
    let used_before_us = used_us();
    if let Some(counters) = container
        .sample()
        .as_ref()
        .and_then(|sample| sample.holding(used_before_us))
    {
        return Ok(counters.clone());
    }
    let mut query = StatsRequest::new();
    if !container.pause {
        query.container_id.clone_from(&container.id);
    }
    let question = pod.meter.as_ref().map(Meter::question);
    let counters = stats::metrics(&agent_call!(pod.agent, stats, &query)?);
    let took_us = question.map(|question| question.answered(stats::QUESTION_US_MAX));
    *container.sample() = Sample::taken(&counters, used_us(), took_us);
    Ok(counters)
}
