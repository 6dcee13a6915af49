//! The pod: one VM, its containers, and everything on the host that is theirs.
//!
//! ```text
//! daemon starts ──> boot: settings, state, cgroup, shared directory, network, VMM ──> configured
//!                     │ fails: everything undone, every call answers why
//!                     v
//!            containers come and go (container.rs) ──> Shutdown, none left ──> tear_down ──> end
//!                     │
//!                     └─ VMM or guest ends: every process ends with 137, calls answer why
//! ```
//!
//! What must be undone is in the journal before it is done, so that `delete` can do the same after
//! `kill -9`.

pub(crate) mod bundle;
pub(crate) mod container;
pub(crate) mod demand;
pub(crate) mod devices;
pub(crate) mod ending;
pub(crate) mod events;
pub(crate) mod files;
pub(crate) mod logger;
pub(crate) mod placeholder;
pub(crate) mod process;
pub(crate) mod resize;
pub(crate) mod stats;
pub(crate) mod stdio;

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use pericarp_protocol::guest::{
    ConfigureSandboxRequest, EventsRequest, SharedDirectory as SharedSource, Storage, event,
    storage::Source,
};
use pericarp_runtime_config::{
    Config, Demand, HostCapacity, PodConfig, RuntimeOptions, Settings, Sizing,
};
use serde::Serialize;
use tokio::{io::AsyncReadExt, net::unix::pipe, sync::watch, time::timeout};
use tracing::{debug, info, warn};

use crate::{
    errors::CallError,
    guest::{
        agent_client::{Agent, agent_call},
        panics, port_forward, spec,
    },
    host::{
        cgroup::{self, Meter},
        child::Watched,
        journal::{self, Entry, Journal},
        limits,
        placement::Place,
        private,
        scope::Scope,
    },
    machine::{
        client::Machine,
        launch::{Launch, Launched, SHARE_TAG, entropy, launch},
        size::Plan,
    },
    network,
    passthrough::{self, Passthrough, group::Wanted},
    pod::{
        bundle::Bundle,
        container::Container,
        ending::LAST_WORDS_MAX,
        events::Publisher,
        files::PodFiles,
        placeholder::StandIn,
        process::{Exit, LOST_STATUS},
        resize::Size,
    },
    storage::{
        disk::Disks, driver_image, huge_pages::Pool, memory_volumes::MemoryVolumes,
        share::SharedDirectory,
    },
};

/// Bytes of the guest's log that are kept for a diagnosis.
const GUEST_LOG_BYTES_MAX: u64 = 1 << 20;

/// What a pod is made from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Request {
    /// The sandbox's id.
    pub(crate) id: String,
    /// Its bundle.
    pub(crate) bundle: Option<Bundle>,
    /// Files of its containers, when it came by the sandbox service.
    pub(crate) files: Option<PodFiles>,
    /// Its network namespace.
    pub(crate) network_namespace: Option<PathBuf>,
    /// Its annotations.
    pub(crate) annotations: HashMap<String, String>,
    /// What the handler's options chose.
    pub(crate) options: RuntimeOptions,
    /// containerd's namespace.
    pub(crate) namespace: String,
}

