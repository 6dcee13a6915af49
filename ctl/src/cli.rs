//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Pods in virtual machines: look after a node.
#[derive(Debug, Parser)]
#[command(name = "pericarp", version, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Say whether this node can run pods, one line for each finding and what to do.
    Check(CheckArguments),
    /// Check or explain the configuration.
    Config(ConfigArguments),
    /// Offer devices of this host to the kubelet, as devices.resources of the configuration says.
    DevicePlugin(DevicePluginArguments),
    /// List the pods that run in virtual machines on this node.
    List(ListArguments),
    /// Look after the saved machines from which pods start (vm.template).
    Template(TemplateArguments),
    /// Print the version.
    Version,
}

/// Arguments of `check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArguments {
    /// Print one JSON document instead of lines.
    #[arg(long)]
    pub(crate) json: bool,
    /// Configuration file to use instead of /etc/pericarp/config.toml.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// containerd's configuration file, if it runs with another one than its default.
    #[arg(long, value_name = "FILE")]
    pub(crate) containerd_config: Option<PathBuf>,
}

/// Arguments of `config`.
#[derive(Debug, Args)]
pub(crate) struct ConfigArguments {
    #[command(subcommand)]
    pub(crate) command: ConfigCommand,
}

/// What to do with the configuration.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Read the configuration and its drop-ins as a shim would, and name every mistake.
    Check {
        /// File to read instead of /etc/pericarp/config.toml; its drop-ins are those of `config.d`
        /// beside it.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Print the resulting values and where each comes from.
        #[arg(long)]
        show: bool,
        /// Lay the settings of this flavour over them.
        #[arg(long, value_name = "NAME")]
        flavour: Option<String>,
    },
    /// Print the reference page of all keys (docs/reference.md).
    #[command(hide = true)]
    Reference,
    /// Print an example with every key and its default (deploy/config.toml).
    Example,
}

/// Arguments of `device-plugin`.
#[derive(Debug, Args)]
pub(crate) struct DevicePluginArguments {
    /// Configuration file to use instead of /etc/pericarp/config.toml.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The kubelet's folder of device plugins.
    #[arg(
        long,
        value_name = "DIRECTORY",
        default_value = "/var/lib/kubelet/device-plugins"
    )]
    pub(crate) folder: PathBuf,
}

/// Arguments of `list`.
#[derive(Debug, Args)]
pub(crate) struct ListArguments {
    /// Print one JSON document instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
    /// Directory of run-time state, if the configuration names another one than /run/pericarp.
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) run_dir: Option<PathBuf>,
}

/// Arguments of `template`.
#[derive(Debug, Args)]
pub(crate) struct TemplateArguments {
    /// Configuration file to use instead of /etc/pericarp/config.toml.
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) config: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: TemplateCommand,
}

/// What to do with templates.
#[derive(Debug, Subcommand)]
pub(crate) enum TemplateCommand {
    /// List the templates of this node.
    List {
        /// Print one JSON document instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Make the template of a pod without requests and limits, ahead of the first such pod.
    Build {
        /// Lay the settings of this flavour over the configuration.
        #[arg(long, value_name = "NAME")]
        flavour: Option<String>,
    },
    /// Remove templates. Pods that run go on; later ones boot and have new ones made.
    Rm {
        /// Their names, as `list` shows them.
        #[arg(required_unless_present = "all")]
        keys: Vec<String>,
        /// All of them.
        #[arg(long, conflicts_with = "keys")]
        all: bool,
    },
}
