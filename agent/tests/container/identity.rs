//! `process`: user, groups, capabilities, limits, environment, working directory.

use nix::sys::signal::{SigSet, Signal};
use serde_json::json;

use crate::harness::*;

fn mask(numbers: &[u32]) -> String {
    format!(
        "{:016x}",
        numbers.iter().fold(0u64, |mask, number| mask | 1 << number)
    )
}

#[test]
fn user_groups_umask_and_home() {
    let mut place = Place::new();
    place.spec["process"]["user"] = json!({"uid": 1000, "gid": 5, "additionalGids": [20, 30]});
    let outcome =
        place.sh("id -u; id -g; id -G; umask; echo $HOME; echo x > /dev/stderr && echo reopened");
    assert_eq!(
        outcome.stdout,
        "1000\n5\n5 20 30\n0022\n/home\nx\nreopened\n"
    );
    place.spec["process"]["user"] = json!({"uid": 4242, "gid": 0, "umask": 0o27});
    place.spec["process"]["env"] = json!(["PATH=/bin", "HOME="]);
    assert_eq!(place.sh("umask; echo $HOME").stdout, "0027\n/\n");
    place.spec["process"]["env"] = json!(["PATH=/bin", "HOME=/mine"]);
    assert_eq!(place.sh("echo $HOME").stdout, "/mine\n");
}

#[test]
fn capabilities_are_exactly_those_asked_for() {
    let mut place = Place::new();
    place.spec["process"]["capabilities"] = json!({
        "bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_NET_RAW", "CAP_SYS_CHROOT"],
        "permitted": ["CAP_KILL", "CAP_CHOWN", "CAP_NET_RAW"],
        "effective": ["CAP_KILL", "CAP_CHOWN"],
        "inheritable": ["CAP_NET_RAW"],
        "ambient": ["CAP_NET_RAW"],
    });
    place.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    // For a user other than root, execve(2) leaves the ambient set alone.
    let outcome = place.sh("grep ^Cap /proc/self/status | cut -f2 | tr '\\n' ' '");
    let raw = mask(&[13]);
    assert_eq!(
        outcome.stdout,
        format!("{raw} {raw} {raw} {} {raw} ", mask(&[0, 5, 13, 18]))
    );
    // For root, it gives what the bounding set has.
    place.spec["process"]["user"] = json!({"uid": 0, "gid": 0});
    let outcome = place.sh("grep CapPrm /proc/self/status | cut -f2");
    assert_eq!(outcome.stdout.trim(), mask(&[0, 5, 13, 18]));
    place.spec["process"]
        .as_object_mut()
        .unwrap()
        .remove("capabilities");
    let outcome = place.sh("grep ^Cap /proc/self/status | cut -f2 | tr '\\n' ' '");
    assert_eq!(outcome.stdout, format!("{0} {0} {0} {0} {0} ", mask(&[])));
}

#[test]
fn no_new_privileges() {
    let mut place = Place::new();
    assert_eq!(
        place
            .sh("grep NoNewPrivs /proc/self/status | cut -f2")
            .stdout,
        "0\n"
    );
    place.spec["process"]["noNewPrivileges"] = json!(true);
    assert_eq!(
        place
            .sh("grep NoNewPrivs /proc/self/status | cut -f2")
            .stdout,
        "1\n"
    );
}

