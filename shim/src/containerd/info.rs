//! `-v` and `-info`.

use std::io::{self, Write};

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, well_known_types::any::Any};
use serde_json::json;

/// What containerd looks up to decode the features, which are JSON (features.md of the OCI runtime
/// specification).
const FEATURES_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Mount options that are more than flags of old, by which callers tell what they may ask for.
const MOUNT_OPTIONS: [&str; 12] = [
    "bind", "rbind", "ro", "rro", "rw", "nosuid", "nodev", "noexec", "noatime", "relatime",
    "idmap", "ridmap",
];

/// Prints the version for people.
pub(crate) fn version() -> io::Result<()> {
    writeln!(
        io::stdout(),
        "containerd-shim-pericarp-v2 {}",
        env!("CARGO_PKG_VERSION")
    )
}

/// Prints `RuntimeInfo` for containerd.
pub(crate) fn runtime_info() -> io::Result<()> {
    let info = RuntimeInfo {
        name: "io.containerd.pericarp.v2".to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
        .into(),
        features: Some(features()).into(),
        ..Default::default()
    };
    let bytes = info.write_to_bytes().map_err(io::Error::other)?;
    io::stdout().write_all(&bytes)
}

/// What a container may ask for, so that kubelet and containerd do not ask for more: user
/// namespaces and recursive read-only mounts among it.
fn features() -> Any {
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.3.0",
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": true, "rdma": true},
            "seccomp": {"enabled": true},
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}},
        },
    });
    Any {
        type_url: FEATURES_URL.to_owned(),
        value: features.to_string().into_bytes(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_those_of_the_specification() {
        let any = features();
        let parsed: oci_spec::runtime::Features = serde_json::from_slice(&any.value).unwrap();
        let linux = parsed.linux().as_ref().unwrap();
        let extensions = linux.mount_extensions().as_ref().unwrap();
        let idmap = extensions.idmap().as_ref().unwrap();
        assert_eq!(*idmap.enabled(), Some(true));
        let namespaces = linux.namespaces().as_ref().unwrap();
        assert!(namespaces.contains(&oci_spec::runtime::LinuxNamespaceType::User));
        let options = parsed.mount_options().as_ref().unwrap();
        assert!(options.iter().any(|option| option == "rro"));
    }
}
