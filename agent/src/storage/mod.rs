//! Storages: what is mounted in the guest before a container's own mounts are made.
//!
//! ```text
//! shared directory  virtio-fs
//! block device      a file system, or a device node when raw
//! overlay, bind     of directories beneath /run/pericarp, or of what a container made in one
//! scratch           tmpfs or hugetlbfs
//! ```
//!
//! Every path of a request lies beneath `/run/pericarp` and is resolved there without following a
//! symbolic link: a container can write to some of the directories beneath.

use std::{
    ffi::CString,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, umount2},
    sys::stat::{Mode, SFlag, fstat, makedev, mkdirat, mknod},
    unistd::{UnlinkatFlags, unlinkat},
};
use oci_spec::runtime::LinuxDevice;
use pericarp_protocol::guest::{
    BindSource, BlockDevice, Overlay, Scratch, SharedDirectory, Storage, storage::Source,
};
use pericarp_sys::fscontext::{DetachedMount, FsContext, c_string};

use crate::{
    ground::{
        beneath::{self, Make},
        log,
        paths::RUN,
    },
    machine::devices::{self, DeviceError},
};

mod ext4;
mod format;
mod ownership;
mod within;

/// Where the host's directory is mounted (`GUEST_SHARED` of the shim).
const SHARED: &str = "/run/pericarp/shared";

/// Lower directories of one overlay: the kernel's own bound (`OVL_MAX_STACK`).
const OVERLAY_LAYERS_MAX: usize = 500;

/// Mount options of one storage.
const OPTIONS_MAX: usize = 64;

/// Why a storage cannot be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    /// The request is invalid.
    #[error("{field}: {reason}")]
    Invalid {
        /// Of the storage.
        field: &'static str,
        /// The reason.
        reason: String,
    },
    /// The device is not available.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The kernel refused.
    #[error("cannot {action} \
        {object}{}", .complaint.as_deref().map(|text| format!(" ({text})")).unwrap_or_default())]
    Kernel {
        /// The action that failed.
        action: &'static str,
        /// On what.
        object: String,
        /// The kernel's own words, where it had some.
        complaint: Option<String>,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A blank disk cannot be formatted.
    #[error("cannot format {device} as {fs_type}: {reason}")]
    Format {
        /// The disk.
        device: String,
        /// As what.
        fs_type: String,
        /// The reason.
        reason: String,
    },
}

impl StorageError {
    fn kernel(action: &'static str, object: impl ToString) -> impl FnOnce(io::Error) -> Self {
        let object = object.to_string();
        move |source| Self::Kernel {
            action,
            object,
            complaint: None,
            source,
        }
    }
}

/// A storage that is there, and how it is taken away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attached {
    /// Where.
    pub(crate) mount_point: PathBuf,
    /// Whether it is a mount; else it is a device node.
    mounted: bool,
    /// Whether it is on a disk of its own, so that its use of space is worth reporting.
    pub(crate) on_disk: bool,
}

/// Mounts storages in order; what was mounted before a failure is unmounted.
pub(crate) fn attach_all(storages: &[Storage]) -> Result<Vec<Attached>, StorageError> {
    let mut attached = Vec::with_capacity(storages.len());
    for storage in storages {
        match attach(storage) {
            Ok(one) => attached.push(one),
            Err(error) => {
                detach_all(&attached);
                return Err(error);
            }
        }
    }
    Ok(attached)
}

/// Unmounts storages in reverse order. What cannot be unmounted is logged: its owner is gone
/// already.
pub(crate) fn detach_all(attached: &[Attached]) {
    for one in attached.iter().rev() {
        if let Err(error) = detach(one) {
            log::warn(format_args!("{}", log::chain(&error)));
        }
    }
}

/// The nodes that containers have of raw disks.
pub(crate) fn nodes(storages: &[Storage]) -> Result<Vec<LinuxDevice>, StorageError> {
    let mut nodes = Vec::new();
    for storage in storages {
        let Some(Source::BlockDevice(device)) = &storage.source else {
            continue;
        };
        if !device.raw || device.device_path.is_empty() {
            continue;
        }
        let address = devices::address("pci_address", &device.pci_address)?;
        let node = devices::block_device(&address, device.partition)?;
        nodes.push(node.at(&device.device_path));
    }
    Ok(nodes)
}

