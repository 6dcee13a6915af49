//! The scope of a sandbox under the systemd cgroup driver: systemd is told that the sandbox's
//! cgroup is in use and whose it is. A cgroup that systemd does not know loses its controllers, and
//! with them its limits, as soon as systemd arranges the slice above it anew (CGROUP_DELEGATION of
//! systemd's documentation).
//!
//! The cgroup is made before, so that the first process is in it from its first instruction;
//! systemd takes over the directory that is there. The scope ends by itself when its cgroup is
//! empty.
//!
//! systemd's own `busctl` makes the one call there is to make (D22).

use std::{
    io,
    path::Path,
    process::{Command, Output, Stdio},
};

use crate::{errors::CallError, host::cgroup::slice_and_scope};

/// There when systemd is the node's first process (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";

/// How long systemd may take to answer.
const TIMEOUT: &str = "--timeout=10";

/// A scope to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scope {
    unit: String,
    slice: String,
}

impl Scope {
    /// The scope that a sandbox's `cgroupsPath` names, where systemd runs.
    pub(crate) fn of(cgroups_path: &Path) -> Option<Self> {
        Path::new(BOOTED)
            .is_dir()
            .then(|| Self::named(&cgroups_path.to_string_lossy()))
            .flatten()
    }

    fn named(cgroups_path: &str) -> Option<Self> {
        let (slice, unit) = slice_and_scope(cgroups_path)?;
        Some(Self {
            unit,
            slice: slice.to_owned(),
        })
    }

    /// Has systemd make the scope around `pid`. Waits for systemd.
    pub(crate) fn start(&self, pid: i32) -> Result<(), CallError> {
        let output = Command::new("busctl")
            .args(self.arguments(pid))
            .stdin(Stdio::null())
            .output();
        judge(output)
            .map_err(|error| CallError::host(format!("systemd scope {}", self.unit), error))
    }

    /// `StartTransientUnit(name, mode, properties, aux)` (org.freedesktop.systemd1(5)) in the words
    /// of busctl(1): `a(sv)` is a count, and a name, a type and a value each.
    fn arguments(&self, pid: i32) -> Vec<String> {
        let pid = pid.to_string();
        let call = [
            "--system",
            TIMEOUT,
            "call",
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
            "org.freedesktop.systemd1.Manager",
            "StartTransientUnit",
            "ssa(sv)a(sa(sv))",
            &self.unit,
            "replace",
        ];
        let properties: [&[&str]; 6] = [
            &["Description", "s", "Pericarp sandbox"],
            &["Slice", "s", &self.slice],
            // What is beneath is ours, and controllers reach it.
            &["Delegate", "b", "true"],
            // Not to be stopped before everything that is not a service when the node goes down.
            &["DefaultDependencies", "b", "false"],
            // Nothing stays behind of a scope that failed.
            &["CollectMode", "s", "inactive-or-failed"],
            &["PIDs", "au", "1", &pid],
        ];
        let count = properties.len().to_string();
        call.into_iter()
            .chain([count.as_str()])
            .chain(properties.into_iter().flatten().copied())
            .chain(["0"])
            .map(str::to_owned)
            .collect()
    }
}

fn judge(output: io::Result<Output>) -> io::Result<()> {
    let output = output.map_err(|error| {
        let text = format!("busctl, which asks systemd for it: {error}; install systemd's tools");
        io::Error::new(error.kind(), text)
    })?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!(
        "systemd does not make it: {} ({})",
        words.trim(),
        output.status
    )))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn paths_of_the_systemd_driver_name_a_scope() {
        let scope = Scope::named("kubepods-pod1.slice:cri-containerd:abc").unwrap();
        assert_eq!(scope.unit, "cri-containerd-abc.scope");
        assert_eq!(scope.slice, "kubepods-pod1.slice");
        assert_eq!(Scope::named("/kubepods/pod1/abc"), None);
    }

    #[test]
    fn the_call_counts_its_properties() {
        let scope = Scope::named("x.slice:p:abc").unwrap();
        let words = scope.arguments(7);
        let tail = "ssa(sv)a(sa(sv)) p-abc.scope replace 6 Description s";
        assert!(words.join(" ").contains(tail), "{words:?}");
        assert!(words.join(" ").ends_with(" PIDs au 1 7 0"), "{words:?}");
    }

    #[test]
    fn failures_say_what_systemd_said() {
        let failed = Output {
            status: std::process::ExitStatus::from_raw(256),
            stdout: Vec::new(),
            stderr: b"Call failed: Unit p.scope already exists.\n".to_vec(),
        };
        let error = judge(Ok(failed)).unwrap_err().to_string();
        assert!(
            error.contains("p.scope already exists. (exit status: 1)"),
            "{error}"
        );
        let absent = judge(Err(io::ErrorKind::NotFound.into())).unwrap_err();
        assert!(
            absent.to_string().contains("install systemd's tools"),
            "{absent}"
        );
    }
}
