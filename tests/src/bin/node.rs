//! `node`: builds the test node's components, boots it, runs commands in it.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use pericarp_tests::node::builder::Kind as NodeKind;
use pericarp_tests::node::channel::Kind;
use pericarp_tests::node::{self, deps::Group};
use pericarp_tests::node::{Builder, Command, Containerd, Device, Exit, Node, Version, inside};
use pericarp_tests::verbs::{bench, critest, demo, kubernetes};

/// Time that a command typed by a person gets.
const RUN_TIMEOUT_S: u64 = 3600;

/// Builds, boots and uses the test node.
#[derive(Debug, Parser)]
#[command(name = "node")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Build the node's components into the cache: groups demo, older, kube, conformance.
    Deps {
        /// Groups to build; all of them when none is named.
        groups: Vec<String>,
    },
    /// Run a line of shell in a fresh node with containerd up.
    Run {
        #[command(flatten)]
        node: NodeArguments,
        /// The line.
        #[arg(required = true, trailing_var_arg = true)]
        line: Vec<String>,
    },
    /// Run a line of shell in a fresh node with Kubernetes up.
    KubeRun {
        #[command(flatten)]
        node: NodeArguments,
        /// The line.
        #[arg(required = true, trailing_var_arg = true)]
        line: Vec<String>,
    },
    /// An interactive shell in a fresh node with containerd up.
    Shell {
        #[command(flatten)]
        node: NodeArguments,
    },
    /// Show a pod of two containers in its own VM, step by step.
    Demo {
        #[command(flatten)]
        node: NodeArguments,
    },
    /// Measure pods under Pericarp beside pods under runc.
    Bench {
        #[command(flatten)]
        node: NodeArguments,
        /// Pods per handler.
        #[arg(long, default_value_t = 10)]
        runs: usize,
        /// Seconds that an idle pod is watched.
        #[arg(long, default_value_t = 10)]
        idle_s: u64,
    },
    /// Run the CRI's conformance tests under runc and under Pericarp, side by side.
    Critest {
        #[command(flatten)]
        node: NodeArguments,
        /// Handlers of containerd to run under.
        #[arg(long, value_delimiter = ',', default_value = "runc,pericarp")]
        handlers: Vec<String>,
        /// Only specs that match (may be repeated).
        #[arg(long)]
        focus: Vec<String>,
        /// No specs that match (may be repeated).
        #[arg(long)]
        skip: Vec<String>,
        /// Minutes per handler after which no further spec is run.
        #[arg(long, default_value_t = 60)]
        limit_min: u64,
    },
    /// Run a pod for each thing that a pod may ask of Kubernetes, under runc and under Pericarp.
    Kubernetes {
        #[command(flatten)]
        node: NodeArguments,
        /// Write the table to this file too.
        #[arg(long)]
        table: Option<PathBuf>,
        /// Only the cases whose names hold one of these.
        only: Vec<String>,
    },
    /// What runs in the node itself.
    #[command(hide = true)]
    Inside {
        /// `init`, `init-here` or `serve`.
        role: String,
    },
}

#[derive(Debug, Args)]
struct NodeArguments {
    /// Use this computer, whose /dev/kvm must boot a stock kernel.
    #[arg(long)]
    host: bool,
    /// Memory in MiB.
    #[arg(long, default_value_t = 4096)]
    memory: u32,
    /// Number of CPUs.
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Count instructions instead of time.
    #[arg(long)]
    icount: bool,
    /// Devices behind an IOMMU: nvme, virtio-blk, virtio-gpu.
    #[arg(long)]
    device: Vec<String>,
    /// Keep the folder of logs and results (RESULTS in the node) even when the command succeeds.
    #[arg(long)]
    keep: bool,
    /// containerd to start: 2.3 or 1.7.
    #[arg(long, default_value = "2.3")]
    containerd: String,
}

fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", format!("{error:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Deps { groups } => {
            node::ensure(&groups_of(&groups)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Run { node, line } => {
            node::ensure(&[Group::Demo])?;
            let (booted, environment) = boot(&node)?;
            let results = booted.results().to_path_buf();
            stream(
                booted,
                &line_command(&line, &environment, &results),
                node.keep,
            )
        }
        Verb::KubeRun { node, line } => {
            node::ensure(&[Group::Demo, Group::Kube])?;
            let (booted, mut environment) = boot(&node)?;
            let kubernetes = booted.kubernetes()?;
            environment.env.extend(kubernetes.kubectl().env);
            let results = booted.results().to_path_buf();
            stream(
                booted,
                &line_command(&line, &environment, &results),
                node.keep,
            )
        }
        Verb::Shell { node } => {
            node::ensure(&[Group::Demo])?;
            let (booted, environment) = boot(&node)?;
            shell(booted, &environment)
        }
        Verb::Demo { node } => show(&node),
        Verb::Bench { node, runs, idle_s } => {
            node::ensure(&[Group::Demo])?;
            judge(&node, |node, containerd| {
                bench::run(node, containerd, bench::Options { runs, idle_s }).map(|()| true)
            })
        }
        Verb::Critest {
            node,
            handlers,
            focus,
            skip,
            limit_min,
        } => {
            node::ensure(&[Group::Demo, Group::Conformance])?;
            let options = critest::Options {
                handlers,
                focus,
                skip,
                limit_s: limit_min * 60,
            };
            judge(&node, |node, containerd| {
                critest::run(node, containerd, &options)
            })
        }
        Verb::Kubernetes { node, table, only } => cases(&node, table.as_deref(), &only),
        Verb::Inside { role } => match role.as_str() {
            "init" => inside::init::run().map(|()| ExitCode::SUCCESS),
            "init-here" => inside::init::run_here().map(|()| ExitCode::SUCCESS),
            "serve" => inside::serve::run().map(|()| ExitCode::SUCCESS),
            other => bail!("`inside {other}` is none of `init`, `init-here`, `serve`"),
        },
    }
}

/// Runs the cases of Kubernetes.
fn cases(arguments: &NodeArguments, table: Option<&Path>, only: &[String]) -> Result<ExitCode> {
    node::ensure(&[Group::Demo, Group::Kube])?;
    let run = kubernetes::Run::new(only, table)?;
    if run.needs_node() {
        judge(arguments, |node, containerd| {
            run.in_node(node, (containerd, &node.kubernetes()?));
            Ok(true)
        })?;
    }
    run.in_own_nodes();
    Ok(ExitCode::from(u8::from(!run.end())))
}

fn groups_of(names: &[String]) -> Result<Vec<Group>> {
    if names.is_empty() {
        return Ok(Group::ALL.to_vec());
    }
    let find = |name: &String| {
        let group = Group::ALL.into_iter().find(|group| group.name() == name);
        group.with_context(|| {
            let known = Group::ALL.map(Group::name).join(", ");
            format!("there is no group {name} of components; there are {known}")
        })
    };
    names.iter().map(find).collect()
}

/// Describes the node that the arguments mean.
fn builder(arguments: &NodeArguments) -> Result<Builder> {
    let mut builder = Node::builder()
        .memory_mib(arguments.memory)
        .cpus(arguments.cpus);
    if arguments.host {
        builder = builder.kind(NodeKind::Host);
    }
    if arguments.icount {
        builder = builder.icount();
    }
    for device in &arguments.device {
        builder = builder.device(match device.as_str() {
            "nvme" => Device::Nvme,
            "virtio-blk" => Device::VirtioBlk,
            "virtio-gpu" => Device::VirtioGpu,
            "edu" => Device::Edu,
            other => {
                bail!("there is no device {other}; there are nvme, virtio-blk, virtio-gpu, edu")
            }
        });
    }
    Ok(builder.name(format!("run-{}", std::process::id())))
}

/// The containerd that the arguments mean, its components built.
fn version(arguments: &NodeArguments) -> Result<Version> {
    match arguments.containerd.as_str() {
        "2.3" => Ok(Version::V23),
        "1.7" => {
            node::ensure(&[Group::Older])?;
            Ok(Version::V17)
        }
        other => bail!("there is no containerd {other} in the node; there are 2.3 and 1.7"),
    }
}

/// Boots a node and starts its containerd.
fn boot_with_containerd(arguments: &NodeArguments) -> Result<(Node, Containerd)> {
    let version = version(arguments)?;
    eprintln!("node: booting");
    let node = builder(arguments)?.boot()?;
    eprintln!(
        "node: up, logs in {}; starting containerd",
        node.results().display()
    );
    let containerd = node.containerd(version)?;
    Ok((node, containerd))
}

/// Boots a node with containerd; the command carries the environment that its tools need.
fn boot(arguments: &NodeArguments) -> Result<(Node, Command)> {
    let (node, containerd) = boot_with_containerd(arguments)?;
    let environment = containerd
        .crictl()
        .env("CONTAINERD_ADDRESS", containerd.socket());
    Ok((node, environment))
}

fn line_command(line: &[String], environment: &Command, results: &Path) -> Command {
    let mut command = Command::new("bash").args(["-c", &line.join(" ")]);
    command.env.clone_from(&environment.env);
    let folder = results.display().to_string();
    command.env.insert("RESULTS".to_owned(), folder);
    command
        .env
        .insert("CONTAINERD_NAMESPACE".to_owned(), "k8s.io".to_owned());
    command.timeout_s(RUN_TIMEOUT_S)
}

/// The demo: every step from the components to the comparison at the end.
fn show(arguments: &NodeArguments) -> Result<ExitCode> {
    let mut steps = demo::Steps::default();
    steps.step(
        "components: containerd, runc, CNI, crictl, virtiofsd",
        || node::ensure(&[Group::Demo]),
    )?;
    let version = version(arguments)?;
    let node = steps.step("boot the test node", || builder(arguments)?.boot())?;
    let containerd = steps.step("start containerd", || node.containerd(version))?;
    let done = demo::run(&node, &containerd, &mut steps);
    let code = finish(node, done.map(|()| true), arguments.keep)?;
    steps.end();
    Ok(code)
}

/// Boots a node for work that says whether what it found is good enough, and keeps the results.
fn judge(
    arguments: &NodeArguments,
    work: impl FnOnce(&Node, &Containerd) -> Result<bool>,
) -> Result<ExitCode> {
    let (node, containerd) = boot_with_containerd(arguments)?;
    let judged = work(&node, &containerd);
    finish(node, judged, true)
}

/// Powers the node off; its results stay where `keep` says so or the work failed.
fn finish(node: Node, work: Result<bool>, keep: bool) -> Result<ExitCode> {
    let results = node.results().to_path_buf();
    if work.is_err() {
        let _the_first_error_counts = node.collect(&results);
    }
    if keep || work.is_err() {
        eprintln!("node: logs and results are in {}", results.display());
    }
    let off = node.power_off();
    let good = work?;
    off?;
    if !keep {
        std::fs::remove_dir_all(&results)
            .with_context(|| format!("cannot remove {}", results.display()))?;
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs the command with its output on ours, and powers the node off.
fn stream(node: Node, command: &Command, keep: bool) -> Result<ExitCode> {
    let output = node.run_with(command, None, Some(Box::new(print)))?;
    let results = node.results().to_path_buf();
    if output.exit.success() && !keep {
        node.power_off()?;
        std::fs::remove_dir_all(&results)
            .with_context(|| format!("cannot remove {}", results.display()))?;
    } else {
        node.collect(&results)?;
        eprintln!(
            "node: {}; logs and results are in {}",
            output.exit,
            results.display()
        );
        node.power_off()?;
    }
    Ok(exit_code(&output.exit))
}

fn print(kind: Kind, bytes: &[u8]) {
    // A reader that has gone (`| head`) is no failure of the command.
    let _reader_gone = if kind == Kind::Stdout {
        let mut stdout = std::io::stdout();
        stdout.write_all(bytes).and_then(|()| stdout.flush())
    } else {
        std::io::stderr().write_all(bytes)
    };
}

fn exit_code(exit: &Exit) -> ExitCode {
    ExitCode::from(u8::try_from(exit.status() & 0xff).unwrap_or(u8::MAX))
}

/// The terminal in raw mode; as it was when dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn new() -> Result<Self> {
        let before = tcgetattr(std::io::stdin()).context("`node shell` needs a terminal")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw).context("cannot set the terminal")?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _terminal_gone = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

/// An interactive shell; `script` gives it a terminal of its own in the node.
fn shell(node: Node, environment: &Command) -> Result<ExitCode> {
    let terminal = RawTerminal::new()?;
    let mut command = line_command(&[], environment, node.results());
    command.argv = ["script", "-qefc", "bash -i", "/dev/null"]
        .map(str::to_owned)
        .to_vec();
    command
        .env
        .insert("TERM".to_owned(), std::env::var("TERM").unwrap_or_default());
    let mut stdin: Box<dyn Read> = Box::new(std::io::stdin());
    let output = node.run_with(&command, Some(&mut *stdin), Some(Box::new(print)))?;
    drop(terminal);
    node.power_off()?;
    Ok(exit_code(&output.exit))
}