/// Mounts one storage.
pub(crate) fn attach(storage: &Storage) -> Result<Attached, StorageError> {
    let mount_point = PathBuf::from(&storage.mount_point);
    let target = Target::new("mount_point", &mount_point)?;
    let options = MountOptions::parse(&storage.options)?;
    let source = storage
        .source
        .as_ref()
        .ok_or_else(|| StorageError::Invalid {
            field: "source",
            reason: "none is given".to_owned(),
        })?;
    let mut attached = Attached {
        mount_point: mount_point.clone(),
        mounted: true,
        on_disk: false,
    };
    match source {
        Source::SharedDirectory(shared) => mount_shared(shared, &options, &target)?,
        Source::BlockDevice(device) => {
            attached.on_disk = !device.raw;
            attached.mounted = !device.raw;
            attach_disk(device, &options, &target)?;
        }
        Source::Overlay(overlay) => mount_overlay(overlay, &options, &target)?,
        Source::Scratch(scratch) => mount_scratch(scratch, &options, &target)?,
        Source::Bind(bind) => bind_path(bind, &options, &target)?,
        _ => {
            return Err(StorageError::Invalid {
                field: "source",
                reason: "this agent does not know its kind".to_owned(),
            });
        }
    }
    if let Some(group) = storage.fs_group.as_ref()
        && attached.mounted
        && !options.read_only()
        && let Err(source) = ownership::apply(&mount_point, group)
    {
        let error = StorageError::kernel("set the group of", mount_point.display())(source);
        detach_all(std::slice::from_ref(&attached));
        return Err(error);
    }
    Ok(attached)
}

/// Unmounts one storage and removes its mount point.
pub(crate) fn detach(attached: &Attached) -> Result<(), StorageError> {
    let path = &attached.mount_point;
    let failed = |action| StorageError::kernel(action, path.display());
    if !attached.mounted {
        return std::fs::remove_file(path).map_err(failed("remove"));
    }
    match umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => {}
        // Something in the guest still uses it: it goes when that ends.
        Err(nix::Error::EBUSY) => umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|error| failed("unmount")(error.into()))?,
        Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
        Err(error) => return Err(failed("unmount")(error.into())),
    }
    let removed = match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir(path),
        Ok(_) => std::fs::remove_file(path),
        Err(_) => Ok(()),
    };
    // On a directory that the host shares read-only the mount point stays.
    if let Err(error) = removed
        && error.kind() != io::ErrorKind::ReadOnlyFilesystem
    {
        log::warn(format_args!(
            "cannot remove mount point {}: {error}",
            path.display()
        ));
    }
    Ok(())
}

/// Whether `mount_point` lies in the directory that the host shares, where no storage is attached.
pub(crate) fn is_shared(mount_point: &str) -> bool {
    let beneath = Path::new(mount_point).strip_prefix(SHARED);
    beneath.is_ok_and(|rest| !rest.as_os_str().is_empty())
}

/// Forgets what the host has removed from the shared directory: the kernel would keep it mounted
/// and its files known, and so the host's file system busy, until the guest needs memory.
pub(crate) fn forget_shared(path: &str) -> Result<(), StorageError> {
    let path = Path::new(path);
    let target = Target::new("mount_point", path)?;
    let Some((name, parents)) = target.names.split_last() else {
        return Ok(());
    };
    let parent = match beneath::open_names(Path::new(RUN), parents, None) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened.map_err(StorageError::kernel("open", path.display()))?,
    };
    // A name that shall be made is looked up on the host again, whatever the kernel remembers of
    // it. To be made it need not be: the host shares the directory read-only.
    match mkdirat(&parent, *name, Mode::S_IRWXU) {
        Ok(()) => unlinkat(&parent, *name, UnlinkatFlags::RemoveDir)
            .map_err(|error| StorageError::kernel("remove", path.display())(error.into())),
        Err(nix::Error::EROFS | nix::Error::EEXIST) => Ok(()),
        Err(error) => Err(StorageError::kernel("look up", path.display())(
            error.into(),
        )),
    }
}

