//! The sandbox: configuration, network, storages that belong to no container.

use std::{
    fs::OpenOptions,
    io,
    path::Path,
    sync::{Arc, PoisonError},
};

use nix::mount::{MsFlags, mount};
use pericarp_protocol::guest::{ConfigureSandboxRequest, Empty, Storage, UpdateNetworkRequest};
use pericarp_sys::guest::ENTROPY_BYTES_MAX;

use super::check_id;
use crate::{
    drivers::Drivers,
    ground::{beneath, clock, errors::RpcError, files, log, paths::RUN, sysctls},
    machine::devices,
    network::{self, NetworkError},
    pod::{Pod, SandboxState, blocking},
    storage,
};

/// The pod's shared memory, which containers get as a bind mount.
const SHM: &str = "/dev/shm";

/// Size of that when the request does not say: the default of container engines.
const SHM_BYTES_DEFAULT: u64 = 64 << 20;

/// A difference of clocks that is worth setting: below it, a paravirtual clock is nearer the truth
/// than a number that has travelled.
const CLOCK_DIFFERENCE_NS: u64 = 1_000_000_000;

/// Sysctls of a pod.
const SYSCTLS_MAX: usize = 256;

/// Configures the sandbox, once.
pub(super) async fn configure(
    pod: Arc<Pod>,
    request: ConfigureSandboxRequest,
) -> Result<Empty, RpcError> {
    check_id("sandbox_id", &request.sandbox_id)?;
    {
        let mut state = pod.sandbox();
        if !matches!(*state, SandboxState::New) {
            return Err(RpcError::State {
                object: "sandbox".to_owned(),
                reason: "it is configured already",
            });
        }
        *state = SandboxState::BeingConfigured;
    }
    let share_pid_namespace = request.share_pid_namespace;
    let result = {
        let pod = Arc::clone(&pod);
        blocking(move || {
            let hold = pod.reaper.hold();
            apply(&pod, &request)?;
            let pod_init = share_pid_namespace
                .then(|| pod.start_pod_init())
                .transpose()?;
            drop(hold);
            Ok(pod_init)
        })
        .await
    };
    match result {
        Ok(Ok(pod_init)) => {
            *pod.sandbox() = SandboxState::Configured { pod_init };
            Ok(Empty::new())
        }
        Ok(Err(error)) | Err(error) => {
            *pod.sandbox() = SandboxState::New;
            Err(error)
        }
    }
}

fn apply(pod: &Pod, request: &ConfigureSandboxRequest) -> Result<(), RpcError> {
    add_entropy(&request.entropy)?;
    let behind = request.wall_clock_ns.abs_diff(clock::wall_clock_ns());
    if request.wall_clock_ns != 0 && behind > CLOCK_DIFFERENCE_NS {
        clock::set_wall_clock_ns(request.wall_clock_ns)
            .map_err(|error| RpcError::kernel("set the clock")(error.into()))?;
    }
    if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname).map_err(|error| {
            RpcError::kernel(format!("set the host name {:?}", request.hostname))(error.into())
        })?;
    }
    // Before the pod's sysctls, which may set some of these limits.
    pod.limits.set(request.node_limits.get_or_default())?;
    // Before the network's sysctls, which may name an interface.
    apply_network(request)?;
    set_network_sysctls(request)?;
    set_sysctls(request)?;
    write_resolver_files(pod.options.etc(), request)?;
    let mut added = Vec::new();
    let done = attach_all(pod, &request.storages, &mut added)
        .and_then(|()| use_drivers(pod, &request.drivers_path));
    if let Err(error) = done {
        // What was added before it goes, so that the host may try again.
        for mount_point in added.into_iter().rev() {
            if let Err(error) = detach(pod, mount_point) {
                log::warn(format_args!("{}", log::chain(&error)));
            }
        }
        return Err(error);
    }
    mount_shm(request.shm_size_bytes)
}

/// Configures the network. Interfaces that were hot-plugged and not noticed yet are found by a
/// rescan of the PCI bus.
fn apply_network(request: &ConfigureSandboxRequest) -> Result<(), RpcError> {
    let apply = || network::apply(&request.interfaces, &request.routes, &request.neighbours);
    match apply() {
        Err(NetworkError::NoInterface(_)) => {
            devices::rescan()?;
            Ok(apply()?)
        }
        other => Ok(other?),
    }
}

fn attach_all<'a>(
    pod: &Pod,
    storages: &'a [Storage],
    added: &mut Vec<&'a str>,
) -> Result<(), RpcError> {
    for storage in storages {
        attach(pod, storage)?;
        added.push(&storage.mount_point);
    }
    Ok(())
}

/// Takes the driver image into use, where there is one: before any container.
fn use_drivers(pod: &Pod, path: &str) -> Result<(), RpcError> {
    if path.is_empty() {
        return Ok(());
    }
    if beneath::components(Path::new(RUN), Path::new(path)).is_none() {
        return Err(RpcError::Invalid {
            field: "drivers_path",
            reason: format!("{path:?} does not lie beneath {}", RUN),
        });
    }
    let drivers = Drivers::set_up(Path::new(path))?;
    *pod.drivers.lock().unwrap_or_else(PoisonError::into_inner) = Some(drivers);
    Ok(())
}

