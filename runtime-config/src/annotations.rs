//! What a pod's annotations may change: an allow-list, deny by default. Pure; the tenant's words
//! end here.

use std::collections::BTreeMap;

use crate::config::{Config, PodConfig, contradiction_rules};
use crate::keys::{self, KEYS};
use crate::kind::{BadValue, quoted};
use crate::nearest::nearest;

/// Annotations that begin so are ours; all others are somebody else's and are ignored.
pub const ANNOTATION_PREFIX: &str = "pericarp.dev/";

/// Why a pod is refused for an annotation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// No key has this name.
    #[error("unknown annotation {name}; the nearest valid one is \"{ANNOTATION_PREFIX}{nearest}\"")]
    Unknown {
        /// The annotation's name, quoted.
        name: String,
        /// The nearest key that a pod may override.
        nearest: &'static str,
    },
    /// The key belongs to the node.
    #[error(
        "annotation \"{ANNOTATION_PREFIX}{key}\": only the node's configuration can set this key"
    )]
    NodeOnly {
        /// The key.
        key: &'static str,
    },
    /// The operator has not allowed it.
    #[error(
        "annotation \"{ANNOTATION_PREFIX}{key}\" is not allowed on this node; its operator can \
            add {key:?} to \
         `security.allowed_annotations`"
    )]
    NotAllowed {
        /// The key.
        key: &'static str,
    },
    /// The value is out of range or of another type.
    #[error("annotation \"{ANNOTATION_PREFIX}{key}\": {bad}")]
    BadValue {
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        bad: BadValue,
    },
    /// The value does not go with another setting.
    #[error("annotation \"{ANNOTATION_PREFIX}{key}\": {message}")]
    Contradiction {
        /// The key.
        key: &'static str,
        /// Which two settings, with their values.
        message: String,
    },
}

impl Config {
    /// The configuration of a pod with these annotations.
    pub fn for_pod(
        &self,
        annotations: &BTreeMap<String, String>,
    ) -> Result<PodConfig, AnnotationError> {
        let allowed = &self.settings.security.allowed_annotations;
        let mut overrides = BTreeMap::new();
        for (name, text) in annotations {
            let Some(path) = name.strip_prefix(ANNOTATION_PREFIX) else {
                continue;
            };
            let key = keys::key(path).ok_or_else(|| unknown(name, path))?;
            if !key.pod_may_override {
                return Err(AnnotationError::NodeOnly { key: key.path });
            }
            if !allowed.iter().any(|name| name == key.path) {
                return Err(AnnotationError::NotAllowed { key: key.path });
            }
            let value = key
                .kind
                .parse_text(text)
                .map_err(|bad| AnnotationError::BadValue { key: key.path, bad })?;
            overrides.insert(key.path, value);
        }
        let settings = self.with_overrides(&overrides);
        if let Some((pair, message)) = contradiction_rules(&settings).next() {
            // The node's own settings do not contradict each other, so one of the pair is the
            // pod's.
            let key = pair
                .into_iter()
                .find(|key| overrides.contains_key(key))
                .unwrap_or(pair[0]);
            return Err(AnnotationError::Contradiction { key, message });
        }
        Ok(PodConfig {
            settings,
            flavour: self.flavour.clone(),
            overridden: overrides.into_keys().collect(),
        })
    }
}

fn unknown(name: &str, path: &str) -> AnnotationError {
    let names = KEYS
        .iter()
        .filter(|key| key.pod_may_override)
        .map(|key| key.path);
    AnnotationError::Unknown {
        name: quoted(name),
        nearest: nearest(path, names).unwrap_or_default(),
    }
}

#[cfg(test)]
#[path = "annotations_tests.rs"]
mod tests;
