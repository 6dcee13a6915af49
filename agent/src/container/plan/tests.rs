//! Plans of specifications, without a kernel.

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{mounts::Source, process::parse_cpu_list, *};

fn spec() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": "/run/root"},
        "process": {"args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
    })
}

fn planned(spec: Value) -> Result<ContainerPlan, ContainerError> {
    let spec: Spec = serde_json::from_value(spec).unwrap();
    of("id", &spec, &CreateOptions::default()).map(|(plan, _)| plan)
}

fn refusal(change: impl FnOnce(&mut Value)) -> String {
    let mut spec = spec();
    change(&mut spec);
    planned(spec).unwrap_err().to_string()
}

fn mount(mount: Value) -> mounts::MountPlan {
    let mut spec = spec();
    spec["mounts"] = json!([mount]);
    planned(spec).unwrap().mounts.remove(0)
}

#[test]
fn plans_survive_the_socket() {
    let plan = planned(spec()).unwrap();
    let text = serde_json::to_string(&plan).unwrap();
    let back: ContainerPlan = serde_json::from_str(&text).unwrap();
    assert_eq!(serde_json::to_string(&back).unwrap(), text);
    assert!(back.namespaces.is_new(LinuxNamespaceType::Pid));
    assert!(back.namespaces.is_guests(LinuxNamespaceType::Network));
    assert_eq!(back.devices.len(), 6);
}

#[test]
fn mount_options_become_attributes() {
    let plan = mount(json!({"destination": "/x", "source": "/y", "options":
        ["rbind", "ro", "nosuid", "noatime", "rro", "rnodev", "rslave", "defaults"]}));
    assert_eq!(
        plan.source,
        Source::Bind {
            path: "/y".to_owned(),
            recursive: true
        }
    );
    let expected = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOATIME;
    assert_eq!(plan.attributes.set, expected);
    assert_eq!(plan.attributes.clear, libc::MOUNT_ATTR__ATIME);
    assert_eq!(
        plan.recursive_attributes.set,
        libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV
    );
    let propagation = plan.propagation.unwrap();
    assert_eq!(
        (propagation.kind, propagation.recursive),
        (libc::MS_SLAVE, true)
    );
}

#[test]
fn the_last_of_two_opposite_options_wins() {
    let plan = mount(json!({"destination": "/x", "source": "/y", "options": ["bind", "ro", "rw"]}));
    assert_eq!(
        (plan.attributes.set, plan.attributes.clear),
        (0, libc::MOUNT_ATTR_RDONLY)
    );
    let plan = mount(
        json!({"destination": "/x", "source": "/y", "options": ["bind", "noatime", "relatime"]}),
    );
    assert_eq!(
        (plan.attributes.set, plan.attributes.clear),
        (0, libc::MOUNT_ATTR__ATIME)
    );
}

#[test]
fn every_option_of_the_specification_is_known() {
    // config.md, "Linux mount options", but for bind, remount and those of tmpfs.
    let options = "async atime defaults dev diratime dirsync exec iversion lazytime loud noatime \
        nodev nodiratime noexec noiversion nolazytime norelatime nostrictatime nosuid nosymfollow \
        private ratime rdev rdiratime relatime rexec rnoatime rnodiratime rnoexec rnorelatime \
        rnostrictatime rnosuid rnosymfollow ro rprivate rrelatime rro rrw rshared rslave \
        rstrictatime rsuid rsymfollow runbindable rw shared silent slave strictatime suid \
        symfollow sync unbindable";
    for option in options.split_whitespace() {
        let plan = mount(json!({"destination": "/x", "type": "tmpfs", "options": [option]}));
        let Source::FileSystem { data, .. } = plan.source else {
            panic!()
        };
        // These are of the file system's instance, which knows them by the same names
        // (fsconfig(2)).
        let instance = ["dirsync", "iversion", "lazytime", "silent", "sync"].contains(&option);
        assert_eq!(data == [option], instance, "{option}");
    }
}

#[test]
fn cgroup_is_the_unified_hierarchy() {
    let plan = mount(
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro", "memory"]}),
    );
    let Source::FileSystem { kind, data, .. } = plan.source else {
        panic!()
    };
    assert_eq!((kind.as_str(), data.len()), ("cgroup2", 0));
}

#[test]
fn the_last_value_of_a_variable_counts() {
    let env = |entries: Value| {
        let mut spec = spec();
        spec["process"]["env"] = entries;
        planned(spec).map(|plan| plan.process.env)
    };
    // The image's first, the pod's behind it; the order of the last occurrences stays.
    assert_eq!(
        env(json!([
            "PATH=/image",
            "A=image",
            "B=1",
            "A=",
            "HOME=/one",
            "PATH=/pod",
            "A=pod=x",
            "HOME=/two"
        ]))
        .unwrap(),
        ["B=1", "PATH=/pod", "A=pod=x", "HOME=/two"]
    );
    // A value may be empty, and a name is all that stands before the first "=".
    assert_eq!(env(json!(["A=x", "AB=y", "A="])).unwrap(), ["AB=y", "A="]);
    for (entries, refusal) in [
        (json!(["A=1", "B"]), "process.env[1]: \"B\" has no \"=\""),
        (json!(["=1", "A=1"]), "process.env[0]: \"=1\" has no name"),
        (json!([""]), "process.env[0]: \"\" has no \"=\""),
        (json!(["A=\0"]), "process.env[0]: holds a NUL"),
    ] {
        assert_eq!(env(entries).unwrap_err().to_string(), refusal);
    }
}

