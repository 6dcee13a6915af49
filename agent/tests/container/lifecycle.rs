//! Create, start, exec, signals, pause, delete; programs that cannot be run.

use serde_json::json;

use crate::harness::*;

#[test]
fn a_container_runs_its_program_and_leaves_its_status() {
    let mut place = Place::new();
    let outcome = place.sh("echo hello; hostname; echo $$; exit 3");
    assert_eq!(
        (outcome.status, outcome.stdout.as_str()),
        (3, "hello\ninside\n1\n")
    );
    assert!(!cgroup_parent().join(&place.id).exists());
}

#[test]
fn nothing_of_the_program_runs_before_start() {
    let mut place = Place::new();
    place.spec["process"]["args"] = json!(["touch", "/data/ran"]);
    let (container, created) = place.create(Stdio::default()).unwrap();
    assert!(container.pids().contains(&created.pid));
    assert!(!place.rootfs().join("data/ran").exists());
    // Never started, it is deleted all the same.
    container.delete().unwrap();
    assert_eq!(wait(created.pid), 137);
    assert!(!place.rootfs().join("data/ran").exists());
}

#[test]
fn a_further_process_is_in_the_container() {
    let running = Place::new().sleeping();
    let outcome = running.sh("hostname; readlink /proc/self/ns/pid; cat /proc/1/comm; exit 4");
    let pid_namespace = std::fs::read_link(format!("/proc/{}/ns/pid", running.pid)).unwrap();
    assert_eq!(
        outcome.stdout,
        format!("inside\n{}\nsh\n", pid_namespace.display())
    );
    assert_eq!(outcome.status, 4);
    running.end();
}

#[test]
fn programs_that_cannot_be_run_are_refused_as_by_runc() {
    let mut place = Place::new();
    let mut refused = |program: &str| {
        place.spec["process"]["args"] = json!([program]);
        let error = place.try_run().unwrap_err();
        (error.to_string(), error.exit_status())
    };
    assert_eq!(
        refused("nonesuch"),
        (
            "exec: \"nonesuch\": executable file not found in $PATH".to_owned(),
            Some(127)
        )
    );
    assert_eq!(
        refused("/no/such"),
        (
            "exec: \"/no/such\": stat /no/such: no such file or directory".to_owned(),
            Some(127)
        )
    );
    assert_eq!(
        refused("/etc/passwd"),
        (
            "exec: \"/etc/passwd\": permission denied".to_owned(),
            Some(126)
        )
    );
    assert_eq!(
        refused("/etc"),
        ("exec: \"/etc\": is a directory".to_owned(), Some(126))
    );
    let running = Place::new().sleeping();
    let error = running.exec(process(&["nonesuch"])).unwrap_err();
    assert_eq!(error.exit_status(), Some(127));
}

#[test]
fn signals_pause_and_state() {
    let running = Place::new().sleeping();
    let container = running.container();
    assert_eq!(container.pids()[0], running.pid);
    container.pause().unwrap();
    let text = std::fs::read_to_string(container.cgroup().join("cgroup.events")).unwrap();
    assert!(text.contains("frozen 1"));
    let error = running.exec(process(&["true"])).unwrap_err();
    assert_eq!(error.to_string(), "the container is paused, not running");
    container.resume().unwrap();
    assert_eq!(running.sh("echo again").stdout, "again\n");
    container.signal_all(libc::SIGTERM).unwrap();
    running.ended(7);
}

#[test]
fn a_running_container_is_not_deleted_and_not_started_twice() {
    let mut place = Place::new();
    place.spec["process"]["args"] = json!(["sleep", "1000"]);
    let (mut container, created) = place.create(Stdio::default()).unwrap();
    container.start().unwrap();
    let error = container.start().unwrap_err();
    assert_eq!(error.to_string(), "the container is running, not created");
    let error = place.create(Stdio::default()).unwrap_err();
    assert!(error.to_string().contains("File exists"), "{error}");
    let cgroup = container.cgroup().to_owned();
    let error = container.delete().unwrap_err();
    assert_eq!(error.to_string(), "the container is running, not stopped");
    std::fs::write(cgroup.join("cgroup.kill"), "1").unwrap();
    assert_eq!(wait(created.pid), 137);
    std::fs::remove_dir(cgroup).unwrap();
}

#[test]
fn killing_the_first_process_ends_all() {
    let running = Place::new().sleeping();
    running.sh("sleep 1000 >/dev/null 2>&1 &");
    assert!(running.container().pids().len() >= 3);
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(running.pid),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    running.end();
}

