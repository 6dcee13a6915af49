//! A pod that comes by the sandbox service (`sandboxer = "shim"`).
//!
//! containerd then has no pause container, hence no specification, and makes none of the files that
//! containers of a pod share: the shim gets the CRI's `PodSandboxConfig` and does what containerd's
//! own controller does with it (containerd 2.3, `internal/cri/server/podsandbox`). From here on
//! both kinds of pods are the same: a specification with the pod's namespaces, sysctls, cgroup and
//! annotations.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use pericarp_protocol::cri::{
    DNSConfig, LinuxContainerResources, LinuxPodSandboxConfig, PodSandboxConfig,
};
use pericarp_runtime_config::{
    CPU_PERIOD_ANNOTATION, CPU_QUOTA_ANNOTATION, CPU_SHARES_ANNOTATION, MEMORY_ANNOTATION,
};
use protobuf::Message;
use serde_json::json;

use crate::{errors::CallError, pod::bundle::Bundle};

/// The type of the options (k8s.io/cri-api).
const CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";
/// CRI's `NamespaceMode.NODE`.
const OF_THE_NODE: i32 = 2;
/// What containerd sets in pods unless they say otherwise (`enable_unprivileged_ports` and
/// `enable_unprivileged_icmp`, on by default since 2.0).
const SYSCTLS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];
/// Where the node's own files are.
const ETC: &str = "/etc";
/// The pod's shared memory, in a container as on the host.
const SHM: &str = "/dev/shm";

/// Contents of the files that the containers of a pod share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodFiles {
    hostname: String,
    /// `None`: as on the node.
    resolver: Option<String>,
}

/// The pod of a request: a specification as if it had a pause container, and its files.
pub(crate) fn pod(
    request: &CreateSandboxRequest,
    namespace: &str,
) -> Result<(Bundle, PodFiles), CallError> {
    let config = match request.options.as_ref() {
        Some(options) if options.type_url.ends_with(CONFIG_TYPE) => {
            PodSandboxConfig::parse_from_bytes(&options.value).map_err(|error| {
                CallError::Invalid(format!("options: not a {CONFIG_TYPE}: {error}"))
            })?
        }
        // A caller that is not the CRI: its annotations are all there is.
        _ => PodSandboxConfig::new(),
    };
    let hostname = match config.hostname.as_str() {
        "" => nix::unistd::gethostname()
            .map_err(|error| CallError::host("host name", error))?
            .to_string_lossy()
            .into_owned(),
        name => name.to_owned(),
    };
    let spec = specification(&config, request, namespace, &hostname)?;
    let bundle = Bundle {
        path: request.bundle_path.clone().into(),
        spec,
    };
    let files = PodFiles {
        hostname,
        resolver: config.dns_config.as_ref().map(resolver),
    };
    Ok((bundle, files))
}

fn specification(
    config: &PodSandboxConfig,
    request: &CreateSandboxRequest,
    namespace: &str,
    hostname: &str,
) -> Result<Spec, CallError> {
    let linux = config.linux.get_or_default();
    let mut sysctls = linux.sysctls.clone();
    for (name, value) in SYSCTLS {
        sysctls
            .entry(name.to_owned())
            .or_insert_with(|| value.to_owned());
    }
    let parent = linux.cgroup_parent.as_str();
    let id = &request.sandbox_id;
    let cgroups_path = match Path::new(parent).file_name().and_then(|name| name.to_str()) {
        None => format!("/{namespace}/{id}"),
        // The driver of systemd: slice, prefix and name of a scope.
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
        Some(_) => format!("{parent}/{id}"),
    };
    serde_json::from_value(json!({
        "ociVersion": "1.2.0",
        "hostname": hostname,
        "annotations": annotations(config, request),
        "linux": {
            "namespaces": namespaces(linux, &request.netns_path),
            "sysctl": sysctls,
            "cgroupsPath": cgroups_path,
        },
    }))
    .map_err(|error| CallError::host("specification of the pod", error))
}

