//! Hooks: programs that the specification wants run at points of a container's life.
//!
//! Those of the host were taken out by the shim; what remains is run where it says, and a missing
//! program is an error.

use std::collections::BTreeMap;

use oci_spec::runtime::{self, Spec};
use serde::{Deserialize, Serialize};

use super::{super::error::ContainerError, bounded};

/// A program to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct Hook {
    pub(in crate::container) stage: String,
    pub(in crate::container) path: String,
    /// As execve(2) takes them, the program's own name first.
    pub(in crate::container) args: Vec<String>,
    pub(in crate::container) env: Vec<String>,
    pub(in crate::container) timeout_s: Option<u32>,
}

/// What hooks read on their standard input (runtime.md, "State"), but for the parts that change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::container) struct State {
    oci_version: String,
    id: String,
    bundle: String,
    annotations: BTreeMap<String, String>,
}

impl State {
    /// The unchanging part of the state of container `id`.
    pub(super) fn of(id: &str, spec: &Spec) -> Self {
        let root = spec.root().as_ref().map(runtime::Root::path);
        // The bundle stays on the host; in the guest the directory of the root file system comes
        // nearest.
        let bundle = root.and_then(|path| path.parent());
        Self {
            oci_version: spec.version().clone(),
            id: id.to_owned(),
            bundle: bundle
                .map(|path| path.display().to_string())
                .unwrap_or_default(),
            annotations: spec.annotations().clone().into_iter().flatten().collect(),
        }
    }

    /// The state as JSON.
    pub(in crate::container) fn json(&self, status: &str, pid: i32) -> Vec<u8> {
        let state = serde_json::json!({
            "ociVersion": self.oci_version,
            "id": self.id,
            "status": status,
            "pid": pid,
            "bundle": self.bundle,
            "annotations": self.annotations,
        });
        state.to_string().into_bytes()
    }
}

/// Hooks that a helper runs in the guest's own namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct HooksPlan {
    pub(in crate::container) hooks: Vec<Hook>,
    pub(in crate::container) state: State,
    pub(in crate::container) status: String,
    pub(in crate::container) pid: i32,
}

impl HooksPlan {
    /// The hooks of one stage after the container was built.
    pub(super) fn of(
        hooks: Option<&[runtime::Hook]>,
        stage: &str,
        state: &State,
    ) -> Result<Self, ContainerError> {
        let status = if stage == "poststop" {
            "stopped"
        } else {
            "running"
        };
        let hooks = of(hooks, stage)?;
        Ok(Self {
            hooks,
            state: state.clone(),
            status: status.to_owned(),
            pid: 0,
        })
    }
}

/// The hooks that run in the guest's namespaces while the container is built: `prestart`, then
/// `createRuntime`.
pub(super) fn runtime(hooks: &runtime::Hooks) -> Result<Vec<Hook>, ContainerError> {
    // Deprecated since 1.1, but older specifications have it and runc still runs it.
    let mut all = of(hooks.prestart().as_deref(), "prestart")?;
    all.extend(of(hooks.create_runtime().as_deref(), "createRuntime")?);
    Ok(all)
}

/// The hooks of one stage.
pub(super) fn of(
    hooks: Option<&[runtime::Hook]>,
    stage: &str,
) -> Result<Vec<Hook>, ContainerError> {
    let hooks = hooks.unwrap_or_default();
    bounded(hooks.len(), &format!("hooks.{stage}"))?;
    hooks
        .iter()
        .enumerate()
        .map(|(index, hook)| one(hook, stage, index))
        .collect()
}

fn one(hook: &runtime::Hook, stage: &str, index: usize) -> Result<Hook, ContainerError> {
    let field = format!("hooks.{stage}[{index}]");
    let path = hook.path().to_str().filter(|path| path.starts_with('/'));
    let path = path.ok_or_else(|| {
        ContainerError::invalid(
            format!("{field}.path"),
            format!("{:?} is not absolute", hook.path()),
        )
    })?;
    let timeout_s = match hook.timeout() {
        None => None,
        Some(seconds) => Some(
            u32::try_from(seconds)
                .ok()
                .filter(|seconds| *seconds > 0)
                .ok_or_else(|| {
                    ContainerError::invalid(format!("{field}.timeout"), "must be a positive number")
                })?,
        ),
    };
    let args = hook.args().clone().filter(|args| !args.is_empty());
    Ok(Hook {
        stage: stage.to_owned(),
        path: path.to_owned(),
        args: args.unwrap_or_else(|| vec![path.to_owned()]),
        env: hook.env().clone().unwrap_or_default(),
        timeout_s,
    })
}
