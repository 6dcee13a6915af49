//! Boots a pod: settings, state, cgroup, shared directory, network, VMM, agent.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::{Duration, SystemTime},
};

use pericarp_protocol::guest::{
    ConfigureSandboxRequest, SharedDirectory as SharedSource, Storage, storage::Source,
};
use pericarp_runtime_config::{Config, Demand, PodConfig, Settings};
use tokio::{sync::watch, time::timeout};
use tracing::info;

use crate::{
    errors::CallError,
    guest::{
        agent_client::{Agent, agent_call},
        paths, port_forward, spec,
    },
    host::{
        capacity,
        cgroup::{self, Meter},
        child::Watched,
        journal::{Entry, Journal},
        limits,
        placement::Placement,
        private,
        scope::Scope,
    },
    machine::{
        client::Machine,
        launch::{Launch, Launched, Origin, SHARE_TAG, claim_user, entropy, launch},
        size::Plan,
        template::{Cold, Template},
        template_maker,
    },
    network::{self, Attachment},
    passthrough::{self, Passthrough, group::Wanted},
    pod::{
        Pod, Request, agent_events,
        bundle::{Bundle, Role},
        clock,
        ending::{LAST_WORDS_MAX, end_without_files, watch_vm},
        events::Publisher,
        guest_log,
        placeholder::Placeholder,
        resize::{self, Size},
        state_file, undo,
    },
    storage::{
        disk::Disks, driver_image, huge_pages::Pool, memory_volumes::MemoryVolumes,
        share::SharedDirectory,
    },
};

/// How long the agent of a pod that starts from a template may take, since nothing is booted. If it
/// takes longer, the pod boots instead.
const FORK_READY_MAX: Duration = Duration::from_secs(10);

/// Devices that a pod has from its beginning, beside those of every VM.
struct PodDevices {
    functions: Vec<Wanted>,
    drivers: Option<driver_image::Image>,
}

/// The sandbox's cgroups.
#[derive(Default)]
struct Cgroups {
    /// The files that take processes.
    procs: Arc<Vec<File>>,
    /// The counter of their time.
    meter: Option<Meter>,
    /// What else is set there.
    placement: Placement,
}

/// A guest whose agent has spoken.
struct Greeted {
    machine: Machine,
    process: Watched,
    agent: Agent,
}

/// A VM whose agent has spoken, and what it has on the host.
struct Started {
    guest: Greeted,
    cgroups: Cgroups,
    shared: SharedDirectory,
    network: network::GuestNetwork,
    /// Key of the template that it started from, or why it booted.
    template: Result<String, Cold>,
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
        let plan = Plan::of(&config.settings, demand(&request)?, capacity::read())?;
        pool.check(sandbox.first(), plan.boot.memory_bytes)?;
        let state = config.settings.paths.run_dir.join(&request.id);
        let booted = tokio::select! {
            biased;
            () = cancelled => Err(CallError::Gone("the sandbox was ended while it booted".into())),
            booted = Self::boot_in(&request, config, plan, &state, publisher) => booted,
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
        config: PodConfig,
        plan: Plan,
        state: &Path,
        publisher: Publisher,
    ) -> Result<Arc<Self>, CallError> {
        let settings = &config.settings;
        let devices = PodDevices {
            functions: passthrough::wanted(settings)?,
            drivers: driver_image::Image::open(settings)?,
        };
        let started = start_vm(request, settings, plan, state).await?;
        let Greeted {
            machine,
            process,
            agent,
        } = started.guest;
        let failed = |error| CallError::host(state.display(), error);
        let template = started.template.as_deref().ok();
        state_file::write(request, state, plan.boot, process.pid, template).map_err(failed)?;
        let placement = started.cgroups.placement;
        placement.apply(None)?;
        let size = follow(settings, plan, state, &machine, &agent);
        let passthrough = Arc::new(Passthrough::new(
            &machine,
            &agent,
            &settings.security.passthrough_devices,
            plan.boot.memory_bytes,
            placement.directory(),
        ));
        let pod = Arc::new(Self {
            id: request.id.clone(),
            namespace: request.namespace.clone(),
            state: state.to_owned(),
            disks: Disks::new(&machine, &agent, &settings.storage),
            machine,
            agent,
            vmm: process,
            meter: started.cgroups.meter,
            passthrough,
            placement,
            size,
            shared: started.shared,
            publisher,
            containers: Mutex::default(),
            ready_at: SystemTime::now(),
            by_sandbox_service: request.files.is_some(),
            guest_seccomp: settings.security.guest_seccomp,
            memory: MemoryVolumes::of(&request.id, &request.annotations, plan.boot.memory_bytes),
            placeholder: Placeholder::for_guest(request.network_namespace.as_deref())?,
            network_namespace: request.network_namespace.clone(),
            kill_limit: Duration::from_millis(settings.timeouts.kill_ms),
            exit: watch::Sender::new(None),
            next_stream: AtomicU64::new(1),
        });
        pod.configure(request, started.network, &devices).await?;
        if started.template.is_ok() {
            // The template's clock stood still, and the time sent with the sandbox's configuration
            // was late by as long as the guest took to handle it.
            clock::set(&pod.agent).await?;
        }
        pod.start_tasks(request);
        if started.template.is_err_and(|cold| cold.wants_one()) {
            have_template_made(request, &config, plan);
        }
        Ok(pod)
    }

