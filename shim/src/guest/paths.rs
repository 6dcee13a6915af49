//! Paths in the guest that the shim and the agent agree on.

use std::path::{Path, PathBuf};

/// Where hugetlbfs volumes are mounted in the guest.
pub(crate) const HUGE_PAGES: &str = "/run/pericarp/huge";

/// Returns the guest's mount point of the hugetlbfs volume that is at `source` on the host.
pub(crate) fn huge_page_volume(source: &Path) -> PathBuf {
    let name = source.to_string_lossy().replace('/', "-");
    Path::new(HUGE_PAGES).join(name.trim_start_matches('-'))
}

/// Where the shared directory is mounted in the guest.
pub(crate) const SHARED: &str = "/run/pericarp/shared";

/// Where the pod's shared memory is in the guest.
pub(crate) const SHARED_MEMORY: &str = "/dev/shm";

/// The path in the guest of a node of container `id`.
pub(crate) fn volume_node(id: &str, number: usize) -> String {
    format!("/run/pericarp/volumes/{id}/{number}")
}

/// The path in the guest of what is container `id`'s alone in the shared directory.
pub(crate) fn shared_path(id: &str, name: &str) -> PathBuf {
    Path::new(SHARED).join(id).join(name)
}
