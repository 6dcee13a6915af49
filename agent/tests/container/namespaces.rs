//! `linux.namespaces` and what belongs to them: names, sysctls, id mappings, clocks.

use serde_json::json;

use crate::harness::*;

fn own(kind: &str) -> String {
    std::fs::read_link(format!("/proc/self/ns/{kind}"))
        .unwrap()
        .display()
        .to_string()
}

const KINDS: [(&str, &str); 6] = [
    ("pid", "pid"),
    ("ipc", "ipc"),
    ("uts", "uts"),
    ("mnt", "mount"),
    ("net", "network"),
    ("cgroup", "cgroup"),
];

#[test]
fn every_new_namespace_is_new() {
    let outcome = Place::new()
        .sh("for n in pid ipc uts mnt net cgroup user time; do readlink /proc/self/ns/$n; done");
    for (link, (file, _)) in outcome.stdout.lines().zip(KINDS) {
        assert_ne!(link, own(file));
    }
    assert_eq!(outcome.stdout.lines().nth(6).unwrap(), own("user"));
    assert_eq!(outcome.stdout.lines().nth(7).unwrap(), own("time"));
}

#[test]
fn namespaces_that_are_not_named_are_the_guests() {
    let mut place = Place::new();
    place.spec.as_object_mut().unwrap().remove("hostname");
    for kind in ["ipc", "uts", "cgroup"] {
        place.without_namespace(kind);
    }
    let outcome = place.sh("for n in ipc uts cgroup; do readlink /proc/self/ns/$n; done");
    let links: Vec<_> = outcome.stdout.lines().collect();
    assert_eq!(links, [own("ipc"), own("uts"), own("cgroup")]);
}

#[test]
fn namespaces_are_joined_by_path_and_exec_joins_them_too() {
    let first = Place::new().sleeping();
    let mut place = Place::new();
    for (file, kind) in KINDS {
        if !["mount", "cgroup"].contains(&kind) {
            place
                .namespace(json!({"type": kind, "path": format!("/proc/{}/ns/{file}", first.pid)}));
        }
    }
    place.spec.as_object_mut().unwrap().remove("hostname");
    let second = place.sleeping();
    assert!(!second.container().has_own_pid_namespace());
    for (file, kind) in KINDS {
        let of = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/{file}")).unwrap();
        assert_eq!(
            of(first.pid) == of(second.pid),
            !["mount", "cgroup"].contains(&kind),
            "{kind}"
        );
    }
    let outcome = second.sh("hostname; cat /proc/1/comm; echo $$");
    assert!(outcome.stdout.starts_with("inside\nsh\n"), "{outcome:?}");
    assert!(!outcome.stdout.ends_with("\n1\n"), "{outcome:?}");
}

#[test]
fn the_sandbox_pid_namespace_wins() {
    let first = Place::new().sleeping();
    let mut place = Place::new();
    place.spec["process"]["args"] = json!(["readlink", "/proc/self/ns/pid"]);
    let path = format!("/proc/{}/ns/pid", first.pid);
    let mut options = place.options();
    options.pid_namespace = Some(std::fs::File::open(&path).unwrap().into());
    let (reader, stdio) = captured();
    let (mut container, created) =
        Container::create(&place.id, place.parsed(), options, stdio).unwrap();
    container.start().unwrap();
    assert_eq!(wait(created.pid), 0);
    container.delete().unwrap();
    assert_eq!(
        read(reader).trim(),
        std::fs::read_link(path).unwrap().to_str().unwrap()
    );
}

#[test]
fn names_loopback_and_sysctls() {
    let mut place = Place::new();
    place.spec["domainname"] = json!("example.org");
    place.spec["linux"]["sysctl"] = json!({
        "net.ipv4.ip_unprivileged_port_start": "80",
        "kernel.shm_rmid_forced": "1",
        "fs.mqueue.msg_max": "12",
    });
    let outcome = place.sh(
        "cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_unprivileged_port_start \
         /proc/sys/kernel/shm_rmid_forced /proc/sys/fs/mqueue/msg_max; \
         ip addr show lo | grep -c 127.0.0.1",
    );
    assert_eq!(outcome.stdout, "example.org\n80\n1\n12\n1\n");
}

#[test]
fn sysctls_of_no_namespace_of_the_container_are_refused() {
    let mut place = Place::new();
    place.spec["linux"]["sysctl"] = json!({"vm.swappiness": "1"});
    assert_eq!(
        place.error(),
        "linux.sysctl[\"vm.swappiness\"]: belongs to no namespace"
    );
    place.spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
    place.without_namespace("network");
    assert!(
        place.error().contains("needs a net namespace"),
        "{}",
        place.error()
    );
    place.spec["linux"]["sysctl"] = json!({"net.../../vm/swappiness": "1"});
    assert!(place.error().starts_with("linux.sysctl"));
}

