//! The pod's network: what CNI made in its namespace, moved to the guest.
//!
//! ```text
//! CNI's interface (veth, ...)  <── tc ingress, mirred redirect ──>  tap ── virtio-net ── guest's
//!   keeps name and addresses                                        same MAC, MTU, addresses
//! ```
//!
//! Frames are redirected both ways before the host's stack sees them, so that everything outside
//! the pod (bridge, policy, service routing) works on the interface that CNI made. The host's stack
//! in the namespace stays reachable on loopback alone, which is where port-forwarding comes in.
//!
//! A network namespace belongs to a thread, so all this happens on a thread of its own with a
//! runtime of its own.

mod collect;
mod sysctls;

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use futures::TryStreamExt;
use netlink_packet_route::tc::TcHandle;
use nix::sched::{CloneFlags, setns};
use pericarp_protocol::{
    guest,
    machine::{MTU_MIN, RateLimit},
};
use pericarp_runtime_config::Settings;
use rtnetlink::{Handle, LinkUnspec, new_connection};

use crate::{
    errors::CallError,
    host::journal::{Entry, Journal},
};
use collect::Link;

/// The parent handle of an ingress queueing discipline (`TC_H_INGRESS`, `ffff:`).
const INGRESS_PARENT: u32 = 0xffff_0000;
/// `ETH_P_ALL` (linux/if_ether.h).
const ETH_P_ALL: u16 = 0x0003;

/// One interface of the pod, ready for the VMM.
#[derive(Debug)]
pub(crate) struct Attachment {
    /// Counts from 0.
    pub(crate) index: usize,
    /// The interface's own address, which the guest takes over.
    pub(crate) mac: [u8; 6],
    /// Its MTU.
    pub(crate) mtu: u32,
    /// One tap descriptor a queue pair.
    pub(crate) taps: Vec<OwnedFd>,
    /// One vhost-net descriptor a queue pair, or none.
    pub(crate) vhosts: Vec<OwnedFd>,
    /// Towards the guest.
    pub(crate) receive_limit: RateLimit,
    /// From the guest.
    pub(crate) transmit_limit: RateLimit,
}

impl Attachment {
    /// Copies the interface for another attempt to start the machine. vhost-net descriptors are
    /// opened anew, because each belongs to the first process that uses it.
    pub(crate) fn again(&self) -> io::Result<Self> {
        let taps = self.taps.iter().map(OwnedFd::try_clone);
        Ok(Self {
            taps: taps.collect::<io::Result<_>>()?,
            vhosts: open_vhosts(self.vhosts.len()),
            ..*self
        })
    }
}

/// What the agent is told.
#[derive(Debug, Default)]
pub(crate) struct GuestNetwork {
    /// Interfaces with their addresses.
    pub(crate) interfaces: Vec<guest::Interface>,
    /// Routes of the main table that the kernel does not make itself.
    pub(crate) routes: Vec<guest::Route>,
    /// Permanent neighbours.
    pub(crate) neighbours: Vec<guest::Neighbour>,
    /// Sysctls that were set in the namespace: path beneath `/proc/sys`, and value.
    pub(crate) sysctls: BTreeMap<String, String>,
}

/// Both halves of the pod's network.
#[derive(Debug, Default)]
pub(crate) struct Attached {
    /// For the VMM.
    pub(crate) interfaces: Vec<Attachment>,
    /// For the agent.
    pub(crate) guest: GuestNetwork,
}

/// What the setup on its own thread needs to know.
#[derive(Debug, Clone)]
struct Plan {
    queues: u32,
    vhost: bool,
    receive_limit: RateLimit,
    transmit_limit: RateLimit,
}

/// Why an interface cannot be moved to the guest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("network namespace {path}: {source}")]
    Namespace { path: PathBuf, source: io::Error },
    #[error("{action}: {source}")]
    Netlink {
        action: String,
        source: rtnetlink::Error,
    },
    #[error("{action}: {source}")]
    Host { action: String, source: io::Error },
    #[error("interface {name}: {reason}")]
    Unusable { name: String, reason: &'static str },
}

