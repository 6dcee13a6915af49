//! What no VM can give, refused before anything is started.

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};

use super::invalid;
use crate::errors::CallError;

/// Refuses what no VM can give. Runs before anything is started.
pub(crate) fn check(spec: &Spec) -> Result<(), CallError> {
    let has = |kind| {
        let namespaces = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.namespaces().as_ref());
        namespaces.is_some_and(|list| list.iter().any(|namespace| namespace.typ() == kind))
    };
    for (kind, field, pod_field) in [
        (LinuxNamespaceType::Network, "network", "hostNetwork"),
        (LinuxNamespaceType::Pid, "pid", "hostPID"),
        (LinuxNamespaceType::Ipc, "ipc", "hostIPC"),
    ] {
        if !has(kind) {
            return Err(invalid(
                &format!("linux.namespaces: no {field} namespace (pod field {pod_field})"),
                "a pod in a VM cannot have the host's: leave the field out or use another \
                    RuntimeClass",
            ));
        }
    }
    root_is_mapped(spec)?;
    no_hooks(spec)
}

/// No hook runs, on the host or in the guest: each kind is refused rather than dropped.
fn no_hooks(spec: &Spec) -> Result<(), CallError> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    for (field, list) in [
        ("hooks.prestart", hooks.prestart()),
        ("hooks.createRuntime", hooks.create_runtime()),
        ("hooks.createContainer", hooks.create_container()),
        ("hooks.startContainer", hooks.start_container()),
        ("hooks.poststart", hooks.poststart()),
        ("hooks.poststop", hooks.poststop()),
    ] {
        if list.as_ref().is_some_and(|list| !list.is_empty()) {
            return Err(invalid(
                field,
                "hooks do not run for a container in a VM: remove them (they come from \
                    containerd's base_runtime_spec, an NRI plugin or a CDI device) or use another \
                    RuntimeClass",
            ));
        }
    }
    Ok(())
}

/// A container is built by the root of its user namespace: nobody could, without one.
fn root_is_mapped(spec: &Spec) -> Result<(), CallError> {
    let Some(linux) = spec.linux() else {
        return Ok(());
    };
    for (field, mappings) in [
        ("linux.uidMappings", linux.uid_mappings()),
        ("linux.gidMappings", linux.gid_mappings()),
    ] {
        let mappings = mappings.as_deref().unwrap_or_default();
        let root = |mapping: &LinuxIdMapping| mapping.container_id() == 0 && mapping.size() > 0;
        if !mappings.is_empty() && !mappings.iter().any(root) {
            return Err(invalid(field, "id 0 of the user namespace must be mapped"));
        }
    }
    Ok(())
}
