//! Paths in the guest that the shim and the agent agree on.

use std::path::{Path, PathBuf};

/// Where hugetlbfs volumes are mounted in the guest.
pub(crate) const HUGE_PAGES: &str = "/run/pericarp/huge";

/// Returns the guest's mount point of the hugetlbfs volume that is at `source` on the host.
pub(crate) fn huge_page_volume(source: &Path) -> PathBuf {
    let name = source.to_string_lossy().replace('/', "-");
    Path::new(HUGE_PAGES).join(name.trim_start_matches('-'))
}
