//! Each kind of OCI hook is refused by name. CDI specifications of device vendors use hooks.

use pericarp_tests::node::Version;
use pericarp_tests::pods::leftovers::Leftovers;
use serde_json::{Value, json};

use crate::side::{Side, WAIT, container, node};
use crate::{PERICARP, RUNC};

/// CDI specification in a folder that containerd reads.
const CDI: &str = "/etc/cdi/hooks-of-the-test.json";

/// CDI kind of the devices.
const KIND: &str = "example.com/hook";

/// Every kind of hook (OCI runtime specification, config.md, "POSIX-platform Hooks").
const HOOKS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

/// A device for each kind of hook; every hook runs `true`.
fn specification() -> Value {
    let device = |hook: &&str| {
        let edits = json!({"hooks": [{"hookName": hook, "path": "/bin/true", "args": ["true"]}]});
        json!({"name": hook, "containerEdits": edits})
    };
    let devices: Vec<Value> = HOOKS.iter().map(device).collect();
    json!({"cdiVersion": "0.6.0", "kind": KIND, "devices": devices})
}

/// Starts a container with a hook. Returns `started` or the error.
fn start(side: &Side<'_>, hook: &str) -> String {
    let mut config = container(&hook.to_lowercase(), &WAIT);
    config["CDI_devices"] = json!([{"name": format!("{KIND}={hook}")}]);
    match side.run(&config) {
        Ok(_) => "started".to_owned(),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn each_kind_of_hook_is_refused_by_name() {
    let Some(node) = node("hooks") else {
        return;
    };
    node.containerd(Version::V23).unwrap();
    let before = Leftovers::look(&node).unwrap();
    node.write(CDI, &specification().to_string()).unwrap();
    let mut found = Vec::new();
    for handler in [RUNC, PERICARP] {
        let side = Side::new(&node, handler, "hooks").unwrap();
        found.push(HOOKS.map(|hook| start(&side, hook)));
        side.remove().unwrap();
    }
    node.shell(&format!("rm {CDI}")).unwrap();
    Leftovers::nothing_since(&node, &before).unwrap();
    assert_eq!(found[0], HOOKS.map(|_| "started".to_owned()));
    let named = |(hook, said): (&&str, &String)| {
        let is_named = said.contains(&format!("hooks.{hook}"));
        (!is_named).then(|| format!("{hook}: {said}"))
    };
    let silent: Vec<String> = HOOKS.iter().zip(&found[1]).filter_map(named).collect();
    assert_eq!(silent, Vec::<String>::new());
}