/// Those that are the pod's own: a missing one is the node's.
fn namespaces(linux: &LinuxPodSandboxConfig, network: &str) -> Vec<serde_json::Value> {
    let context = linux.security_context.get_or_default();
    let options = context.namespace_options.get_or_default();
    [
        (LinuxNamespaceType::Network, options.network),
        (LinuxNamespaceType::Pid, options.pid),
        (LinuxNamespaceType::Ipc, options.ipc),
    ]
    .into_iter()
    .filter(|(_, mode)| *mode != OF_THE_NODE)
    .map(|(kind, _)| match kind {
        LinuxNamespaceType::Network if !network.is_empty() => {
            json!({"type": kind, "path": network})
        }
        _ => json!({"type": kind}),
    })
    .collect()
}

fn annotations(
    config: &PodSandboxConfig,
    request: &CreateSandboxRequest,
) -> HashMap<String, String> {
    let mut annotations = request.annotations.clone();
    annotations.extend(config.annotations.clone());
    let metadata = config.metadata.get_or_default();
    for (name, value) in [
        ("container-type", "sandbox"),
        ("sandbox-id", &request.sandbox_id),
        ("sandbox-name", &metadata.name),
        ("sandbox-namespace", &metadata.namespace),
        ("sandbox-uid", &metadata.uid),
    ] {
        annotations.insert(format!("io.kubernetes.cri.{name}"), value.to_owned());
    }
    let linux = config.linux.get_or_default();
    if let Some(resources) = linux.resources.as_ref() {
        annotations.extend(demand(resources));
    }
    annotations
}

fn demand(resources: &LinuxContainerResources) -> impl Iterator<Item = (String, String)> {
    [
        (CPU_PERIOD_ANNOTATION, resources.cpu_period),
        (CPU_QUOTA_ANNOTATION, resources.cpu_quota),
        (CPU_SHARES_ANNOTATION, resources.cpu_shares),
        (MEMORY_ANNOTATION, resources.memory_limit_in_bytes),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value.to_string()))
}

/// resolv.conf(5).
fn resolver(dns: &DNSConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    text
}

impl PodFiles {
    /// Writes the files beneath the sandbox's state directory.
    pub(crate) fn write(&self, state: &Path) -> io::Result<()> {
        let etc = folder(state);
        fs::create_dir_all(&etc)?;
        fs::write(etc.join("hostname"), format!("{}\n", self.hostname))?;
        fs::write(etc.join("hosts"), of_the_node("hosts")?)?;
        let resolver = match &self.resolver {
            Some(text) => text.clone(),
            None => of_the_node("resolv.conf")?,
        };
        fs::write(etc.join("resolv.conf"), resolver)
    }
}

fn folder(state: &Path) -> PathBuf {
    state.join("etc")
}