/// A pod whose VM runs.
#[derive(Debug)]
pub(crate) struct Pod {
    /// The sandbox's id.
    pub(crate) id: String,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// Its state directory.
    pub(crate) state: PathBuf,
    /// The VMM.
    pub(crate) machine: Machine,
    /// The agent.
    pub(crate) agent: Agent,
    /// The VMM's process.
    pub(crate) vmm: Watched,
    /// What the VM and its daemon use, where the pod has a cgroup.
    pub(crate) meter: Option<Meter>,
    /// Where its processes stand on the host.
    pub(crate) place: Place,
    /// The VM's size.
    pub(crate) size: Size,
    /// The directory shared with the guest.
    pub(crate) shared: SharedDirectory,
    /// Events to containerd.
    pub(crate) publisher: Publisher,
    /// Containers by id.
    pub(crate) containers: Mutex<HashMap<String, Arc<Container>>>,
    /// When it was ready.
    pub(crate) ready_at: SystemTime,
    /// It came without a pause container.
    pub(crate) by_sandbox_service: bool,
    /// Containers' seccomp profiles are applied.
    pub(crate) guest_seccomp: bool,
    /// What was decided about its volumes in memory.
    pub(crate) memory: MemoryVolumes,
    /// Its disks.
    pub(crate) disks: Disks,
    stand_in: StandIn,
    network_namespace: Option<PathBuf>,
    /// What gives it functions of the host.
    pub(crate) passthrough: Arc<Passthrough>,
    /// How long a container may take to end after SIGKILL.
    pub(crate) kill_limit: Duration,
    exit: watch::Sender<Option<Exit>>,
    next_stream: AtomicU64,
}

impl Pod {
    /// Boots a pod, unless it is `cancelled` meanwhile. On failure nothing is left.
    pub(crate) async fn boot(
        request: Request,
        publisher: Publisher,
        cancelled: impl Future<Output = ()>,
    ) -> Result<Arc<Self>, CallError> {
        let mut config = configure(&request)?;
        let sandbox = cgroups_path(&request).map(|path| cgroup::directories(&path));
        let sandbox = sandbox.unwrap_or_default();
        let pool = Pool::reserve(sandbox.first(), &mut config.settings)?;
        let plan = Plan::of(&config.settings, demand(&request)?, host_capacity())?;
        pool.check(sandbox.first(), plan.boot.memory_bytes)?;
        let state = config.settings.paths.run_dir.join(&request.id);
        let booted = tokio::select! {
            biased;
            () = cancelled => Err(CallError::Gone("the sandbox was ended while it booted".into())),
            booted = Self::boot_in(&request, (config, plan), &state, publisher) => booted,
        };
        match booted {
            Ok(pod) => Ok(pod),
            Err(error) => {
                undo(state).await;
                Err(error)
            }
        }
    }

    async fn boot_in(
        request: &Request,
        (config, plan): (PodConfig, Plan),
        state: &Path,
        publisher: Publisher,
    ) -> Result<Arc<Self>, CallError> {
        let settings = &config.settings;
        let devices = (
            passthrough::wanted(settings)?,
            driver_image::Image::open(settings)?,
        );
        let failed = |error| CallError::host(state.display(), error);
        let mut journal = make_state(request, state).map_err(failed)?;
        let (cgroups, meter, place) = make_cgroups(request, &mut journal)?;
        let shared = SharedDirectory::make(state, &mut journal).map_err(failed)?;
        let (daemon, file_system) = shared.serve(state, settings, Arc::clone(&cgroups))?;
        journal.note(&daemon.entry()).map_err(failed)?;
        let namespace = request.network_namespace.as_deref();
        let attached = network::attach(namespace, settings, &mut journal).await?;
        let described = Launch {
            settings,
            plan,
            state,
            cgroups,
            file_system,
            interfaces: attached.interfaces,
        };
        let launched = launch(described, &mut journal);
        let (launched, ()) = tokio::try_join!(launched, start_scope(request, daemon.pid))?;
        tokio::spawn(end_without_files(daemon, launched.process.clone()));
        let (machine, process, agent) = greet(launched, settings, state).await?;
        write_state(request, state, plan.boot, process.pid).map_err(failed)?;
        place.settle(None)?;
        let size = follow(settings, plan, state, (&machine, &agent));
        let passthrough = Arc::new(Passthrough::new(
            &machine,
            &agent,
            &settings.security.passthrough_devices,
            plan.boot.memory_bytes,
            place.directory(),
        ));
        let pod = Arc::new(Self {
            id: request.id.clone(),
            namespace: request.namespace.clone(),
            state: state.to_owned(),
            disks: Disks::new(&machine, &agent, &settings.storage),
            machine,
            agent,
            vmm: process,
            meter,
            passthrough,
            place,
            size,
            shared,
            publisher,
            containers: Mutex::default(),
            ready_at: SystemTime::now(),
            by_sandbox_service: request.files.is_some(),
            guest_seccomp: settings.security.guest_seccomp,
            memory: MemoryVolumes::of(&request.annotations, plan.boot.memory_bytes),
            stand_in: stand_in(namespace)?,
            network_namespace: request.network_namespace.clone(),
            kill_limit: Duration::from_millis(settings.timeouts.kill_ms),
            exit: watch::Sender::new(None),
            next_stream: AtomicU64::new(1),
        });
        pod.configure(request, attached.guest, &devices).await?;
        pod.start_tasks(request);
        Ok(pod)
    }