    /// Makes the guest the pod's: its sandbox with the drivers that it loads, and the functions of
    /// the host that the pod names.
    async fn configure(
        self: &Arc<Self>,
        request: &Request,
        network: network::GuestNetwork,
        devices: &PodDevices,
    ) -> Result<(), CallError> {
        let mut sandbox = self.sandbox_request(request, network)?;
        if let Some(image) = &devices.drivers {
            sandbox.storages.push(image.plug(&self.disks).await?);
            sandbox.drivers_path = driver_image::GUEST_PATH.to_owned();
            let agent = driver_image::Image::patient(&self.agent);
            let configured = agent_call!(agent, configure_sandbox, &sandbox);
            configured.map_err(|error| image.explain(error))?;
        } else {
            agent_call!(self.agent, configure_sandbox, &sandbox)?;
        }
        self.passthrough.plug_for_pod(&devices.functions).await
    }

    /// What goes on beside the calls, as long as the VM lives.
    fn start_tasks(self: &Arc<Self>, request: &Request) {
        if let Some(namespace) = &request.network_namespace {
            port_forward::start(namespace, &self.agent);
        }
        tokio::spawn(watch_vm(Arc::clone(self)));
        tokio::spawn(clock::follow(Arc::clone(self)));
        tokio::spawn(agent_events::pass_on(Arc::clone(self)));
    }

    fn sandbox_request(
        &self,
        request: &Request,
        network: network::GuestNetwork,
    ) -> Result<ConfigureSandboxRequest, CallError> {
        let spec = request.bundle.as_ref().map(|bundle| &bundle.spec);
        let linux = spec.and_then(|spec| spec.linux().as_ref());
        let mut shared = Storage::new();
        shared.mount_point = paths::SHARED.to_owned();
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
            network_sysctls: network.sysctls.into_iter().collect(),
            entropy: entropy()?,
            wall_clock_ns: nanoseconds(SystemTime::now()),
            storages: vec![shared],
            share_pid_namespace: false,
            node_limits: Some(limits::read()).into(),
            ..Default::default()
        })
    }
}

/// Starts making the template for the next pod of this shape.
fn have_template_made(request: &Request, config: &PodConfig, plan: Plan) {
    let order = template_maker::Order {
        config: request.options.config_path.clone(),
        flavour: request.options.flavour.clone(),
        annotations: request.annotations.clone().into_iter().collect(),
        sizes: Some(plan.into()),
    };
    let settings = config.settings.clone();
    tokio::spawn(async move { template_maker::start(&settings, order).await });
}

/// Gives a pod its place on the host, starts its VM and waits for the agent.
async fn start_vm(
    request: &Request,
    settings: &Settings,
    plan: Plan,
    state: &Path,
) -> Result<Started, CallError> {
    let failed = |error| CallError::host(state.display(), error);
    let mut journal = make_state(request, state).map_err(failed)?;
    let cgroups = make_cgroups(request, &mut journal)?;
    let shared =
        SharedDirectory::make(state, &request.annotations, &mut journal).map_err(failed)?;
    let user = claim_user(settings, &mut journal)?;
    let namespace = request.network_namespace.as_deref();
    let attached = network::attach(namespace, settings, &mut journal).await?;
    let mut parts = Parts {
        request,
        settings,
        plan,
        state,
        cgroups: &cgroups,
        shared: &shared,
        user,
        journal,
    };
    let (guest, template) = match Template::find(settings, plan) {
        Ok(template) => parts.fork(&template, attached.interfaces).await?,
        Err(cold) => parts.boot(cold, attached.interfaces).await?,
    };
    Ok(Started {
        guest,
        cgroups,
        shared,
        network: attached.guest,
        template,
    })
}

/// Everything that starting a guest needs, whether it boots or starts from a template.
struct Parts<'a> {
    request: &'a Request,
    settings: &'a Settings,
    plan: Plan,
    state: &'a Path,
    cgroups: &'a Cgroups,
    shared: &'a SharedDirectory,
    user: u32,
    journal: Journal,
}

