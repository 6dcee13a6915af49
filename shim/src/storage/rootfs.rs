//! How a container's root file system reaches its guest.
//!
//! | containerd's mounts | on the host | in the guest |
//! |---|---|---|
//! | an overlay | its layers are mounted in the shared directory | an overlay, a disk on top |
//! | a block device or the image of a file system | nothing | a disk, mounted |
//! | anything else | mounted in the shared directory | shared as it is |
//!
//! The disk above the layers is a sparse file in the snapshot's own upper directory: its blocks
//! count as the container's use of ephemeral storage, and it goes when the snapshot goes. What the
//! upper directory held before is the topmost layer. A root that is read-only gets no disk but a
//! little memory, for the mount points that its image lacks.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, chown},
    path::{Path, PathBuf},
};

use containerd_shim_protos::api::Mount;
use pericarp_protocol::{
    guest::{BlockDevice, Overlay, Scratch, Storage, storage::Source},
    machine::CacheMode,
};

use crate::{
    errors::CallError,
    guest::paths,
    host::id_map::IdMap,
    storage::disk::{Disk, DiskFile, Disks},
};

/// Name of the disk's file in a snapshot's upper directory.
pub(crate) const DISK_NAME: &str = ".pericarp-disk";
/// Where the guest mounts disks and assembled roots; the container's id follows.
const GUEST_DISK: &str = "/run/pericarp/disk-";
const GUEST_ROOT: &str = "/run/pericarp/root-";
/// Memory for mount points on a read-only root.
const MOUNT_POINTS_BYTES: u64 = 4 << 20;

/// What containerd's mounts describe.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Rootfs {
    /// Layers that never change, and a directory for what the container writes.
    Layers(Layers),
    /// A file system of its own on a block device or in a file.
    Image(Image),
    /// Anything else that the host can mount.
    Mounted(Vec<Mount>),
    /// A directory that is ready.
    Directory(PathBuf),
}

/// The parts of an overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layers {
    /// Topmost first.
    pub(crate) lower: Vec<PathBuf>,
    /// Where the snapshotter would have the container write.
    pub(crate) upper: Option<PathBuf>,
    /// The container writes nothing.
    pub(crate) read_only: bool,
    /// How the owners of the lower layers' files are shown; the upper directory has them so.
    pub(crate) id_map: Option<IdMap>,
    /// Marks of the layers are in `user.` attributes.
    pub(crate) user_attributes: bool,
}

/// A file system on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Image {
    /// Block device or file.
    pub(crate) path: PathBuf,
    /// Its type.
    pub(crate) fs_type: String,
    /// Mount options for the guest.
    pub(crate) options: Vec<String>,
    /// Nothing is written.
    pub(crate) read_only: bool,
}

/// Overlay options that concern the upper directory, or the kernel's own bookkeeping about it: they
/// mean nothing without one, and the guest's overlay is another.
const UPPER_OPTIONS: [&str; 9] = [
    "workdir",
    "index",
    "nfs_export",
    "volatile",
    "metacopy",
    "redirect_dir",
    "xino",
    "uuid",
    "ro",
];

impl Rootfs {
    /// Reads containerd's mounts. `ready` is the root's own path, for callers that mount it
    /// themselves; `read_only` is the specification's word about the root.
    pub(crate) fn of(
        mounts: &[Mount],
        ready: Option<PathBuf>,
        read_only: bool,
    ) -> Result<Self, CallError> {
        match mounts {
            [] => ready.map(Self::Directory).ok_or_else(|| {
                CallError::Invalid("rootfs: neither mounts nor root.path name one".to_owned())
            }),
            [mount] if mount.type_ == "overlay" => {
                let mut layers = Layers::of(mount)?;
                layers.read_only = read_only;
                Ok(Self::Layers(layers))
            }
            [mount] if is_image(mount) => Ok(Self::Image(Image::of(mount))),
            mounts => Ok(Self::Mounted(mounts.to_vec())),
        }
    }
}