    /// Makes the guest the pod's: its sandbox with the drivers that it loads, and the functions of
    /// the host that the pod names.
    async fn configure(
        self: &Arc<Self>,
        request: &Request,
        network: network::GuestNetwork,
        (functions, drivers): &(Vec<Wanted>, Option<driver_image::Image>),
    ) -> Result<(), CallError> {
        let mut sandbox = self.sandbox_request(request, network)?;
        if let Some(image) = drivers {
            sandbox.storages.push(image.plug(&self.disks).await?);
            sandbox.drivers_path = driver_image::GUEST_PATH.to_owned();
            let agent = driver_image::Image::patient(&self.agent);
            let configured = agent_call!(agent, configure_sandbox, &sandbox);
            configured.map_err(|error| image.explain(error))?;
        } else {
            agent_call!(self.agent, configure_sandbox, &sandbox)?;
        }
        self.passthrough.plug_for_pod(functions).await
    }

    /// What goes on beside the calls, as long as the VM lives.
    fn start_tasks(self: &Arc<Self>, request: &Request) {
        if let Some(namespace) = &request.network_namespace {
            port_forward::start(namespace, &self.agent);
        }
        tokio::spawn(watch_end(Arc::clone(self)));
        tokio::spawn(pass_events(Arc::clone(self)));
    }

    fn sandbox_request(
        &self,
        request: &Request,
        network: network::GuestNetwork,
    ) -> Result<ConfigureSandboxRequest, CallError> {
        let spec = request.bundle.as_ref().map(|bundle| &bundle.spec);
        let linux = spec.and_then(|spec| spec.linux().as_ref());
        let mut shared = Storage::new();
        shared.mount_point = spec::GUEST_SHARED.to_owned();
        shared.source = Some(Source::SharedDirectory(SharedSource {
            tag: SHARE_TAG.to_owned(),
            ..Default::default()
        }));
        Ok(ConfigureSandboxRequest {
            sandbox_id: self.id.clone(),
            hostname: spec
                .and_then(|spec| spec.hostname().clone())
                .unwrap_or_default(),
            interfaces: network.interfaces,
            routes: network.routes,
            neighbours: network.neighbours,
            sysctls: linux
                .and_then(|linux| linux.sysctl().clone())
                .unwrap_or_default(),
            entropy: entropy()?,
            wall_clock_ns: nanoseconds(SystemTime::now()),
            storages: vec![shared],
            share_pid_namespace: false,
            node_limits: Some(limits::read()).into(),
            ..Default::default()
        })
    }

    /// A number for a stream that no other stream of this sandbox has.
    pub(crate) fn stream_number(&self) -> u64 {
        self.next_stream.fetch_add(1, Ordering::Relaxed)
    }

    /// The PID that containerd is told for the pod.
    pub(crate) fn pid(&self) -> u32 {
        self.stand_in.number()
    }

    /// The PID that containerd is told for a container or, by the sandbox's own id, for the pod; 0
    /// for what is not here.
    pub(crate) fn pid_of(&self, id: &str) -> u32 {
        match self.container(id) {
            Ok(container) => container.init.pid,
            Err(_) if id == self.id => self.pid(),
            Err(_) => 0,
        }
    }