#[test]
fn limits_and_scores() {
    let mut place = Place::new();
    place.spec["process"]["rlimits"] = json!([
        {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
    ]);
    place.spec["process"]["oomScoreAdj"] = json!(321);
    let outcome = place.sh(
        "grep 'open files\\|core file' /proc/self/limits | tr -s ' '; cat /proc/self/oom_score_adj",
    );
    assert_eq!(
        outcome.stdout,
        "Max core file size 0 0 bytes \nMax open files 100 200 files \n321\n"
    );
    let running = place.sleeping();
    assert_eq!(running.sh("cat /proc/self/oom_score_adj").stdout, "321\n");
}

#[test]
fn limits_that_the_specification_does_not_set_are_the_nodes() {
    let mut place = Place::new();
    place.default_limits = vec![
        (libc::RLIMIT_NPROC, 5000, 6000),
        (libc::RLIMIT_NOFILE, 1000, 1500),
        (libc::RLIMIT_CORE, 0, 0),
        (libc::RLIMIT_SIGPENDING, 70, 80),
    ];
    place.spec["process"]["rlimits"] = json!([
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        {"type": "RLIMIT_NOFILE", "soft": 9, "hard": 90},
    ]);
    let script =
        "grep 'processes\\|open files\\|core file\\|pending' /proc/self/limits | tr -s ' '";
    let limits = |files: &str| {
        format!(
            "Max core file size 0 0 bytes \nMax processes 5000 6000 processes \n\
            Max open files {files} files \nMax pending signals 70 80 signals \n"
        )
    };
    let hooks = place.outside("hooks").join("said");
    let script_of_hook = format!(
        "grep 'open files' /proc/self/limits | tr -s ' ' > {}",
        hooks.display()
    );
    place.spec["hooks"] =
        json!({"poststart": [{"path": "/bin/sh", "args": ["sh", "-c", script_of_hook]}]});
    assert_eq!(place.sh(script).stdout, limits("9 90"));
    let said = std::fs::read_to_string(hooks).unwrap();
    assert_eq!(said, "Max open files 1000 1500 files \n");
    // A hook in the container's own process has that process's limits.
    let spec = place.spec.clone();
    let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", "test $(ulimit -n) = 64"]});
    place.spec["hooks"] = json!({ "startContainer": [hook] });
    place.spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 64}]);
    assert_eq!(place.sh("ulimit -n").stdout, "64\n");
    place.spec = spec;
    // The specification of an exec is its own.
    let mut place = Place::new();
    place.default_limits = vec![
        (libc::RLIMIT_NPROC, 5000, 6000),
        (libc::RLIMIT_NOFILE, 1000, 1500),
        (libc::RLIMIT_CORE, 0, 0),
        (libc::RLIMIT_SIGPENDING, 70, 80),
    ];
    let running = place.sleeping();
    assert_eq!(running.sh(script).stdout, limits("1000 1500"));
    let mut process = process(&["sh", "-c", script]);
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 8, "hard": 80}]);
    assert_eq!(running.exec(process).unwrap().stdout, limits("8 80"));
}

#[test]
fn a_container_may_have_more_mounts_than_its_processes_descriptors() {
    let mut place = Place::new();
    place.default_limits = vec![(libc::RLIMIT_NOFILE, 30, 400)];
    for number in 0..50 {
        place.mount(
            json!({"destination": format!("/mnt/{number}"), "source": "/tmp",
            "options": ["bind"]}),
        );
    }
    assert_eq!(place.sh("ulimit -n; ulimit -Hn").stdout, "30\n400\n");
}

#[test]
fn limits_work_in_a_user_namespace_too() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .unwrap();
    // CAP_SYS_RESOURCE, which a build machine may have taken away.
    if u64::from_str_radix(line.trim(), 16).unwrap() & (1 << 24) == 0 {
        println!("skipped: root has no CAP_SYS_RESOURCE on this machine");
        return;
    }
    let mut place = Place::new();
    place.user_namespace();
    place.spec["process"]["rlimits"] =
        json!([{"type": "RLIMIT_NOFILE", "soft": 2_000_000, "hard": 2_000_000}]);
    place.spec["process"]["oomScoreAdj"] = json!(-50);
    // What the kernel allows at all.
    let most: u64 = std::fs::read_to_string("/proc/sys/fs/nr_open")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    if most < 2_000_000 {
        place.spec["process"]["rlimits"][0]["soft"] = json!(most);
        place.spec["process"]["rlimits"][0]["hard"] = json!(most);
    }
    assert_eq!(place.sh("cat /proc/self/oom_score_adj").stdout, "-50\n");
}

#[test]
fn scheduling_priority_and_domain() {
    let mut place = Place::new();
    place.spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
    place.spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
    place.spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    place.spec["process"]["args"] = json!(["sleep", "1000"]);
    let (mut container, created) = place.create(Stdio::default()).unwrap();
    container.start().unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", created.pid)).unwrap();
    let fields: Vec<_> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    // proc_pid_stat(5), counted from field 3: nice is 19, policy 41; SCHED_BATCH is 3.
    assert_eq!((fields[16], fields[38]), ("5", "3"));
    let persona = std::fs::read_to_string(format!("/proc/{}/personality", created.pid)).unwrap();
    assert_eq!(persona.trim(), "00000008");
    container.signal_all(libc::SIGKILL).unwrap();
    wait(created.pid);
    container.delete().unwrap();
}

#[test]
fn the_working_directory_is_made_and_entered() {
    let mut place = Place::new();
    place.spec["process"]["cwd"] = json!("/srv/app/work");
    assert_eq!(place.sh("pwd").stdout, "/srv/app/work\n");
    place.spec["process"]["cwd"] = json!("/etc/passwd");
    assert!(place.error().contains("/etc/passwd"), "{}", place.error());
    place.spec["process"]["cwd"] = json!("relative");
    assert_eq!(place.error(), "process.cwd: \"relative\" is not absolute");
    // Through a descriptor of the builder's, were one left: CVE-2024-21626.
    for descriptor in 3..12 {
        place.spec["process"]["cwd"] = json!(format!("/proc/self/fd/{descriptor}"));
        if let Ok(outcome) = place.try_run() {
            panic!("{descriptor}: {outcome:?}");
        }
    }
}

