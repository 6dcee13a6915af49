//! `state.json` of a sandbox: what `pericarp list` shows of a pod.

use std::{fs, io, path::Path};

use pericarp_runtime_config::Sizing;
use serde::Serialize;

use crate::{host::private, pod::Request};

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
    /// The template that it went on from; none when it booted.
    template: Option<&'a str>,
}

/// Writes the file of a pod that has booted.
pub(crate) fn write(
    request: &Request,
    directory: &Path,
    sizing: Sizing,
    vmm_pid: i32,
    template: Option<&str>,
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
        template,
    };
    replace_state(directory, &serde_json::to_value(&state)?)
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

fn replace_state(directory: &Path, state: &serde_json::Value) -> io::Result<()> {
    private::replace(&directory.join("state.json"), &serde_json::to_vec(state)?)
}
