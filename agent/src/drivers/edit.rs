//! Edits of a CDI specification, applied to a container's specification.

use std::path::PathBuf;

use oci_spec::runtime::{
    self, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxResources, Spec,
};

use super::cdi::{Edits, Hook, Mount, Node, START_CONTAINER};

/// Type and number of a device.
pub(super) type Number = (LinuxDeviceType, i64, i64);

/// What the guest knows and a specification does not.
#[derive(Debug)]
pub(super) struct Guest<D, P> {
    /// The device that a path of the guest is.
    pub(super) device: D,
    /// The kernel's list of drivers with their numbers (`/proc/devices`).
    pub(super) drivers: String,
    /// The real path of a path of the image.
    pub(super) path: P,
}

impl<D, P> Guest<D, P>
where
    D: Fn(&str) -> Option<Number>,
    P: Fn(&str) -> Result<PathBuf, String>,
{
    /// Applies `edits`. `found` are the nodes that the container has for its functions; a node of
    /// the same path takes their place. The error begins with a field.
    pub(super) fn apply(
        &self,
        edits: &Edits,
        spec: &mut Spec,
        found: &mut Vec<LinuxDevice>,
    ) -> Result<(), String> {
        if let Some(process) = spec.process_mut() {
            add_to_process(process, edits);
        }
        for (index, node) in edits.device_nodes.iter().enumerate() {
            let number = number(node, &self.device, &self.drivers)
                .map_err(|reason| format!("deviceNodes[{index}]: {reason}"))?;
            found.retain(|device| device.path().to_str() != Some(&node.path));
            add_node(spec, node, number);
        }
        for (index, mount) in edits.mounts.iter().enumerate() {
            let source = (self.path)(&mount.host_path)
                .map_err(|reason| format!("mounts[{index}].hostPath: {reason}"))?;
            add_mount(spec, mount, source);
        }
        for (index, hook) in edits.hooks.iter().enumerate() {
            // What runs in the container's root is the container's.
            let path = match hook.hook_name.as_str() {
                START_CONTAINER => Ok(PathBuf::from(&hook.path)),
                _ => (self.path)(&hook.path),
            };
            let path = path.map_err(|reason| format!("hooks[{index}].path: {reason}"))?;
            add_hook(spec, hook, path);
        }
        Ok(())
    }
}

/// What each process of the container has: a variable of the same name is replaced.
pub(super) fn add_to_process(process: &mut runtime::Process, edits: &Edits) {
    let env = process.env_mut().get_or_insert_default();
    let name = |entry: &str| entry.split('=').next().map(str::to_owned);
    for variable in &edits.env {
        env.retain(|entry| name(entry) != name(variable));
        env.push(variable.clone());
    }
    if !edits.additional_gids.is_empty() {
        let groups = process.user_mut().additional_gids_mut();
        let groups = groups.get_or_insert_default();
        let new = edits.additional_gids.iter();
        groups.extend(new.filter(|group| **group != 0));
    }
}

/// What a node is: as it says, as the guest's own is, or the first of the driver of its name, whose
/// number the kernel chose and whose node nobody made.
fn number(
    node: &Node,
    device: impl Fn(&str) -> Option<Number>,
    drivers: &str,
) -> Result<Number, String> {
    let kind = match node.kind.as_str() {
        "b" => Some(LinuxDeviceType::B),
        "c" => Some(LinuxDeviceType::C),
        "u" => Some(LinuxDeviceType::U),
        "p" => return Ok((LinuxDeviceType::P, 0, 0)),
        _ => None,
    };
    if let (Some(kind), 1..) = (kind, node.major) {
        return Ok((kind, node.major, node.minor));
    }
    let path = node.guest_path();
    if let Some((real, major, minor)) = device(path) {
        let block = |kind| kind == LinuxDeviceType::B;
        if kind.is_some_and(|kind| block(kind) != block(real)) {
            let kind = &node.kind;
            return Err(format!("{path} of the guest is not of type {kind:?}"));
        }
        return Ok((kind.unwrap_or(real), major, minor));
    }
    let name = path.rsplit('/').next().unwrap_or_default();
    let kind = kind.unwrap_or(LinuxDeviceType::C);
    match major_of(drivers, kind == LinuxDeviceType::B, name) {
        Some(major) => Ok((kind, major, node.minor)),
        None => Err(format!(
            "the guest has no {path}, and no driver of its kernel (/proc/devices) is called \
             {name:?}: give type, major and minor, or load the driver in modules.load"
        )),
    }
}

