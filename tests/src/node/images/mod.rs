//! The images of the node: made here from busybox and agnhost, as an OCI layout and as an archive,
//! and served by a registry inside the node that answers for every registry's name.

mod layer;
mod layout;
pub mod registry;
mod table;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::deps::{self, Group, cache_key, component};
use super::tools;

/// The image that the tests run where any will do.
pub const BUSYBOX: &str = "docker.io/library/busybox:test";

/// An image whose configuration has variables; it is in the registry only.
pub const VARIABLES: &str = "docker.io/library/variables:test";

/// An image with a set-user-ID program in a layer of its own; it is in the registry only.
pub const SET_USER_ID: &str = "docker.io/library/nonewprivs:test";

/// The sandbox image of both containerds.
pub const PAUSE: &str = "registry.k8s.io/pause:3.10.1";

/// Kubernetes' test program.
pub const AGNHOST: &str = "registry.k8s.io/e2e-test-images/agnhost:2.53";

/// File in an image set that says which names it answers to.
const NAMES_FILE: &str = "names.json";

/// Changes when the images are made differently, so that caches are not reused.
const RECIPE: &str = "2";

/// Which manifest a reference means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Name {
    /// Last part of the repository's name.
    pub repository: String,
    /// The tag; `*` for any.
    pub tag: String,
    /// Digest of the manifest, `sha256:...`.
    pub digest: String,
}

/// An image set on disk.
#[derive(Debug, Clone)]
pub struct ImageSet {
    folder: PathBuf,
}

impl ImageSet {
    /// The set in a folder.
    #[must_use]
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
        }
    }

    /// The OCI layout, with the names.
    #[must_use]
    pub fn layout(&self) -> PathBuf {
        self.folder.join("layout")
    }

    /// The archive that `ctr images import` takes: [`BUSYBOX`] and [`PAUSE`]. All else is pulled
    /// when it is asked for: checksums are slow in the node.
    #[must_use]
    pub fn archive(&self) -> PathBuf {
        self.folder.join("images.tar")
    }
}

/// The names of a layout.
pub fn names(layout: &Path) -> Result<Vec<Name>> {
    let file = layout.join(NAMES_FILE);
    let text = std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is damaged", file.display()))
}

/// Makes the sets that the given groups need.
pub fn ensure(groups: &[Group]) -> Result<()> {
    if groups.contains(&Group::Demo) {
        build(false)?;
    }
    if groups.contains(&Group::Kube) {
        build(true)?;
    }
    Ok(())
}

/// The largest set that can be made from what is built: with agnhost when that is there.
pub fn best() -> Result<ImageSet> {
    build(component("agnhost")?.folder()?.is_dir())
}

fn build(with_agnhost: bool) -> Result<ImageSet> {
    let busybox = tools::find("busybox").context("busybox is missing: install busybox-static")?;
    let busybox = read(&busybox)?;
    if !is_static(&busybox) {
        bail!("/bin/busybox is not static: install the package busybox-static");
    }
    let agnhost = if with_agnhost {
        Some(component("agnhost")?.built()?.join("agnhost"))
    } else {
        None
    };
    let inputs = format!(
        "{RECIPE} {} {agnhost:?} {:?}",
        cache_key(&busybox),
        table::IMAGES
    );
    let folder = super::paths::node_cache()?.join(format!("images-{}", cache_key(inputs)));
    deps::once(&folder, |partial| {
        let programs = layer::Programs {
            busybox,
            agnhost: agnhost.as_deref().map(read).transpose()?,
        };
        layout::write(&ImageSet::at(partial), &programs)
    })?;
    Ok(ImageSet::at(folder))
}

fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// Whether an ELF file asks for no program interpreter: its path would stand in the first page.
fn is_static(elf: &[u8]) -> bool {
    let start = &elf[..elf.len().min(4096)];
    !start.windows(8).any(|window| window == b"ld-linux")
}
