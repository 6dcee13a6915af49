//! Makes a template: boots a machine that never serves a pod, waits for its agent, and saves it.
//!
//! This runs in a separate process, `containerd-shim-pericarp-v2 template`, in a node-level cgroup,
//! so that it does not end with a pod and its memory is not charged to one. It reads an [`Order`]
//! from its standard input. The shim of the first pod of a shape starts it, and so does
//! `pericarp template build`. Only one runs at a time; it first removes what a killed one left.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};
use pericarp_protocol::{
    guest::Empty,
    machine::{Descriptor, Nothing, Request, Save},
};
use pericarp_runtime_config::{Config, Demand, Settings, Sizing};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::{
    errors::CallError,
    guest::agent_client::{Agent, agent_call},
    host::{
        capacity,
        cgroup::{self, ROOT},
        child::Watched,
        journal::{self, Journal},
        private,
    },
    machine::{
        launch::{Launch, Launched, Origin, claim_user, launch},
        size::{Most, Plan},
        template::{self, TEMPLATES, Unpublished},
    },
    network,
};

/// The node-level cgroup in which templates are made and to which their memory is charged.
const CGROUP: &str = "pericarp-templates";

/// Working directory, beneath the directory of templates.
const WORK: &str = ".work";

/// Longest order in bytes: annotations are bounded by Kubernetes to 256 KiB.
const ORDER_BYTES_MAX: u64 = 1 << 20;

/// How long the VMM may take to end after the save.
const VMM_ENDS_MAX: Duration = Duration::from_secs(5);

/// The name of the action on the shim's command line.
pub(crate) const ACTION: &str = "template";

/// What to make. Without sizes: the template of a pod without requests and limits.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Order {
    /// Configuration file, if not the default.
    pub(crate) config: Option<PathBuf>,
    /// Flavour of the handler.
    pub(crate) flavour: Option<String>,
    /// Annotations of the pod, of which those that change settings are used.
    pub(crate) annotations: BTreeMap<String, String>,
    /// Sizes of the machine.
    pub(crate) sizes: Option<Sizes>,
}

/// Sizes of a machine.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sizes {
    vcpus: u32,
    vcpus_max: u32,
    memory_bytes: u64,
    memory_max_bytes: u64,
}

impl From<Plan> for Sizes {
    fn from(plan: Plan) -> Self {
        Self {
            vcpus: plan.boot.vcpus,
            vcpus_max: plan.most.vcpus,
            memory_bytes: plan.boot.memory_bytes,
            memory_max_bytes: plan.most.memory_bytes,
        }
    }
}

impl Sizes {
    fn plan(self, demand: Demand) -> Plan {
        Plan {
            demand,
            host: capacity::read(),
            boot: Sizing {
                vcpus: self.vcpus,
                memory_bytes: self.memory_bytes,
            },
            most: Most {
                vcpus: self.vcpus_max,
                memory_bytes: self.memory_max_bytes,
            },
        }
    }
}

/// Starts a separate process that carries out `order`, waits for it and logs how it ended.
pub(crate) async fn start(settings: &Settings, order: Order) {
    let log = template::directory(settings).join("log");
    match spawn(settings, &order, &log) {
        Ok(maker) => {
            let how = maker.ended().await;
            let said = fs::read_to_string(log).unwrap_or_default();
            let said = said.lines().last().unwrap_or_default();
            info!(how, said, "a template was to be made");
        }
        Err(error) => warn!(%error, "no template can be made"),
    }
}

fn spawn(settings: &Settings, order: &Order, log: &Path) -> io::Result<Watched> {
    private::make_directory(&template::directory(settings))?;
    let log = private::file()
        .write(true)
        .create(true)
        .truncate(true)
        .open(log)?;
    let mut input = private::nameless(&settings.paths.run_dir)?;
    input.write_all(&serde_json::to_vec(order)?)?;
    io::Seek::rewind(&mut input)?;
    let directory = Path::new(ROOT).join(CGROUP);
    let cgroup = cgroup::make(&directory)?;
    // Pods come first. Without the cpu controller the maker competes with them.
    let _ = fs::write(directory.join("cpu.idle"), "1");
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg(ACTION)
        .stdin(input)
        .stdout(log.try_clone()?)
        .stderr(log);
    Watched::spawn_program_in(command, Arc::new(vec![cgroup]))
}

/// Why no template was made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MakeError {
    /// The order.
    #[error("order on standard input: {0}")]
    Order(io::Error),
    /// The configuration or an annotation.
    #[error("{0}")]
    Settings(String),
    /// Something of the node.
    #[error("{object}: {source}")]
    Host {
        /// Which file or directory.
        object: String,
        /// The error of the kernel.
        source: io::Error,
    },
    /// The machine.
    #[error(transparent)]
    Machine(#[from] CallError),
}

fn host(object: impl ToString) -> impl FnOnce(io::Error) -> MakeError {
    move |source| MakeError::Host {
        object: object.to_string(),
        source,
    }
}

/// Runs the whole process: reads the order, carries it out and prints the template's key. When
/// another process is making a template, it says so and ends.
pub(crate) fn run() -> Result<(), MakeError> {
    let answer = match carry_out(&read_order()?)? {
        Some(key) => format!("{key}\n"),
        None => "another template is being made\n".to_owned(),
    };
    let written = io::stdout().write_all(answer.as_bytes());
    written.map_err(host("standard output"))
}