    /// Something that stands for one more container.
    pub(crate) fn stand_in(&self) -> Result<StandIn, CallError> {
        stand_in(self.network_namespace.as_deref())
    }

    /// Containers at this moment.
    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    /// Gives the VM's processes what its containers ask of the host.
    pub(crate) fn settle_place(&self) -> Result<(), CallError> {
        let containers = self.containers().into_iter();
        let containers = containers.filter(|container| !container.pause);
        self.place
            .settle_for(containers.map(|container| container.wish().clone()))
    }

    /// The same after a container is gone or an update failed, when nobody waits for an answer.
    pub(crate) fn resettle_place(&self) {
        if let Err(error) = self.settle_place() {
            warn!(%error, "the pod keeps host limits that none of its containers has");
        }
    }

    /// The container called `id`.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, CallError> {
        let containers = self
            .containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        containers
            .get(id)
            .cloned()
            .ok_or_else(|| CallError::NotFound(format!("container {id}")))
    }

    /// How the sandbox ended, if it has.
    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for the end of the sandbox.
    pub(crate) async fn ended(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        let known = exit
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exit| *exit);
        known.unwrap_or_else(|| Exit::now(LOST_STATUS))
    }
}

/// Waits for the agent's first word, or for the end of the VM that would have brought it. What the
/// guest's kernel says is kept from here on.
async fn greet(
    launched: Launched,
    settings: &Settings,
    state: &Path,
) -> Result<(Machine, Watched, Agent), CallError> {
    let (machine, process) = (launched.machine, launched.process);
    let log = settings.log.guest_kernel.then(|| state.join("guest.log"));
    tokio::spawn(keep_guest_log(launched.console, log));
    let ready = Duration::from_millis(settings.timeouts.agent_ready_ms);
    let call = Duration::from_millis(settings.timeouts.rpc_ms);
    let greeted = tokio::select! {
        greeted = Agent::greet(launched.agent, launched.vsock, ready, call) => greeted,
        how = process.ended() => return Err(vmm_failed(state, &machine.ended().await, &how)),
    };
    if let Err(CallError::Gone(_)) = greeted
        && let Ok(how) = timeout(LAST_WORDS_MAX, process.ended()).await
    {
        return Err(vmm_failed(state, &machine.ended().await, &how));
    }
    let (agent, hello) = greeted?;
    info!(
        kernel = hello.kernel_release,
        agent = hello.agent_version,
        boot_us = hello.ready_us,
        "the guest is ready"
    );
    Ok((machine, process, agent))
}

/// What `pericarp list` shows of a pod.
#[derive(Debug, Serialize)]
struct State<'a> {
    namespace: &'a str,
    name: Option<&'a str>,
    state: &'static str,
    vcpus: u32,
    memory_bytes: u64,
    shim_pid: u32,
    vmm_pid: i32,
}

fn write_state(
    request: &Request,
    directory: &Path,
    sizing: Sizing,
    vmm_pid: i32,
) -> io::Result<()> {
    let annotation = |name: &str| request.annotations.get(name).map(String::as_str);
    let state = State {
        namespace: annotation("io.kubernetes.cri.sandbox-namespace").unwrap_or(&request.namespace),
        name: annotation("io.kubernetes.cri.sandbox-name"),
        state: "running",
        vcpus: sizing.vcpus,
        memory_bytes: sizing.memory_bytes,
        shim_pid: std::process::id(),
        vmm_pid,
    };
    replace_state(directory, &serde_json::to_value(&state)?)
}

/// Readers see all of it or nothing.
fn replace_state(directory: &Path, state: &serde_json::Value) -> io::Result<()> {
    let partial = directory.join("state.json.partial");
    let mut file = private::file()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&partial)?;
    file.write_all(&serde_json::to_vec(state)?)?;
    fs::rename(partial, directory.join("state.json"))
}

