//! The node's initramfs: busybox, the modules of the stock kernel in load order, and an init that
//! puts a tmpfs over the computer's own root.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cpio::Cpio;
use crate::node::deps::{cache_key, once};
use crate::node::{paths, tools};

/// Runs before there is a root file system; then [`crate::node::inside`] takes over.
const INIT: &str = include_str!("init.sh");

/// Modules that the node needs, besides what they depend on. Of those that a kernel has built in
/// or lacks, nothing is loaded.
const MODULES: &[&str] = &[
    // The root, and what is mounted over it.
    "9pnet_virtio",
    "9p",
    "virtio_pci",
    "overlay",
    "erofs",
    "ext4",
    "loop",
    "virtio_blk",
    // The control channel.
    "virtio_console",
    // KVM and what a VMM uses.
    "kvm_amd",
    "kvm_intel",
    "tun",
    "tap",
    "vhost_vsock",
    "vhost_net",
    // Pods' networks.
    "virtio_net",
    "af_packet",
    "bridge",
    "br_netfilter",
    "veth",
    "dummy",
    "macvlan",
    "ipvlan",
    "nf_nat",
    "nf_tables",
    "nft_compat",
    "nft_chain_nat",
    "nft_ct",
    "nft_masq",
    "nft_nat",
    "xt_MASQUERADE",
    "xt_comment",
    "xt_conntrack",
    "xt_mark",
    "xt_addrtype",
    "xt_multiport",
    "xt_nat",
    "xt_tcpudp",
    "xt_statistic",
    "xt_REDIRECT",
    "xt_limit",
    "ip_tables",
    "iptable_nat",
    "iptable_filter",
    "ip6_tables",
    "ip6table_nat",
    "ip6table_filter",
    "sch_ingress",
    "sch_tbf",
    "sch_htb",
    "sch_fq_codel",
    "act_mirred",
    "act_police",
    "ifb",
    "cls_u32",
    "cls_matchall",
    "cls_bpf",
    // Passthrough.
    "vfio_pci",
    "vfio_iommu_type1",
    "nvme",
];

/// A kernel and its initramfs.
#[derive(Debug, Clone)]
pub struct BootFiles {
    /// Release of the kernel.
    pub release: String,
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
}

/// Finds the kernel and makes its initramfs, unless the cache has it.
pub fn prepare() -> Result<BootFiles> {
    tools::require(tools::BOOT)?;
    let release = tools::kernel_release()?;
    let key = cache_key(format!(
        "{release} {INIT} {MODULES:?} {}",
        env!("CARGO_PKG_VERSION")
    ));
    let folder = paths::node_cache()?.join(format!("initramfs-{key}"));
    let initramfs = folder.join("initramfs.cpio");
    once(&folder, |partial| {
        let bytes = build(&release)?;
        let file = partial.join("initramfs.cpio");
        std::fs::write(&file, bytes).with_context(|| format!("cannot write {}", file.display()))
    })?;
    let kernel = PathBuf::from(format!("/boot/vmlinuz-{release}"));
    Ok(BootFiles {
        release,
        kernel,
        initramfs,
    })
}

fn build(release: &str) -> Result<Vec<u8>> {
    let busybox = tools::find("busybox").context("busybox is missing")?;
    let busybox =
        std::fs::read(&busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    let mut cpio = Cpio::default();
    for folder in [
        "bin", "modules", "proc", "sys", "dev", "lower", "upper", "newroot",
    ] {
        cpio.folder(folder);
    }
    cpio.file("bin/busybox", 0o755, &busybox);
    let mut order = String::new();
    for file in module_files(release)? {
        let name = file
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let name = name.trim_end_matches(".xz");
        cpio.file(&format!("modules/{name}"), 0o644, &unpacked(&file)?);
        order.push_str(name);
        order.push('\n');
    }
    cpio.file("modules/order", 0o644, order.as_bytes());
    cpio.file("init", 0o755, INIT.as_bytes());
    Ok(cpio.finish())
}

/// The modules' files, each after those that it depends on.
fn module_files(release: &str) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = Vec::new();
    for module in MODULES {
        let mut command = tools::child("modprobe", "TERM");
        command.args(["-S", release, "--show-depends", module]);
        let output = command.output().context("cannot run modprobe")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let inserted = text.lines().filter_map(|line| line.strip_prefix("insmod "));
        for path in inserted.filter_map(|rest| rest.split_whitespace().next()) {
            let path = PathBuf::from(path);
            if !files.contains(&path) {
                files.push(path);
            }
        }
    }
    if files.is_empty() {
        bail!("modprobe knows no module of kernel {release}: is /lib/modules/{release} complete?");
    }
    Ok(files)
}

fn unpacked(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_none_or(|extension| extension != "xz") {
        return std::fs::read(file).with_context(|| format!("cannot read {}", file.display()));
    }
    let output = Command::new("xz")
        .arg("-dc")
        .arg(file)
        .output()
        .context("cannot run xz")?;
    if !output.status.success() {
        bail!("xz cannot unpack {}", file.display());
    }
    Ok(output.stdout)
}
