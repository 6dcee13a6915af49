//! Writes an image set: OCI image layout (image-spec, image-layout.md) and archive.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::layer::{Programs, layers};
use super::table::{Content, IMAGES, Image};
use super::{ImageSet, NAMES_FILE, Name};
use crate::node::deps::hex;

/// Media types of the image specification.
pub(super) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A blob store in memory on its way to disk.
struct Blobs<'a> {
    folder: &'a Path,
    sizes: BTreeMap<String, usize>,
}

impl Blobs<'_> {
    /// Stores a blob and describes it.
    fn add(&mut self, media_type: &str, bytes: &[u8]) -> Result<Value> {
        let digest = hex(&Sha256::digest(bytes));
        let file = self.folder.join(&digest);
        std::fs::write(&file, bytes).with_context(|| format!("cannot write {}", file.display()))?;
        self.sizes.insert(digest.clone(), bytes.len());
        let digest = format!("sha256:{digest}");
        Ok(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}))
    }
}

/// Writes layout and archive of all images whose programs are there.
pub(super) fn write(set: &ImageSet, programs: &Programs) -> Result<()> {
    let layout = set.layout();
    let folder = layout.join("blobs/sha256");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let mut blobs = Blobs {
        folder: &folder,
        sizes: BTreeMap::new(),
    };
    let mut described: Vec<(Content, Vec<Value>)> = Vec::new();
    let mut names = Vec::new();
    let mut manifests = Vec::new();
    for image in IMAGES {
        let known = described
            .iter()
            .position(|(content, _)| *content == image.content);
        let index = if let Some(index) = known {
            index
        } else {
            let Some(layers) = layers(image.content, programs)? else {
                continue;
            };
            let all = layers.iter().map(|layer| blobs.add(LAYER, layer));
            described.push((image.content, all.collect::<Result<_>>()?));
            described.len() - 1
        };
        let manifest = add_image(&mut blobs, image, &described[index].1)?;
        let digest = manifest["digest"].as_str().unwrap_or_default().to_owned();
        names.extend(image.names.iter().map(|(repository, tag)| Name {
            repository: (*repository).to_owned(),
            tag: (*tag).to_owned(),
            digest: digest.clone(),
        }));
        if !image.archive.is_empty() {
            manifests.push(annotated(manifest, image.archive));
        }
    }
    let names = serde_json::to_vec_pretty(&names).context("cannot encode the names")?;
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
    let files = [
        (NAMES_FILE, names),
        ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ("index.json", index.to_string().into_bytes()),
    ];
    for (name, bytes) in files {
        let file = layout.join(name);
        std::fs::write(&file, bytes).with_context(|| format!("cannot write {}", file.display()))?;
    }
    write_archive(&layout, &set.archive())
}

fn add_image(blobs: &mut Blobs<'_>, image: &Image, layers: &[Value]) -> Result<Value> {
    let digests: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
    let variables = ["PATH=/bin:/usr/bin:/usr/sbin"]
        .iter()
        .chain(image.variables);
    let variables: Vec<&&str> = variables.collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "User": image.user,
            "Env": variables,
            "Entrypoint": image.entrypoint,
            "Cmd": image.command,
            "Labels": {"pericarp.dev/test-image": image.label},
        },
        "rootfs": {"type": "layers", "diff_ids": digests},
        "history": [],
    });
    let config = blobs.add(CONFIG, config.to_string().as_bytes())?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config,
        "layers": layers,
    });
    blobs.add(MANIFEST, manifest.to_string().as_bytes())
}

/// The annotations by which containerd names an image that it imports.
fn annotated(mut manifest: Value, name: &str) -> Value {
    let tag = name.rsplit(':').next().unwrap_or_default();
    manifest["annotations"] = json!({
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": tag,
    });
    manifest
}

fn write_archive(layout: &Path, archive: &Path) -> Result<()> {
    let file = File::create(archive)
        .with_context(|| format!("cannot write the archive {}", archive.display()))?;
    let mut tar = tar::Builder::new(file);
    tar.mode(tar::HeaderMode::Deterministic);
    for name in ["oci-layout", "index.json"] {
        tar.append_path_with_name(layout.join(name), name)
            .with_context(|| format!("cannot add {name} to {}", archive.display()))?;
    }
    tar.append_dir_all("blobs", layout.join("blobs"))
        .and_then(|()| tar.finish())
        .with_context(|| format!("cannot write the archive {}", archive.display()))
}