/// A guest, and the key of the template that it started from or why it booted.
type Begun = (Greeted, Result<String, Cold>);

impl Parts<'_> {
    /// Starts the guest from a template, or boots it when that fails.
    async fn fork(
        &mut self,
        template: &Template,
        interfaces: Vec<Attachment>,
    ) -> Result<Begun, CallError> {
        let again = interfaces.iter().map(Attachment::again);
        let again = again.collect::<io::Result<_>>();
        let again = again.map_err(|error| CallError::host("the pod's network", error))?;
        match self.start_guest(Origin::Fork(template), again).await {
            Ok(guest) => {
                info!(template = template.key, "the pod goes on from a template");
                Ok((guest, Ok(template.key.clone())))
            }
            Err(error) => {
                let booted = self.boot(Cold::Damaged(error.to_string()), interfaces);
                let booted = booted.await?;
                // The same pod boots, so the template was at fault.
                template.discard();
                Ok(booted)
            }
        }
    }

    async fn boot(&mut self, cold: Cold, interfaces: Vec<Attachment>) -> Result<Begun, CallError> {
        info!(reason = %cold, "the pod boots");
        let guest = self.start_guest(Origin::Boot, interfaces).await?;
        Ok((guest, Err(cold)))
    }

    /// Starts the file-system daemon and the VMM, and waits for the agent. On failure both are
    /// ended, so that the caller can try again.
    async fn start_guest(
        &mut self,
        origin: Origin<'_>,
        interfaces: Vec<Attachment>,
    ) -> Result<Greeted, CallError> {
        let failed = |error| CallError::host(self.state.display(), error);
        let mut ready = Duration::from_millis(self.settings.timeouts.agent_ready_ms);
        if matches!(origin, Origin::Fork(_)) {
            ready = ready.min(FORK_READY_MAX);
        }
        let procs = &self.cgroups.procs;
        let (daemon, file_system) =
            self.shared
                .serve(self.state, self.settings, Arc::clone(procs))?;
        self.journal.note(&daemon.entry()).map_err(failed)?;
        let described = Launch {
            settings: self.settings,
            plan: self.plan,
            state: self.state,
            cgroups: Arc::clone(procs),
            user: self.user,
            origin,
            file_system: Some(file_system),
            interfaces,
        };
        let launched = launch(described, &mut self.journal);
        let scope = start_scope(self.request, daemon.pid);
        let started = async {
            let (launched, ()) = tokio::try_join!(launched, scope)?;
            let vmm = launched.process.clone();
            tokio::spawn(end_without_files(daemon.clone(), vmm.clone()));
            let greeted = greet(launched, ready, self.settings, self.state).await;
            if greeted.is_err() {
                vmm.kill();
                // The VMM holds the pod's interfaces until it has ended.
                let _ = timeout(LAST_WORDS_MAX, vmm.ended()).await;
            }
            greeted
        }
        .await;
        if started.is_err() {
            daemon.kill();
        }
        started
    }
}

/// Waits for the agent's first word, or for the end of the VM that would have brought it. What the
/// guest's kernel says is kept from here on.
async fn greet(
    launched: Launched,
    ready: Duration,
    settings: &Settings,
    state: &Path,
) -> Result<Greeted, CallError> {
    let (machine, process) = (launched.machine, launched.process);
    let log = settings.log.guest_kernel.then(|| state.join("guest.log"));
    tokio::spawn(guest_log::keep(launched.console, log));
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
    Ok(Greeted {
        machine,
        process,
        agent,
    })
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
    let sandbox = bundle.role() == Role::Sandbox;
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

/// The path of the sandbox's cgroup, as its specification has it.
fn cgroups_path(request: &Request) -> Option<PathBuf> {
    let bundle = request.bundle.as_ref()?;
    bundle.spec.linux().as_ref()?.cgroups_path().clone()
}

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

/// Makes the sandbox's cgroups.
fn make_cgroups(request: &Request, journal: &mut Journal) -> Result<Cgroups, CallError> {
    let Some(path) = cgroups_path(request) else {
        return Ok(Cgroups::default());
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
    Ok(Cgroups {
        procs: Arc::new(files),
        meter,
        placement: Placement::new(&path, directories),
    })
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

pub(super) fn follow(
    settings: &Settings,
    plan: Plan,
    state: &Path,
    machine: &Machine,
    agent: &Agent,
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

/// Nanoseconds since the epoch.
pub(super) fn nanoseconds(time: SystemTime) -> i64 {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use pericarp_runtime_config::Sizing;

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
        state_file::write(&request, &state, sizing, 1, None).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&run_dir), mode(&state)), (0o700, 0o700));
        for file in ["journal", "state.json"] {
            assert_eq!(mode(&state.join(file)), 0o600, "{file}");
        }
    }
}