impl Layers {
    fn of(mount: &Mount) -> Result<Self, CallError> {
        let mut layers = Self {
            lower: Vec::new(),
            upper: None,
            read_only: false,
            id_map: None,
            user_attributes: false,
        };
        let (mut uidmap, mut gidmap) = (None, None);
        for option in &mount.options {
            match option.split_once('=') {
                Some(("lowerdir", list)) => layers.lower = split_layers(list),
                Some(("lowerdir+", layer)) => layers.lower.push(layer.into()),
                Some(("uidmap", map)) => uidmap = Some(map),
                Some(("gidmap", map)) => gidmap = Some(map),
                Some(("upperdir", upper)) => layers.upper = Some(upper.into()),
                None if option == "userxattr" => layers.user_attributes = true,
                None if matches!(option.as_str(), "rw" | "relatime" | "noatime") => {}
                other => {
                    let name = other.map_or(option.as_str(), |(name, _)| name);
                    if !UPPER_OPTIONS.contains(&name) {
                        return Err(CallError::Invalid(format!(
                            "rootfs: the overlay option {option:?} has no meaning for a guest"
                        )));
                    }
                }
            }
        }
        if uidmap.is_some() || gidmap.is_some() {
            let map = IdMap::of_options(uidmap.unwrap_or(""), gidmap.unwrap_or(""));
            layers.id_map = Some(map.ok_or_else(|| {
                CallError::Invalid(format!(
                    "rootfs: the overlay options uidmap={uidmap:?} and gidmap={gidmap:?} do not \
                     map both kinds of ids"
                ))
            })?);
        }
        if layers.lower.is_empty() {
            return Err(CallError::Invalid(
                "rootfs: an overlay without lowerdir".to_owned(),
            ));
        }
        Ok(layers)
    }

    /// What is above the lower layers: the upper directory, when a container wrote to it on the
    /// host. `mask` is a directory that may be filled to hide our own file in it.
    pub(crate) fn above(&self, mask: &Path) -> io::Result<Vec<PathBuf>> {
        if let Some(upper) = &self.upper {
            let names = fs::read_dir(upper)?
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect::<io::Result<Vec<_>>>()?;
            if names.iter().any(|name| name != DISK_NAME) {
                hide_disk(mask, upper)?;
                return Ok(vec![mask.to_owned(), upper.clone()]);
            }
        }
        Ok(Vec::new())
    }
}

