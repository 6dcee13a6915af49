//! Attributes that a process of a container inherits, as the container's init and by exec.

use std::collections::BTreeMap;

use anyhow::Result;
use pericarp_tests::node::Version;
use pericarp_tests::node::images::{BUSYBOX, VARIABLES};
use serde_json::{Map, Value, json};

use crate::side::{Side, WAIT, assert_same, container, merge, node, under_both};

/// An unprivileged user.
const USER: i64 = 1000;

/// Number of threads that a user can create under runc in a node of this size.
const THREADS: u64 = 3000;

/// Mask of signals 1 to 31, which the probe reports for other processes.
const STANDARD_SIGNALS: u64 = 0x7fff_ffff;

/// Name and configuration changes of each container.
fn cases() -> Vec<(&'static str, Value)> {
    let variables = json!([
        {"key": "ORIGIN", "value": "pod"},
        {"key": "ONLY_POD", "value": "yes"},
        {"key": "EMPTY", "value": "no more"},
        {"key": "PATH", "value": "/bin:/usr/bin:/of/the/pod"},
    ]);
    let user = json!({"security_context": {
        "run_as_user": {"value": USER},
        "run_as_group": {"value": USER},
        "supplemental_groups": [2000, 3000],
        "no_new_privs": true,
        "capabilities": {"drop_capabilities": ["ALL"], "add_capabilities": ["NET_BIND_SERVICE"]},
        "seccomp": {"profile_type": 0},
    }});
    let limited = json!({"resources": {
        "memory_limit_in_bytes": 512 << 20, "oom_score_adj": 500,
    }});
    vec![
        ("plain", json!({"image": {"image": BUSYBOX}})),
        (
            "variables",
            json!({"image": {"image": VARIABLES}, "envs": variables}),
        ),
        ("user", json!({"linux": user, "working_dir": "/tmp"})),
        ("terminal", json!({"tty": true, "stdin": true})),
        // Last, because the VM grows for it.
        ("limited", json!({"linux": limited})),
    ]
}

/// Inspects the init of a container and two processes of execs.
fn look(side: &Side<'_>, id: &str) -> Result<Value> {
    // Rust's runtime changes SIGPIPE in the probe itself, so grep prints the masks of an exec.
    let masks = side.exec(id, &["grep", "^Sig[BCI]", "/proc/self/status"])?;
    let masks = masks.lines().map(|line| {
        let (name, mask) = line.split_once(":\t")?;
        Some((name, u64::from_str_radix(mask, 16).ok()? & STANDARD_SIGNALS))
    });
    Ok(json!({
        "first": side.probe(id, &["inherits", "1"])?,
        "exec": side.probe(id, &["inherits", "self"])?,
        "signals_of_exec": masks.collect::<Option<BTreeMap<_, _>>>(),
    }))
}

/// Removes attributes that may differ from runc.
fn without_what_may_differ(mut found: Value) -> Value {
    for container in found.as_object_mut().into_iter().flat_map(Map::values_mut) {
        for process in ["first", "exec"] {
            // A VM has as many processors as the pod's limits need, not as many as the node.
            container[process]["processors"] = Value::Null;
        }
    }
    found
}

fn every_case(side: &Side<'_>) -> Result<Value> {
    let mut found = Map::new();
    let mut first = None;
    for (name, change) in cases() {
        let mut config = container(name, &WAIT);
        merge(&mut config, &change);
        let id = side.run(&config)?;
        found.insert(name.to_owned(), look(side, &id)?);
        first.get_or_insert(id);
    }
    // An exec in a container that was started before the VM grew.
    if let Some(id) = first {
        found.insert("plain, once the pod has grown".to_owned(), look(side, &id)?);
    }
    Ok(without_what_may_differ(Value::Object(found)))
}

#[test]
fn processes_inherit_what_they_do_under_runc() {
    let Some(node) = node("inherits") else {
        return;
    };
    let containerd = node.containerd(Version::V23).unwrap();
    containerd.crictl_text(&node, &["pull", VARIABLES]).unwrap();
    let found = under_both(&node, "inherits", every_case).unwrap();
    // Checks runc itself too, so that two equal mistakes are noticed.
    let first = &found[0]["variables"]["first"];
    let variables = first["environment"].as_array().unwrap();
    assert!(variables.contains(&json!("ORIGIN=pod")), "{first}");
    assert!(!variables.contains(&json!("ORIGIN=image")), "{first}");
    assert_eq!(first["signals"]["SigIgn"], 0, "{first}");
    assert!(
        found[0]["plain"]["signals_of_exec"].is_object(),
        "{}",
        found[0]
    );
    assert_same(&found);
}

/// SIGPIPE ends a writer whose reader has exited.
#[test]
fn a_writer_ends_with_its_reader() {
    let Some(node) = node("writer") else {
        return;
    };
    let found = under_both(&node, "writer", |side| {
        let id = side.run(&container("c", &WAIT))?;
        let line = "{ { timeout 20 yes; echo $? >&3; } | head -n 1 >/dev/null; } 3>&1";
        Ok(json!(side.exec(&id, &["sh", "-c", line])?))
    });
    let found = found.unwrap();
    assert_eq!(found[0], "141");
    assert_same(&found);
}

#[test]
fn a_user_has_three_thousand_threads() {
    let Some(node) = node("threads") else {
        return;
    };
    let found = under_both(&node, "threads", |side| {
        let mut config = container("c", &WAIT);
        let user = json!({"run_as_user": {"value": USER}, "run_as_group": {"value": USER}});
        merge(&mut config, &json!({"linux": {"security_context": user}}));
        let id = side.run(&config)?;
        side.probe(&id, &["threads", &THREADS.to_string()])
    });
    let found = found.unwrap();
    assert_eq!(found[0], json!({"threads": THREADS}));
    assert_same(&found);
}
