//! `node`: builds the test node's components, boots it, runs commands in it.

use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use pericarp_tests::node::builder::Kind as NodeKind;
use pericarp_tests::node::channel::Kind;
use pericarp_tests::node::deps::{self, Group};
use pericarp_tests::node::{Command, Device, Exit, Node, Version, inside};

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
            deps::ensure(&groups_of(&groups)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Run { node, line } => {
            deps::ensure(&[Group::Demo])?;
            let (booted, environment) = boot(&node)?;
            let results = booted.results().to_path_buf();
            stream(
                booted,
                &line_command(&line, &environment, &results),
                node.keep,
            )
        }
        Verb::KubeRun { node, line } => {
            deps::ensure(&[Group::Demo, Group::Kube])?;
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
            deps::ensure(&[Group::Demo])?;
            let (booted, environment) = boot(&node)?;
            shell(booted, &environment)
        }
        Verb::Inside { role } => match role.as_str() {
            "init" => inside::init::run().map(|()| ExitCode::SUCCESS),
            "init-here" => inside::init::run_here().map(|()| ExitCode::SUCCESS),
            "serve" => inside::serve::run().map(|()| ExitCode::SUCCESS),
            other => bail!("`inside {other}` is none of `init`, `init-here`, `serve`"),
        },
    }
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

/// Boots a node with containerd; the command carries the environment that its tools need.
fn boot(arguments: &NodeArguments) -> Result<(Node, Command)> {
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
            other => bail!("there is no device {other}; there are nvme, virtio-blk, virtio-gpu"),
        });
    }
    let version = match arguments.containerd.as_str() {
        "2.3" => Version::V23,
        "1.7" => {
            deps::ensure(&[Group::Older])?;
            Version::V17
        }
        other => bail!("there is no containerd {other} in the node; there are 2.3 and 1.7"),
    };
    eprintln!("node: booting");
    let node = builder.name(format!("run-{}", std::process::id())).boot()?;
    eprintln!(
        "node: up, logs in {}; starting containerd",
        node.results().display()
    );
    let containerd = node.containerd(version)?;
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
