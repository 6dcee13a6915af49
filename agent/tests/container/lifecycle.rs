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