/// A path of a request that was found to lie beneath `/run/pericarp`.
#[derive(Debug)]
struct Target<'a> {
    field: &'static str,
    path: &'a Path,
    names: Vec<&'a str>,
}

impl<'a> Target<'a> {
    fn new(field: &'static str, path: &'a Path) -> Result<Self, StorageError> {
        let names =
            beneath::components(Path::new(RUN), path).ok_or_else(|| StorageError::Invalid {
                field,
                reason: format!("{} does not lie beneath {RUN}", path.display()),
            })?;
        Ok(Self { field, path, names })
    }

    fn open(&self, missing: Option<Make>) -> Result<std::os::fd::OwnedFd, StorageError> {
        beneath::open_names(Path::new(RUN), &self.names, missing).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::ELOOP | libc::ENOENT) => StorageError::Invalid {
                    field: self.field,
                    reason: format!("{}: {source}", self.path.display()),
                },
                _ => StorageError::kernel("open", self.path.display())(source),
            }
        })
    }

    fn attach(&self, mount: DetachedMount) -> Result<(), StorageError> {
        let target = self.open(Some(Make::Directory))?;
        mount
            .attach(target.as_fd())
            .map_err(StorageError::kernel("mount on", self.path.display()))
    }
}

/// Mount options, sorted into attributes of the mount and parameters of the file system.
#[derive(Debug, Default, PartialEq, Eq)]
struct MountOptions {
    attributes: u64,
    parameters: Vec<(String, Option<String>)>,
}

impl MountOptions {
    fn parse(words: &[String]) -> Result<Self, StorageError> {
        if words.len() > OPTIONS_MAX {
            return Err(StorageError::Invalid {
                field: "options",
                reason: format!("there are more than {OPTIONS_MAX}"),
            });
        }
        let mut options = Self::default();
        for word in words.iter().flat_map(|word| word.split(',')) {
            match word {
                // Defaults, and options for an init system.
                "" | "defaults" | "rw" | "relatime" | "suid" | "dev" | "exec" | "bind"
                | "rbind" | "_netdev" | "nofail" | "noauto" => {}
                "ro" => {
                    options.attributes |= libc::MOUNT_ATTR_RDONLY;
                    options.parameters.push((word.to_owned(), None));
                }
                "nosuid" => options.attributes |= libc::MOUNT_ATTR_NOSUID,
                "nodev" => options.attributes |= libc::MOUNT_ATTR_NODEV,
                "noexec" => options.attributes |= libc::MOUNT_ATTR_NOEXEC,
                "noatime" => options.attributes |= libc::MOUNT_ATTR_NOATIME,
                "nodiratime" => options.attributes |= libc::MOUNT_ATTR_NODIRATIME,
                "strictatime" => options.attributes |= libc::MOUNT_ATTR_STRICTATIME,
                _ => {
                    let (key, value) = match word.split_once('=') {
                        Some((key, value)) => (key, Some(value.to_owned())),
                        None => (word, None),
                    };
                    options.parameters.push((key.to_owned(), value));
                }
            }
        }
        Ok(options)
    }

    fn read_only(&self) -> bool {
        self.attributes & libc::MOUNT_ATTR_RDONLY != 0
    }
}

/// A file system being configured, with errors that carry what the kernel says about it.
struct Maker {
    context: FsContext,
    object: String,
}

