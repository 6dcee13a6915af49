//! The pod's shared directory and the daemon that serves it to the guest (virtio-fs).
//!
//! ```text
//! <state>/shared                    a read-only mount of its own with shared propagation
//! <state>/shared/<container>/rootfs the container's root file system, or its read-only layers
//! <state>/shared/.volumes/<n>       a volume, file or directory: see [`super::volumes`]
//! <state>/mount-points              the directory that is mounted at <state>/shared
//! ```
//!
//! The guest could write to the shared directory itself, and place a link where the next mount
//! point is to be made. So it is read-only, and mount points are made where the guest is not.
//!
//! virtiofsd runs in a mount namespace that is a slave of ours, so what is mounted here later
//! appears there. It sees this directory and nothing else. It ends when the VMM closes the
//! vhost-user connection.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            fs::DirBuilderExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use containerd_shim_protos::api::Mount;
use nix::{
    fcntl::{OFlag, open},
    mount::{MsFlags, mount},
    sys::stat::Mode,
};
use pericarp_protocol::guest::Storage;
use pericarp_runtime_config::Settings;
use pericarp_sys::mount_tree;
use tracing::debug;

use crate::{
    errors::CallError,
    guest::{
        agent_client::{Agent, agent_call},
        paths,
        spec::Share,
    },
    host::{
        child::Watched,
        journal::{Entry, Journal, unmount},
    },
    storage::{
        kubelet,
        rootfs::{Layers, Rootfs},
        volumes::Volumes,
    },
};

/// The shared directory of a pod.
#[derive(Debug, Clone)]
pub(crate) struct SharedDirectory {
    path: PathBuf,
    mount_points: PathBuf,
    volumes: Arc<Volumes>,
}

impl SharedDirectory {
    /// Makes it beneath the sandbox's state directory, for a pod with these annotations.
    pub(crate) fn make(
        state: &Path,
        annotations: &HashMap<String, String>,
        journal: &mut Journal,
    ) -> io::Result<Self> {
        // As mountinfo has it.
        let state = state.canonicalize()?;
        let [path, mount_points] = ["shared", "mount-points"].map(|name| state.join(name));
        journal.note(&Entry::Mount { path: path.clone() })?;
        for directory in [&path, &mount_points] {
            DirBuilder::new().mode(0o700).create(directory)?;
        }
        bind(&mount_points, &path, false)?;
        let mount = open_directory(&path)?;
        mount_tree::set_attributes(mount.as_fd(), libc::MOUNT_ATTR_RDONLY, 0, false)?;
        mount_tree::set_propagation(mount.as_fd(), libc::MS_PRIVATE, false)?;
        mount_tree::set_propagation(mount.as_fd(), libc::MS_SHARED, false)?;
        let volumes = Volumes::new(&mount_points, &path, kubelet::pod_uid(annotations));
        Ok(Self {
            path,
            mount_points,
            volumes: Arc::new(volumes),
        })
    }

