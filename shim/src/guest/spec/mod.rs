//! From the OCI specification that containerd wrote for this host to the one that the agent builds
//! in the guest.
//!
//! Three things happen to a part of it:
//! - it holds in the guest as it stands (capabilities, limits, seccomp, most mounts): kept;
//! - it names something of the host that the guest gets in another way (bind mounts, namespaces of
//!   the pod): translated;
//! - it cannot hold in a VM (host namespaces, host devices, hooks on the host): refused, naming the
//!   field.

mod check;
mod devices;
mod mounts;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use self::mounts::Mappings;
pub(crate) use self::{
    check::check,
    devices::BlockVolume,
    mounts::{Share, SourceKind, bind_sources, source_kind},
};
use crate::{errors::CallError, guest::vfio::VfioPath, host::placement};

/// The specification for the guest and what must be shared before.
#[derive(Debug)]
pub(crate) struct Translated {
    /// For the agent.
    pub(crate) spec: Spec,
    /// What to share, in the order of the mounts.
    pub(crate) shares: Vec<Share>,
    /// The PID namespace of the host's that the container would join: it stands for the pod's, or
    /// for another container's.
    pub(crate) pid_namespace: Option<PathBuf>,
    /// Nodes of the host's functions that are for this container.
    pub(crate) functions: Vec<VfioPath>,
    /// Block devices of the host that the container gets as disks (`volumeDevices`).
    pub(crate) disks: Vec<BlockVolume>,
}

impl Translated {
    /// Tells the mounts of [`Self::shares`] where the guest has their sources.
    pub(crate) fn set_sources(&mut self, places: Vec<PathBuf>) {
        let mounts = self.spec.mounts_mut().as_deref_mut().unwrap_or_default();
        for (share, place) in self.shares.iter().zip(places) {
            if let Some(mount) = mounts.get_mut(share.mount) {
                mount.set_source(Some(place));
            }
        }
    }
}

fn invalid(field: &str, reason: &str) -> CallError {
    CallError::Invalid(format!("{field}: {reason}"))
}

/// Translates the specification of a container. `source_kind` tells what a mount's source is on the
/// host.
pub(crate) fn translate(
    mut spec: Spec,
    source_kind: impl Fn(&Path) -> SourceKind,
) -> Result<Translated, CallError> {
    check(&spec)?;
    let mut shares = Vec::new();
    let own = Mappings::of(&spec);
    let mounts = spec.mounts_mut().take().unwrap_or_default();
    let mut kept = Vec::with_capacity(mounts.len());
    for mount in mounts {
        let number = kept.len();
        kept.push(mounts::translate(
            mount,
            number,
            &own,
            &mut shares,
            &source_kind,
        )?);
    }
    spec.set_mounts(Some(kept));
    spec.set_hooks(None);
    spec.set_annotations(None);
    let functions = match spec.linux_mut() {
        Some(linux) => devices::take_functions(linux)?,
        None => Vec::new(),
    };
    let (pid_namespace, disks) = translate_linux(&mut spec)?;
    translate_process(&mut spec);
    Ok(Translated {
        spec,
        shares,
        pid_namespace,
        disks,
        functions,
    })
}

/// Leaves a container's system calls alone, as the operator wants it (`security.guest_seccomp`).
pub(crate) fn drop_seccomp(spec: &mut Spec) {
    if let Some(linux) = spec.linux_mut() {
        linux.set_seccomp(None);
    }
}

fn translate_linux(spec: &mut Spec) -> Result<(Option<PathBuf>, Vec<BlockVolume>), CallError> {
    let Some(linux) = spec.linux_mut() else {
        return Ok((None, Vec::new()));
    };
    let mut pid_namespace = None;
    let mut namespaces = Vec::new();
    for namespace in linux.namespaces().clone().unwrap_or_default() {
        let joined = namespace.path().is_some();
        match namespace.typ() {
            // The guest's first network namespace is the pod's.
            LinuxNamespaceType::Network => {}
            // So are its IPC and UTS namespaces, when the container shares them with the pod.
            LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts if joined => {}
            LinuxNamespaceType::Pid if joined => pid_namespace = namespace.path().clone(),
            kind => {
                let mut own = LinuxNamespace::default();
                own.set_typ(kind);
                namespaces.push(own);
            }
        }
    }
    linux.set_namespaces(Some(namespaces));
    linux.set_cgroups_path(None);
    linux.set_intel_rdt(None);
    linux.set_mount_label(None);
    let disks = devices::take_disks(linux);
    for device in linux.devices().iter().flatten() {
        devices::check(device)?;
    }
    if let Some(resources) = linux.resources_mut() {
        placement::keep_on_host(resources);
    }
    Ok((pid_namespace, disks))
}

fn translate_process(spec: &mut Spec) {
    if let Some(process) = spec.process_mut() {
        translate_process_fields(process);
    }
}

/// Labels of security modules of the host name policies that the guest does not have.
pub(crate) fn translate_process_fields(process: &mut oci_spec::runtime::Process) {
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
}