fn read_order() -> Result<Order, MakeError> {
    let mut text = Vec::new();
    let input = io::stdin().lock();
    input
        .take(ORDER_BYTES_MAX)
        .read_to_end(&mut text)
        .map_err(MakeError::Order)?;
    if text.is_empty() {
        return Ok(Order::default());
    }
    serde_json::from_slice(&text).map_err(|error| MakeError::Order(error.into()))
}

/// Returns the template's key, or `None` when another process is making a template.
fn carry_out(order: &Order) -> Result<Option<String>, MakeError> {
    let (settings, plan) = understand(order)?;
    let directory = template::directory(&settings);
    private::make_directory(&directory).map_err(host(directory.display()))?;
    let Some(_lock) = lock(&directory).map_err(host(directory.display()))? else {
        return Ok(None);
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(host("event loop"))?;
    let work = directory.join(WORK);
    undo(&work).map_err(|error| host(work.display())(io::Error::other(error.to_string())))?;
    let made = runtime.block_on(make(&settings, plan, &directory, &work));
    if let Err(error) = undo(&work) {
        warn!(%error, "something of the making of a template is left");
    }
    made.map(Some)
}

/// Takes the lock that allows one maker at a time; `None` when another process holds it.
fn lock(directory: &Path) -> io::Result<Option<Flock<File>>> {
    let lock = File::open(directory)?;
    Ok(Flock::lock(lock, FlockArg::LockExclusiveNonblock).ok())
}

fn undo(work: &Path) -> Result<(), journal::UndoError> {
    journal::undo(work, network::remove_tap)
}

/// Removes what a maker left behind that was killed.
pub(crate) fn undo_stale(run_dir: &Path) {
    let directory = run_dir.join(TEMPLATES);
    let work = directory.join(WORK);
    if !work.exists() {
        return;
    }
    if let Ok(Some(_lock)) = lock(&directory)
        && let Err(error) = undo(&work)
    {
        warn!(%error, "something of the making of a template is left");
    }
}

fn understand(order: &Order) -> Result<(Settings, Plan), MakeError> {
    let wrong = |error: &dyn std::fmt::Display| MakeError::Settings(error.to_string());
    let mut config = Config::load(order.config.as_deref(), true).map_err(|error| wrong(&error))?;
    if let Some(flavour) = &order.flavour {
        config = config
            .with_flavour(flavour)
            .map_err(|error| wrong(&error))?;
    }
    let pod = config
        .for_pod(&order.annotations)
        .map_err(|error| wrong(&error))?;
    let settings = pod.settings;
    let demand = Demand::default();
    let plan = match order.sizes {
        Some(sizes) => sizes.plan(demand),
        None => Plan::of(&settings, demand, capacity::read())?,
    };
    Ok((settings, plan))
}

async fn make(
    settings: &Settings,
    plan: Plan,
    directory: &Path,
    work: &Path,
) -> Result<String, MakeError> {
    let key = template::key(settings, plan)?;
    private::make_directory(work).map_err(host(work.display()))?;
    let mut journal = Journal::open(work).map_err(host(work.display()))?;
    let files =
        Unpublished::new(directory, plan.boot.memory_bytes).map_err(host(directory.display()))?;
    let cgroup = Path::new(ROOT).join(CGROUP);
    let memory = files.memory.try_clone().map_err(host("memory"))?;
    let launched = launch(
        Launch {
            settings,
            plan,
            state: work,
            cgroups: Arc::new(vec![cgroup::make(&cgroup).map_err(host(cgroup.display()))?]),
            user: claim_user(settings, &mut journal)?,
            origin: Origin::BootToSave(memory.into()),
            file_system: None,
            interfaces: Vec::new(),
        },
        &mut journal,
    )
    .await?;
    let process = launched.process.clone();
    let saved = save(settings, launched, &files.state).await;
    process.kill();
    if tokio::time::timeout(VMM_ENDS_MAX, process.ended())
        .await
        .is_err()
    {
        warn!(pid = process.pid, "the VMM of the template is still ending");
    }
    saved?;
    files
        .publish(work, directory, &key)
        .map_err(host(directory.display()))?;
    Ok(key)
}

/// Waits until the agent serves, then pauses the machine and saves it.
async fn save(settings: &Settings, launched: Launched, state: &File) -> Result<(), MakeError> {
    let ready = Duration::from_millis(settings.timeouts.agent_ready_ms);
    let call = Duration::from_millis(settings.timeouts.rpc_ms);
    let machine = launched.machine;
    // Kept open for the machine's life. Nobody reads it: a quiet boot does not fill the pipe.
    let _console = launched.console;
    let (agent, _) = tokio::select! {
        greeted = Agent::greet(launched.agent, launched.vsock, ready, call) => greeted?,
        how = launched.process.ended() => {
            return Err(CallError::Gone(format!("the VM did not boot: {how}")).into());
        }
    };
    // The agent answers once it has set up everything that does not depend on a pod.
    agent_call!(agent, diagnostics, &Empty::new())?;
    machine
        .request(Request::Pause(Nothing {}), Vec::new())
        .await?;
    let descriptor = state
        .as_fd()
        .try_clone_to_owned()
        .map_err(host("state of the template"))?;
    let save = Request::Save(Save {
        state: Descriptor { position: 0 },
    });
    machine.request(save, vec![descriptor]).await?;
    Ok(())
}
