//! Starts the VMM of a pod and describes the machine to it.
//!
//! The shim opens everything: KVM, guest memory, kernel, image, sockets. The VMM receives
//! descriptors and opens nothing.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::PermissionsExt, net::UnixListener},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use pericarp_protocol::{
    AGENT_PORT, GUEST_CID,
    machine::{
        Balloon, CONTROL_DESCRIPTOR, Console, CpuMode, Descriptor, Device, DeviceKind, FieldError,
        Fs, List, Machine as Description, Mem, Net, Nothing, PageKind, Pmem, Request, Rng, Text,
        Vsock, VsockPort,
    },
};
use pericarp_runtime_config::{CpuModel, HugePages, Settings, Sizing};
use pericarp_sys::memory_file::{self, Pages};
use tokio::net::UnixStream;

use crate::{
    errors::CallError,
    host::{
        child::Watched,
        journal::{Entry, Journal},
        private,
    },
    machine::{
        client::Machine,
        size::{BLOCK_BYTES, Most, Plan},
        template::Template,
    },
    network::Attachment,
};

/// The tag by which the guest mounts the shared directory.
pub(crate) const SHARE_TAG: &str = "pericarp";

/// Everything a machine is started from.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    /// The pod's settings.
    pub(crate) settings: &'a Settings,
    /// Its size, and what it can become.
    pub(crate) plan: Plan,
    /// The sandbox's state directory.
    pub(crate) state: &'a Path,
    /// Where its processes live.
    pub(crate) cgroups: Arc<Vec<File>>,
    /// User ID of the VMM.
    pub(crate) user: u32,
    /// How the machine starts.
    pub(crate) origin: Origin<'a>,
    /// The VMM's end of the file-system daemon's socket; `None` for a machine that becomes a
    /// template.
    pub(crate) file_system: Option<OwnedFd>,
    /// The pod's interfaces.
    pub(crate) interfaces: Vec<Attachment>,
}

/// How a machine starts.
#[derive(Debug)]
pub(crate) enum Origin<'a> {
    /// Boots.
    Boot,
    /// Boots with this file as its memory, in order to be saved.
    BootToSave(OwnedFd),
    /// Starts from a template.
    Fork(&'a Template),
}

/// A machine that was told to run.
#[derive(Debug)]
pub(crate) struct Launched {
    /// Control of it.
    pub(crate) machine: Machine,
    /// Its process.
    pub(crate) process: Watched,
    /// The connection that the agent will speak on.
    pub(crate) agent: UnixStream,
    /// Path of the socket that reaches the guest's ports.
    pub(crate) vsock: PathBuf,
    /// What the guest's kernel says.
    pub(crate) console: OwnedFd,
}

fn host(object: impl std::fmt::Display) -> impl FnOnce(io::Error) -> CallError {
    move |error| CallError::host(object, error)
}

fn field(error: FieldError) -> CallError {
    CallError::Invalid(format!("machine description: {error}"))
}

/// Starts the VMM, describes the machine and lets it run. The guest boots while the caller goes on.
pub(crate) async fn launch(
    launch: Launch<'_>,
    journal: &mut Journal,
) -> Result<Launched, CallError> {
    let settings = launch.settings;
    let (process, machine) = start_vmm(&launch, journal)?;
    let fork = matches!(launch.origin, Origin::Fork(_));
    let description = describe(settings, launch.plan, launch.user, fork)?;
    let opened = open_for(settings, launch.plan, launch.origin)?;
    machine.request(Request::Start(description), opened).await?;
    let pipe_flags = nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK;
    let (console, console_writer) = nix::unistd::pipe2(pipe_flags)
        .map_err(|error| CallError::host("pipe of the guest's log", error))?;
    let vsock = launch.state.join("vsock.sock");
    // Of an attempt before, if there was one.
    let _ = fs::remove_file(&vsock);
    let (agent, agents_end) = UnixStream::pair().map_err(host("socket of the agent"))?;
    let agents_end = agents_end.into_std().map_err(host("socket of the agent"))?;
    let mut devices = vec![
        console_device(console_writer)?,
        image_device(&settings.paths.image)?,
        vsock_device(&vsock, agents_end.into())?,
        file_system_device(launch.file_system)?,
        plain_device("rng", DeviceKind::Rng(Rng {}))?,
        plain_device("balloon", DeviceKind::Balloon(balloon(settings)))?,
    ];
    if launch.plan.most.plugs(launch.plan.boot) {
        let memory = Mem {
            block_bytes: BLOCK_BYTES,
            requested_bytes: 0,
        };
        devices.push(plain_device("memory", DeviceKind::Mem(memory))?);
    }
    let interfaces = launch.interfaces.into_iter().map(interface_device);
    let interfaces = interfaces.collect::<Result<Vec<_>, _>>()?;
    // A template has no interfaces: those of a fork are plugged in when it runs.
    let (later, now) = if fork {
        (interfaces, Vec::new())
    } else {
        (Vec::new(), interfaces)
    };
    for (device, descriptors) in devices.into_iter().chain(now) {
        machine.add_device(device, descriptors).await?;
    }
    let run = Request::Run(Nothing {});
    machine.request(run, Vec::new()).await?;
    for (device, descriptors) in later {
        machine.add_device(device, descriptors).await?;
    }
    Ok(Launched {
        machine,
        process,
        agent,
        vsock,
        console,
    })
}

