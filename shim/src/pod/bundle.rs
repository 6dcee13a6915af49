//! An OCI bundle as containerd makes it: `config.json` and what its annotations say about the pod.
//!
//! Callers differ in how they name the pod's parts; the table below is the only place that knows.
//!
//! | caller | annotation of the kind | annotation of the sandbox |
//! |---|---|---|
//! | containerd's CRI | `io.kubernetes.cri.container-type` | `io.kubernetes.cri.sandbox-id` |
//! | CRI-O | `io.kubernetes.cri-o.ContainerType` | `io.kubernetes.cri-o.SandboxID` |
//! | ctr, nerdctl | none | none: a sandbox of one |

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    io,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

/// File of the bundle with the path of the sandbox's state directory.
const STATE_FILE: &str = "pericarp-state";

/// What the container of a bundle is to its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Role {
    /// The pod's own "pause" container: it stands for the sandbox.
    Sandbox,
    /// A container of the sandbox with this id.
    Member(String),
    /// A container that is its own sandbox.
    Single,
}

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BundleError {
    #[error("bundle {path}: config.json cannot be read")]
    Read { path: PathBuf, source: io::Error },
    #[error("bundle {path}: config.json is not an OCI runtime specification: {source}")]
    Parse {
        path: PathBuf,
        source: serde_json::Error,
    },
}

/// A bundle that was read.
#[derive(Debug, Clone)]
pub(crate) struct Bundle {
    /// Its directory.
    pub(crate) path: PathBuf,
    /// `config.json`.
    pub(crate) spec: Spec,
}

impl Bundle {
    /// Reads `config.json` of the bundle at `path`.
    pub(crate) fn read(path: &Path) -> Result<Self, BundleError> {
        let text = std::fs::read(path.join("config.json")).map_err(|source| BundleError::Read {
            path: path.to_owned(),
            source,
        })?;
        let spec = serde_json::from_slice(&text).map_err(|source| BundleError::Parse {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            spec,
        })
    }

    /// Writes down where the sandbox's state is: `delete` knows neither the handler's configuration
    /// nor its flavour.
    pub(crate) fn note_state(&self, state: &Path) -> io::Result<()> {
        let bytes = state.as_os_str().as_bytes();
        std::fs::write(self.path.join(STATE_FILE), bytes)
    }

    /// Where the state of sandbox `id` is, if the bundle at `path` says it.
    pub(crate) fn noted_state(path: &Path, id: &str) -> Option<PathBuf> {
        let bytes = std::fs::read(path.join(STATE_FILE)).ok()?;
        let state = PathBuf::from(OsString::from_vec(bytes));
        let fits = state.is_absolute() && state.file_name() == Some(OsStr::new(id));
        fits.then_some(state)
    }

    /// The specification's annotations.
    pub(crate) fn annotations(&self) -> HashMap<String, String> {
        self.spec.annotations().clone().unwrap_or_default()
    }

    /// What this container is to its pod.
    pub(crate) fn role(&self) -> Role {
        role(self.spec.annotations().as_ref())
    }

    /// Path of the network namespace, when the specification joins one.
    pub(crate) fn network_namespace(&self) -> Option<PathBuf> {
        self.namespace(LinuxNamespaceType::Network)?
    }

    /// `None`: the host's namespace; `Some(None)`: a new one; `Some(Some(path))`: the one at that
    /// path.
    pub(crate) fn namespace(&self, kind: LinuxNamespaceType) -> Option<Option<PathBuf>> {
        let namespaces = self.spec.linux().as_ref()?.namespaces().as_ref()?;
        namespaces
            .iter()
            .find(|n| n.typ() == kind)
            .map(|n| n.path().clone())
    }
}

/// The kinds' words as each caller spells them.
const CALLERS: [(&str, &str); 2] = [
    (
        "io.kubernetes.cri.container-type",
        "io.kubernetes.cri.sandbox-id",
    ),
    (
        "io.kubernetes.cri-o.ContainerType",
        "io.kubernetes.cri-o.SandboxID",
    ),
];

fn role(annotations: Option<&HashMap<String, String>>) -> Role {
    let Some(annotations) = annotations else {
        return Role::Single;
    };
    for (kind, sandbox) in CALLERS {
        match annotations.get(kind).map(String::as_str) {
            Some("sandbox") => return Role::Sandbox,
            Some("container") => {
                if let Some(id) = annotations.get(sandbox) {
                    return Role::Member(id.clone());
                }
            }
            _ => {}
        }
    }
    Role::Single
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles() {
        let with = |pairs: &[(&str, &str)]| {
            let map = pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect();
            role(Some(&map))
        };
        assert_eq!(role(None), Role::Single);
        assert_eq!(with(&[]), Role::Single);
        assert_eq!(
            with(&[("io.kubernetes.cri.container-type", "sandbox")]),
            Role::Sandbox
        );
        assert_eq!(
            with(&[
                ("io.kubernetes.cri.container-type", "container"),
                ("io.kubernetes.cri.sandbox-id", "p"),
            ]),
            Role::Member("p".into())
        );
        assert_eq!(
            with(&[
                ("io.kubernetes.cri-o.ContainerType", "container"),
                ("io.kubernetes.cri-o.SandboxID", "q"),
            ]),
            Role::Member("q".into())
        );
        assert_eq!(
            with(&[("io.kubernetes.cri.container-type", "container")]),
            Role::Single
        );
    }
}
