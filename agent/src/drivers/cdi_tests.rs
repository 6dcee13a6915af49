//! CDI specifications of the guest: what is read, what is refused, and what goes with which
//! functions.

use serde_json::{Value, json};

use super::*;

const GPU: Model = Model {
    vendor: 0x10de,
    device: 0x2331,
    class: 0x0302,
};

const DISK: Model = Model {
    vendor: 0x144d,
    device: 0xa80a,
    class: 0x0108,
};

fn document() -> Value {
    json!({
        "cdiVersion": "0.6.0",
        "kind": "example.com/gpu",
        "containerEdits": {"env": ["ALL=1"]},
        "devices": [{
            "name": "any",
            "annotations": {"other.example/x": "kept"},
            "containerEdits": {
                "env": ["ANY=1"],
                "deviceNodes": [{"path": "/dev/x0", "type": "c", "major": 195, "minor": 255,
                    "fileMode": 438, "permissions": "rw", "uid": 0, "gid": 5}],
                "mounts": [{"hostPath": "/lib/x.so", "containerPath": "/usr/lib/x.so",
                    "options": ["ro", "nosuid", "rbind"], "type": "bind"}],
                "hooks": [{"hookName": "createContainer", "path": "/bin/hook",
                    "args": ["hook", "x"], "env": ["A=b"], "timeout": 5}],
                "additionalGids": [44],
            },
        }],
    })
}

fn parse(document: &Value) -> Result<Spec, String> {
    Spec::parse(document.to_string().as_bytes())
}

fn fields(spec: &Spec, functions: &[Model]) -> Vec<String> {
    let edits = spec.edits_for(functions);
    edits.into_iter().map(|(field, _)| field).collect()
}

#[test]
fn everything_that_is_known_is_read() {
    let spec = parse(&document()).unwrap();
    let all = ["containerEdits", "devices[0].containerEdits"];
    assert_eq!(fields(&spec, &[DISK]), all);
    assert!(fields(&spec, &[]).is_empty());
    let edits = spec.edits_for(&[GPU])[1].1;
    assert_eq!(edits.device_nodes[0].guest_path(), "/dev/x0");
    assert_eq!(edits.additional_gids, [44]);
}

#[test]
fn an_annotation_says_which_functions_are_meant() {
    for (selectors, gpu, disk) in [
        ("class:03", true, false),
        ("class:0302", true, false),
        ("class:0300", false, false),
        ("vendor:144d", false, true),
        ("10de:2331", true, false),
        ("10de:2330, 144d:a80a", false, true),
    ] {
        for of_device in [true, false] {
            let mut document = document();
            let annotations = json!({FUNCTIONS: selectors});
            if of_device {
                document["devices"][0]["annotations"] = annotations;
                // The device's own counts.
                document["annotations"] = json!({FUNCTIONS: "class:ff"});
            } else {
                document["annotations"] = annotations;
            }
            let spec = parse(&document).unwrap();
            assert_eq!(!fields(&spec, &[GPU]).is_empty(), gpu, "{selectors}");
            assert_eq!(!fields(&spec, &[DISK]).is_empty(), disk, "{selectors}");
            assert_eq!(fields(&spec, &[GPU, DISK]).is_empty(), !(gpu || disk));
        }
    }
}

#[test]
fn a_mistake_is_named_with_its_place() {
    let long: Vec<String> = vec!["A=b".to_owned(); ENTRIES_MAX + 1];
    for (pointer, value, words) in [
        ("/cdiVersion", json!("2.0.0"), "cdiVersion: \"2.0.0\""),
        ("/kind", json!("gpu"), "kind: "),
        ("/devices", json!([]), "devices: there is none"),
        ("/devices/0/name", json!(""), "devices[0].name"),
        (
            "/annotations",
            json!({FUNCTIONS: "10DE:2331"}),
            "class:0302",
        ),
        (
            "/annotations",
            json!({"pericarp.dev/pcie": "x"}),
            "only pericarp.dev/pci is known",
        ),
        ("/containerEdits/env", json!(["A"]), "containerEdits.env[0]"),
        ("/containerEdits/env", json!(long), "at most 512"),
        (
            "/containerEdits/netDevices",
            json!([]),
            "unknown field `netDevices`",
        ),
        ("/containerEdits/intelRdt", json!({}), "line 1 column"),
        (
            "/devices/0/containerEdits/deviceNodes/0/path",
            json!("dev"),
            "deviceNodes[0].path",
        ),
        (
            "/devices/0/containerEdits/deviceNodes/0/hostPath",
            json!("/dev/.."),
            "hostPath",
        ),
        (
            "/devices/0/containerEdits/deviceNodes/0/type",
            json!("x"),
            "not b, c",
        ),
        (
            "/devices/0/containerEdits/deviceNodes/0/major",
            json!(-1),
            "not a device number",
        ),
        (
            "/devices/0/containerEdits/deviceNodes/0/minor",
            json!(1 << 20),
            "not a device number",
        ),
        (
            "/devices/0/containerEdits/deviceNodes/0/permissions",
            json!("rx"),
            "permissions",
        ),
        (
            "/devices/0/containerEdits/mounts/0/hostPath",
            json!("/../x"),
            "mounts[0].hostPath",
        ),
        (
            "/devices/0/containerEdits/mounts/0/containerPath",
            json!("x"),
            "containerPath",
        ),
        (
            "/devices/0/containerEdits/mounts/0/type",
            json!("tmpfs"),
            "only files of the image",
        ),
        (
            "/devices/0/containerEdits/mounts/0/options",
            json!(["rw"]),
            "read-only",
        ),
        (
            "/devices/0/containerEdits/hooks/0/hookName",
            json!("start"),
            "poststop",
        ),
        (
            "/devices/0/containerEdits/hooks/0/path",
            json!("x"),
            "hooks[0].path",
        ),
        (
            "/devices/0/containerEdits/hooks/0/timeout",
            json!(0),
            "hooks[0].timeout",
        ),
    ] {
        let mut document = document();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        let parent = document.pointer_mut(parent).unwrap();
        parent[name] = value;
        let error = parse(&document).unwrap_err();
        assert!(error.contains(words), "{pointer}: {error}");
    }
    let mut twice = document();
    let device = twice["devices"][0].clone();
    twice["devices"].as_array_mut().unwrap().push(device);
    assert!(parse(&twice).unwrap_err().contains("devices[1].name"));
}