    /// The directory that is there already.
    #[cfg(test)]
    pub(crate) fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            mount_points: path.to_owned(),
            volumes: Arc::new(Volumes::new(path, path, None)),
        }
    }

    /// Makes a directory of container `id`, to mount something on.
    fn make_mount_point(&self, id: &str, name: &str) -> io::Result<PathBuf> {
        let beneath = Path::new(id).join(name);
        fs::create_dir_all(self.mount_points.join(&beneath))?;
        Ok(self.path.join(beneath))
    }

    /// Mounts the host's part of a container's root file system: see [`super::rootfs`].
    pub(crate) fn mount_rootfs(&self, id: &str, rootfs: &Rootfs) -> Result<(), CallError> {
        if matches!(rootfs, Rootfs::Image(_)) {
            return Ok(());
        }
        let target = self
            .make_mount_point(id, "rootfs")
            .map_err(|error| CallError::host(format!("mount point of container {id}"), error))?;
        let mounted = match rootfs {
            Rootfs::Image(_) => Ok(()),
            Rootfs::Directory(ready) => bind(ready, &target, true),
            Rootfs::Layers(layers) => self.mount_layers(layers, id, &target),
            Rootfs::Mounted(mounts) => mounts
                .iter()
                .try_for_each(|described| mount_described(described, &target)),
        };
        mounted
            .map_err(|error| CallError::host(format!("root file system of container {id}"), error))
    }

    /// Mounts layers, read-only.
    fn mount_layers(&self, layers: &Layers, id: &str, target: &Path) -> io::Result<()> {
        let mut all = layers.above(&self.path.with_file_name("mask"))?;
        if let (true, [layer]) = (all.is_empty(), layers.lower.as_slice()) {
            match &layers.id_map {
                Some(map) => map.mapper()?.bind(layer, target)?,
                None => bind(layer, target, false)?,
            }
            return make_read_only(target);
        }
        let mapped = self.mapped(layers, id)?;
        all.extend_from_slice(if mapped.is_empty() {
            &layers.lower
        } else {
            &mapped
        });
        self.overlay(&all, layers.user_attributes, target)?;
        // The overlay has mounts of its own of them.
        mapped.iter().try_for_each(|path| {
            unmount(path)?;
            fs::remove_dir(
                self.mount_points
                    .join(path.strip_prefix(&self.path).unwrap_or(path)),
            )
        })
    }

    /// The lower layers with mapped owners, mounted: overlayfs takes no mount that is attached
    /// nowhere. In the shared directory, whose end is the end of every mount in it.
    fn mapped(&self, layers: &Layers, id: &str) -> io::Result<Vec<PathBuf>> {
        let Some(map) = &layers.id_map else {
            return Ok(Vec::new());
        };
        let mapper = map.mapper()?;
        let numbered = layers.lower.iter().enumerate();
        let mount = |(number, layer): (usize, &PathBuf)| {
            let path = self.make_mount_point(id, &format!("layer-{number}"))?;
            mapper.bind(layer, &path)?;
            make_read_only(&path)?;
            Ok(path)
        };
        numbered.map(mount).collect()
    }

    fn overlay(&self, all: &[PathBuf], user_attributes: bool, target: &Path) -> io::Result<()> {
        // By descriptor: paths of many layers would not fit the one page that mount(2) takes, nor
        // could they hold a colon.
        let opened = all
            .iter()
            .map(|layer| open_directory(layer))
            .collect::<io::Result<Vec<_>>>()?;
        let paths: Vec<_> = opened
            .iter()
            .map(|layer| format!("/proc/self/fd/{}", layer.as_raw_fd()))
            .collect();
        let attributes = if user_attributes { ",userxattr" } else { "" };
        let data = format!("lowerdir={}{attributes}", paths.join(":"));
        Ok(mount(
            Some("overlay"),
            target,
            Some("overlay"),
            MsFlags::MS_RDONLY,
            Some(data.as_str()),
        )?)
    }

    /// Shares files and directories with a container. The answer is where the guest has them.
    pub(crate) fn add(&self, id: &str, shares: &[Share]) -> Result<Vec<PathBuf>, CallError> {
        self.volumes.add(id, shares)
    }

    /// Takes everything of a container away. Absent is fine. The answer is where the guest had what
    /// is gone now.
    pub(crate) fn remove(&self, id: &str) -> io::Result<Vec<PathBuf>> {
        let mut gone = self.volumes.remove(id)?;
        let mount_points = self.mount_points.join(id);
        let entries = match fs::read_dir(&mount_points) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(gone),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            unmount(&self.path.join(id).join(entry.file_name()))?;
            fs::remove_dir(entry.path())?;
        }
        fs::remove_dir(&mount_points)?;
        gone.push(Path::new(paths::SHARED).join(id));
        Ok(gone)
    }

    /// Starts the daemon and gives the VMM's end of its socket.
    pub(crate) fn serve(
        &self,
        state: &Path,
        settings: &Settings,
        cgroups: Arc<Vec<File>>,
    ) -> Result<(Watched, OwnedFd), CallError> {
        let path = state.join("virtiofsd.sock");
        let failed = |error| CallError::host(path.display(), error);
        let listener = UnixListener::bind(&path).map_err(failed)?;
        let socket = UnixStream::connect(&path).map_err(failed)?;
        fs::remove_file(&path).map_err(failed)?;
        let binary = &settings.paths.virtiofsd;
        let mut command = Command::new(binary);
        command
            .arg("--fd=3")
            .arg(format!("--shared-dir={}", self.path.display()))
            .arg(format!("--cache={}", settings.storage.virtiofs_cache))
            .arg(format!(
                "--thread-pool-size={}",
                settings.storage.virtiofs_threads
            ))
            .args([
                "--sandbox=namespace",
                "--announce-submounts",
                "--xattr",
                "--inode-file-handles=never",
            ])
            .args(["--log-level=error"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let watched =
            Watched::spawn(command, vec![(listener.as_raw_fd(), 3)], cgroups).map_err(|error| {
                CallError::host(format!("file-system daemon {}", binary.display()), error)
            })?;
        self.volumes
            .served_by(watched.pid)
            .map_err(|error| CallError::host("file-system daemon", error))?;
        Ok((watched, socket.into()))
    }
}

/// Makes the guest forget what was taken away. Else its kernel has files open here for as long as
/// it likes, and file systems of the host stay busy.
pub(crate) async fn forget(agent: &Agent, gone: Vec<PathBuf>) {
    for path in gone {
        let request = Storage {
            mount_point: path.display().to_string(),
            ..Default::default()
        };
        if let Err(error) = agent_call!(agent, remove_storage, &request) {
            // A guest that is gone remembers nothing, and one that is slow is not asked again.
            debug!(path = %path.display(), %error, "the guest does not forget what was unmounted");
            return;
        }
    }
}

fn bind(source: &Path, target: &Path, recursive: bool) -> io::Result<()> {
    let recursion = if recursive {
        MsFlags::MS_REC
    } else {
        MsFlags::empty()
    };
    Ok(mount(
        Some(source),
        target,
        None::<&str>,
        MsFlags::MS_BIND | recursion,
        None::<&str>,
    )?)
}

/// Leaves the other attributes of the mount as they are.
fn make_read_only(target: &Path) -> io::Result<()> {
    let mount = open_directory(target)?;
    mount_tree::set_attributes(mount.as_fd(), libc::MOUNT_ATTR_RDONLY, 0, false)
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}

/// Mounts one entry of containerd's list at `target`.
fn mount_described(described: &Mount, target: &Path) -> io::Result<()> {
    let (flags, data) = split_options(&described.options);
    if described.type_ == "bind" || flags.contains(MsFlags::MS_BIND) {
        bind(
            Path::new(&described.source),
            target,
            flags.contains(MsFlags::MS_REC),
        )?;
        if flags.contains(MsFlags::MS_RDONLY) {
            make_read_only(target)?;
        }
        return Ok(());
    }
    let data = data.join(",");
    mount(
        Some(described.source.as_str()),
        target,
        Some(described.type_.as_str()),
        flags,
        (!data.is_empty()).then_some(data.as_str()),
    )?;
    Ok(())
}

/// mount(8)'s words that are flags of mount(2), and the rest, which is the file system's own.
fn split_options(options: &[String]) -> (MsFlags, Vec<&str>) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" => flags &= !MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            other => data.push(other),
        }
    }
    (flags, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_data() {
        let words = ["ro", "lowerdir=/a:/b", "rbind"].map(str::to_owned);
        let (flags, data) = split_options(&words);
        assert_eq!(
            flags,
            MsFlags::MS_RDONLY | MsFlags::MS_BIND | MsFlags::MS_REC
        );
        assert_eq!(data, ["lowerdir=/a:/b"]);
    }
}