fn balloon(settings: &Settings) -> Balloon {
    Balloon {
        deflate_on_oom: true,
        free_page_reporting: settings.vm.free_page_reporting,
    }
}

fn start_vmm(launch: &Launch<'_>, journal: &mut Journal) -> Result<(Watched, Machine), CallError> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
        .map_err(|error| CallError::host("control socket of the VMM", error))?;
    let binary = &launch.settings.paths.vmm;
    let log = private::file()
        .write(true)
        .create(true)
        .truncate(true)
        .open(launch.state.join("vmm.log"))
        .map_err(host("vmm.log"))?;
    let mut command = Command::new(binary);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::from(log))
        .env_clear();
    let descriptors = vec![(theirs.as_raw_fd(), CONTROL_DESCRIPTOR)];
    let process = Watched::spawn(command, descriptors, Arc::clone(&launch.cgroups))
        .map_err(host(format!("VMM {}", binary.display())))?;
    journal.note(&process.entry()).map_err(host("journal"))?;
    let limit = Duration::from_millis(launch.settings.timeouts.rpc_ms);
    let machine = Machine::new(ours, limit).map_err(host("control socket of the VMM"))?;
    Ok((process, machine))
}

fn open(path: &Path) -> Result<OwnedFd, CallError> {
    File::open(path)
        .map(OwnedFd::from)
        .map_err(host(path.display()))
}

fn at(position: u8) -> Descriptor {
    Descriptor { position }
}

/// The first free of the VMMs' user ids, held by a file of its number.
pub(crate) fn claim_user(settings: &Settings, journal: &mut Journal) -> Result<u32, CallError> {
    let dir = settings.paths.run_dir.join(".users");
    private::make_directory(&dir).map_err(host(dir.display()))?;
    let count = settings.security.vmm_uid_count;
    let first = std::process::id() % count;
    for step in 0..count {
        let number = (first + step) % count;
        let path = dir.join(number.to_string());
        match private::file().write(true).create_new(true).open(&path) {
            Ok(_) => {
                journal
                    .note(&Entry::Path { path })
                    .map_err(host("journal"))?;
                return Ok(settings.security.vmm_uid_base + number);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(CallError::host(path.display(), error)),
        }
    }
    Err(CallError::Host(format!(
        "all {count} user ids of VMMs are taken (security.vmm_uid_count): remove stale files from \
            {}",
        dir.display()
    )))
}

fn page_kind(settings: &Settings) -> (Pages, PageKind) {
    match settings.vm.huge_pages {
        HugePages::Size2Mib => (Pages::Huge2M, PageKind::Huge2M),
        HugePages::Size1Gib => (Pages::Huge1G, PageKind::Huge1G),
        HugePages::None => (Pages::Base, PageKind::Base),
    }
}

/// Where the kernel and what follows it stand among the descriptors of [`open_for`].
const KVM: u8 = 0;
const MEMORY: u8 = 1;
const KERNEL: u8 = 2;

/// Opens what [`describe`] names, in its order.
fn open_for(
    settings: &Settings,
    plan: Plan,
    origin: Origin<'_>,
) -> Result<Vec<OwnedFd>, CallError> {
    let kvm = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| CallError::host("/dev/kvm (run `pericarp check`)", error))?;
    let (pages, _) = page_kind(settings);
    let fresh = |bytes| memory_file::create(bytes, pages).map_err(host("guest memory"));
    let mut saved = None;
    let memory = match origin {
        Origin::Boot => fresh(plan.boot.memory_bytes)?,
        Origin::BootToSave(file) => file,
        Origin::Fork(template) => {
            let (memory, state) = template.open().map_err(host("template"))?;
            saved = Some(state);
            memory
        }
    };
    let mut opened = vec![OwnedFd::from(kvm), memory, open(&settings.paths.kernel)?];
    if let Some(path) = &settings.paths.initramfs {
        opened.push(open(path)?);
    }
    if plan.most.plugs(plan.boot) {
        opened.push(fresh(plan.most.memory_bytes - plan.boot.memory_bytes)?);
    }
    opened.extend(saved);
    Ok(opened)
}

