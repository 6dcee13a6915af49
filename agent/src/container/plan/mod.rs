//! From an OCI runtime specification to a plan: every field is checked, resolved to the kernel's
//! numbers, or refused by name.
//!
//! All of it is pure: nothing here touches a file or the kernel, so it is tested without either.
//! Plans cross to the helper as they are.

use std::path::PathBuf;

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use crate::ground::sysctls;

use super::{error::ContainerError, options::CreateOptions};

mod capabilities;
pub(super) mod devices;
pub(super) mod hooks;
pub(super) mod mounts;
pub(super) mod namespaces;
pub(super) mod process;
#[cfg(test)]
mod tests;

use devices::DevicePlan;
use hooks::{Hook, HooksPlan};
use mounts::{MountPlan, Propagation};
use namespaces::Namespaces;
use process::ProcessPlan;

/// Most mounts, devices, sysctls or hidden paths of one container. Kubernetes' own limits are far
/// lower.
pub(super) const ENTRIES_MAX: usize = 1024;

/// A container to be built.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ContainerPlan {
    pub(super) id: String,
    pub(super) hostname: Option<String>,
    pub(super) domainname: Option<String>,
    pub(super) rootfs: PathBuf,
    /// Where the pod's own files lie; see [`CreateOptions::pod_files`].
    pub(super) pod_files: Option<PathBuf>,
    pub(super) rootfs_readonly: bool,
    pub(super) rootfs_propagation: Propagation,
    pub(super) namespaces: Namespaces,
    pub(super) mounts: Vec<MountPlan>,
    pub(super) devices: Vec<DevicePlan>,
    pub(super) masked_paths: Vec<String>,
    pub(super) readonly_paths: Vec<String>,
    pub(super) sysctls: Vec<(String, String)>,
    pub(super) create_runtime_hooks: Vec<Hook>,
    pub(super) create_container_hooks: Vec<Hook>,
    pub(super) start_container_hooks: Vec<Hook>,
    /// The specification's annotations and version, for the state that hooks read.
    pub(super) hook_state: hooks::State,
    pub(super) process: ProcessPlan,
}

/// A further process to be built.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ExecPlan {
    /// `CLONE_NEW*` of the namespaces in which the container differs from the agent.
    pub(super) join: i32,
    pub(super) process: ProcessPlan,
}

/// `size` ids from `inside` on are `outside` and following in the parent user namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct IdMapping {
    pub(super) inside: u32,
    pub(super) outside: u32,
    pub(super) size: u32,
}

impl IdMapping {
    /// The id outside of `id` inside, when a mapping has it.
    pub(super) fn to_outside(mappings: &[Self], id: u32) -> Option<u32> {
        mappings.iter().find_map(|mapping| {
            let offset = id.checked_sub(mapping.inside)?;
            (offset < mapping.size).then(|| mapping.outside.checked_add(offset))?
        })
    }

    /// The lines of a `uid_map` file (user_namespaces(7)).
    pub(super) fn lines(mappings: &[Self]) -> String {
        mappings
            .iter()
            .map(|mapping| format!("{} {} {}\n", mapping.inside, mapping.outside, mapping.size))
            .collect()
    }
}

/// What outlives the building of a container: what its other processes and its end need.
#[derive(Debug)]
pub(super) struct Afterwards {
    pub(super) poststart: HooksPlan,
    pub(super) poststop: HooksPlan,
}

/// Plans the container `id`.
pub(super) fn of(
    id: &str,
    spec: &Spec,
    options: &CreateOptions,
) -> Result<(ContainerPlan, Afterwards), ContainerError> {
    refuse_unsupported(spec)?;
    let linux = spec
        .linux()
        .as_ref()
        .ok_or_else(|| ContainerError::invalid("linux", "missing; it names the namespaces"))?;
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| ContainerError::invalid("root", "missing; a container needs root.path"))?;
    if !root.path().is_absolute() {
        return Err(ContainerError::invalid(
            "root.path",
            format!("{:?} is not an absolute path of the guest", root.path()),
        ));
    }
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| ContainerError::invalid("process", "missing; a container runs a program"))?;
    let namespaces = namespaces::of(linux, options.pid_namespace.is_some())?;
    let mut process = process::of(process, "process", linux, options.console_size)?;
    process.init = true;
    process.stdio_owner = namespaces.outside_uid(process.uid);
    let hooks = spec.hooks().clone().unwrap_or_default();
    let state = hooks::State::of(id, spec);
    let plan = ContainerPlan {
        id: id.to_owned(),
        hostname: name(spec.hostname(), "hostname", &namespaces)?,
        domainname: name(spec.domainname(), "domainname", &namespaces)?,
        rootfs: root.path().clone(),
        pod_files: options.pod_files.clone(),
        rootfs_readonly: root.readonly().unwrap_or(false),
        rootfs_propagation: mounts::rootfs_propagation(linux.rootfs_propagation().as_deref())?,
        mounts: mounts::of(spec.mounts().as_deref().unwrap_or_default(), &namespaces)?,
        devices: devices::of(
            linux.devices().as_deref().unwrap_or_default(),
            &options.devices,
        )?,
        masked_paths: paths(linux.masked_paths().as_deref(), "linux.maskedPaths")?,
        readonly_paths: paths(linux.readonly_paths().as_deref(), "linux.readonlyPaths")?,
        sysctls: sysctls(linux, &namespaces)?,
        create_runtime_hooks: hooks::runtime(&hooks)?,
        create_container_hooks: hooks::of(hooks.create_container().as_deref(), "createContainer")?,
        start_container_hooks: hooks::of(hooks.start_container().as_deref(), "startContainer")?,
        hook_state: state.clone(),
        namespaces,
        process,
    };
    let afterwards = Afterwards {
        poststart: HooksPlan::of(hooks.poststart().as_deref(), "poststart", &state)?,
        poststop: HooksPlan::of(hooks.poststop().as_deref(), "poststop", &state)?,
    };
    Ok((plan, afterwards))
}

