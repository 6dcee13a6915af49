//! What is kept, translated and refused of a specification.

use oci_spec::runtime::{LinuxDevice, LinuxIdMapping};
use serde_json::json;

use super::*;
use crate::host::id_map::IdMap;

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

#[test]
fn shared_memory_is_the_sandboxs_own_and_no_volume_of_that_name() {
    // /dev/shm is a tmpfs of the node: beneath it everything is on one.
    let node = tempfile::tempdir_in("/dev/shm").unwrap();
    let make = |path: &str| {
        let path = node.path().join(path);
        std::fs::create_dir_all(&path).unwrap();
        path
    };
    let kind = |path: &str| source_kind(&make(path), "0123abcd");
    for own in ["sandboxes/0123abcd/shm", "containers/0123abcd/userdata/shm"] {
        assert_eq!(kind(own), SourceKind::SharedMemory, "{own}");
    }
    for volume in [
        "data/shm",
        "0123abcd/shmem",
        "sandboxes/4567ef01/shm",
        "0123abcd",
    ] {
        assert_eq!(kind(volume), SourceKind::Directory, "{volume}");
    }
    assert_eq!(source_kind(&make("x/shm"), ""), SourceKind::Directory);
    let place = source_kind(Path::new("/dev/shm"), "0123abcd");
    assert_eq!(place, SourceKind::SharedMemory);
}