/// The machine, whose descriptors come in the order of [`open_for`].
pub(super) fn describe(
    settings: &Settings,
    plan: Plan,
    user: u32,
    fork: bool,
) -> Result<Description, CallError> {
    let (sizing, most) = (plan.boot, plan.most);
    let mut last = KERNEL;
    let mut next_if = |field, there: bool| {
        last += u8::from(there);
        let position = there.then(|| at(last));
        List::new(field, position.into_iter().collect()).map_err(self::field)
    };
    let features: Vec<String> = settings
        .vm
        .cpu_features
        .iter()
        .map(|feature| format!("{}{}", if feature.shown { '+' } else { '-' }, feature.name))
        .collect();
    let vcpus = |count: u32| {
        u16::try_from(count).map_err(|_| CallError::Invalid(format!("vcpus: {count}")))
    };
    Ok(Description {
        vcpus: vcpus(sizing.vcpus)?,
        vcpus_max: vcpus(most.vcpus)?,
        memory_bytes: sizing.memory_bytes,
        memory_max_bytes: most.memory_bytes,
        pages: page_kind(settings).1,
        cpu: cpu_mode(settings.vm.cpu_model)?,
        cpu_features: Text::new("vm.cpu_features", features.join(",")).map_err(field)?,
        kvm: at(KVM),
        memory: at(MEMORY),
        kernel: at(KERNEL),
        initramfs: next_if("initramfs", settings.paths.initramfs.is_some())?,
        pluggable: next_if("pluggable", most.plugs(sizing))?,
        saved: next_if("saved", fork)?,
        command_line: Text::new(
            "kernel.extra_parameters",
            command_line(settings, sizing, most),
        )
        .map_err(field)?,
        uid: user,
        gid: user,
    })
}

fn cpu_mode(model: CpuModel) -> Result<CpuMode, CallError> {
    match model {
        CpuModel::Host => Ok(CpuMode::Host),
        CpuModel::V2 => Ok(CpuMode::BaselineV2),
        CpuModel::V3 => Ok(CpuMode::BaselineV3),
        CpuModel::V4 => Err(CallError::Unimplemented("vm.cpu_model x86-64-v4")),
    }
}

fn command_line(settings: &Settings, sizing: Sizing, most: Most) -> String {
    // vCPUs to spare are parked: the guest's kernel must not wait for them.
    let online = format!("maxcpus={}", sizing.vcpus);
    let mut words = vec![
        "quiet panic=-1 pci=noearly 8250.nr_uarts=0 console=hvc0",
        // An idle guest sleeps: kcompactd would look for work each half second, kvm-clock would
        // watch over the TSC, which the host already does, and the counters of memory would be
        // summed up each second that the guest is awake in. That makes a thread run, for which the
        // scheduler's fair server sets its timer, which wakes the guest in the next second.
        "sysctl.vm.compaction_proactiveness=0 sysctl.vm.stat_interval=60 tsc=nowatchdog",
        // Nor are there neighbours that the kernel is told to keep (NTF_MANAGED), for which it
        // looks each 5 s all the same.
        "sysctl.net.ipv4.neigh.default.interval_probe_time_ms=3600000",
        "sysctl.net.ipv6.neigh.default.interval_probe_time_ms=3600000",
        // Chunks of per-CPU memory of their natural size: one of 2 MiB takes 4 MiB for its
        // accounting alone, as soon as the first disk is mounted.
        "percpu_alloc=page",
    ];
    if most.vcpus > sizing.vcpus {
        words.push(&online);
    }
    if most.memory_bytes > sizing.memory_bytes {
        // What a kernel allocates for itself cannot be moved. Kept out of added memory, up to three
        // times that of the boot, it does not hinder that memory from being taken away.
        words.push("memory_hotplug.online_policy=auto-movable");
    }
    if settings.vm.huge_pages == HugePages::None {
        // Free memory goes back to the host in pieces from 256 KiB, not from 2 MiB: 1.8 MiB less in
        // an idle pod.
        words.push("page_reporting.page_reporting_order=6");
    }
    if settings.paths.initramfs.is_none() {
        words.push(
            "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro init=/sbin/pericarp-agent",
        );
    }
    if !settings.kernel.extra_parameters.is_empty() {
        words.push(&settings.kernel.extra_parameters);
    }
    words.join(" ")
}

