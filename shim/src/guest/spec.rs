//! From the OCI specification that containerd wrote for this host to the one that the agent builds
//! in the guest.
//!
//! Three things happen to a part of it:
//! - it holds in the guest as it stands (capabilities, limits, seccomp, most mounts): kept;
//! - it names something of the host that the guest gets in another way (bind mounts, namespaces of
//!   the pod): translated;
//! - it cannot hold in a VM (host namespaces, host devices, hooks on the host): refused, naming the
//!   field.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};
use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxIdMapping, LinuxNamespace,
    LinuxNamespaceType, Mount, Spec,
};

use crate::{
    errors::CallError,
    guest::{paths, vfio::VfioPath},
    host::{id_map::IdMap, placement},
};

/// Where the shared directory is mounted in the guest.
pub(crate) const GUEST_SHARED: &str = "/run/pericarp/shared";
/// Where the pod's shared memory is in the guest.
const GUEST_SHM: &str = "/dev/shm";
/// Devices that every Linux has and that are not the host's hardware: the guest makes its own.
const PSEUDO_DEVICES: [&str; 9] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/tty",
    "/dev/random",
    "/dev/urandom",
    "/dev/fuse",
    "/dev/net/tun",
    "/dev/console",
];

/// A directory or file of the host that the guest gets by the shared directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Share {
    /// On the host.
    pub(crate) source: PathBuf,
    /// The mount that it is for, by its number in the specification.
    pub(crate) mount: usize,
    /// Submounts come along.
    pub(crate) recursive: bool,
    /// How owners of files are shown, and whether those of submounts too.
    pub(crate) id_map: Option<(IdMap, bool)>,
    /// The host itself refuses writes.
    pub(crate) read_only: bool,
}

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

/// A block device of the host, under a path of the container's own choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockVolume {
    /// Its path in the container.
    pub(crate) path: PathBuf,
    /// Its number on the host.
    pub(crate) number: (i64, i64),
    /// The container may not write.
    pub(crate) read_only: bool,
}

fn invalid(field: &str, reason: &str) -> CallError {
    CallError::Invalid(format!("{field}: {reason}"))
}

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
        kept.push(translate_mount(
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
        Some(linux) => take_functions(linux)?,
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

/// What a bind mount's source is on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SourceKind {
    Missing,
    Directory,
    File,
    BlockDevice,
    CharacterDevice,
    SharedMemory,
    HugePages,
    /// The guest has it in its place, here.
    Guests(PathBuf),
}

/// Looks at the host.
pub(crate) fn source_kind(path: &Path) -> SourceKind {
    use std::os::unix::fs::FileTypeExt;
    // containerd and CRI-O keep a pod's shared memory in a directory of this name on its own tmpfs.
    if path.ends_with("shm") && is_on(path, TMPFS_MAGIC) {
        return SourceKind::SharedMemory;
    }
    if is_on(path, HUGETLBFS_MAGIC) {
        return SourceKind::HugePages;
    }
    match std::fs::metadata(path) {
        Err(_) => SourceKind::Missing,
        Ok(metadata) if metadata.is_dir() => SourceKind::Directory,
        Ok(metadata) if metadata.file_type().is_block_device() => SourceKind::BlockDevice,
        Ok(metadata) if metadata.file_type().is_char_device() => SourceKind::CharacterDevice,
        Ok(_) => SourceKind::File,
    }
}

fn is_on(path: &Path, kind: FsType) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == kind)
}

