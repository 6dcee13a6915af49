//! Everything of the guest that a container sees, opened before the helper leaves the guest's
//! namespaces.
//!
//! Each is a mount attached nowhere yet: with its attributes set, its owners mapped, out of reach
//! of the image. In a user namespace the container's side could do none of that.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use nix::{
    fcntl::OFlag,
    mount::MsFlags,
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, SFlag, makedev, mknodat},
};
use oci_spec::runtime::LinuxNamespaceType;
use pericarp_sys::{
    clone::{Forked, fork_child},
    fscontext::{DetachedMount, FsContext},
    mount_tree, pidfd, user_namespace,
};

use super::{
    super::{
        error::ContainerError,
        message,
        plan::{
            ContainerPlan, IdMapping,
            devices::DevicePlan,
            mounts::{IdMap, MountPlan, Source},
        },
    },
    Step, rootfs,
};
use crate::ground::beneath::{self, Links};

/// Mounts that wait to be attached.
#[derive(Debug)]
pub(super) struct Sources {
    /// The root file system; taken once.
    pub(super) rootfs: Option<DetachedMount>,
    /// Bind mounts by their index among the plan's mounts.
    pub(super) binds: BTreeMap<usize, DetachedMount>,
    /// Device nodes by their index, when the container could not make them itself.
    pub(super) devices: BTreeMap<usize, DetachedMount>,
    /// For masking files.
    pub(super) null: DetachedMount,
    /// Instances, by their mounts' index, of namespaces that the container's user namespace does
    /// not own.
    pub(super) file_systems: BTreeMap<usize, DetachedMount>,
}

impl Sources {
    /// Opens what `plan` names.
    pub(super) fn open(plan: &ContainerPlan) -> Result<Self, ContainerError> {
        let rootfs = clone_at(plan, &plan.rootfs, true)
            .step("open", format!("root.path {}", plan.rootfs.display()))?;
        let mut binds = BTreeMap::new();
        for (index, mount) in plan.mounts.iter().enumerate() {
            if let Source::Bind { path, recursive } = &mount.source {
                binds.insert(index, bind(plan, mount, path, *recursive)?);
            }
        }
        let null =
            DetachedMount::clone_at(Path::new("/dev/null"), false).step("open", "/dev/null")?;
        let user = plan.namespaces.has_user_namespace();
        // Last: it hides the guest's /dev from here on.
        let devices = if user {
            device_nodes(plan)?
        } else {
            BTreeMap::new()
        };
        Ok(Self {
            rootfs: Some(rootfs),
            binds,
            devices,
            null,
            file_systems: BTreeMap::new(),
        })
    }

    /// Makes the file systems that show a namespace which is not of the container's user namespace:
    /// in there, the right to mount them would be missing. To be called in those namespaces, and
    /// not yet in that of users.
    pub(super) fn mount_shared(&mut self, plan: &ContainerPlan) -> Result<(), ContainerError> {
        if !plan.namespaces.has_user_namespace() {
            return Ok(());
        }
        for (index, mount) in plan.mounts.iter().enumerate() {
            let Source::FileSystem { kind, .. } = &mount.source else {
                continue;
            };
            let shows = match kind.as_str() {
                "proc" => LinuxNamespaceType::Pid,
                "sysfs" => LinuxNamespaceType::Network,
                "mqueue" => LinuxNamespaceType::Ipc,
                "cgroup2" => LinuxNamespaceType::Cgroup,
                _ => continue,
            };
            if plan.namespaces.is_new(shows) {
                continue;
            }
            let made = if shows == LinuxNamespaceType::Pid {
                made_by_a_child(mount)?
            } else {
                rootfs::make_file_system(mount)?
            };
            self.file_systems.insert(index, made);
        }
        Ok(())
    }
}

/// Clones the mount of what `path` names. Beneath the pod's own files no symbolic link is followed:
/// containers write some of them, and a link that one put there would show it the guest's files or
/// those of another container. Mounts on the way are crossed: virtio-fs announces one for each file
/// system of the host, and volumes are mounts.
fn clone_at(plan: &ContainerPlan, path: &Path, recursive: bool) -> io::Result<DetachedMount> {
    let files = plan.pod_files.as_deref();
    let Some((root, rest)) = files.and_then(|root| Some((root, path.strip_prefix(root).ok()?)))
    else {
        return DetachedMount::clone_at(path, recursive);
    };
    let root = File::open(root)?;
    let open = |flags| beneath::resolve(root.as_fd(), rest, Links::Refused, OFlag::O_PATH | flags);
    // Only where a directory is asked for does the kernel mount what virtio-fs announces. Left to
    // the containers, each would have a file system of its own there, in which the same file is
    // another inode.
    let place = match open(OFlag::O_DIRECTORY) {
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => open(OFlag::empty()),
        opened => opened,
    }?;
    DetachedMount::clone_of(place.as_fd(), recursive)
}

