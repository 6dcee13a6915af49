//! Device nodes that a container makes and opens.

use serde_json::{Value, json};

use crate::side::{WAIT, assert_same, container, merge, node, under_both};

/// Some nodes that runc does not let a container open.
const REFUSED: [&str; 4] = ["mem", "kmsg", "fuse", "kvm"];

#[test]
fn a_container_opens_the_devices_that_it_does_under_runc() {
    let Some(node) = node("devices") else {
        return;
    };
    let found = under_both(&node, "devices", |side| {
        let plain = side.run(&container("plain", &WAIT))?;
        let mut config = container("network-admin", &WAIT);
        let capabilities = json!({"add_capabilities": ["NET_ADMIN"]});
        let capabilities = json!({"security_context": {"capabilities": capabilities}});
        merge(&mut config, &json!({"linux": capabilities}));
        let admin = side.run(&config)?;
        let devices = side.probe(&plain, &["devices"])?;
        Ok(json!({"devices": devices, "tun": side.probe(&admin, &["tun"])?}))
    });
    let found: [Value; 2] = found.unwrap();
    assert_eq!(
        found[0]["tun"],
        json!({"mknod": "ok", "open": "ok", "interface_is_there": true})
    );
    for name in REFUSED {
        assert_eq!(found[0]["devices"][name]["open"], "EPERM", "{name}");
    }
    assert_same(&found);
}