#[test]
fn refusals_name_their_field() {
    let table: [(&str, Value, &str); 17] = [
        ("/root", Value::Null, "root: missing"),
        ("/process", Value::Null, "process: missing"),
        ("/linux", Value::Null, "linux: missing"),
        ("/root/path", json!("relative"), "root.path: "),
        ("/ociVersion", json!("2.0.0"), "ociVersion: "),
        (
            "/linux/namespaces",
            json!([{"type": "mount"}, {"type": "mount"}]),
            "linux.namespaces[1]: ",
        ),
        (
            "/linux/namespaces",
            json!([{"type": "mount"}, {"type": "net", "path": "x"}]),
            "",
        ),
        ("/process/args", json!(["a\u{0}b"]), "process.args[0]: "),
        ("/process/cwd", json!("x"), "process.cwd: "),
        (
            "/linux/maskedPaths",
            json!(["proc"]),
            "linux.maskedPaths[0]: ",
        ),
        ("/hostname", json!("x".repeat(65)), "hostname: "),
        ("/linux/intelRdt", json!({}), "linux.intelRdt: "),
        ("/linux/cgroupsPath", json!("/a"), "linux.cgroupsPath: "),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}),
            "linux.seccomp.listenerPath: ",
        ),
        ("/solaris", json!({}), "solaris: "),
        (
            "/process/execCPUAffinity",
            json!({"initial": "0-99999", "final": "0"}),
            "process.execCPUAffinity.initial: ",
        ),
        (
            "/linux/memoryPolicy",
            json!({"mode": "MPOL_BIND", "nodes": "0"}),
            "linux.memoryPolicy: ",
        ),
    ];
    for (pointer, value, expected) in table {
        if expected.is_empty() {
            continue;
        }
        let error = refusal(|spec| {
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            let object = spec.pointer_mut(parent).unwrap().as_object_mut().unwrap();
            if value.is_null() {
                object.remove(key);
            } else {
                object.insert(key.to_owned(), value);
            }
        });
        assert!(error.starts_with(expected), "{pointer}: {error}");
    }
    let error = refusal(|spec| spec["hostname"] = json!("x"));
    assert!(error.starts_with("hostname: needs a UTS namespace"));
    let error = refusal(|spec| {
        spec["mounts"] =
            json!([{"destination": "/x", "source": "/y", "options": ["bind", "size=1"]}]);
    });
    assert!(error.starts_with("mounts[0].options: "), "{error}");
    let error = refusal(|spec| {
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}]);
    });
    assert!(error.starts_with("process.rlimits[0]: "), "{error}");
}

#[test]
fn ids_are_mapped() {
    let mappings = [
        IdMapping {
            inside: 0,
            outside: 1000,
            size: 10,
        },
        IdMapping {
            inside: 100,
            outside: 0,
            size: 1,
        },
    ];
    let outside = |id| IdMapping::to_outside(&mappings, id);
    assert_eq!(
        [outside(0), outside(9), outside(10), outside(100)],
        [Some(1000), Some(1009), None, Some(0)]
    );
    assert_eq!(IdMapping::lines(&mappings), "0 1000 10\n100 0 1\n");
}

#[test]
fn cpu_lists() {
    assert_eq!(parse_cpu_list("0-2,5"), Some(vec![0, 1, 2, 5]));
    for bad in ["", "a", "3-1", "0-99999", "1,,2", "-1"] {
        assert_eq!(parse_cpu_list(bad), None, "{bad}");
    }
}

proptest! {
    // Whatever a specification says, planning answers and does not panic, and destinations are
    // normal.
    #[test]
    fn destinations_are_normal_or_refused(destination in "[/a.]{0,12}") {
        let mut spec = spec();
        spec["mounts"] = json!([{"destination": destination, "type": "tmpfs"}]);
        if let Ok(plan) = planned(spec) {
            let destination = &plan.mounts[0].destination;
            prop_assert!(destination.starts_with('/') && destination.len() > 1);
            let mut names = destination.split('/').skip(1);
            prop_assert!(names.all(|name| !matches!(name, "" | "." | "..")));
        }
    }

    #[test]
    fn sysctl_names_never_climb(name in "(net|kernel|fs)[./a-z]{0,16}") {
        let mut spec = spec();
        spec["linux"]["namespaces"] =
            json!([{"type": "mount"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}]);
        spec["linux"]["sysctl"] = json!({name: "1"});
        if let Ok(plan) = planned(spec) {
            prop_assert!(plan.sysctls[0].0.split('/').all(|part| !matches!(part, "" | "." | "..")));
        }
    }
}