fn bind(
    plan: &ContainerPlan,
    mount: &MountPlan,
    path: &str,
    recursive: bool,
) -> Result<DetachedMount, ContainerError> {
    let object = || format!("{}.source {path}", mount.field);
    let tree = clone_at(plan, Path::new(path), recursive).step("open", object())?;
    if let Some(id_map) = &mount.id_map {
        let namespace = mapped_namespace(plan, id_map)?;
        mount_tree::map_ids(tree.as_fd(), namespace.as_fd(), id_map.recursive)
            .step("map the ids of", object())?;
    }
    for (attributes, whole) in [
        (mount.recursive_attributes, true),
        (mount.attributes, false),
    ] {
        if !attributes.is_empty() {
            tree.set_attributes(attributes.set, attributes.clear, whole)
                .step("set the options of", object())?;
        }
    }
    if mount
        .propagation
        .is_none_or(|propagation| propagation.kind != libc::MS_SHARED)
    {
        // The guest's later mounts show in the container, never the other way round.
        mount_tree::set_propagation(tree.as_fd(), libc::MS_SLAVE, true)
            .step("set the propagation of", object())?;
    }
    Ok(tree)
}

/// A user namespace with the mappings of `id_map`. It needs a process to exist in, which lives as
/// long as its socket.
fn mapped_namespace(plan: &ContainerPlan, id_map: &IdMap) -> Result<OwnedFd, ContainerError> {
    let pick = |own: &[IdMapping], containers: &[IdMapping]| {
        if own.is_empty() {
            containers.to_vec()
        } else {
            own.to_vec()
        }
    };
    let uid_mappings = pick(&id_map.uid_mappings, &plan.namespaces.uid_mappings);
    let gid_mappings = pick(&id_map.gid_mappings, &plan.namespaces.gid_mappings);
    let [uids, gids] = [uid_mappings, gid_mappings].map(|mappings| IdMapping::lines(&mappings));
    user_namespace::with_maps(&uids, &gids).step(
        "create",
        format!("a user namespace that maps {uids:?} and {gids:?}"),
    )
}

/// A process that joins a PID namespace stays outside, and procfs shows its maker's.
fn made_by_a_child(mount: &MountPlan) -> Result<DetachedMount, ContainerError> {
    let object = || format!("{} in the PID namespace", mount.field);
    let (near, far) = UnixStream::pair().step("create", "a socket pair")?;
    match fork_child().step("make", object())? {
        Forked::New => {
            let made = rootfs::make_file_system(mount);
            let fds: Vec<_> = made.iter().map(DetachedMount::as_fd).collect();
            let answer = made.as_ref().map(|_| ()).map_err(Clone::clone);
            // Nobody is left to be told of a failure.
            let _ = message::send(&far, &answer, &fds);
            std::process::exit(0)
        }
        Forked::Caller { pidfd, .. } => {
            drop(far);
            let answer = message::receive(&near, message::REPORT_BYTES_MAX);
            pidfd::collect(&pidfd).step("collect", "a process")?;
            let gone = || ContainerError::Helper {
                reason: format!("nobody made {}", object()),
            };
            let (made, fds): (Result<(), ContainerError>, _) =
                answer.step("make", object())?.ok_or_else(gone)?;
            made?;
            fds.into_iter()
                .next()
                .map(DetachedMount::from)
                .ok_or_else(gone)
        }
    }
}

/// Device nodes on a file system of the guest's: those on one of a user namespace's cannot be
/// opened.
///
/// The file system hides `/dev` of a mount namespace that nobody but this helper is in, since only
/// from a mount that is attached somewhere others can be cloned.
fn device_nodes(plan: &ContainerPlan) -> Result<BTreeMap<usize, DetachedMount>, ContainerError> {
    unshare(CloneFlags::CLONE_NEWNS).step("create", "a mount namespace for device nodes")?;
    let none: Option<&str> = None;
    nix::mount::mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)
        .step("set the propagation of", "/")?;
    let context = FsContext::open(c"tmpfs").step("create", "a tmpfs for device nodes")?;
    let tmpfs = context.mount(0).step("mount", "a tmpfs for device nodes")?;
    let directory = tmpfs
        .as_fd()
        .try_clone_to_owned()
        .step("keep", "a tmpfs for device nodes")?;
    let target = File::open("/dev").step("open", "/dev")?;
    tmpfs
        .attach(target.as_fd())
        .step("mount", "a tmpfs for device nodes")?;
    let mut nodes = BTreeMap::new();
    for (index, device) in plan.devices.iter().enumerate() {
        let object = || format!("device {}", device.path);
        let name = index.to_string();
        make_node(
            &directory,
            &name,
            device,
            &plan.namespaces.uid_mappings,
            &plan.namespaces.gid_mappings,
        )
        .step("create", object())?;
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let node = nix::fcntl::openat(&directory, name.as_str(), flags, Mode::empty())
            .step("open", object())?;
        let mount = DetachedMount::clone_of(node.as_fd(), false).step("clone", object())?;
        nodes.insert(index, mount);
    }
    Ok(nodes)
}

fn make_node(
    directory: &OwnedFd,
    name: &str,
    device: &DevicePlan,
    uid_mappings: &[IdMapping],
    gid_mappings: &[IdMapping],
) -> nix::Result<()> {
    let file_type = SFlag::from_bits_truncate(device.file_type);
    let number = makedev(u64::from(device.major), u64::from(device.minor));
    mknodat(
        directory,
        name,
        file_type,
        Mode::from_bits_truncate(device.mode),
        number,
    )?;
    // An id that the namespace does not have stays the guest's root, which shows as nobody.
    let uid = IdMapping::to_outside(uid_mappings, device.uid).unwrap_or(0);
    let gid = IdMapping::to_outside(gid_mappings, device.gid).unwrap_or(0);
    let flags = nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW;
    nix::unistd::fchownat(directory, name, Some(uid.into()), Some(gid.into()), flags)
}