fn translate_mount(
    mut mount: Mount,
    number: usize,
    own: &Mappings,
    shares: &mut Vec<Share>,
    source_kind: &impl Fn(&Path) -> SourceKind,
) -> Result<Mount, CallError> {
    if !is_bind(&mount) {
        return Ok(mount);
    }
    let options = mount.options().clone().unwrap_or_default();
    let destination = mount.destination().clone();
    let field = format!("mounts[{}].source", destination.display());
    let Some(source) = mount.source().clone() else {
        return Err(invalid(&field, "a bind mount needs one"));
    };
    refuse_bidirectional(&options, &destination)?;
    let kind = source_kind(&source);
    if let SourceKind::Guests(place) = kind {
        // Owners too are the guest's to map.
        mount.set_source(Some(place));
        return Ok(mount);
    }
    let id_map = take_id_map(&mut mount, own);
    if let Some(own) = guests_own(&kind, &source, &destination) {
        mount.set_source(Some(own));
        return Ok(mount);
    }
    match kind {
        SourceKind::Missing => {
            return Err(invalid(
                &field,
                &format!("{} does not exist on the host", source.display()),
            ));
        }
        SourceKind::BlockDevice | SourceKind::CharacterDevice if !is_pseudo(&source) => {
            let reason = format!(
                "{} is a device of the host: a disk can be given as a persistent volume of \
                 volumeMode Block (volumeDevices), a PCI function by its IOMMU group",
                source.display()
            );
            return Err(invalid(&field, &reason));
        }
        SourceKind::CharacterDevice | SourceKind::BlockDevice => return Ok(mount),
        _ => {}
    }
    // Its source in the guest is known when it is shared.
    shares.push(Share {
        source,
        mount: number,
        recursive: options.iter().any(|option| option == "rbind"),
        id_map,
        read_only: options
            .iter()
            .any(|option| option == "ro" || option == "rro"),
    });
    Ok(mount)
}

fn refuse_bidirectional(options: &[String], destination: &Path) -> Result<(), CallError> {
    let mut options = options.iter();
    if !options.any(|option| option == "rshared" || option == "shared") {
        return Ok(());
    }
    let field = format!(
        "mounts[{}].options: rshared (volumeMounts.mountPropagation: Bidirectional)",
        destination.display()
    );
    Err(invalid(
        &field,
        "mounts that are made in a VM cannot reach the host: leave the field out or use another \
         RuntimeClass",
    ))
}

fn is_bind(mount: &Mount) -> bool {
    let mut options = mount.options().iter().flatten();
    mount.typ().as_deref() == Some("bind")
        || options.any(|option| option == "bind" || option == "rbind")
}

/// Every path of the host that a container has a bind mount of, once.
pub(crate) fn bind_sources(spec: &Spec) -> BTreeSet<&PathBuf> {
    let mounts = spec.mounts().iter().flatten();
    let binds = mounts.filter(|mount| is_bind(mount));
    binds.filter_map(|mount| mount.source().as_ref()).collect()
}

/// Where the guest has what only a kernel can give.
fn guests_own(kind: &SourceKind, source: &Path, destination: &Path) -> Option<PathBuf> {
    match kind {
        SourceKind::SharedMemory if destination == Path::new("/dev/shm") => Some(GUEST_SHM.into()),
        SourceKind::HugePages => Some(paths::huge_page_volume(source)),
        _ => None,
    }
}

/// Ids of the container's user namespace.
struct Mappings {
    uids: Vec<LinuxIdMapping>,
    gids: Vec<LinuxIdMapping>,
}

impl Mappings {
    fn of(spec: &Spec) -> Self {
        let linux = spec.linux().as_ref();
        let taken = |mappings: Option<&Option<Vec<LinuxIdMapping>>>| {
            mappings.cloned().flatten().unwrap_or_default()
        };
        Self {
            uids: taken(linux.map(|linux| linux.uid_mappings())),
            gids: taken(linux.map(|linux| linux.gid_mappings())),
        }
    }
}

