//! `pericarp check`: can this node run pods? One module for each thing that can be wrong; none of
//! them changes anything.
//!
//! Each module turns facts (texts and numbers of the host) into findings by pure functions, and
//! gathers the facts in one place, so that the judgements are tested without the host.

mod assets;
mod cgroup;
mod configuration;
mod containerd;
mod containerd_config;
mod finding;
mod kernel;
mod kvm;
mod program;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;

use crate::check::finding::Report;
use crate::cli::CheckArguments;

/// The host's files, under `/` or under a test's folder.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host<'a> {
    root: &'a Path,
}

impl Host<'_> {
    /// A file's path under the root.
    fn path(&self, absolute: &str) -> std::path::PathBuf {
        self.root.join(absolute.trim_start_matches('/'))
    }

    /// A small text file of the kernel's; `None` when it is not there.
    fn text(&self, absolute: &str) -> Option<String> {
        std::fs::read_to_string(self.path(absolute)).ok()
    }

    fn exists(&self, absolute: &str) -> bool {
        self.path(absolute).exists()
    }
}

pub(crate) fn run(arguments: &CheckArguments, out: &mut impl Write) -> Result<ExitCode> {
    let host = Host {
        root: Path::new("/"),
    };
    let mut report = Report::default();
    if !nix::unistd::geteuid().is_root() {
        report.warn(
            "user",
            "not root: some findings may be wrong",
            "run it as root",
        );
    }
    kvm::check(host, &mut report);
    let config = configuration::check(host, arguments.config.as_deref(), &mut report);
    kernel::check(host, &config.settings, &mut report);
    cgroup::check(host, &mut report);
    assets::check(host, &config.settings, &mut report);
    assets::check_flavours(host, &config, &mut report);
    containerd::check(
        host,
        &config,
        arguments.containerd_config.as_deref(),
        &mut report,
    );
    if arguments.json {
        report.write_json(out)?;
    } else {
        report.write_lines(out)?;
    }
    Ok(if report.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
