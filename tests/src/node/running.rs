//! A booted node.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

use super::channel::{Command, Request, Service, SetUp};
use super::control::{Control, Output, Sink};
use super::machine::{Machine, POWER_OFF_TIMEOUT};
use super::{Builder, Containerd, Kubernetes, Version};

/// Files and folders of the node that a failure's folder gets, as shell patterns.
const COLLECTED: &str = "/var/log/pericarp /run/pericarp /run/pericarp-node/log \
    /var/log/pods /var/lib/containerd/*.log";

/// Time that collecting logs gets.
const COLLECT_TIMEOUT_S: u64 = 60;

/// A booted node. It is killed when this is dropped, or when the process ends in whatever way.
pub struct Node {
    control: Control,
    machine: Arc<dyn Machine>,
    results: PathBuf,
    search_path: String,
    has_disk: bool,
    history: Mutex<Vec<String>>,
    pub(super) containerds: Mutex<Vec<Containerd>>,
    pub(super) kubernetes: Mutex<Option<Kubernetes>>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("results", &self.results)
            .finish_non_exhaustive()
    }
}

/// Time that the writing of a small file gets.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// How many commands the history names.
const HISTORY_MAX: usize = 1000;

impl Node {
    /// Describes a node to boot.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    pub(super) fn new(control: Control, machine: Arc<dyn Machine>, set_up: SetUp) -> Self {
        Self {
            control,
            machine,
            results: set_up.results,
            search_path: set_up.path,
            has_disk: set_up.state_disk,
            history: Mutex::default(),
            containerds: Mutex::default(),
            kubernetes: Mutex::default(),
        }
    }

    /// The folder of logs and results: the same path inside and outside, writable on both sides.
    #[must_use]
    pub fn results(&self) -> &Path {
        &self.results
    }

    /// PATH of every command in the node.
    #[must_use]
    pub fn search_path(&self) -> &str {
        &self.search_path
    }

    /// Whether what daemons write outlives the node.
    #[must_use]
    pub fn has_disk(&self) -> bool {
        self.has_disk
    }

    /// Runs a command to its end, whatever that is.
    pub fn run(&self, command: &Command) -> Result<Output> {
        self.run_with(command, None, None)
    }

    /// Runs a command that must succeed, and gives its standard output.
    pub fn text(&self, command: &Command) -> Result<String> {
        Ok(self.run(command)?.checked(&command.line())?.stdout)
    }

    /// Runs a line of bash that must succeed, and gives its standard output.
    pub fn shell(&self, line: &str) -> Result<String> {
        self.text(&Command::shell(line))
    }

    /// Runs a command with standard input, and with its output going to `sink` as it comes.
    pub fn run_with(
        &self,
        command: &Command,
        stdin: Option<&mut dyn Read>,
        sink: Option<Sink>,
    ) -> Result<Output> {
        let mut command = command.clone();
        command.stdin = stdin.is_some();
        let timeout = Duration::from_secs(command.timeout_s);
        let line = command.line();
        let output = self
            .control
            .request(&Request::Run(command), stdin, sink, timeout)?;
        self.remember(format!(
            "{line} -> {} after {:.1?}",
            output.exit, output.elapsed
        ));
        Ok(output)
    }

    /// Starts a service and waits until it is ready.
    pub fn start(&self, service: &Service) -> Result<()> {
        let timeout = Duration::from_secs(service.command.timeout_s);
        let request = Request::Start(service.clone());
        let output = self.control.request(&request, None, None, timeout)?;
        self.remember(format!("started {} -> {}", service.name, output.exit));
        output.checked(&service.name)?;
        Ok(())
    }

    /// Writes a small text file in the node, with the folders above it.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        let request = Request::Write {
            path: PathBuf::from(path),
            text: text.to_owned(),
        };
        let output = self.control.request(&request, None, None, WRITE_TIMEOUT)?;
        output.checked(&format!("write {path}")).map(|_| ())
    }

    /// Reads a text file of the node.
    pub fn read(&self, path: &str) -> Result<String> {
        self.text(&Command::new("cat").arg(path))
    }

    /// A containerd in the node with Pericarp's and runc's handlers; started on first use.
    pub fn containerd(&self, version: Version) -> Result<Containerd> {
        let mut started = self
            .containerds
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(containerd) = started.iter().find(|c| c.version() == version) {
            return Ok(containerd.clone());
        }
        let containerd = Containerd::start(self, version)?;
        started.push(containerd.clone());
        Ok(containerd)
    }

    /// etcd, API server and kubelet in the node, over containerd 2.3; started on first use.
    pub fn kubernetes(&self) -> Result<Kubernetes> {
        let containerd = self.containerd(Version::V23)?;
        let mut started = self
            .kubernetes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(kubernetes) = started.as_ref() {
            return Ok(kubernetes.clone());
        }
        let kubernetes = Kubernetes::start(self, &containerd)?;
        *started = Some(kubernetes.clone());
        Ok(kubernetes)
    }

    /// Copies everything that explains a failure into a folder.
    pub fn collect(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        let history = self
            .history
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .join("\n");
        std::fs::write(folder.join("commands.log"), history + "\n")
            .context("cannot write the list of commands")?;
        let line = format!(
            "dmesg >dmesg.log; ps -eo pid,ppid,stat,args --forest >processes.log; \
             cp -r --parents {COLLECTED} . 2>/dev/null || true"
        );
        let mut command = Command::new("bash")
            .args(["-c", &line])
            .timeout_s(COLLECT_TIMEOUT_S);
        let inside = self.results.join("collected");
        let made = std::fs::create_dir_all(&inside);
        made.with_context(|| format!("cannot make {}", inside.display()))?;
        command.cwd = Some(inside.clone());
        // A node that is gone has left what its machine logged, and that is copied in any case.
        let from_inside = self.run(&command);
        for entry in std::fs::read_dir(&self.results)
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = entry.path();
            // A copy of a file onto itself would empty it.
            let is_there = folder.join(entry.file_name()) == path;
            if !is_there
                && path.is_file()
                && path.extension().is_none_or(|extension| extension != "img")
            {
                let copied = std::fs::copy(&path, folder.join(entry.file_name()));
                copied.with_context(|| format!("cannot copy {}", path.display()))?;
            }
        }
        let _other_file_system = std::fs::rename(&inside, folder.join("node"));
        from_inside.map(|_| ())
    }

    /// Removes every pod of every containerd that was started.
    pub fn remove_pods(&self) -> Result<()> {
        let started = self
            .containerds
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let all = ["rmp", "--all", "--force"];
        let mut removals = started
            .iter()
            .map(|containerd| containerd.crictl_text(self, &all));
        removals.try_for_each(|removed| removed.map(drop))
    }

    /// Syncs and powers the node off.
    pub fn power_off(self) -> Result<()> {
        let timeout = POWER_OFF_TIMEOUT;
        let asked = self
            .control
            .request(&Request::PowerOff, None, None, timeout);
        self.machine.end(timeout);
        asked.map(|_| ())
    }

    /// Ends the node as a loss of power would: what it had not written to its disk is gone.
    pub fn cut_power(self) {
        self.machine.kill();
    }

    /// Whether it died, or hangs and was given up; then it is killed, if it is there still.
    pub(super) fn is_dead(&self) -> bool {
        let dead = self.control.is_closed();
        if dead {
            self.machine.kill();
        }
        dead
    }

    /// Logs of the machine itself.
    #[must_use]
    pub fn machine_logs(&self) -> Vec<PathBuf> {
        self.machine.logs()
    }

    fn remember(&self, line: String) {
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        if history.len() < HISTORY_MAX {
            history.push(line);
        }
    }
}