fn refuse_unsupported(spec: &Spec) -> Result<(), ContainerError> {
    let refuse = |field: &str, reason: &str| Err(ContainerError::invalid(field, reason));
    if !(spec.version().is_empty() || spec.version().starts_with("1.")) {
        return refuse(
            "ociVersion",
            "only versions 1.x of the runtime specification are known",
        );
    }
    let others = [
        ("solaris", spec.solaris().is_some()),
        ("windows", spec.windows().is_some()),
        ("vm", spec.vm().is_some()),
        ("zos", spec.zos().is_some()),
    ];
    if let Some((field, _)) = others.iter().find(|(_, present)| *present) {
        return refuse(field, "is for another platform than Linux");
    }
    let Some(linux) = spec.linux() else {
        return Ok(());
    };
    if linux
        .cgroups_path()
        .as_ref()
        .is_some_and(|path| !path.as_os_str().is_empty())
    {
        return refuse(
            "linux.cgroupsPath",
            "is of the host; in the guest the container's id names its cgroup",
        );
    }
    if linux.intel_rdt().is_some() {
        return refuse(
            "linux.intelRdt",
            "cache allocation is the host's; a guest has none",
        );
    }
    if linux.memory_policy().is_some() {
        return refuse(
            "linux.memoryPolicy",
            "memory nodes are the host's; a guest has one",
        );
    }
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|devices| !devices.is_empty())
    {
        return refuse(
            "linux.netDevices",
            "interfaces are attached to the pod, not to a container",
        );
    }
    if linux
        .mount_label()
        .as_deref()
        .is_some_and(|label| !label.is_empty())
    {
        return refuse("linux.mountLabel", "the guest's kernel has no SELinux");
    }
    Ok(())
}

fn name(
    name: &Option<String>,
    field: &str,
    namespaces: &Namespaces,
) -> Result<Option<String>, ContainerError> {
    // Longest name of uname(2) without its NUL.
    const NAME_BYTES_MAX: usize = 64;
    let Some(name) = name.clone().filter(|name| !name.is_empty()) else {
        return Ok(None);
    };
    if name.len() > NAME_BYTES_MAX || name.contains('\0') {
        return Err(ContainerError::invalid(
            field,
            format!("at most {NAME_BYTES_MAX} bytes"),
        ));
    }
    if namespaces.is_guests(LinuxNamespaceType::Uts) {
        return Err(ContainerError::invalid(
            field,
            "needs a UTS namespace in linux.namespaces",
        ));
    }
    Ok(Some(name))
}

fn paths(paths: Option<&[String]>, field: &str) -> Result<Vec<String>, ContainerError> {
    let paths = paths.unwrap_or_default();
    bounded(paths.len(), field)?;
    for (index, path) in paths.iter().enumerate() {
        if !path.starts_with('/') || path.contains('\0') {
            let field = format!("{field}[{index}]");
            return Err(ContainerError::invalid(
                field,
                format!("{path:?} is not absolute"),
            ));
        }
    }
    Ok(paths.to_vec())
}

pub(super) fn bounded(count: usize, field: &str) -> Result<(), ContainerError> {
    if count > ENTRIES_MAX {
        return Err(ContainerError::invalid(
            field,
            format!("{count} entries, at most {ENTRIES_MAX}"),
        ));
    }
    Ok(())
}

/// Sysctls of namespaces only: any other would change the guest, and with it the pod's other
/// containers.
fn sysctls(
    linux: &oci_spec::runtime::Linux,
    namespaces: &Namespaces,
) -> Result<Vec<(String, String)>, ContainerError> {
    let Some(sysctls) = linux.sysctl() else {
        return Ok(Vec::new());
    };
    bounded(sysctls.len(), "linux.sysctl")?;
    let mut result = Vec::new();
    for (key, value) in sysctls {
        let field = format!("linux.sysctl[{key:?}]");
        let path = sysctls::path(key)
            .ok_or_else(|| ContainerError::invalid(&field, "is not the name of a sysctl"))?;
        let needs = sysctls::namespace(&path)
            .ok_or_else(|| ContainerError::invalid(&field, "belongs to no namespace"))?;
        if namespaces.is_guests(needs) {
            let reason = format!("needs a {needs} namespace of the container in linux.namespaces");
            return Err(ContainerError::invalid(&field, reason));
        }
        result.push((path, value.clone()));
    }
    result.sort();
    Ok(result)
}

/// Converts and checks id mappings.
pub(super) fn id_mappings(
    mappings: Option<&[LinuxIdMapping]>,
    field: &str,
) -> Result<Vec<IdMapping>, ContainerError> {
    // user_namespaces(7): at most 340 lines.
    const MAPPINGS_MAX: usize = 340;
    let mappings = mappings.unwrap_or_default();
    if mappings.len() > MAPPINGS_MAX {
        return Err(ContainerError::invalid(
            field,
            format!("at most {MAPPINGS_MAX} mappings"),
        ));
    }
    mappings
        .iter()
        .enumerate()
        .map(|(index, mapping)| {
            let (inside, outside, size) =
                (mapping.container_id(), mapping.host_id(), mapping.size());
            if size == 0
                || inside.checked_add(size).is_none()
                || outside.checked_add(size).is_none()
            {
                let field = format!("{field}[{index}]");
                return Err(ContainerError::invalid(
                    field,
                    "is empty or leaves the range of ids",
                ));
            }
            Ok(IdMapping {
                inside,
                outside,
                size,
            })
        })
        .collect()
}
