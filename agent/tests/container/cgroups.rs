//! `linux.resources`. Controllers that the machine's unified hierarchy does not have are told, not
//! tested.

use serde_json::{Value, json};

use crate::harness::*;

fn limited(resources: Value) -> Running {
    let mut place = Place::new();
    place.spec["linux"]["resources"] = resources;
    place.sleeping()
}

fn file(running: &Running, name: &str) -> String {
    std::fs::read_to_string(running.container().cgroup().join(name))
        .unwrap()
        .trim()
        .to_owned()
}

#[test]
fn cpu() {
    if !has_controller("cpu") {
        return;
    }
    let running = limited(
        json!({"cpu": {"shares": 2048, "quota": 50_000, "period": 100_000, "burst": 1000}}),
    );
    assert_eq!(file(&running, "cpu.max"), "50000 100000");
    assert_eq!(file(&running, "cpu.max.burst"), "1000");
    assert_eq!(file(&running, "cpu.weight"), "174");
    running
        .container()
        .update(serde_json::from_value(json!({"cpu": {"quota": -1, "shares": 1024}})).unwrap())
        .unwrap();
    assert_eq!(file(&running, "cpu.max"), "max 100000");
    assert_eq!(file(&running, "cpu.weight"), "100");
}

#[test]
fn cpuset() {
    if !has_controller("cpuset") {
        return;
    }
    let running = limited(json!({"cpu": {"cpus": "0", "mems": "0"}}));
    assert_eq!(
        running
            .sh("nproc; grep Cpus_allowed_list /proc/self/status | cut -f2")
            .stdout,
        "1\n0\n"
    );
}

#[test]
fn memory_and_its_killer() {
    if !has_controller("memory") {
        return;
    }
    let running = limited(
        json!({"memory": {"limit": 33_554_432, "swap": 33_554_432, "reservation": 16_777_216},
        "unified": {"memory.high": "30000000"}}),
    );
    assert_eq!(file(&running, "memory.max"), "33554432");
    assert_eq!(file(&running, "memory.low"), "16777216");
    assert_eq!(
        file(&running, "memory.high"),
        (30_000_000 / 4096 * 4096).to_string()
    );
    let update = json!({"unified": {"memory.high": "max"}});
    running
        .container()
        .update(serde_json::from_value(update).unwrap())
        .unwrap();
    assert!(file(&running, "memory.events").contains("oom_kill 0"));
    let outcome = running.sh("dd if=/dev/zero of=/dev/null bs=100M count=1; echo $?");
    assert!(outcome.stdout.contains("137"), "{outcome:?}");
    assert!(file(&running, "memory.events").contains("oom_kill 1"));
    let update = json!({"memory": {"limit": 4096, "checkBeforeUpdate": true}});
    let error = running
        .container()
        .update(serde_json::from_value(update).unwrap())
        .unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("linux.resources.memory.limit: "),
        "{error}"
    );
}

#[test]
fn pids() {
    if !has_controller("pids") {
        return;
    }
    let running = limited(json!({"pids": {"limit": 6}}));
    assert_eq!(file(&running, "pids.max"), "6");
    let outcome = running.sh("for i in 1 2 3 4 5 6 7; do sleep 0.1 & done; wait; echo done");
    assert!(outcome.stdout.contains("fork"), "{outcome:?}");
}

#[test]
fn io() {
    if !has_controller("io") {
        return;
    }
    let running = limited(json!({"unified": {"io.max": "7:0 rbps=1048576"}}));
    assert_eq!(
        file(&running, "io.max"),
        "7:0 rbps=1048576 wbps=max riops=max wiops=max"
    );
}

#[test]
fn huge_pages() {
    if !has_controller("hugetlb") {
        return;
    }
    let running = limited(json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4_194_304}]}));
    assert_eq!(file(&running, "hugetlb.2MB.max"), "4194304");
}

#[test]
fn mistakes_are_named() {
    let mut place = Place::new();
    place.spec["linux"]["resources"] = json!({"unified": {"../escape.x": "1"}});
    assert!(place.error().starts_with("linux.resources.unified: "));
    place.spec["linux"]["resources"] = json!({"unified": {"cgroup.procs": "1"}});
    assert!(place.error().starts_with("linux.resources.unified: "));
    place.spec["linux"]["resources"] = json!({"unified": {"nosuch.file": "1"}});
    assert!(place.error().contains("nosuch.file"));
    place.spec["linux"]["resources"] = json!({"memory": {"limit": 1000, "swap": 10}});
    assert!(place.error().starts_with("linux.resources.memory.swap: "));
    assert!(!cgroup_parent().join(&place.id).exists());
}
