//! `pericarp device-plugin`: offers functions of this host to the kubelet, so that a node without a
//! vendor's plugin can give them to pods.
//!
//! ```text
//!  kubelet's socket appears --> a socket per resource, Register --> kubelet lists, allocates
//!        ^                                                              |
//!        +---------- it appears anew: the kubelet was restarted <-------+
//! ```
//!
//! Nothing is polled: the folder is watched by inotify, the host's devices by the kernel's uevents
//! (driver bound, driver gone), which reach the first network namespace only.

mod api;
mod host;
mod server;
mod service {
    #![expect(
        unreachable_pub,
        clippy::allow_attributes,
        reason = "tonic makes it from build.rs"
    )]
    include!(concat!(env!("OUT_DIR"), "/v1beta1.DevicePlugin.rs"));
    include!(concat!(env!("OUT_DIR"), "/v1beta1.Registration.rs"));
}

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use pericarp_runtime_config::Config;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixListener;
use tokio::task::JoinSet;
use tonic::transport::Endpoint;

use self::api::{DevicePluginOptions, RegisterRequest};
use self::server::Resource;
use self::service::registration_client::RegistrationClient;
use crate::cli::DevicePluginArguments;

/// The kubelet's own socket in its folder.
const KUBELET: &str = "kubelet.sock";

/// Group of the kernel's own announcements.
const UEVENTS: u32 = 1;

/// Largest announcement in bytes (`UEVENT_BUFFER_SIZE` of the kernel, and its header).
const UEVENT_BYTES_MAX: usize = 4096;

/// Runs until it fails or is ended.
pub(crate) fn run(arguments: &DevicePluginArguments, out: &mut impl Write) -> Result<()> {
    let config = Config::load(arguments.config.as_deref(), true)?;
    let settings = config.settings;
    if settings.devices.resources.is_empty() {
        bail!("there is nothing to offer: name what in devices.resources");
    }
    let allowed = &settings.security.passthrough_devices;
    let resources: Vec<Arc<Resource>> = settings
        .devices
        .resources
        .iter()
        .map(|resource| Arc::new(Resource::new(resource.clone(), allowed.clone())))
        .collect();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("event loop")?;
    runtime.block_on(live(&arguments.folder, &resources, out))
}

async fn live(folder: &Path, resources: &[Arc<Resource>], out: &mut impl Write) -> Result<()> {
    let mut folder_watch = FolderWatch::new(folder)?;
    let uevents = Uevents::new().context("the kernel's announcements of devices")?;
    for resource in resources {
        resource.look()?;
    }
    loop {
        let mut served = JoinSet::new();
        if folder.join(KUBELET).exists() {
            match introduce(folder, resources, &mut served).await {
                Ok(()) => tell(resources, out)?,
                // A kubelet that has just ended leaves its socket; the next one makes it anew.
                Err(error) => writeln!(out, "the kubelet does not answer: {error:#}")?,
            }
        }
        loop {
            tokio::select! {
                made = folder_watch.kubelet_made() => {
                    made?;
                    break;
                }
                heard = uevents.heard() => {
                    heard?;
                    for resource in resources {
                        resource.look()?;
                    }
                }
                Some(ended) = served.join_next() => {
                    ended.context("server")?.context("server")?;
                }
            }
        }
    }
}

/// Opens each resource's socket and registers it.
async fn introduce(
    folder: &Path,
    resources: &[Arc<Resource>],
    served: &mut JoinSet<Result<(), tonic::transport::Error>>,
) -> Result<()> {
    for resource in resources {
        let path = resource.socket(folder);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context(path.display().to_string());
            }
            _ => {}
        }
        let listener = UnixListener::bind(&path).context(path.display().to_string())?;
        served.spawn(server::serve(Arc::clone(resource), listener));
        register(folder, resource).await?;
    }
    Ok(())
}

async fn register(folder: &Path, resource: &Resource) -> Result<()> {
    let kubelet = folder.join(KUBELET);
    let address = format!("unix://{}", kubelet.display());
    let channel = Endpoint::from_shared(address)?.connect().await;
    let channel = channel.with_context(|| kubelet.display().to_string())?;
    let mut client = RegistrationClient::new(channel);
    let socket = resource.socket(folder);
    let endpoint = socket.file_name().unwrap_or_default().to_string_lossy();
    let request = RegisterRequest {
        version: api::VERSION.to_owned(),
        endpoint: endpoint.into_owned(),
        resource_name: resource.name(),
        options: Some(DevicePluginOptions::default()),
    };
    let registered = client.register(request).await;
    registered.with_context(|| format!("registering {}", resource.name()))?;
    Ok(())
}

/// Says that it is up, to whoever reads and to the service manager (sd_notify(3)).
fn tell(resources: &[Arc<Resource>], out: &mut impl Write) -> Result<()> {
    for resource in resources {
        let count = resource.healthy();
        writeln!(out, "{}: {count} functions offered", resource.name())?;
    }
    out.flush()?;
    if let Some(path) = std::env::var_os("NOTIFY_SOCKET") {
        let socket = UnixDatagram::unbound().context("NOTIFY_SOCKET")?;
        socket.send_to(b"READY=1", path).context("NOTIFY_SOCKET")?;
    }
    Ok(())
}

/// Lets tasks wait for a descriptor.
#[expect(
    deprecated,
    reason = "its successor is unsafe for owners that close early; `OwnedFd` closes when dropped"
)]
fn watch(owner: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(owner)
}

/// Tells when the kubelet's socket is made.
struct FolderWatch {
    inotify: Inotify,
    ready: AsyncFd<OwnedFd>,
}

impl FolderWatch {
    fn new(folder: &Path) -> Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        inotify
            .add_watch(folder, AddWatchFlags::IN_CREATE)
            .with_context(|| {
                format!(
                    "{}: start the kubelet once, or name its folder by --folder",
                    folder.display()
                )
            })?;
        let ready = watch(inotify.as_fd().try_clone_to_owned()?)?;
        Ok(Self { inotify, ready })
    }

    async fn kubelet_made(&mut self) -> Result<()> {
        loop {
            let mut guard = self.ready.readable().await?;
            match self.inotify.read_events() {
                Ok(events) => {
                    let made = events
                        .iter()
                        .any(|event| event.name.as_deref() == Some(KUBELET.as_ref()));
                    if made {
                        return Ok(());
                    }
                }
                Err(Errno::EAGAIN) => guard.clear_ready(),
                Err(error) => return Err(error).context("inotify"),
            }
        }
    }
}

/// Tells when devices or their drivers come and go.
struct Uevents(AsyncFd<OwnedFd>);

impl Uevents {
    fn new() -> Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, UEVENTS))?;
        Ok(Self(watch(fd)?))
    }

    /// What is said does not matter: the caller looks again.
    async fn heard(&self) -> Result<()> {
        let mut guard = self.0.readable().await?;
        let mut buffer = [0; UEVENT_BYTES_MAX];
        loop {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                // More was said than the socket holds: so there is something to look at.
                Ok(_) | Err(Errno::ENOBUFS) => {}
                Err(Errno::EAGAIN) => break,
                Err(error) => return Err(error).context("uevents"),
            }
        }
        guard.clear_ready();
        Ok(())
    }
}