#[test]
fn programs_are_found_by_the_containers_path() {
    let mut place = Place::new();
    std::fs::rename(
        place.rootfs().join("bin/true"),
        place.rootfs().join("data/mine"),
    )
    .unwrap();
    std::fs::copy("/bin/busybox", place.rootfs().join("data/busybox")).unwrap();
    place.spec["process"]["args"] = json!(["mine"]);
    assert!(
        place
            .error()
            .ends_with("executable file not found in $PATH")
    );
    place.spec["process"]["env"] = json!(["PATH=/nonesuch:/data"]);
    // Busybox does not know that name and says so with 127 itself; it ran.
    assert_eq!(place.try_run().unwrap().status, 127);
}

/// What a program gets, seen by one that does not interpret it: a shell merges variables.
#[test]
fn the_environment_has_each_name_once() {
    let mut place = Place::new();
    let env = json!([
        "PATH=/nonesuch",
        "A=image",
        "HOME=/image",
        "PATH=/bin",
        "A=pod",
        "HOME="
    ]);
    let expected = "PATH=/bin\nA=pod\nHOME=/root\n";
    place.spec["process"]["env"] = env.clone();
    place.spec["process"]["args"] = json!(["env"]);
    assert_eq!(place.try_run().unwrap().stdout, expected);
    let running = place.sleeping();
    let mut process = process(&["env"]);
    process["env"] = env;
    assert_eq!(running.exec(process.clone()).unwrap().stdout, expected);
    process["env"] = json!(["PATH=/bin", "A"]);
    let error = running.exec(process).unwrap_err().to_string();
    assert_eq!(error, "process.env[1]: \"A\" has no \"=\"");
}

/// SIGPIPE is ignored in this process by Rust's runtime.
#[test]
fn a_process_begins_with_default_signals() {
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGUSR2);
    blocked.thread_block().unwrap();
    let none = "SigBlk: 0000000000000000\nSigIgn: 0000000000000000\nSigCgt: 0000000000000000\n";
    let grep = ["grep", "^Sig[BIC]", "/proc/self/status"];
    let mut place = Place::new();
    place.spec["process"]["args"] = json!(grep);
    let hook = |name: &str| {
        let script = format!("busybox grep '^Sig[BIC]' /proc/self/status > {name}");
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
    };
    let said = place.outside("hooks");
    place.spec["hooks"] = json!({
        "createRuntime": hook(said.join("runtime").to_str().unwrap()),
        "createContainer": hook(said.join("container").to_str().unwrap()),
        "poststart": hook(said.join("poststart").to_str().unwrap()),
    });
    let outcome = place.try_run().unwrap();
    assert_eq!(outcome.stdout.replace('\t', " "), none);
    for name in ["runtime", "container", "poststart"] {
        let seen = std::fs::read_to_string(said.join(name)).unwrap();
        assert_eq!(seen.replace('\t', " "), none, "{name}");
    }
    place.spec.as_object_mut().unwrap().remove("hooks");
    let running = place.sleeping();
    assert_eq!(
        running
            .exec(process(&grep))
            .unwrap()
            .stdout
            .replace('\t', " "),
        none
    );
    // A writer ends with its reader.
    let outcome = running
        .sh("(cat /dev/zero; echo $? > /tmp/status) | head -c 1 > /dev/null; cat /tmp/status");
    assert_eq!(outcome.stdout, format!("{}\n", 128 + libc::SIGPIPE));
    blocked.thread_unblock().unwrap();
}

#[test]
fn mistakes_are_named() {
    let mut place = Place::new();
    place.spec["process"]["apparmorProfile"] = json!("some-profile");
    // Without AppArmor the field is refused, with it the kernel does not know the profile.
    assert!(place.error().contains("some-profile"));
    place.spec["process"]["apparmorProfile"] = json!("");
    place.spec["process"]["selinuxLabel"] = json!("a:b:c:d");
    assert!(place.error().starts_with("process.selinuxLabel: "));
    place.spec["process"]["selinuxLabel"] = json!("");
    place.spec["process"]["oomScoreAdj"] = json!(2000);
    assert!(place.error().starts_with("process.oomScoreAdj: "));
    place.spec["process"]["oomScoreAdj"] = json!(0);
    place.spec["process"]["args"] = json!([]);
    assert!(place.error().starts_with("process.args: "));
}