type Described = (Device, Vec<OwnedFd>);

fn plain_device(name: &str, kind: DeviceKind) -> Result<Described, CallError> {
    Ok((
        Device {
            name: Text::new("name", name).map_err(field)?,
            kind,
        },
        Vec::new(),
    ))
}

fn console_device(output: OwnedFd) -> Result<Described, CallError> {
    let (device, _) = plain_device("console", DeviceKind::Console(Console { output: at(0) }))?;
    Ok((device, vec![output]))
}

fn image_device(path: &Path) -> Result<Described, CallError> {
    let file = File::open(path).map_err(host(path.display()))?;
    let (device, _) = plain_device("image", DeviceKind::Pmem(Pmem { file: at(0) }))?;
    Ok((device, vec![file.into()]))
}

fn vsock_device(path: &Path, agent: OwnedFd) -> Result<Described, CallError> {
    let listener = UnixListener::bind(path).map_err(host(path.display()))?;
    listener
        .set_nonblocking(true)
        .map_err(host(path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(host(path.display()))?;
    let ports = vec![VsockPort {
        port: AGENT_PORT,
        socket: at(1),
    }];
    let vsock = Vsock {
        cid: GUEST_CID,
        listener: at(0),
        ports: List::new("ports", ports).map_err(field)?,
    };
    let (device, _) = plain_device("vsock", DeviceKind::Vsock(vsock))?;
    Ok((device, vec![listener.into(), agent]))
}

fn file_system_device(socket: Option<OwnedFd>) -> Result<Described, CallError> {
    let tag = Text::new("tag", SHARE_TAG).map_err(field)?;
    let position = socket.is_some().then(|| at(0));
    let (device, _) = plain_device(
        "shared",
        DeviceKind::Fs(Fs {
            tag,
            socket: List::new("socket", position.into_iter().collect()).map_err(field)?,
            queues: 1,
        }),
    )?;
    Ok((device, socket.into_iter().collect()))
}

fn interface_device(attachment: Attachment) -> Result<Described, CallError> {
    let pairs = u8::try_from(attachment.taps.len()).unwrap_or(u8::MAX);
    let vhosts = u8::try_from(attachment.vhosts.len()).unwrap_or(u8::MAX);
    let net = Net {
        mac: attachment.mac,
        mtu: u16::try_from(attachment.mtu).unwrap_or(u16::MAX),
        taps: List::new("taps", (0..pairs).map(at).collect()).map_err(field)?,
        vhosts: List::new(
            "vhosts",
            (pairs..pairs.saturating_add(vhosts)).map(at).collect(),
        )
        .map_err(field)?,
        offloads: true,
        receive_limit: attachment.receive_limit,
        transmit_limit: attachment.transmit_limit,
    };
    let (device, _) = plain_device(&format!("net-{}", attachment.index), DeviceKind::Net(net))?;
    let descriptors = attachment
        .taps
        .into_iter()
        .chain(attachment.vhosts)
        .collect();
    Ok((device, descriptors))
}

/// Random bytes for the guest's first entropy.
pub(crate) fn entropy() -> Result<Vec<u8>, CallError> {
    let mut bytes = vec![0; 64];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(host("/dev/urandom"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use pericarp_runtime_config::Config;

    use super::*;

    const BOOT: Sizing = Sizing {
        vcpus: 2,
        memory_bytes: 128 << 20,
    };
    const STAYS: Most = Most {
        vcpus: BOOT.vcpus,
        memory_bytes: BOOT.memory_bytes,
    };

    fn has(most: Most, word: &str) -> bool {
        command_line(&Config::default().settings, BOOT, most).contains(word)
    }

    #[test]
    fn a_guest_that_may_grow_keeps_what_it_allocates_out_of_added_memory() {
        let grows = Most {
            memory_bytes: 2 * BOOT.memory_bytes,
            ..STAYS
        };
        let policy = |most| has(most, "auto-movable");
        assert_eq!((policy(STAYS), policy(grows)), (false, true));
    }

    #[test]
    fn the_guests_kernel_waits_for_no_parked_vcpu() {
        let spare = Most { vcpus: 4, ..STAYS };
        let bound = |most| has(most, "maxcpus=2");
        assert_eq!((bound(STAYS), bound(spare)), (false, true));
    }
}