/// Writes down that the VM has another size.
pub(crate) fn note_size(directory: &Path, sizing: Sizing) -> io::Result<()> {
    let mut state: serde_json::Value =
        serde_json::from_slice(&fs::read(directory.join("state.json"))?)?;
    if let Some(state) = state.as_object_mut() {
        state.insert("vcpus".to_owned(), sizing.vcpus.into());
        state.insert("memory_bytes".to_owned(), sizing.memory_bytes.into());
    }
    replace_state(directory, &state)
}

/// Undoes the journal of a sandbox; what is left over is reported by the journal itself.
async fn undo(state: PathBuf) {
    let undone =
        tokio::task::spawn_blocking(move || journal::undo(&state, network::remove_tap)).await;
    if let Ok(Err(error)) = undone {
        warn!(%error, "something of the sandbox is left");
    }
}

fn configure(request: &Request) -> Result<PodConfig, CallError> {
    if let Some(bundle) = &request.bundle {
        spec::check(&bundle.spec)?;
    }
    let loaded = Config::load(request.options.config_path.as_deref(), true);
    let mut config = loaded.map_err(|error| CallError::Host(error.to_string()))?;
    if let Some(flavour) = &request.options.flavour {
        config = config
            .with_flavour(flavour)
            .map_err(|error| CallError::Host(error.to_string()))?;
    }
    let annotations: BTreeMap<String, String> = request.annotations.clone().into_iter().collect();
    let pod = config
        .for_pod(&annotations)
        .map_err(|error| CallError::Invalid(error.to_string()))?;
    Ok(pod)
}

fn demand(request: &Request) -> Result<Demand, CallError> {
    let annotations: BTreeMap<String, String> = request.annotations.clone().into_iter().collect();
    let mut demand = Demand::from_annotations(&annotations)
        .map_err(|error| CallError::Invalid(error.to_string()))?;
    if demand == Demand::default() {
        demand = request.bundle.as_ref().map(own_demand).unwrap_or_default();
    }
    Ok(demand)
}

fn host_capacity() -> HostCapacity {
    HostCapacity {
        cpus: online_cpus(),
        memory_bytes: host_memory(),
    }
}

/// What a container that is its own sandbox asks for.
fn own_demand(bundle: &Bundle) -> Demand {
    let resources = bundle
        .spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let Some(resources) = resources else {
        return Demand::default();
    };
    let positive = |value: Option<i64>| {
        value
            .and_then(|value| u64::try_from(value).ok())
            .filter(|value| *value > 0)
    };
    let cpu = resources.cpu().as_ref();
    let sandbox = bundle.role() == crate::pod::bundle::Role::Sandbox;
    if sandbox {
        // A pause container's own numbers are its own, not the pod's.
        return Demand::default();
    }
    Demand {
        cpu_quota_us: cpu.and_then(|cpu| positive(cpu.quota())),
        cpu_period_us: cpu.and_then(|cpu| cpu.period()),
        cpu_shares: None,
        memory_limit_bytes: resources
            .memory()
            .as_ref()
            .and_then(|memory| positive(memory.limit())),
    }
}

fn online_cpus() -> u32 {
    let count = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN)
        .ok()
        .flatten();
    count
        .and_then(|count| u32::try_from(count).ok())
        .unwrap_or(1)
}

fn host_memory() -> u64 {
    nix::sys::sysinfo::sysinfo()
        .map(|info| info.ram_total())
        .unwrap_or(u64::MAX)
}

/// The path of the sandbox's cgroup, as its specification has it.
fn cgroups_path(request: &Request) -> Option<PathBuf> {
    let bundle = request.bundle.as_ref()?;
    bundle.spec.linux().as_ref()?.cgroups_path().clone()
}