/// Takes what a mount says about the owners of its files: the host maps them, since the guest's
/// virtio-fs cannot. Mappings of its own come before those of the container (config.md, "Mounts").
fn take_id_map(mount: &mut Mount, own: &Mappings) -> Option<(IdMap, bool)> {
    let options = mount.options_mut().get_or_insert_default();
    let all = options.iter().any(|option| option == "ridmap");
    let asked = all || options.iter().any(|option| option == "idmap");
    options.retain(|option| option != "idmap" && option != "ridmap");
    let uids = mount.uid_mappings().clone().unwrap_or_default();
    let gids = mount.gid_mappings().clone().unwrap_or_default();
    mount.set_uid_mappings(None);
    mount.set_gid_mappings(None);
    let map = match IdMap::of_mappings(&uids, &gids) {
        None if asked => IdMap::of_mappings(&own.uids, &own.gids),
        map => map,
    };
    map.map(|map| (map, all))
}

fn is_pseudo(path: &Path) -> bool {
    PSEUDO_DEVICES
        .iter()
        .any(|device| path == Path::new(device))
}

/// The path in the guest of a node of container `id`.
pub(crate) fn guest_volume(id: &str, number: usize) -> String {
    format!("/run/pericarp/volumes/{id}/{number}")
}

/// The path in the guest of what is container `id`'s alone in the shared directory.
pub(crate) fn guest_path(id: &str, name: &str) -> PathBuf {
    Path::new(GUEST_SHARED).join(id).join(name)
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
    let disks = take_disks(linux);
    for device in linux.devices().iter().flatten() {
        check_device(device)?;
    }
    if let Some(resources) = linux.resources_mut() {
        placement::keep_on_host(resources);
    }
    Ok((pid_namespace, disks))
}

/// Takes devices out of the specification, with the rules about them, which come along: their
/// numbers are other devices' in the guest.
fn take_devices(
    linux: &mut Linux,
    wanted: impl Fn(&LinuxDevice) -> bool,
) -> (Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>) {
    let devices = linux.devices().clone().unwrap_or_default();
    let (taken, kept): (Vec<_>, Vec<_>) = devices.into_iter().partition(wanted);
    if taken.is_empty() {
        return (taken, Vec::new());
    }
    linux.set_devices(Some(kept));
    let rules = linux
        .resources_mut()
        .as_mut()
        .and_then(|resources| resources.devices_mut().as_mut());
    let Some(rules) = rules else {
        return (taken, Vec::new());
    };
    let (about, others) = std::mem::take(rules)
        .into_iter()
        .partition(|rule| taken.iter().any(|device| is_about(rule, device)));
    *rules = others;
    (taken, about)
}