/// Overlay's mark of a file that is not there: a character device of number 0:0. The topmost
/// layer's directory is the root that the container sees, so it looks as `upper` does.
fn hide_disk(mask: &Path, upper: &Path) -> io::Result<()> {
    use nix::sys::stat::{Mode, SFlag, mknod};
    fs::create_dir_all(mask)?;
    let root = fs::metadata(upper)?;
    chown(mask, Some(root.uid()), Some(root.gid()))?;
    fs::set_permissions(mask, root.permissions())?;
    match mknod(&mask.join(DISK_NAME), SFlag::S_IFCHR, Mode::empty(), 0) {
        Ok(()) | Err(nix::Error::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// `a:b` with `\:` for a colon and `\\` for a backslash, as overlayfs reads it.
fn split_layers(list: &str) -> Vec<PathBuf> {
    let mut layers = vec![String::new()];
    let mut characters = list.chars();
    while let Some(character) = characters.next() {
        if character == ':' {
            layers.push(String::new());
            continue;
        }
        let literal = match character {
            '\\' => characters.next().unwrap_or('\\'),
            other => other,
        };
        if let Some(layer) = layers.last_mut() {
            layer.push(literal);
        }
    }
    layers.into_iter().map(PathBuf::from).collect()
}

/// A block device, or a file that would be mounted by a loop device.
fn is_image(mount: &Mount) -> bool {
    fs::metadata(&mount.source).is_ok_and(|metadata| {
        metadata.file_type().is_block_device() || (metadata.is_file() && mount.type_ != "bind")
    })
}

impl Image {
    fn of(mount: &Mount) -> Self {
        let mut image = Self {
            path: mount.source.clone().into(),
            fs_type: mount.type_.clone(),
            options: Vec::new(),
            read_only: mount.type_ == "erofs",
        };
        for option in &mount.options {
            match option.as_str() {
                "loop" | "rw" => {}
                "ro" => image.read_only = true,
                other => image.options.push(other.to_owned()),
            }
        }
        image
    }

    fn open(&self) -> io::Result<DiskFile> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(!self.read_only).open(&self.path)?;
        Ok(DiskFile {
            file,
            read_only: self.read_only,
        })
    }
}

/// Opens the disk of a snapshot, and makes it when there is none. A disk that is there keeps its
/// size: a file system is on it.
fn open_disk(upper: &Path, size_bytes: u64) -> io::Result<DiskFile> {
    let path = upper.join(DISK_NAME);
    // A container that ran on the host may have left anything by that name.
    match fs::symlink_metadata(&path) {
        Ok(metadata) if !metadata.is_file() => {
            return Err(io::Error::other("something else has its name"));
        }
        _ => {}
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits())
        .open(&path)?;
    if file.metadata()?.len() == 0 {
        file.set_len(size_bytes)?;
    }
    Ok(DiskFile {
        file,
        read_only: false,
    })
}

/// A root file system on its way to a container.
#[derive(Debug)]
pub(crate) struct Attached {
    /// What the agent mounts first.
    pub(crate) storages: Vec<Storage>,
    /// The root in the guest.
    pub(crate) path: PathBuf,
    /// The disk it is on.
    pub(crate) disk: Option<Disk>,
}

/// Brings the root of container `id` to the guest; its host mounts are made already. `cache` is of
/// a disk above layers.
pub(crate) async fn attach(
    disks: &Disks,
    id: &str,
    rootfs: &Rootfs,
    cache: CacheMode,
) -> Result<Attached, CallError> {
    let shared = paths::shared_path(id, "rootfs");
    let assembled = format!("{GUEST_ROOT}{id}");
    let failed = |path: &Path| {
        let object = format!("disk {}", path.display());
        move |error| CallError::host(object, error)
    };
    match rootfs {
        Rootfs::Directory(_) | Rootfs::Mounted(_) => Ok(Attached {
            storages: Vec::new(),
            path: shared,
            disk: None,
        }),
        Rootfs::Image(image) => {
            let file = image.open().map_err(failed(&image.path))?;
            let disk = disks.plug(file, CacheMode::WriteBack).await?;
            let mut storage = on_disk(&disk, &image.fs_type, false, assembled.clone());
            storage.options = image.options.clone();
            if image.read_only {
                storage.options.push("ro".to_owned());
            }
            Ok(Attached {
                storages: vec![storage],
                path: assembled.into(),
                disk: Some(disk),
            })
        }
        Rootfs::Layers(layers) => {
            let writable = format!("{GUEST_DISK}{id}");
            let (above, disk) = match &layers.upper {
                Some(upper) if !layers.read_only => {
                    let file = open_disk(upper, disks.scratch_bytes()).map_err(failed(upper))?;
                    let disk = disks.plug(file, cache).await?;
                    let mut storage = on_disk(&disk, "ext4", true, writable.clone());
                    // Blocks go back to the host when files are deleted. The file reads as zeroes
                    // already, so that nothing need be cleared.
                    storage.options = ["discard", "noinit_itable"].map(str::to_owned).into();
                    (storage, Some(disk))
                }
                _ => (mount_points(writable.clone()), None),
            };
            let overlay = Overlay {
                lower: vec![shared.display().to_string()],
                upper: format!("{writable}/upper"),
                work: format!("{writable}/work"),
                ..Default::default()
            };
            let root = Storage {
                mount_point: assembled.clone(),
                source: Some(Source::Overlay(overlay)),
                ..Default::default()
            };
            Ok(Attached {
                storages: vec![above, root],
                path: assembled.into(),
                disk,
            })
        }
    }
}

fn on_disk(disk: &Disk, fs_type: &str, format_if_blank: bool, mount_point: String) -> Storage {
    Storage {
        mount_point,
        source: Some(Source::BlockDevice(BlockDevice {
            pci_address: disk.address.clone(),
            fs_type: fs_type.to_owned(),
            format_if_blank,
            ..Default::default()
        })),
        ..Default::default()
    }
}

fn mount_points(mount_point: String) -> Storage {
    Storage {
        mount_point,
        source: Some(Source::Scratch(Scratch {
            size_bytes: MOUNT_POINTS_BYTES,
            mode: 0o755,
            ..Default::default()
        })),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn mount(type_: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            type_: type_.to_owned(),
            source: source.to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Default::default()
        }
    }

    fn layers(options: &[&str], read_only: bool) -> Result<Layers, CallError> {
        match Rootfs::of(&[mount("overlay", "overlay", options)], None, read_only)? {
            Rootfs::Layers(layers) => Ok(layers),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn overlays_are_taken_apart() {
        let options = [
            "index=off",
            "workdir=/s/3/work",
            "upperdir=/s/3/fs",
            r"lowerdir=/s/2/fs:/s/a\:b\\c/fs",
        ];
        let found = layers(&options, false).unwrap();
        assert_eq!(found.lower, [r"/s/2/fs", r"/s/a:b\c/fs"].map(PathBuf::from));
        assert_eq!(found.upper, Some("/s/3/fs".into()));
        assert!(!found.user_attributes);
        assert_eq!(found.id_map, None);
        let mapped = ["lowerdir=/a", "uidmap=0:65536:9", "gidmap=0:65536:9"];
        let map = layers(&mapped, false).unwrap().id_map;
        assert_eq!(map, IdMap::of_options("0:65536:9", "0:65536:9"));
        let found = layers(&["lowerdir=/a:/b", "userxattr", "ro"], false).unwrap();
        assert!(found.upper.is_none() && found.user_attributes);
        assert!(layers(&options, true).unwrap().read_only);
    }

    #[test]
    fn what_cannot_be_kept_is_refused_by_name() {
        for (options, name) in [
            (vec!["lowerdir=/a", "uidmap=0:65536:65536"], "gidmap"),
            (vec!["lowerdir=/a", "verity=require"], "verity"),
            (vec!["upperdir=/a"], "lowerdir"),
        ] {
            let error = layers(&options, false).unwrap_err().to_string();
            assert!(
                error.contains("rootfs: ") && error.contains(name),
                "{error}"
            );
        }
        let error = Rootfs::of(&[], None, false).unwrap_err().to_string();
        assert!(error.contains("rootfs"), "{error}");
    }

    #[test]
    fn images_are_told_from_directories() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("image");
        fs::write(&file, "").unwrap();
        let file = file.to_str().unwrap();
        let of = |mount| Rootfs::of(&[mount], None, false).unwrap();
        let Rootfs::Image(image) = of(mount("ext4", file, &["loop", "rw", "errors=remount-ro"]))
        else {
            panic!("no image");
        };
        assert_eq!(image.options, ["errors=remount-ro"]);
        assert!(!image.read_only);
        let Rootfs::Image(image) = of(mount("erofs", file, &["loop"])) else {
            panic!("no image");
        };
        assert!(image.read_only);
        let bind = mount("bind", dir.path().to_str().unwrap(), &["rbind", "rw"]);
        assert_eq!(of(bind.clone()), Rootfs::Mounted(vec![bind]));
        let ready = Rootfs::of(&[], Some("/r".into()), false).unwrap();
        assert_eq!(ready, Rootfs::Directory("/r".into()));
    }

    #[test]
    fn the_upper_directory_is_a_layer_once_it_holds_something() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, mask) = (dir.path().join("fs"), dir.path().join("mask"));
        fs::create_dir(&upper).unwrap();
        let layers = Layers {
            lower: vec!["/l".into()],
            upper: Some(upper.clone()),
            read_only: false,
            id_map: None,
            user_attributes: false,
        };
        assert!(layers.above(&mask).unwrap().is_empty());
        let disk = open_disk(&upper, 1 << 30).unwrap();
        assert_eq!(disk.file.metadata().unwrap().len(), 1 << 30);
        assert!(layers.above(&mask).unwrap().is_empty());
        assert!(!mask.exists());
        fs::write(upper.join("old"), "").unwrap();
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: only root can make the mark of a deleted file");
            return;
        }
        fs::set_permissions(&upper, fs::Permissions::from_mode(0o1777)).unwrap();
        let above = layers.above(&mask).unwrap();
        assert_eq!(above, [mask.clone(), upper.clone()]);
        assert_eq!(mask.metadata().unwrap().mode() & 0o7777, 0o1777);
        assert!(mask.join(DISK_NAME).symlink_metadata().is_ok());
        // Twice, and with another size: the disk keeps its own.
        assert_eq!(layers.above(&mask).unwrap().len(), 2);
        let disk = open_disk(&upper, 2 << 30).unwrap();
        assert_eq!(disk.file.metadata().unwrap().len(), 1 << 30);
    }

    #[test]
    fn a_strangers_file_is_no_disk() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join(DISK_NAME)).unwrap();
        assert!(open_disk(dir.path(), 1 << 30).is_err());
    }
}