/// Prepares every interface of the namespace for the guest; without a namespace there is none.
pub(crate) async fn attach(
    namespace: Option<&Path>,
    settings: &Settings,
    journal: &mut Journal,
) -> Result<Attached, CallError> {
    let Some(namespace) = namespace else {
        return Ok(Attached::default());
    };
    let limit = |kbit: u64| RateLimit {
        bytes_per_s: kbit.saturating_mul(125),
        ..RateLimit::default()
    };
    let plan = Plan {
        queues: settings.network.queues,
        vhost: settings.network.vhost,
        receive_limit: limit(settings.network.receive_kbit_per_s),
        transmit_limit: limit(settings.network.transmit_kbit_per_s),
    };
    let failed =
        |error: &dyn std::fmt::Display| CallError::Host(format!("the pod's network: {error}"));
    let entered = plan.clone();
    let (links, mut network, sysctls) = in_namespace(namespace, |handle| async move {
        let (links, network) = collect::collect(&handle).await?;
        let names: Vec<&str> = links.iter().map(|link| link.name.as_str()).collect();
        let sysctls = sysctls::read(&names).map_err(of_sysctls)?;
        Ok((links, network, sysctls))
    })
    .await
    .map_err(|error| failed(&error))?;
    let run_dir = settings.paths.run_dir.clone();
    let defaults = tokio::task::spawn_blocking(move || sysctls::defaults(&run_dir));
    let defaults = match defaults.await {
        Ok(read) => read.map_err(|error| failed(&of_sysctls(error)))?,
        Err(error) => return Err(failed(&error)),
    };
    network.sysctls = sysctls::changed(sysctls, &defaults);
    for link in &links {
        let entry = Entry::Tap {
            namespace: namespace.to_owned(),
            name: tap_name(link),
            peer: link.name.clone(),
        };
        journal.note(&entry).map_err(|error| failed(&error))?;
    }
    let interfaces = in_namespace(namespace, |handle| async move {
        let mut interfaces = Vec::new();
        for (index, link) in links.iter().enumerate() {
            interfaces.push(attach_one(&handle, index, link, &entered).await?);
        }
        Ok(interfaces)
    })
    .await
    .map_err(|error| failed(&error))?;
    Ok(Attached {
        interfaces,
        guest: network,
    })
}

fn of_sysctls(source: io::Error) -> NetworkError {
    NetworkError::Host {
        action: "reading sysctls of the network".to_owned(),
        source,
    }
}

/// Runs `work` on a thread inside `namespace`, with a netlink connection of that namespace.
async fn in_namespace<T, W, F>(namespace: &Path, work: W) -> Result<T, NetworkError>
where
    T: Send + 'static,
    W: FnOnce(Handle) -> F + Send + 'static,
    F: Future<Output = Result<T, NetworkError>>,
{
    let path = namespace.to_owned();
    let ran = tokio::task::spawn_blocking(move || {
        // A thread that entered a namespace must not go back to a pool: this one ends.
        std::thread::scope(|scope| scope.spawn(|| enter_and_run(&path, work)).join())
    });
    match ran.await {
        Ok(Ok(result)) => result,
        _ => Err(NetworkError::Host {
            action: "thread in the network namespace".to_owned(),
            source: io::Error::other("it panicked"),
        }),
    }
}

fn enter_and_run<T, W, F>(namespace: &Path, work: W) -> Result<T, NetworkError>
where
    W: FnOnce(Handle) -> F,
    F: Future<Output = Result<T, NetworkError>>,
{
    let entered = |source: io::Error| NetworkError::Namespace {
        path: namespace.to_owned(),
        source,
    };
    let file = File::open(namespace).map_err(entered)?;
    setns(&file, CloneFlags::CLONE_NEWNET).map_err(|error| entered(error.into()))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(entered)?;
    runtime.block_on(async {
        let (connection, handle, _) = new_connection().map_err(entered)?;
        let connection = tokio::spawn(connection);
        let result = work(handle).await;
        connection.abort();
        result
    })
}

/// Interface names end at 15 bytes; the index is unique in the namespace.
fn tap_name(link: &Link) -> String {
    format!("pericarp{}", link.index)
}

async fn attach_one(
    handle: &Handle,
    index: usize,
    link: &Link,
    plan: &Plan,
) -> Result<Attachment, NetworkError> {
    if link.mtu < u32::from(MTU_MIN) {
        return Err(NetworkError::Unusable {
            name: link.name.clone(),
            reason: "its MTU is too small",
        });
    }
    let name = tap_name(link);
    let (tap, taps) = make_tap(handle, &name, link.mtu, plan.queues).await?;
    let netlink = |action: String| move |source| NetworkError::Netlink { action, source };
    redirect(handle, link.index, tap)
        .await
        .map_err(netlink(format!("redirecting {} to {name}", link.name)))?;
    redirect(handle, tap, link.index)
        .await
        .map_err(netlink(format!("redirecting {name} to {}", link.name)))?;
    let limited =
        plan.receive_limit != RateLimit::default() || plan.transmit_limit != RateLimit::default();
    let vhosts = if plan.vhost && !limited {
        open_vhosts(taps.len())
    } else {
        Vec::new()
    };
    Ok(Attachment {
        index,
        mac: link.mac,
        mtu: link.mtu,
        taps,
        vhosts,
        receive_limit: plan.receive_limit,
        transmit_limit: plan.transmit_limit,
    })
}

