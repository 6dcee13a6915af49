//! Paths by which kubelet lays out the volumes of a pod.
//!
//! ```text
//! <root>/pods/<uid>/volumes/kubernetes.io~empty-dir/<volume>
//! <root>/pods/<uid>/volume-subpaths/<volume>/<container>/<index>   a bind mount of a subPath
//! ```

use std::{
    collections::HashMap,
    path::{Component, Path, PathBuf},
};

/// The plugin of `emptyDir` volumes as kubelet writes it in paths.
pub(crate) const EMPTY_DIR: &str = "kubernetes.io~empty-dir";

/// Where the pod's UID is among the annotations that containerd makes.
const UID: &str = "io.kubernetes.cri.sandbox-uid";

/// The UID of the pod, if Kubernetes made it.
pub(crate) fn pod_uid(annotations: &HashMap<String, String>) -> Option<String> {
    let uid = annotations.get(UID).filter(|uid| !uid.is_empty());
    uid.cloned()
}

/// The directory of the `emptyDir` volume that `path` belongs to by its name, if it is one of the
/// pod with this `uid`. Whether it lies in there is for the caller to find out.
pub(crate) fn empty_dir(path: &Path, uid: &str) -> Option<PathBuf> {
    let components: Vec<_> = path.components().collect();
    let name = |index: usize| match components.get(index) {
        Some(Component::Normal(name)) => Some(*name),
        _ => None,
    };
    let is = |index: usize, text: &str| name(index).is_some_and(|name| name == text);
    let pods = (0..components.len()).find(|index| is(*index, "pods") && is(index + 1, uid))?;
    let volume = if is(pods + 2, "volumes") && is(pods + 3, EMPTY_DIR) {
        name(pods + 4)?
    } else if is(pods + 2, "volume-subpaths") {
        name(pods + 3)?
    } else {
        return None;
    };
    let mut directory: PathBuf = components.iter().take(pods + 2).collect();
    directory.extend([Path::new("volumes"), EMPTY_DIR.as_ref(), volume.as_ref()]);
    Some(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_volume_of_a_path_is_named_by_kubelet() {
        let volume = Path::new("/k/pods/u/volumes/kubernetes.io~empty-dir/v");
        for path in [
            "/k/pods/u/volumes/kubernetes.io~empty-dir/v",
            "/k/pods/u/volumes/kubernetes.io~empty-dir/v/a/b",
            "/k/pods/u/volume-subpaths/v/c/0",
        ] {
            assert_eq!(empty_dir(Path::new(path), "u").as_deref(), Some(volume));
        }
        for path in [
            "/k/pods/u/volumes/kubernetes.io~empty-dir",
            "/k/pods/u/volumes/kubernetes.io~configmap/v",
            "/k/pods/u/etc-hosts",
            "/k/pods/other/volumes/kubernetes.io~empty-dir/v",
            "/k/pods/uu/volume-subpaths/v/c/0",
            "/k/u/volumes/kubernetes.io~empty-dir/v",
            "/",
        ] {
            assert_eq!(empty_dir(Path::new(path), "u"), None, "{path}");
        }
    }

    #[test]
    fn a_pod_without_a_uid_is_none_of_kubernetes() {
        let annotations = |uid: &str| HashMap::from([(UID.to_owned(), uid.to_owned())]);
        assert_eq!(pod_uid(&annotations("u")).as_deref(), Some("u"));
        assert_eq!(pod_uid(&annotations("")), None);
        assert_eq!(pod_uid(&HashMap::new()), None);
    }
}