impl Maker {
    fn new(fs_type: &str, object: impl ToString) -> Result<Self, StorageError> {
        let object = object.to_string();
        let name = c_string(fs_type).map_err(StorageError::kernel("name", fs_type))?;
        match FsContext::open(&name) {
            Ok(context) => Ok(Self { context, object }),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                Err(StorageError::Invalid {
                    field: "fs_type",
                    reason: format!("the guest's kernel has no file system {fs_type:?}"),
                })
            }
            Err(error) => Err(StorageError::kernel("prepare", object)(error)),
        }
    }

    fn set(&self, key: &str, value: Option<&str>) -> Result<(), StorageError> {
        let strings = || -> io::Result<(CString, Option<CString>)> {
            Ok((c_string(key)?, value.map(c_string).transpose()?))
        };
        strings()
            .and_then(|(key, value)| match value {
                Some(value) => self.context.set_string(&key, &value),
                None => self.context.set_flag(&key),
            })
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EINVAL) => StorageError::Invalid {
                    field: "options",
                    reason: self.context.complaint().unwrap_or_else(|| {
                        format!(
                            "{} does not take {key}={}",
                            self.object,
                            value.unwrap_or_default()
                        )
                    }),
                },
                _ => self.failed("configure", source),
            })
    }

    fn set_all(&self, options: &MountOptions) -> Result<(), StorageError> {
        options
            .parameters
            .iter()
            .try_for_each(|(key, value)| self.set(key, value.as_deref()))
    }

    fn mount(&self, options: &MountOptions, target: &Target<'_>) -> Result<(), StorageError> {
        let mount = self
            .context
            .mount(options.attributes)
            .map_err(|source| self.failed("mount", source))?;
        target.attach(mount)
    }

    fn failed(&self, action: &'static str, source: io::Error) -> StorageError {
        let complaint = self.context.complaint();
        StorageError::Kernel {
            action,
            object: self.object.clone(),
            complaint,
            source,
        }
    }
}

fn mount_shared(
    shared: &SharedDirectory,
    options: &MountOptions,
    target: &Target<'_>,
) -> Result<(), StorageError> {
    let maker = Maker::new("virtiofs", format!("shared directory {:?}", shared.tag))?;
    maker.set("source", Some(&shared.tag))?;
    maker.set_all(options)?;
    maker.mount(options, target)
}

fn attach_disk(
    device: &BlockDevice,
    options: &MountOptions,
    target: &Target<'_>,
) -> Result<(), StorageError> {
    let address = devices::address("pci_address", &device.pci_address)?;
    let node = devices::block_device(&address, device.partition)?;
    if device.raw {
        // Its parents are made and checked; the node itself must be new.
        let parent = target.path.parent().unwrap_or(Path::new(RUN));
        if parent != Path::new(RUN) {
            Target::new(target.field, parent)?.open(Some(Make::Directory))?;
        }
        let mode = Mode::from_bits_truncate(0o660);
        return mknod(
            target.path,
            SFlag::S_IFBLK,
            mode,
            makedev(node.major, node.minor),
        )
        .map_err(|error| {
            StorageError::kernel("make device node", target.path.display())(error.into())
        });
    }
    if device.format_if_blank {
        format::format_if_blank(&node.path, &device.fs_type)?;
    }
    let source = node.path.display().to_string();
    let maker = Maker::new(&device.fs_type, format!("disk {address} ({source})"))?;
    maker.set("source", Some(&source))?;
    maker.set_all(options)?;
    maker.mount(options, target)
}

fn mount_overlay(
    overlay: &Overlay,
    options: &MountOptions,
    target: &Target<'_>,
) -> Result<(), StorageError> {
    if overlay.lower.is_empty() || overlay.lower.len() > OVERLAY_LAYERS_MAX {
        return Err(StorageError::Invalid {
            field: "overlay.lower",
            reason: format!(
                "{} directories; 1 to {OVERLAY_LAYERS_MAX} are possible",
                overlay.lower.len()
            ),
        });
    }
    let maker = Maker::new("overlay", format!("overlay at {}", target.path.display()))?;
    maker.set("source", Some("overlay"))?;
    for lower in &overlay.lower {
        Target::new("overlay.lower", Path::new(lower))?.open(None)?;
        // Linux 6.8: one directory a call, so that their number is not bounded by the length of one
        // option. The last "." has a mount of the host that is announced there made by the guest's
        // virtio-fs (`FUSE_ATTR_SUBMOUNT`): overlay's own look-up would stop before it.
        maker.set("lowerdir+", Some(&format!("{lower}/.")))?;
    }
    if !overlay.upper.is_empty() {
        for (field, key, path) in [
            ("overlay.upper", "upperdir", &overlay.upper),
            ("overlay.work", "workdir", &overlay.work),
        ] {
            let is_new = field == "overlay.upper" && !Path::new(path).exists();
            Target::new(field, Path::new(path))?.open(Some(Make::Directory))?;
            if is_new && let Some(lower) = overlay.lower.first() {
                look_like(Path::new(path), Path::new(lower))
                    .map_err(StorageError::kernel("set the owner of", path))?;
            }
            maker.set(key, Some(path))?;
        }
    }
    maker.set_all(options)?;
    maker.mount(options, target)
}