/// Makes the tap with its queues, silent and up; the answer is its index and a descriptor a queue.
async fn make_tap(
    handle: &Handle,
    name: &str,
    mtu: u32,
    queues: u32,
) -> Result<(u32, Vec<OwnedFd>), NetworkError> {
    let host = |action: &str| {
        let action = format!("{action} {name}");
        move |source| NetworkError::Host { action, source }
    };
    let netlink = |action: String| move |source| NetworkError::Netlink { action, source };
    let open = || pericarp_sys::tap::open(name, queues > 1);
    let taps: io::Result<Vec<OwnedFd>> = (0..queues).map(|_| open()).collect();
    let taps = taps.map_err(host("making tap"))?;
    // The tap has no business of its own in the namespace: else the host would announce itself.
    let quiet = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    match fs::write(&quiet, "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(host("silencing IPv6 on")(error));
        }
        _ => {}
    }
    let found = handle
        .link()
        .get()
        .match_name(name.to_owned())
        .execute()
        .try_next()
        .await;
    let found = found.map_err(netlink(format!("looking for tap {name}")))?;
    let tap = found.map_or(0, |tap| tap.header.index);
    let change = LinkUnspec::new_with_index(tap).mtu(mtu).up().build();
    let changed = handle.link().set(change).execute().await;
    changed.map_err(netlink(format!("bringing tap {name} up")))?;
    Ok((tap, taps))
}

/// A node without vhost-net is slower, not broken: `pericarp check` tells its operator.
fn open_vhosts(count: usize) -> Vec<OwnedFd> {
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/vhost-net")
            .map(OwnedFd::from)
    };
    let opened: io::Result<Vec<_>> = (0..count).map(|_| open()).collect();
    opened.unwrap_or_default()
}

/// Everything that arrives on one interface leaves by the other.
async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), rtnetlink::Error> {
    let index = i32::try_from(from).map_err(|_| rtnetlink::Error::RequestFailed)?;
    handle.qdisc().add(index).ingress().execute().await?;
    handle
        .traffic_filter(index)
        .add()
        .parent(INGRESS_PARENT)
        .protocol(ETH_P_ALL.to_be())
        .redirect(to)?
        .execute()
        .await
}

/// Takes a tap and its redirection away. A namespace that is gone has taken both along; the tap
/// itself goes with the VMM's descriptor.
pub(crate) fn remove_tap(namespace: &Path, name: &str, peer: &str) -> io::Result<()> {
    if !namespace.exists() {
        return Ok(());
    }
    let names = [name.to_owned(), peer.to_owned()];
    let result = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                enter_and_run(namespace, |handle| async move {
                    remove_redirections(&handle, names).await
                })
            })
            .join()
    });
    match result {
        Ok(Ok(())) => Ok(()),
        // Not a namespace any more: the mount is gone and an empty file is left.
        Ok(Err(NetworkError::Namespace { .. })) => Ok(()),
        Ok(Err(error)) => Err(io::Error::other(error.to_string())),
        Err(_) => Err(io::Error::other(
            "the thread in the network namespace panicked",
        )),
    }
}

/// EINVAL and ENOENT: there is no ingress discipline. ENODEV: the interface has just gone, as the
/// tap of a VMM that is ending does.
fn is_absent(code: i32) -> bool {
    [-libc::EINVAL, -libc::ENOENT, -libc::ENODEV].contains(&code)
}

async fn remove_redirections(handle: &Handle, names: [String; 2]) -> Result<(), NetworkError> {
    for name in names {
        let found = handle
            .link()
            .get()
            .match_name(name.clone())
            .execute()
            .try_next()
            .await;
        let Ok(Some(link)) = found else { continue };
        let Ok(index) = i32::try_from(link.header.index) else {
            continue;
        };
        let mut request = handle.qdisc().del(index);
        let header = &mut request.message_mut().header;
        header.parent = TcHandle::INGRESS;
        header.handle = TcHandle::from(INGRESS_PARENT);
        let removed = request.execute().await;
        if let Err(rtnetlink::Error::NetlinkError(message)) = &removed
            && !message.code.is_none_or(|code| is_absent(code.get()))
        {
            return removed.map_err(|source| NetworkError::Netlink {
                action: format!("freeing {name}"),
                source,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_that_goes_while_it_is_freed_is_no_failure() {
        for code in [libc::EINVAL, libc::ENOENT, libc::ENODEV] {
            assert!(is_absent(-code), "{code}");
        }
        assert!(!is_absent(-libc::EPERM));
    }
}