/// The sandbox's cgroups: the files that take processes, the counter of their time, and what else
/// is set there.
/// Makes the state directory, with the journal of what must be undone and the sandbox's files.
fn make_state(request: &Request, state: &Path) -> io::Result<Journal> {
    if let Some(bundle) = &request.bundle {
        bundle.note_state(state)?;
    }
    if let Some(run_dir) = state.parent() {
        private::make_directory(run_dir)?;
    }
    private::make_directory(state)?;
    let journal = Journal::open(state)?;
    if let Some(files) = &request.files {
        files.write(state)?;
    }
    Ok(journal)
}

type Cgroups = (Arc<Vec<File>>, Option<Meter>, Place);

/// Makes the sandbox's cgroups.
fn make_cgroups(request: &Request, journal: &mut Journal) -> Result<Cgroups, CallError> {
    let Some(path) = cgroups_path(request) else {
        return Ok((Arc::default(), None, Place::default()));
    };
    let mut files = Vec::new();
    let mut meter = None;
    let directories = cgroup::directories(&path);
    for directory in &directories {
        let failed =
            |error: io::Error| CallError::host(format!("cgroup {}", directory.display()), error);
        journal
            .note(&Entry::Cgroup {
                path: directory.clone(),
            })
            .map_err(failed)?;
        files.push(cgroup::make(directory).map_err(failed)?);
        meter = meter.or_else(|| Meter::open(directory));
    }
    Ok((Arc::new(files), meter, Place::new(&path, directories)))
}

/// Tells systemd of the sandbox's cgroup, where the pod comes by the systemd driver. `pid` is in
/// it.
async fn start_scope(request: &Request, pid: i32) -> Result<(), CallError> {
    let Some(scope) = cgroups_path(request).and_then(|path| Scope::of(&path)) else {
        return Ok(());
    };
    tokio::task::spawn_blocking(move || scope.start(pid))
        .await
        .map_err(|error| CallError::host("systemd scope", error))?
}

/// A VMM that ends before the agent speaks has said why on its own stderr or in its last words.
fn vmm_failed(state: &Path, last_words: &str, how: &str) -> CallError {
    let log = fs::read_to_string(state.join("vmm.log")).unwrap_or_default();
    let line = log.lines().last().unwrap_or_default();
    CallError::Gone(
        format!("the VM did not boot: {last_words} ({how}) {line}")
            .trim_end()
            .to_owned(),
    )
}

/// Without a path the log is read and dropped: the guest must not wait for it.
async fn keep_guest_log(console: OwnedFd, path: Option<PathBuf>) {
    let path = path.unwrap_or_else(|| "/dev/null".into());
    let opened = private::file().append(true).create(true).open(path);
    let (Ok(mut reader), Ok(file)) = (pipe::Receiver::from_owned_fd(console), opened) else {
        return;
    };
    let mut file = tokio::fs::File::from_std(file);
    let mut left = GUEST_LOG_BYTES_MAX;
    let mut panic = panics::Finder::default();
    let mut buffer = vec![0; 4096];
    while let Ok(count) = reader.read(&mut buffer).await {
        if count == 0 {
            break;
        }
        if let Some(words) = panic.find(buffer.get(..count).unwrap_or_default()) {
            // The guest's own words: quoted, so that they are one line and no more.
            warn!(words, "the guest's kernel panicked");
        }
        let keep = usize::try_from(left).unwrap_or(usize::MAX).min(count);
        left = left.saturating_sub(keep as u64);
        let bytes = buffer.get(..keep).unwrap_or_default();
        // Past the bound the log is read on and dropped, so that the guest never waits for it.
        if tokio::io::AsyncWriteExt::write_all(&mut file, bytes)
            .await
            .is_err()
        {
            left = 0;
        }
        let _ = tokio::io::AsyncWriteExt::flush(&mut file).await;
    }
}

/// Passes the agent's events on. The stream ends with the agent's connection, and the VM with it:
/// nobody could ask anything of such a guest any more.
async fn pass_events(pod: Arc<Pod>) {
    pass_events_on(&pod).await;
    pod.agent_lost().await;
}