fn is_about(rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> bool {
    (rule.major(), rule.minor()) == (Some(device.major()), Some(device.minor()))
}

/// Takes the block devices that have a path of their own in the container: kubelet gives volumes
/// so. A container that is given the host's devices, as a privileged one under runc, has them where
/// the host has them, and they stay.
fn take_disks(linux: &mut Linux) -> Vec<BlockVolume> {
    let (volumes, rules) = take_devices(linux, |device| {
        device.typ() == LinuxDeviceType::B && !device.path().exists()
    });
    let lets_write = |rule: &LinuxDeviceCgroup| {
        let access = rule.access().as_deref();
        access.is_some_and(|access| access.contains('w'))
    };
    let volume = |device: &LinuxDevice| BlockVolume {
        path: device.path().clone(),
        number: (device.major(), device.minor()),
        read_only: !rules
            .iter()
            .any(|rule| is_about(rule, device) && lets_write(rule)),
    };
    volumes.iter().map(volume).collect()
}

/// Takes VFIO's nodes of the host out of the specification. The agent puts what the functions are
/// there in their place.
fn take_functions(linux: &mut Linux) -> Result<Vec<VfioPath>, CallError> {
    let (nodes, _) = take_devices(linux, |device| VfioPath::of(device.path()).is_some());
    let mut functions = Vec::new();
    for device in &nodes {
        match VfioPath::of(device.path()) {
            Some(VfioPath::Other) => {
                return Err(invalid(
                    &format!("linux.devices[{}]", device.path().display()),
                    "only functions behind an IOMMU are passed through, by /dev/vfio/<group> or \
                        /dev/vfio/devices/vfio<number>",
                ));
            }
            Some(VfioPath::Container) | None => {}
            Some(path) if functions.contains(&path) => {}
            Some(path) => functions.push(path),
        }
    }
    Ok(functions)
}

fn check_device(device: &LinuxDevice) -> Result<(), CallError> {
    let pseudo = is_pseudo(device.path()) && device.typ() != LinuxDeviceType::B;
    if pseudo || device.typ() == LinuxDeviceType::P {
        return Ok(());
    }
    Err(invalid(
        &format!("linux.devices[{}]", device.path().display()),
        "a device of the host that is not passed through (for privileged pods set \
         privileged_without_host_devices = true in containerd's runtime handler)",
    ))
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(value: serde_json::Value) -> Spec {
        serde_json::from_value(value).unwrap()
    }

    fn namespaces() -> serde_json::Value {
        json!([
            {"type": "pid"}, {"type": "network", "path": "/var/run/netns/x"},
            {"type": "ipc", "path": "/proc/1/ns/ipc"},
            {"type": "uts", "path": "/proc/1/ns/uts"}, {"type": "mount"}, {"type": "cgroup"}
        ])
    }

    fn container(mounts: serde_json::Value) -> Spec {
        spec(json!({
            "ociVersion": "1.2.0", "root": {"path": "rootfs"}, "mounts": mounts,
            "linux": {"namespaces": namespaces(), "cgroupsPath": "/x",
                      "resources": {"cpu": {"cpus": "0-3", "quota": 5}}}
        }))
    }

    #[test]
    fn pods_namespaces_become_the_guests() {
        let result = translate(container(json!([])), |_| SourceKind::Missing).unwrap();
        let linux = result.spec.linux().as_ref().unwrap();
        let kinds: Vec<_> = linux
            .namespaces()
            .as_ref()
            .unwrap()
            .iter()
            .map(LinuxNamespace::typ)
            .collect();
        assert_eq!(
            kinds,
            [
                LinuxNamespaceType::Pid,
                LinuxNamespaceType::Mount,
                LinuxNamespaceType::Cgroup
            ]
        );
        assert!(result.pid_namespace.is_none());
        assert!(linux.cgroups_path().is_none());
        let cpu = linux.resources().as_ref().unwrap().cpu().as_ref().unwrap();
        assert_eq!((cpu.cpus().clone(), cpu.quota()), (None, Some(5)));
    }

    #[test]
    fn binds_are_shared_and_others_kept() {
        let mounts = json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev/shm", "type": "bind", "source": "/run/containerd/x/shm",
             "options": ["rbind"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/hosts",
             "options": ["rbind", "ro"]},
            {"destination": "/data", "type": "bind", "source": "/srv", "options": ["bind"]},
            {"destination": "/huge", "type": "bind", "source": "/dev/huge", "options": ["rbind"]},
            {"destination": "/m", "type": "bind", "source": "/memory", "options": ["rbind", "ro"]}
        ]);
        let kind = |path: &Path| match path.to_str() {
            Some("/run/containerd/x/shm") => SourceKind::SharedMemory,
            Some("/var/lib/hosts") => SourceKind::File,
            Some("/dev/huge") => SourceKind::HugePages,
            Some("/memory") => SourceKind::Guests("/run/pericarp/memory/0".into()),
            _ => SourceKind::Directory,
        };
        let asked = container(mounts);
        assert_eq!(bind_sources(&asked).len(), 5);
        let mut result = translate(asked, kind).unwrap();
        result.set_sources(["/shared/hosts", "/shared/srv"].map(PathBuf::from).into());
        let sources: Vec<_> = result
            .spec
            .mounts()
            .as_ref()
            .unwrap()
            .iter()
            .map(|m| m.source().clone().unwrap())
            .collect();
        let expected = [
            "proc",
            "/dev/shm",
            "/shared/hosts",
            "/shared/srv",
            "/run/pericarp/huge/dev-huge",
            "/run/pericarp/memory/0",
        ]
        .map(PathBuf::from);
        assert_eq!(sources, expected);
        assert!(result.shares[0].read_only && result.shares[0].recursive);
        assert!(!result.shares[1].read_only && !result.shares[1].recursive);
    }

    #[test]
    fn the_host_maps_the_owners_of_shared_files() {
        let map = json!([{"containerID": 0, "hostID": 65536, "size": 65536}]);
        let mounts = json!([
            {"destination": "/a", "type": "bind", "source": "/a", "options": ["rbind"],
             "uidMappings": map, "gidMappings": map},
            {"destination": "/b", "type": "bind", "source": "/b", "options": ["rbind", "ridmap"]},
            {"destination": "/c", "type": "bind", "source": "/c", "options": ["rbind"]}
        ]);
        let mut spec = container(mounts);
        let own: Vec<LinuxIdMapping> =
            serde_json::from_value(json!([{"containerID": 0, "hostID": 7, "size": 9}])).unwrap();
        let linux = spec.linux_mut().as_mut().unwrap();
        linux.set_uid_mappings(Some(own.clone()));
        linux.set_gid_mappings(Some(own.clone()));
        let result = translate(spec, |_| SourceKind::Directory).unwrap();
        let found: Vec<_> = result.shares.iter().map(|share| &share.id_map).collect();
        let first = IdMap::of_options("0:65536:65536", "0:65536:65536").unwrap();
        let second = IdMap::of_mappings(&own, &own).unwrap();
        assert_eq!(found, [&Some((first, false)), &Some((second, true)), &None]);
        for mount in result.spec.mounts().as_ref().unwrap() {
            let options = mount.options().as_ref().unwrap();
            assert!(mount.uid_mappings().is_none() && mount.gid_mappings().is_none());
            assert!(!options.iter().any(|option| option.ends_with("idmap")));
        }
        // The container's own namespace has them still.
        assert!(
            result
                .spec
                .linux()
                .as_ref()
                .unwrap()
                .uid_mappings()
                .is_some()
        );
    }

    #[test]
    fn the_guest_maps_the_owners_of_its_own_files() {
        let map = json!([{"containerID": 0, "hostID": 65536, "size": 65536}]);
        let mounts = json!([
            {"destination": "/a", "type": "bind", "source": "/a", "options": ["rbind", "ridmap"],
             "uidMappings": map, "gidMappings": map}
        ]);
        let asked = container(mounts);
        let before = asked.mounts().as_ref().unwrap()[0].clone();
        let result = translate(asked, |_| SourceKind::Guests("/g".into())).unwrap();
        let mut after = result.spec.mounts().as_ref().unwrap()[0].clone();
        assert_eq!(after.source().as_deref(), Some(Path::new("/g")));
        after.set_source(before.source().clone());
        assert_eq!((after, result.shares), (before, Vec::new()));
    }

    #[test]
    fn profiles_are_kept_unless_the_operator_drops_them() {
        let mut with_profile = container(json!([]));
        let profile = json!({"defaultAction": "SCMP_ACT_ERRNO"});
        with_profile
            .linux_mut()
            .as_mut()
            .unwrap()
            .set_seccomp(serde_json::from_value(profile).unwrap());
        let translated = translate(with_profile.clone(), |_| SourceKind::Missing).unwrap();
        let seccomp = |spec: &Spec| spec.linux().as_ref().unwrap().seccomp().clone();
        assert!(seccomp(&translated.spec).is_some());
        drop_seccomp(&mut with_profile);
        assert!(seccomp(&with_profile).is_none());
    }

    #[test]
    fn groups_are_taken_with_their_rules() {
        let node = |path: &str, major: i64, minor: i64| {
            let kind = "c";
            json!({"path": path, "type": kind, "major": major, "minor": minor})
        };
        let rule = |major: i64, minor: i64| {
            let mut of = node("", major, minor);
            of["allow"] = json!(true);
            of["access"] = json!("rwm");
            of
        };
        let mut asked = container(json!([]));
        let linux = asked.linux_mut().as_mut().unwrap();
        linux.set_devices(
            serde_json::from_value(json!([
                node("/dev/vfio/vfio", 10, 196),
                node("/dev/vfio/7", 240, 0),
                node("/dev/fuse", 10, 229),
                node("/dev/iommu", 10, 125),
                node("/dev/vfio/devices/vfio0", 241, 0),
                node("/dev/vfio/7", 240, 0)
            ]))
            .unwrap(),
        );
        let resources = json!({"devices": [
            {"allow": false, "access": "rwm"}, rule(10, 196), rule(240, 0), rule(10, 229),
            rule(10, 125), rule(241, 0)
        ]});
        linux.set_resources(serde_json::from_value(resources).unwrap());
        let result = translate(asked, |_| SourceKind::Missing).unwrap();
        let wanted = [VfioPath::Group(7), VfioPath::Device(0)];
        assert_eq!(result.functions, wanted);
        let linux = result.spec.linux().as_ref().unwrap();
        let paths: Vec<_> = linux
            .devices()
            .iter()
            .flatten()
            .map(LinuxDevice::path)
            .collect();
        assert_eq!(paths, [Path::new("/dev/fuse")]);
        let rules = linux
            .resources()
            .as_ref()
            .unwrap()
            .devices()
            .as_ref()
            .unwrap();
        let majors: Vec<_> = rules
            .iter()
            .map(|rule| (rule.major(), rule.minor()))
            .collect();
        assert_eq!(majors, [(None, None), (Some(10), Some(229))]);
        let mut other = container(json!([]));
        let linux = other.linux_mut().as_mut().unwrap();
        let node = json!([node("/dev/vfio/noiommu-0", 240, 1)]);
        linux.set_devices(serde_json::from_value(node).unwrap());
        let error = translate(other, |_| SourceKind::Missing).unwrap_err();
        assert!(error.to_string().contains("noiommu-0"), "{error}");
    }

    #[test]
    fn refusals_name_the_field() {
        for (missing, text) in [
            ("network", "hostNetwork"),
            ("pid", "hostPID"),
            ("ipc", "hostIPC"),
        ] {
            let mut list = namespaces();
            list.as_array_mut()
                .unwrap()
                .retain(|n| n["type"] != missing);
            let error = check(&spec(
                json!({"ociVersion": "1.2.0", "linux": {"namespaces": list}}),
            ))
            .unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
        for field in ["uidMappings", "gidMappings"] {
            let rootless = json!([{"containerID": 1, "hostID": 1000, "size": 100_000}]);
            let error = check(&spec(json!({"ociVersion": "1.2.0",
                "linux": {"namespaces": namespaces(), field: rootless}})))
            .unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        }
        let device = json!([
            {"destination": "/dev/kvm", "type": "bind", "source": "/dev/kvm", "options": ["bind"]}
        ]);
        let error = translate(container(device), |_| SourceKind::CharacterDevice).unwrap_err();
        assert!(
            error.to_string().contains("mounts[/dev/kvm].source"),
            "{error}"
        );
        let shared = json!([
            {"destination": "/m", "type": "bind", "source": "/m", "options": ["rbind", "rshared"]}
        ]);
        let error = translate(container(shared), |_| SourceKind::Directory).unwrap_err();
        assert!(error.to_string().contains("Bidirectional"), "{error}");
    }

    #[test]
    fn every_kind_of_hook_is_refused_by_name() {
        let with = |hooks: serde_json::Value| {
            let mut spec = container(json!([]));
            spec.set_hooks(serde_json::from_value(hooks).unwrap());
            check(&spec)
        };
        for kind in [
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "poststart",
            "poststop",
        ] {
            let error = with(json!({kind: [{"path": "/bin/x"}]})).unwrap_err();
            let field = format!("hooks.{kind}: ");
            assert!(error.to_string().starts_with(&field), "{error}");
            with(json!({ kind: [] })).unwrap();
        }
        with(json!({})).unwrap();
    }
}
