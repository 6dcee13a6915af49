//! Makes the node ready: mounts, cgroups, network, installed files, registry, devices.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use pericarp_sys::sk_lookup::{AllPorts, listen_on_all_ports};

use super::own_root;
use crate::node::channel::SetUp;
use crate::node::images::registry;

/// Controllers of cgroup v2 that pods need.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "memory", "pids", "io", "hugetlb"];

/// Where containerd, kubelet and etcd keep their state: a file system of their own, because an
/// overlay cannot be the upper layer of another.
const STATE_FOLDERS: [&str; 5] = [
    "/var/lib/containerd",
    "/var/lib/containerd-1.7",
    "/var/lib/kubelet",
    "/var/lib/cni",
    "/var/lib/etcd",
];

/// Where a disk for their state is mounted.
const DISK_FOLDER: &str = "/mnt";

/// Kernel settings: file below /proc/sys and value.
const SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/bridge/bridge-nf-call-iptables", "1"),
    ("net/bridge/bridge-nf-call-ip6tables", "1"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/printk", "4"),
    ("fs/inotify/max_user_instances", "1024"),
    ("vm/overcommit_memory", "1"),
];

/// Does everything that a [`SetUp`] says.
pub(super) fn run(set_up: &SetUp) -> Result<()> {
    if !set_up.is_machine {
        own_root::enter(&set_up.results)?;
    }
    mounts(set_up.state_disk)?;
    if set_up.is_machine {
        let results = set_up.results.to_string_lossy();
        mount_at(
            "9p",
            "results",
            &results,
            "trans=virtio,version=9p2000.L,msize=512000",
        )?;
    }
    cgroups()?;
    network()?;
    for (source, destination, mode) in &set_up.install {
        install(source, destination, *mode)?;
    }
    if let Some(layout) = &set_up.image_layout {
        registry::start(layout)?;
    }
    for address in &set_up.vfio {
        bind_to_vfio(address)?;
    }
    if set_up.is_machine {
        hold_kernel_code()?;
    }
    Ok(())
}

/// What keeps parts of the node's kernel in use.
struct Held {
    _vm: Option<(VmFd, VcpuFd)>,
    _lookup: Option<(AllPorts, TcpListener)>,
}

/// Keeps what pods use of the kernel in use for as long as the node lives.
///
/// The first and the last use of such a part patch the kernel's code (static keys): preemption
/// notifiers by a VM, the local APIC that is not enabled yet by a virtual processor, the ingress of
/// a queueing discipline, lookups of sockets. Emulation in several threads sometimes runs the
/// breakpoint of such a patch on another processor after it was taken back, and the node's kernel
/// dies of an `int3` that nobody expects, or without a word: with these, pods that come and go
/// patch nothing.
fn hold_kernel_code() -> Result<()> {
    static HELD: OnceLock<Held> = OnceLock::new();
    tool("tc", &["qdisc", "add", "dev", "lo", "clsact"])?;
    HELD.get_or_init(|| Held {
        // A node without KVM is still good for what needs no VM.
        _vm: held_vm().ok(),
        _lookup: std::thread::spawn(held_lookup)
            .join()
            .ok()
            .and_then(Result::ok),
    });
    Ok(())
}

fn held_vm() -> Result<(VmFd, VcpuFd), kvm_ioctls::Error> {
    let vm = Kvm::new()?.create_vm()?;
    vm.create_irq_chip()?;
    let vcpu = vm.create_vcpu(0)?;
    Ok((vm, vcpu))
}

/// In a network namespace of its own, whose ports nobody asks for.
fn held_lookup() -> Result<(AllPorts, TcpListener)> {
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    let namespace = File::open("/proc/thread-self/ns/net").context("cannot open a namespace")?;
    let listener = TcpListener::bind("0.0.0.0:0").context("cannot listen")?;
    let lookup = listen_on_all_ports(namespace.as_fd(), &listener).context("cannot attach")?;
    Ok((lookup, listener))
}

fn folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))
}