async fn pass_events_on(pod: &Pod) {
    let subscribed = pod
        .agent
        .client()
        .events(ttrpc::context::Context::default(), &EventsRequest::new())
        .await;
    let Ok(mut events) = subscribed else { return };
    while let Ok(Some(event)) = events.recv().await {
        match event.event {
            // The guest names the container, so it is believed only if there is one.
            Some(event::Event::OutOfMemory(oom)) if pod.container(&oom.container_id).is_ok() => {
                ending::out_of_memory(pod, &oom.container_id).await;
            }
            Some(event::Event::DeviceGone(device)) => {
                debug!(
                    pci_address = device.pci_address,
                    "the guest let go of a device"
                );
            }
            _ => {}
        }
    }
}

/// How much later than its file-system daemon a VMM may be seen to end that ended first.
const VMM_GOES_FIRST_MAX: Duration = Duration::from_millis(500);

/// Without its file-system daemon a guest hangs in every access to its files, its agent included:
/// such a pod is ended at once, so that its end is seen and its removal does not wait for it.
async fn end_without_files(daemon: Watched, vmm: Watched) {
    let how = daemon.ended().await;
    // It ends with the VMM too, and may be seen to end first.
    if timeout(VMM_GOES_FIRST_MAX, vmm.ended()).await.is_err() {
        warn!(
            how,
            "the file-system daemon ended, and the VM is ended with it"
        );
        vmm.kill();
    }
}

fn follow(
    settings: &Settings,
    plan: Plan,
    state: &Path,
    (machine, agent): (&Machine, &Agent),
) -> Size {
    Size::follow(resize::Parts {
        machine: machine.clone(),
        agent: agent.clone(),
        vm: settings.vm.clone(),
        plan,
        state: state.to_owned(),
        limit: Duration::from_millis(settings.timeouts.rpc_ms),
    })
}

fn stand_in(network_namespace: Option<&Path>) -> Result<StandIn, CallError> {
    StandIn::start(network_namespace)
        .map_err(|error| CallError::host("stand-in for a PID of the guest", error))
}

/// The end of the VM is the end of every process in it.
async fn watch_end(pod: Arc<Pod>) {
    let reason = pod.machine.ended().await;
    pod.vmm.kill();
    pod.agent.hang_up();
    pod.note_end(Exit::now(LOST_STATUS));
    for container in pod.containers() {
        if container.lost(&pod).await {
            warn!(
                container = container.id,
                reason, "a container ended with its VM"
            );
        }
    }
}

/// Nanoseconds since the epoch.
pub(crate) fn nanoseconds(time: SystemTime) -> i64 {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod contract_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pod_has_on_the_host_is_roots_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("pericarp");
        // As an older version left it.
        fs::create_dir(&run_dir).unwrap();
        fs::set_permissions(&run_dir, fs::Permissions::from_mode(0o755)).unwrap();
        let state = run_dir.join("pod");
        let request = Request::default();
        make_state(&request, &state).unwrap();
        let sizing = Sizing {
            vcpus: 1,
            memory_bytes: 1 << 27,
        };
        write_state(&request, &state, sizing, 1).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&run_dir), mode(&state)), (0o700, 0o700));
        for file in ["journal", "state.json"] {
            assert_eq!(mode(&state.join(file)), 0o600, "{file}");
        }
    }

    #[tokio::test]
    async fn the_guests_log_is_kept_when_it_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("guest.log");
        for (wanted, kept) in [(None, None), (Some(path.clone()), Some("words"))] {
            let flags = nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK;
            let (reader, writer) = nix::unistd::pipe2(flags).unwrap();
            nix::unistd::write(&writer, b"words").unwrap();
            drop(writer);
            keep_guest_log(reader, wanted).await;
            assert_eq!(fs::read_to_string(&path).ok().as_deref(), kept);
        }
    }
}