#[test]
fn exec_with_its_own_user_directory_environment_and_capabilities() {
    let running = Place::new().sleeping();
    let mut exec = process(&[
        "sh",
        "-c",
        "id; pwd; echo $A; grep CapEff /proc/self/status; umask",
    ]);
    exec["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [7, 8], "umask": 0o77});
    exec["cwd"] = json!("/data");
    exec["env"] = json!(["PATH=/bin", "A=b"]);
    let outcome = running.exec(exec).unwrap();
    assert_eq!(
        outcome.stdout,
        "uid=1000(user) gid=1000 groups=7,8\n/data\nb\nCapEff:\t0000000000000000\n0077\n"
    );
}

#[test]
fn nothing_of_the_agents_is_in_reach() {
    // A descriptor that somebody forgot to mark.
    let leaked = std::fs::File::open("/etc").unwrap();
    nix::fcntl::fcntl(
        &leaked,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
    )
    .unwrap();
    let script =
        "ls /proc/self/fd | tr '\\n' ' '; readlink /proc/self/fd/0; ls /proc | grep -c '^[0-9]'";
    let mut place = Place::new();
    let outcome = place.sh(script);
    // 3 is the directory that ls itself reads; the two processes are the shell and what it runs,
    // with grep.
    let lines: Vec<_> = outcome.stdout.lines().collect();
    assert!(lines[0].starts_with("0 1 2 3 /dev/null"), "{lines:?}");
    let running = Place::new().sleeping();
    let outcome = running.sh(script);
    assert!(
        outcome.stdout.starts_with("0 1 2 3 /dev/null"),
        "{outcome:?}"
    );
    drop(leaked);
}

#[test]
fn hooks_run_where_the_specification_says() {
    let mut place = Place::new();
    let log = place.outside("hooks").join("log");
    let hook = |name: &str| {
        let script = format!(
            "echo {name} $X $(cat | grep -o '\"status\":\"[a-z]*\"') >> {}",
            log.display()
        );
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script],
                "env": ["X=y", "PATH=/bin:/usr/bin"]}])
    };
    place.spec["hooks"] = json!({
        "prestart": hook("prestart"),
        "createRuntime": hook("createRuntime"),
        "createContainer": hook("createContainer"),
        "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "echo inside > /data/hook"]}],
        "poststart": hook("poststart"),
        "poststop": hook("poststop"),
    });
    assert_eq!(place.sh("cat /data/hook").stdout, "inside\n");
    let lines: Vec<_> = std::fs::read_to_string(&log)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    assert_eq!(
        lines,
        [
            "prestart y \"status\":\"creating\"",
            "createRuntime y \"status\":\"creating\"",
            "createContainer y \"status\":\"creating\"",
            "poststart y \"status\":\"running\"",
            "poststop y \"status\":\"stopped\"",
        ]
    );
    let failing = "echo sad >&2; exit 5";
    place.spec["hooks"] =
        json!({"createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", failing]}]});
    let error = place.error();
    assert_eq!(
        error,
        "hook \"/bin/sh\" (createContainer): exit status: 5: sad"
    );
    place.spec["hooks"] =
        json!({"startContainer": [{"path": "/bin/sleep", "args": ["sleep", "9"], "timeout": 1}]});
    let error = place.error();
    assert_eq!(
        error,
        "hook \"/bin/sleep\" (startContainer): not done after 1 s"
    );
    place.spec["hooks"] = json!({"createRuntime": [{"path": "/no/such/hook"}]});
    assert!(place.error().contains("No such file"), "{}", place.error());
}

/// Alone in its process, since it counts what belongs to the process: `--ignored --test-threads=1
/// growth`.
#[test]
#[ignore = "counts descriptors of the whole process; run alone"]
fn many_containers_leave_no_growth() {
    let mut place = Place::new();
    place.spec["process"]["args"] = json!(["true"]);
    place.try_run().unwrap();
    let count = || {
        let entries = |path: &str| std::fs::read_dir(path).unwrap().count();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .count();
        let cgroups = std::fs::read_dir(cgroup_parent()).unwrap().flatten();
        let cgroups = cgroups
            .filter(|entry| entry.file_type().unwrap().is_dir())
            .count();
        (entries("/proc/self/fd"), mounts, cgroups)
    };
    let before = count();
    let start = std::time::Instant::now();
    for _ in 0..200 {
        place.try_run().unwrap();
    }
    println!("200 containers in {:?}", start.elapsed());
    assert_eq!(count(), before);
}