/// Writes a text file, with the folders above it.
pub(super) fn write(path: &Path, text: &str) -> Result<()> {
    folder(path.parent().unwrap_or(Path::new("/")))?;
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn mount_at(kind: &str, source: &str, at: &str, options: &str) -> Result<()> {
    folder(Path::new(at))?;
    let options = (!options.is_empty()).then_some(options);
    mount(Some(source), at, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("cannot mount {kind} at {at}"))
}

fn mounts(state_disk: bool) -> Result<()> {
    mount_at("tmpfs", "tmpfs", "/run", "mode=755")?;
    mount_at("tmpfs", "tmpfs", "/dev/shm", "mode=1777")?;
    mount_at(
        "devpts",
        "devpts",
        "/dev/pts",
        "gid=5,mode=620,ptmxmode=666",
    )?;
    mount_at("mqueue", "mqueue", "/dev/mqueue", "")?;
    mount_at("cgroup2", "cgroup2", "/sys/fs/cgroup", "")?;
    mount_at("debugfs", "debugfs", "/sys/kernel/debug", "")?;
    mount_at("tracefs", "tracefs", "/sys/kernel/tracing", "")?;
    mount_at("bpf", "bpf", "/sys/fs/bpf", "mode=700")?;
    if state_disk {
        mount_at("ext4", "/dev/vda", DISK_FOLDER, "")?;
    }
    for state in STATE_FOLDERS {
        if state_disk {
            let kept = format!("{DISK_FOLDER}{state}");
            folder(Path::new(&kept))?;
            folder(Path::new(state))?;
            let none = None::<&str>;
            mount(Some(kept.as_str()), state, none, MsFlags::MS_BIND, none)
                .with_context(|| format!("cannot mount {kept} at {state}"))?;
        } else {
            mount_at("tmpfs", "tmpfs", state, "mode=755")?;
        }
    }
    // Mounts made under shared mounts reach containers that ask for them, as on a systemd node.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SHARED,
        None::<&str>,
    )
    .context("cannot make the mounts of the node shared")?;
    for link in ["fd", "stdin", "stdout", "stderr"] {
        let target = if link == "fd" {
            "/proc/self/fd".to_owned()
        } else {
            fd_link(link)
        };
        let _exists = std::os::unix::fs::symlink(target, format!("/dev/{link}"));
    }
    Ok(())
}

fn fd_link(name: &str) -> String {
    let number = ["stdin", "stdout", "stderr"]
        .iter()
        .position(|known| *known == name);
    format!("/proc/self/fd/{}", number.unwrap_or_default())
}

/// No process may sit in a cgroup that hands controllers down (cgroup-v2.rst, "No Internal Process
/// Constraint"); user processes of the node go to `/init`.
fn cgroups() -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let init = root.join("init");
    folder(&init)?;
    let processes = std::fs::read_to_string(root.join("cgroup.procs"))
        .context("cannot list the processes of the root cgroup")?;
    for process in processes.lines() {
        // Kernel threads cannot be moved and need not be.
        let _kernel_thread = std::fs::write(init.join("cgroup.procs"), process);
    }
    let present = std::fs::read_to_string(root.join("cgroup.controllers"))
        .context("cannot list the cgroup controllers")?;
    for controller in CONTROLLERS {
        if !present.split_whitespace().any(|known| known == controller) {
            bail!("cgroup v2 has no controller {controller} here: take it away from cgroup v1");
        }
        std::fs::write(
            root.join("cgroup.subtree_control"),
            format!("+{controller}"),
        )
        .with_context(|| format!("cannot hand down the cgroup controller {controller}"))?;
    }
    Ok(())
}

fn network() -> Result<()> {
    for (name, value) in SYSCTLS {
        let file = Path::new("/proc/sys").join(name);
        std::fs::write(&file, value).with_context(|| format!("cannot set {}", file.display()))?;
    }
    // The API server and kubelet take the address of the default route; nothing is behind it.
    for line in [
        "link set lo up",
        "link add eth0 type dummy",
        "addr add 10.77.0.1/24 dev eth0",
        "addr add fd00:77::1/64 dev eth0 nodad",
        "link set eth0 up",
        "route add default via 10.77.0.254",
        "-6 route add default via fd00:77::fe",
    ] {
        tool("ip", &line.split(' ').collect::<Vec<_>>())?;
    }
    nix::unistd::sethostname("node1").context("cannot set the host name")?;
    std::fs::write("/etc/hostname", "node1\n").context("cannot write /etc/hostname")?;
    std::fs::write("/etc/hosts", "127.0.0.1 localhost node1\n::1 localhost\n")
        .context("cannot write /etc/hosts")?;
    std::fs::write("/etc/resolv.conf", "nameserver 10.0.0.10\n")
        .context("cannot write /etc/resolv.conf")
}

fn tool(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{program} {} failed: {}",
            arguments.join(" "),
            errors.trim()
        );
    }
    Ok(())
}

fn install(source: &Path, destination: &Path, mode: u32) -> Result<()> {
    folder(destination.parent().unwrap_or(Path::new("/")))?;
    std::fs::copy(source, destination).with_context(|| {
        format!(
            "cannot copy {} to {}",
            source.display(),
            destination.display()
        )
    })?;
    std::fs::set_permissions(destination, std::fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot set the mode of {}", destination.display()))
}

/// Gives a PCI function to vfio-pci (Documentation/driver-api/vfio.rst).
fn bind_to_vfio(address: &str) -> Result<()> {
    let device = Path::new("/sys/bus/pci/devices").join(address);
    if !device.exists() {
        bail!("there is no PCI device {address} in the node");
    }
    let unbind = device.join("driver/unbind");
    if unbind.exists() {
        std::fs::write(&unbind, address)
            .with_context(|| format!("cannot take {address} from its driver"))?;
    }
    std::fs::write(device.join("driver_override"), "vfio-pci")
        .with_context(|| format!("cannot choose vfio-pci for {address}"))?;
    std::fs::write("/sys/bus/pci/drivers_probe", address)
        .with_context(|| format!("cannot bind {address} to vfio-pci"))
}