/// The number of a driver in `/proc/devices`, which has a part for characters and one for blocks.
fn major_of(drivers: &str, block: bool, name: &str) -> Option<i64> {
    let heading = if block {
        "Block devices:"
    } else {
        "Character devices:"
    };
    let lines = drivers.lines().skip_while(|line| line.trim() != heading);
    let mut lines = lines.skip(1).take_while(|line| !line.trim().is_empty());
    lines.find_map(|line| {
        let (major, its_name) = line.trim().split_once(' ')?;
        (its_name == name).then(|| major.parse().ok())?
    })
}

fn add_node(spec: &mut Spec, node: &Node, (kind, major, minor): Number) {
    let user = spec
        .process()
        .as_ref()
        .map(|process| process.user().clone());
    let user = user.unwrap_or_default();
    let mut device = LinuxDevice::default();
    device
        .set_path(node.path.clone().into())
        .set_typ(kind)
        .set_major(major)
        .set_minor(minor)
        .set_file_mode(Some(node.file_mode.unwrap_or(0o666)))
        .set_uid(Some(node.uid.unwrap_or_else(|| user.uid())))
        .set_gid(Some(node.gid.unwrap_or_else(|| user.gid())));
    let linux = spec.linux_mut().get_or_insert_default();
    let devices = linux.devices_mut().get_or_insert_default();
    devices.retain(|other| other.path() != device.path());
    devices.push(device);
    let access = match node.permissions.as_str() {
        "none" => return,
        "" => "rwm",
        letters => letters,
    };
    if kind == LinuxDeviceType::P {
        return;
    }
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(true)
        .set_typ(Some(kind))
        .set_major(Some(major))
        .set_minor(Some(minor))
        .set_access(Some(access.to_owned()));
    let resources = linux.resources_mut();
    let resources: &mut LinuxResources = resources.get_or_insert_default();
    let rules = resources.devices_mut().get_or_insert_default();
    rules.push(rule);
}

/// A mount at the same place is replaced.
fn add_mount(spec: &mut Spec, mount: &Mount, source: PathBuf) {
    let mut options = mount.options.clone();
    for (needed, alternative) in [("rbind", "bind"), ("ro", "rro")] {
        if !options
            .iter()
            .any(|one| one == needed || one == alternative)
        {
            options.push(needed.to_owned());
        }
    }
    let mut new = runtime::Mount::default();
    new.set_destination(mount.container_path.clone().into())
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(source))
        .set_options(Some(options));
    let mounts = spec.mounts_mut().get_or_insert_default();
    mounts.retain(|other| other.destination() != new.destination());
    mounts.push(new);
}

fn add_hook(spec: &mut Spec, hook: &Hook, path: PathBuf) {
    let mut new = runtime::Hook::default();
    new.set_path(path)
        .set_args((!hook.args.is_empty()).then(|| hook.args.clone()))
        .set_env((!hook.env.is_empty()).then(|| hook.env.clone()))
        .set_timeout(hook.timeout);
    let hooks = spec.hooks_mut().get_or_insert_default();
    let stage = match hook.hook_name.as_str() {
        "prestart" => hooks.prestart_mut(),
        "createRuntime" => hooks.create_runtime_mut(),
        "createContainer" => hooks.create_container_mut(),
        START_CONTAINER => hooks.start_container_mut(),
        "poststart" => hooks.poststart_mut(),
        _ => hooks.poststop_mut(),
    };
    stage.get_or_insert_default().push(new);
}

#[cfg(test)]
#[path = "edit_tests.rs"]
mod tests;
