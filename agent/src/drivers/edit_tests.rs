//! Edits of a container's specification, with closures for the guest and the image.

use serde_json::{Value, json};

use super::*;

const DRIVERS: &str = "Character devices:\n  1 mem\n195 nvidia\n236 nvidia-uvm\n\n\
                       Block devices:\n  7 loop\n236 other\n";

fn edits(value: Value) -> Edits {
    serde_json::from_value(value).unwrap()
}

fn apply(value: Value, spec: &mut Spec, found: &mut Vec<LinuxDevice>) -> Result<(), String> {
    let guest = Guest {
        device: |path: &str| match path {
            "/dev/log" => Some((LinuxDeviceType::C, 1, 11)),
            "/dev/disk" => Some((LinuxDeviceType::B, 8, 0)),
            _ => None,
        },
        drivers: DRIVERS.to_owned(),
        path: |path: &str| match path {
            "/missing" => Err("/missing is not in the image".to_owned()),
            path => Ok(PathBuf::from(format!("/image{path}"))),
        },
    };
    guest.apply(&edits(value), spec, found)
}

fn container() -> Spec {
    serde_json::from_value(json!({
        "ociVersion": "1.2.0", "root": {"path": "/r"},
        "process": {"cwd": "/", "args": ["sh"], "env": ["PATH=/bin", "OLD=1"],
            "user": {"uid": 7, "gid": 8}},
        "mounts": [{"destination": "/usr/lib/x.so", "type": "bind", "source": "/s"}],
        "linux": {"devices": [{"path": "/dev/a", "type": "c", "major": 9, "minor": 9}]},
    }))
    .unwrap()
}

#[test]
fn edits_come_after_what_is_there_and_replace_it() {
    let mut spec = container();
    let mut found: Vec<LinuxDevice> = serde_json::from_value(json!([
        {"path": "/dev/a", "type": "c", "major": 1, "minor": 1},
        {"path": "/dev/b", "type": "c", "major": 1, "minor": 2},
    ]))
    .unwrap();
    apply(
        json!({
            "env": ["OLD=2", "NEW=a=b"],
            "deviceNodes": [{"path": "/dev/a", "type": "c", "major": 195, "permissions": "r"}],
            "mounts": [{"hostPath": "/x.so", "containerPath": "/usr/lib/x.so",
                "options": ["nosuid", "bind"]}],
            "hooks": [{"hookName": "createRuntime", "path": "/h", "args": ["h", "1"]},
                {"hookName": "startContainer", "path": "/in/container"}],
            "additionalGids": [0, 44],
        }),
        &mut spec,
        &mut found,
    )
    .unwrap();
    let spec = serde_json::to_value(&spec).unwrap();
    assert_eq!(
        spec["process"]["env"],
        json!(["PATH=/bin", "OLD=2", "NEW=a=b"])
    );
    assert_eq!(spec["process"]["user"]["additionalGids"], json!([44]));
    assert_eq!(
        spec["mounts"],
        json!([{"destination": "/usr/lib/x.so", "type": "bind", "source": "/image/x.so",
            "options": ["nosuid", "bind", "ro"]}])
    );
    assert_eq!(
        spec["linux"]["devices"],
        json!([{"path": "/dev/a", "type": "c", "major": 195, "minor": 0, "fileMode": 0o666,
            "uid": 7, "gid": 8}])
    );
    let rules = &spec["linux"]["resources"]["devices"];
    let rule = json!({"allow": true, "type": "c", "major": 195, "minor": 0, "access": "r"});
    assert_eq!(rules.as_array().unwrap().last(), Some(&rule));
    assert_eq!(spec["hooks"]["createRuntime"][0]["path"], json!("/image/h"));
    assert_eq!(spec["hooks"]["createRuntime"][0]["args"], json!(["h", "1"]));
    assert_eq!(
        spec["hooks"]["startContainer"][0]["path"],
        json!("/in/container")
    );
    assert_eq!(found.len(), 1, "{found:?}");
}

#[test]
fn numbers_are_said_or_found() {
    for (node, wanted) in [
        (
            json!({"path": "/dev/x", "type": "c", "major": 5, "minor": 6}),
            Ok(('c', 5, 6)),
        ),
        (json!({"path": "/dev/log"}), Ok(('c', 1, 11))),
        (
            json!({"path": "/dev/x", "hostPath": "/dev/disk"}),
            Ok(('b', 8, 0)),
        ),
        (json!({"path": "/dev/nvidia-uvm"}), Ok(('c', 236, 0))),
        (
            json!({"path": "/dev/nvidia-uvm-tools", "hostPath": "/dev/nvidia-uvm", "minor": 1}),
            Ok(('c', 236, 1)),
        ),
        (json!({"path": "/dev/p", "type": "p"}), Ok(('p', 0, 0))),
        (
            json!({"path": "/dev/other"}),
            Err("no driver of its kernel"),
        ),
        (
            json!({"path": "/dev/disk", "type": "c"}),
            Err("not of type \"c\""),
        ),
        (
            json!({"path": "/dev/nothing"}),
            Err("give type, major and minor"),
        ),
    ] {
        let mut spec = Spec::default();
        spec.set_linux(None);
        let done = apply(json!({"deviceNodes": [node]}), &mut spec, &mut Vec::new());
        match wanted {
            Ok((kind, major, minor)) => {
                done.unwrap();
                let spec = serde_json::to_value(&spec).unwrap();
                let device = &spec["linux"]["devices"]
                    .as_array()
                    .unwrap()
                    .last()
                    .unwrap()
                    .clone();
                let found = json!([device["type"], device["major"], device["minor"]]);
                assert_eq!(found, json!([kind.to_string(), major, minor]), "{node}");
            }
            Err(words) => {
                let error = done.unwrap_err();
                assert!(error.starts_with("deviceNodes[0]: "), "{error}");
                assert!(error.contains(words), "{error}");
            }
        }
    }
}

#[test]
fn nodes_without_permissions_have_no_rule_and_missing_files_are_named() {
    let mut spec = container();
    let node = json!({"path": "/dev/x", "type": "c", "major": 5, "permissions": "none"});
    apply(json!({"deviceNodes": [node]}), &mut spec, &mut Vec::new()).unwrap();
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(linux.devices().as_ref().unwrap().len(), 2);
    assert!(linux.resources().is_none());
    for (edits, words) in [
        (
            json!({"mounts": [{"hostPath": "/missing", "containerPath": "/x"}]}),
            "mounts[0].hostPath: /missing",
        ),
        (
            json!({"hooks": [{"hookName": "poststop", "path": "/missing"}]}),
            "hooks[0].path: /missing",
        ),
    ] {
        let error = apply(edits, &mut spec, &mut Vec::new()).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn further_processes_have_the_variables_and_groups_too() {
    let mut process = container().process().clone().unwrap();
    let added = edits(json!({"env": ["OLD=2", "NEW=1"], "additionalGids": [0, 44]}));
    add_to_process(&mut process, &added);
    let process = serde_json::to_value(&process).unwrap();
    assert_eq!(process["env"], json!(["PATH=/bin", "OLD=2", "NEW=1"]));
    assert_eq!(process["user"]["additionalGids"], json!([44]));
}