/// The topmost directory is the root that the container sees: its owner and mode are the image's.
fn look_like(upper: &Path, lower: &Path) -> io::Result<()> {
    let root = std::fs::metadata(lower.join("."))?;
    std::os::unix::fs::chown(upper, Some(root.uid()), Some(root.gid()))?;
    std::fs::set_permissions(upper, root.permissions())
}

fn mount_scratch(
    scratch: &Scratch,
    options: &MountOptions,
    target: &Target<'_>,
) -> Result<(), StorageError> {
    let huge = scratch.huge_page_size_bytes != 0;
    let fs_type = if huge { "hugetlbfs" } else { "tmpfs" };
    let maker = Maker::new(fs_type, format!("{fs_type} at {}", target.path.display()))?;
    maker.set("source", Some(fs_type))?;
    if huge {
        maker.set("pagesize", Some(&scratch.huge_page_size_bytes.to_string()))?;
    }
    if scratch.size_bytes != 0 {
        maker.set("size", Some(&scratch.size_bytes.to_string()))?;
    }
    let mode = if scratch.mode == 0 {
        0o1777
    } else {
        scratch.mode
    };
    maker.set("mode", Some(&format!("{mode:o}")))?;
    maker.set_all(options)?;
    maker.mount(options, target)
}

fn bind_path(
    bind: &BindSource,
    options: &MountOptions,
    target: &Target<'_>,
) -> Result<(), StorageError> {
    let source_path = Path::new(&bind.path);
    let mut source = Target::new("bind.path", source_path)?.open(None)?;
    if !bind.beneath.is_empty() {
        let names = bind.beneath.iter().map(|one| one.name.as_str());
        let place = source_path.join(names.collect::<PathBuf>());
        source = within::open(source.as_fd(), &bind.beneath)
            .map_err(StorageError::kernel("find or make", place.display()))?;
    }
    let failed = |action| StorageError::kernel(action, source_path.display());
    let mount = DetachedMount::clone_of(source.as_fd(), true).map_err(failed("bind"))?;
    if options.attributes != 0 {
        mount
            .set_attributes(options.attributes, 0, true)
            .map_err(failed("set attributes of"))?;
    }
    let is_directory = fstat(&source)
        .map(|stat| {
            SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFDIR
        })
        .map_err(|error| failed("examine")(error.into()))?;
    let missing = if is_directory {
        Some(Make::Directory)
    } else {
        Some(Make::File)
    };
    let target_fd = target.open(missing)?;
    mount
        .attach(target_fd.as_fd())
        .map_err(StorageError::kernel("mount on", target.path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_sorted() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let options = MountOptions::parse(&words("ro nosuid,nodev size=64m dax defaults")).unwrap();
        assert!(options.read_only());
        assert_eq!(
            options.attributes,
            libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV
        );
        assert_eq!(
            options.parameters,
            vec![
                ("ro".to_owned(), None),
                ("size".to_owned(), Some("64m".to_owned())),
                ("dax".to_owned(), None),
            ]
        );
        assert!(MountOptions::parse(&vec!["a".to_owned(); OPTIONS_MAX + 1]).is_err());
    }

    #[test]
    fn only_what_lies_in_the_shared_directory_is_shared() {
        assert!(is_shared("/run/pericarp/shared/.volumes/1"));
        for path in [
            SHARED,
            "/run/pericarp/shared2/x",
            "/run/pericarp/memory/0",
            "",
        ] {
            assert!(!is_shared(path), "{path}");
        }
        assert!(forget_shared("/run/pericarp/shared/../../x").is_err());
        assert!(forget_shared("/run/pericarp/shared/never/shared").is_ok());
    }

    #[test]
    fn paths_elsewhere_are_refused_by_their_field() {
        let storage = Storage {
            mount_point: "/etc".to_owned(),
            ..Default::default()
        };
        let error = attach(&storage).unwrap_err().to_string();
        assert!(error.starts_with("mount_point: "), "{error}");
    }
}