fn of_the_node(name: &str) -> io::Result<String> {
    match fs::read_to_string(Path::new(ETC).join(name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        other => other,
    }
}

/// Mounts the pod's files into a container that has no mount of its own there.
pub(crate) fn add_mounts(spec: &mut Spec, state: &Path) {
    let read_only = spec
        .root()
        .as_ref()
        .is_some_and(|root| root.readonly() == Some(true));
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    // Its own instance is what a container gets that shares nothing.
    mounts.retain(|mount| {
        mount.destination() != Path::new(SHM) || mount.typ().as_deref() != Some("tmpfs")
    });
    let files = ["hostname", "hosts", "resolv.conf"].map(|name| {
        (
            Path::new(ETC).join(name),
            folder(state).join(name),
            read_only,
        )
    });
    let shm = (PathBuf::from(SHM), PathBuf::from(SHM), false);
    for (destination, source, read_only) in files.into_iter().chain([shm]) {
        if mounts
            .iter()
            .any(|mount| *mount.destination() == destination)
        {
            continue;
        }
        let mode = if read_only { "ro" } else { "rw" };
        let mut mount = Mount::default();
        mount
            .set_destination(destination)
            .set_typ(Some("bind".to_owned()))
            .set_source(Some(source))
            .set_options(Some(["rbind", "rprivate", mode].map(str::to_owned).into()));
        mounts.push(mount);
    }
    spec.set_mounts(Some(mounts));
}

#[cfg(test)]
mod tests {
    use protobuf::well_known_types::any::Any;

    use super::*;

    fn request(config: &PodSandboxConfig) -> CreateSandboxRequest {
        CreateSandboxRequest {
            sandbox_id: "p".to_owned(),
            netns_path: "/run/netns/x".to_owned(),
            options: Some(Any {
                type_url: CONFIG_TYPE.to_owned(),
                value: config.write_to_bytes().unwrap(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_config_becomes_what_a_pause_container_would_say() {
        let mut config = PodSandboxConfig::new();
        config.hostname = "web".to_owned();
        config.annotations.insert("a".to_owned(), "b".to_owned());
        let dns = config.dns_config.mut_or_insert_default();
        dns.servers = vec!["10.0.0.1".to_owned(), "10.0.0.2".to_owned()];
        dns.searches = vec!["x.example".to_owned(), "y.example".to_owned()];
        dns.options = vec!["ndots:5".to_owned()];
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = "/kubepods/pod1".to_owned();
        let range = ("net.ipv4.ping_group_range".to_owned(), "1 2".to_owned());
        linux.sysctls.extend([range.clone()]);
        linux.resources.mut_or_insert_default().cpu_quota = 50_000;
        let (bundle, files) = pod(&request(&config), "k8s.io").unwrap();
        crate::guest::spec::check(&bundle.spec).unwrap();
        assert_eq!(bundle.role(), crate::pod::bundle::Role::Sandbox);
        assert_eq!(bundle.network_namespace(), Some("/run/netns/x".into()));
        assert_eq!(bundle.annotations()["a"], "b");
        assert_eq!(bundle.annotations()[CPU_QUOTA_ANNOTATION], "50000");
        let linux = bundle.spec.linux().clone().unwrap();
        assert_eq!(
            linux.cgroups_path(),
            &Some(PathBuf::from("/kubepods/pod1/p"))
        );
        let sysctls = linux.sysctl().clone().unwrap();
        assert_eq!(sysctls[&range.0], range.1);
        assert_eq!(sysctls.len(), 2);
        assert_eq!(
            files.resolver.unwrap(),
            "search x.example y.example\nnameserver 10.0.0.1\nnameserver 10.0.0.2\n\
                options ndots:5\n"
        );
        assert_eq!(files.hostname, "web");
    }

    #[test]
    fn the_nodes_namespaces_are_refused_as_everywhere() {
        let mut config = PodSandboxConfig::new();
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = "/kubepods.slice/kubepods-x.slice".to_owned();
        let context = linux.security_context.mut_or_insert_default();
        context.namespace_options.mut_or_insert_default().pid = OF_THE_NODE;
        let (bundle, _) = pod(&request(&config), "k8s.io").unwrap();
        let error = crate::guest::spec::check(&bundle.spec)
            .unwrap_err()
            .to_string();
        assert!(error.contains("hostPID"), "{error}");
        let linux = bundle.spec.linux().clone().unwrap();
        let path = linux.cgroups_path().clone().unwrap();
        assert_eq!(path, Path::new("kubepods-x.slice:cri-containerd:p"));
    }

    #[test]
    fn other_options_are_refused_and_none_are_fine() {
        let mut broken = request(&PodSandboxConfig::new());
        broken.options.mut_or_insert_default().value = vec![0xff];
        assert!(pod(&broken, "k8s.io").is_err());
        broken.options.clear();
        let (bundle, files) = pod(&broken, "default").unwrap();
        assert!(files.resolver.is_none());
        let linux = bundle.spec.linux().clone().unwrap();
        assert_eq!(linux.cgroups_path(), &Some(PathBuf::from("/default/p")));
    }

    #[test]
    fn files_go_where_a_container_has_none() {
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.2.0", "root": {"path": "rootfs", "readonly": true},
            "mounts": [
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
                {"destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts",
                 "options": ["rbind"]}
            ]
        }))
        .unwrap();
        let state = tempfile::tempdir().unwrap();
        add_mounts(&mut spec, state.path());
        let mounts = spec.mounts().clone().unwrap();
        let found: Vec<_> = mounts
            .iter()
            .map(|mount| mount.destination().to_str().unwrap())
            .collect();
        assert_eq!(
            found,
            [
                "/etc/hosts",
                "/etc/hostname",
                "/etc/resolv.conf",
                "/dev/shm"
            ]
        );
        assert!(
            mounts[1]
                .options()
                .clone()
                .unwrap()
                .contains(&"ro".to_owned())
        );
        let files = PodFiles {
            hostname: "web".to_owned(),
            resolver: Some(String::new()),
        };
        files.write(state.path()).unwrap();
        let hostname = fs::read_to_string(mounts[1].source().clone().unwrap()).unwrap();
        assert_eq!(hostname, "web\n");
    }
}