#[test]
fn a_user_namespace_maps_its_root() {
    let mut place = Place::new();
    place.user_namespace();
    std::os::unix::fs::chown(place.rootfs().join("data"), Some(100_000), Some(100_000)).unwrap();
    let outcome = place.sh(
        "id -u; cat /proc/self/uid_map | tr -s ' '; stat -c %u /data /etc; touch /data/x && echo \
            made; \
         echo > /dev/null && echo null; stat -c '%F %u %t:%T' /dev/null; ls /sys | wc -l; \
         mount -t tmpfs x /tmp || echo denied",
    );
    let lines: Vec<_> = outcome.stdout.lines().collect();
    assert_eq!(
        lines[..7],
        [
            "0",
            " 0 100000 65536",
            "0",
            "65534",
            "made",
            "null",
            "character special file 0 1:3"
        ]
    );
    assert!(lines.contains(&"denied"), "{lines:?}");
    let created = std::os::unix::fs::MetadataExt::uid(
        &std::fs::metadata(place.rootfs().join("data/x")).unwrap(),
    );
    assert_eq!(created, 100_000);
    let running = place.sleeping();
    let outcome =
        running.sh("id -u; cat /proc/self/uid_map | tr -s ' '; readlink /proc/self/ns/user");
    let user = std::fs::read_link(format!("/proc/{}/ns/user", running.pid)).unwrap();
    assert_eq!(
        outcome.stdout,
        format!("0\n 0 100000 65536\n{}\n", user.display())
    );
}

#[test]
fn a_user_namespace_needs_a_root() {
    let mut place = Place::new();
    place.namespace(json!({"type": "user"}));
    assert_eq!(
        place.error(),
        "linux.uidMappings: id 0 of the user namespace must be mapped"
    );
}

#[test]
fn clocks_are_offset() {
    let mut place = Place::new();
    place.namespace(json!({"type": "time"}));
    place.spec["linux"]["timeOffsets"] =
        json!({"boottime": {"secs": 1_000_000}, "monotonic": {"secs": 5, "nanosecs": 7}});
    let outcome = place.sh("cut -d. -f1 /proc/uptime; cat /proc/self/timens_offsets | tr -s ' '");
    let uptime: u64 = outcome.stdout.lines().next().unwrap().parse().unwrap();
    assert!(uptime >= 1_000_000, "{outcome:?}");
    assert!(outcome.stdout.contains("boottime 1000000 0"), "{outcome:?}");
}

#[test]
fn mistakes_are_named() {
    let mut place = Place::new();
    place.without_namespace("mount");
    assert_eq!(
        place.error(),
        "linux.namespaces: a mount namespace of the container's own is needed"
    );
    let mut place = Place::new();
    place.namespace(json!({"type": "network", "path": "/no/such/namespace"}));
    assert_eq!(
        place.error(),
        "open net namespace /no/such/namespace: No such file or directory (os error 2)"
    );
}

#[test]
fn a_user_namespace_works_with_namespaces_that_it_does_not_own() {
    let mut place = Place::new();
    place.user_namespace();
    place.spec.as_object_mut().unwrap().remove("hostname");
    for kind in ["network", "ipc", "uts", "cgroup"] {
        place.without_namespace(kind);
    }
    let outcome = place.sh("ls /sys/class/net | grep lo; stat -f -c %T /dev/mqueue; id -u");
    assert_eq!(
        (outcome.status, outcome.stdout.lines().next()),
        (0, Some("lo")),
        "{outcome:?}"
    );
}

#[test]
fn a_user_namespace_sees_the_processes_of_a_pid_namespace_that_it_does_not_own() {
    let first = Place::new().sleeping();
    let mut place = Place::new();
    place.user_namespace();
    let path = format!("/proc/{}/ns/pid", first.pid);
    place.namespace(json!({"type": "pid", "path": path}));
    let outcome = place.sh("id -u; readlink /proc/self/ns/pid; [ $$ = 1 ] || ls -d /proc/1");
    let joined = std::fs::read_link(&path).unwrap();
    assert_eq!(
        outcome.stdout,
        format!("0\n{}\n/proc/1\n", joined.display())
    );
}

#[test]
fn a_user_namespace_is_joined_with_those_that_it_owns() {
    let mut first = Place::new();
    first.user_namespace();
    let first = first.sleeping();
    let mut place = Place::new();
    place.user_namespace();
    place.spec.as_object_mut().unwrap().remove("hostname");
    for (kind, file) in [
        ("user", "user"),
        ("network", "net"),
        ("ipc", "ipc"),
        ("uts", "uts"),
    ] {
        let path = format!("/proc/{}/ns/{file}", first.pid);
        place.namespace(json!({"type": kind, "path": path}));
    }
    let outcome = place.sh(
        "id -u; hostname; readlink /proc/self/ns/user; ls /sys/class/net | \
        grep lo; echo x > /dev/null",
    );
    let user = std::fs::read_link(format!("/proc/{}/ns/user", first.pid)).unwrap();
    assert_eq!(
        outcome.stdout,
        format!("0\ninside\n{}\nlo\n", user.display())
    );
}