fn mount_shm(size_bytes: u64) -> Result<(), RpcError> {
    let size_bytes = if size_bytes == 0 {
        SHM_BYTES_DEFAULT
    } else {
        size_bytes
    };
    let failed = |error: nix::Error| RpcError::kernel(format!("mount {SHM}"))(error.into());
    // On devtmpfs, where it is not there yet.
    if let Err(error) = std::fs::create_dir(SHM)
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(RpcError::kernel(format!("make {SHM}"))(error));
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let data = format!("mode=1777,size={size_bytes}");
    mount(Some("shm"), SHM, Some("tmpfs"), flags, Some(data.as_str())).map_err(failed)
}

fn add_entropy(seed: &[u8]) -> Result<(), RpcError> {
    if seed.is_empty() {
        return Ok(());
    }
    let device = OpenOptions::new()
        .write(true)
        .open("/dev/urandom")
        .map_err(RpcError::kernel("open /dev/urandom"))?;
    for part in seed.chunks(ENTROPY_BYTES_MAX) {
        pericarp_sys::guest::add_entropy(&device, part).map_err(RpcError::kernel("add entropy"))?;
    }
    pericarp_sys::guest::reseed(&device).map_err(RpcError::kernel("reseed the generator"))
}

fn check_count(field: &'static str, count: usize) -> Result<(), RpcError> {
    if count > SYSCTLS_MAX {
        return Err(RpcError::Invalid {
            field,
            reason: format!("there are more than {SYSCTLS_MAX}"),
        });
    }
    Ok(())
}

/// A sysctl that the node's kernel has and this one lacks does not fail the pod.
fn set_network_sysctls(request: &ConfigureSandboxRequest) -> Result<(), RpcError> {
    check_count("network_sysctls", request.network_sysctls.len())?;
    for (path, value) in &request.network_sysctls {
        let named = sysctls::path(path).filter(|path| path.starts_with("net/"));
        let path = named.ok_or_else(|| RpcError::Invalid {
            field: "network_sysctls",
            reason: format!("{path:?} is not the path of a sysctl of the network"),
        })?;
        if let Err(error) = files::write(Path::new("/proc/sys").join(&path), value) {
            log::warn(format_args!("sysctl {path} is not {value:?} here: {error}"));
        }
    }
    Ok(())
}

fn set_sysctls(request: &ConfigureSandboxRequest) -> Result<(), RpcError> {
    check_count("sysctls", request.sysctls.len())?;
    for (name, value) in &request.sysctls {
        let path = sysctls::path(name).ok_or_else(|| RpcError::Invalid {
            field: "sysctls",
            reason: format!("{name:?} is not the name of a sysctl"),
        })?;
        files::write(Path::new("/proc/sys").join(path), value)
            .map_err(RpcError::kernel(format!("set sysctl {name} to {value:?}")))?;
    }
    Ok(())
}

/// The guest's own resolver files. Containers get theirs as mounts.
fn write_resolver_files(folder: &Path, request: &ConfigureSandboxRequest) -> Result<(), RpcError> {
    let lines = request
        .dns_servers
        .iter()
        .map(|line| match line.contains(' ') {
            // A line of its own, such as "search" or "options".
            true => format!("{line}\n"),
            false => format!("nameserver {line}\n"),
        });
    for (name, text) in [
        ("resolv.conf", lines.collect()),
        ("hosts", "127.0.0.1 localhost\n::1 localhost\n".to_owned()),
    ] {
        let path = folder.join(name);
        std::fs::write(&path, text)
            .map_err(RpcError::kernel(format!("write {}", path.display())))?;
    }
    Ok(())
}

/// Changes the network of a running pod.
pub(super) async fn update_network(request: UpdateNetworkRequest) -> Result<Empty, RpcError> {
    blocking(move || {
        network::take_away(
            &request.removed_interfaces,
            &request.removed_routes,
            &request.removed_neighbours,
        )?;
        network::apply(&request.interfaces, &request.routes, &request.neighbours)
    })
    .await??;
    Ok(Empty::new())
}

/// Mounts a storage of the sandbox.
pub(super) async fn add_storage(pod: Arc<Pod>, request: Storage) -> Result<Empty, RpcError> {
    blocking(move || {
        let hold = pod.reaper.hold();
        let result = attach(&pod, &request);
        drop(hold);
        result
    })
    .await??;
    Ok(Empty::new())
}

/// Unmounts a storage of the sandbox, or forgets what the host removed of the shared directory.
pub(super) async fn remove_storage(pod: Arc<Pod>, request: Storage) -> Result<Empty, RpcError> {
    blocking(move || detach(&pod, &request.mount_point)).await??;
    Ok(Empty::new())
}

fn attach(pod: &Pod, storage: &Storage) -> Result<(), RpcError> {
    let place = pod.storages.reserve(&storage.mount_point)?;
    place.fill(storage::attach(storage)?);
    Ok(())
}

fn detach(pod: &Pod, mount_point: &str) -> Result<(), RpcError> {
    if storage::is_shared(mount_point) {
        return Ok(storage::forget_shared(mount_point)?);
    }
    let (attached, place) = pod.storages.begin_removal(mount_point)?;
    if let Err(error) = storage::detach(&attached) {
        place.fill(attached);
        return Err(error.into());
    }
    Ok(())
}
