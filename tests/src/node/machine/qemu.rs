//! A node in QEMU, emulated, with SVM emulated too, so that real KVM runs inside on any computer.
//!
//! The control channel is QEMU's own standard input and output: no socket file is left behind,
//! and both ends notice at once when the other is gone.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Kept, Machine, POWER_OFF_TIMEOUT, Started};
use crate::node::boot::BootFiles;
use crate::node::builder::{Builder, Device};
use crate::node::inside::init::PORT_NAME;
use crate::node::{paths, tools};

/// Names of the logs in the results folder.
const SERIAL_LOG: &str = "serial.log";
/// State of the processors whenever one was reset.
const PROCESSOR_LOG: &str = "processor.log";
const QEMU_LOG: &str = "qemu.log";
const COMMAND_FILE: &str = "qemu.command";

/// How long a closed channel waits for QEMU's exit status, to name it.
const EXIT_STATUS_TIMEOUT: Duration = Duration::from_secs(5);

struct Qemu {
    kept: Arc<Kept>,
    results: PathBuf,
}

impl Machine for Qemu {
    fn logs(&self) -> Vec<PathBuf> {
        let names = [SERIAL_LOG, PROCESSOR_LOG, QEMU_LOG, COMMAND_FILE];
        names.iter().map(|name| self.results.join(name)).collect()
    }

    fn end(&self, timeout: Duration) {
        if self.kept.wait(timeout).is_none() {
            self.kept.kill();
        }
    }

    fn kill(&self) {
        self.kept.kill();
        self.kept.wait(POWER_OFF_TIMEOUT);
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kept.kill();
    }
}

/// The emulator: `$PERICARP_QEMU`, else the one that its recipe keeps in the cache.
fn emulator() -> Result<String> {
    if let Ok(program) = std::env::var("PERICARP_QEMU") {
        return Ok(program);
    }
    let recipe = paths::checkout().join("tests/qemu/build");
    let status = Command::new(&recipe)
        .stdout(std::io::stderr())
        .status()
        .with_context(|| format!("cannot run {}", recipe.display()))?;
    ensure!(
        status.success(),
        "{} failed: see above, or set PERICARP_QEMU to a QEMU that is sound",
        recipe.display()
    );
    let program = paths::cache()?.join("qemu/qemu-system-x86_64");
    Ok(program.display().to_string())
}

/// Starts QEMU for a node.
pub fn start(builder: &Builder, boot: &BootFiles, results: &Path) -> Result<Started> {
    let mut command = tools::child(&emulator()?, "KILL");
    command.args(arguments(builder, boot, results)?);
    let text = format!("{command:?}\n");
    std::fs::write(results.join(COMMAND_FILE), text).context("cannot write QEMU's command line")?;
    let log = File::create(results.join(QEMU_LOG)).context("cannot make QEMU's log")?;
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log);
    let (kept, pipes) = Kept::start(command)?;
    let kept = Arc::new(kept);
    let (watched, folder) = (Arc::clone(&kept), results.to_path_buf());
    let ended = Box::new(move || explain(&watched, &folder));
    Ok(Started {
        machine: Arc::new(Qemu {
            kept,
            results: results.to_path_buf(),
        }),
        reader: Box::new(pipes.stdout),
        writer: Box::new(pipes.stdin),
        ended,
    })
}

/// Why QEMU is gone, in one line.
fn explain(kept: &Kept, results: &Path) -> String {
    let status = kept.wait(EXIT_STATUS_TIMEOUT);
    let failed = status.is_some_and(|status| status.code().is_some_and(|code| code != 0));
    let status = status.map_or_else(|| "its channel closed".to_owned(), |s| s.to_string());
    let last_line = |name: &str| {
        let bytes = std::fs::read(results.join(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let line = text.lines().rev().find(|line| !line.trim().is_empty());
        line.map(|line| line.trim().to_owned())
    };
    // QEMU's own log is full of notes on what TCG lacks; its last line counts when it failed.
    let said = last_line(if failed { QEMU_LOG } else { SERIAL_LOG });
    let said = said.unwrap_or_else(|| "without a word".to_owned());
    let log = results.join(SERIAL_LOG);
    format!("the node ended ({status}): {said}: see {}", log.display())
}

/// Of a node with an IOMMU. On a busy computer no tick may come while the kernel tries its timer,
/// and behind an interrupt remapper it gives up then: it is told not to try.
const IOMMU_WORDS: &str = " intel_iommu=on iommu=pt no_timer_check";

/// What is the same for each node; the firmware is that of Debian's packages.
const FIXED: &[&str] = &[
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    "-no-reboot",
    "-L",
    "/usr/share/qemu",
    "-L",
    "/usr/share/seabios",
    "-L",
    "/usr/lib/ipxe/qemu",
];

fn arguments(builder: &Builder, boot: &BootFiles, results: &Path) -> Result<Vec<String>> {
    let mut all: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| all.extend(words.iter().map(|word| (*word).to_owned()));
    let mut kernel_line = format!(
        "console=ttyS0 panic=-1 quiet net.ifnames=0 node={}",
        paths::node_program()?.display()
    );
    if builder.icount {
        // One virtual nanosecond is one executed instruction: figures repeat.
        add(&["-accel", "tcg", "-icount", "shift=0,sleep=off"]);
    } else {
        add(&["-accel", "tcg,thread=multi"]);
    }
    if builder.devices.is_empty() {
        add(&["-machine", "pc"]);
    } else {
        add(&[
            "-machine",
            "q35",
            "-device",
            "intel-iommu,intremap=on,caching-mode=off",
        ]);
        kernel_line.push_str(IOMMU_WORDS);
    }
    let cpus = if builder.icount { 1 } else { builder.cpus };
    add(&["-cpu", "EPYC,+svm,+npt", "-smp", &processors(builder, cpus)]);
    add(&["-m", &format!("{}M", builder.memory_mib)]);
    if let Some(file) = &builder.state_disk {
        // A file of this computer outlives the emulator whether or not it was flushed.
        let drive = "if=virtio,format=raw,cache=unsafe";
        add(&["-drive", &format!("file={},{drive}", file.display())]);
    }
    add(FIXED);
    // A processor that gives up (triple fault) leaves its state here; nothing else does.
    let processor_log = results.join(PROCESSOR_LOG).display().to_string();
    add(&["-d", "cpu_reset", "-D", &processor_log]);
    add(&[
        "-serial",
        &format!("file:{}", results.join(SERIAL_LOG).display()),
    ]);
    add(&["-chardev", "stdio,id=control,signal=off"]);
    add(&["-device", "virtio-serial-pci"]);
    add(&[
        "-device",
        &format!("virtserialport,chardev=control,name={PORT_NAME}"),
    ]);
    let shared = "security_model=none,multidevs=remap";
    add(&[
        "-virtfs",
        &format!("local,path=/,mount_tag=root,readonly=on,{shared}"),
    ]);
    let folder = results.display();
    add(&[
        "-virtfs",
        &format!("local,path={folder},mount_tag=results,{shared}"),
    ]);
    add(&["-kernel", &boot.kernel.to_string_lossy()]);
    add(&[
        "-initrd",
        &boot.initramfs.to_string_lossy(),
        "-append",
        &kernel_line,
    ]);
    all.extend(numa_arguments(builder));
    for (index, device) in builder.devices.iter().enumerate() {
        all.extend(device_arguments(index, *device, results)?);
    }
    Ok(all)
}

/// Cores of one socket are never near two memory nodes: the node's kernel would warn of it.
fn processors(builder: &Builder, cpus: u32) -> String {
    let sockets = if builder.numa_nodes > 1 { cpus } else { 1 };
    format!("{cpus},sockets={sockets}")
}

/// An even share of memory and CPUs for each NUMA node, if there is more than one.
fn numa_arguments(builder: &Builder) -> Vec<String> {
    let nodes = builder.numa_nodes;
    if nodes < 2 || builder.icount {
        return Vec::new();
    }
    let (memory, cpus) = (builder.memory_mib / nodes, builder.cpus / nodes);
    let node = |number: u32| {
        let last = if number + 1 == nodes {
            // What does not divide evenly is the last one's.
            (builder.memory_mib - memory * number, builder.cpus - 1)
        } else {
            (memory, cpus * (number + 1) - 1)
        };
        [
            "-object".to_owned(),
            format!("memory-backend-ram,id=numa{number},size={}M", last.0),
            "-numa".to_owned(),
            format!(
                "node,nodeid={number},memdev=numa{number},cpus={}-{}",
                cpus * number,
                last.1
            ),
        ]
    };
    (0..nodes).flat_map(node).collect()
}

/// Size of the disks that are added for passthrough.
const DISK_BYTES: u64 = 320 * 1024 * 1024;

/// A device behind a root port of its own, which gives it an IOMMU group of its own.
fn device_arguments(index: usize, device: Device, results: &Path) -> Result<Vec<String>> {
    let port = format!("port{index}");
    let slot = index + 1;
    let mut words = vec![
        "-device".to_owned(),
        format!(
            "pcie-root-port,id={port},chassis={slot},bus=pcie.0,addr={:#x}",
            0x10 + index
        ),
    ];
    let disk = results.join(format!("disk{index}.img"));
    if !matches!(
        device,
        Device::VirtioGpu | Device::Edu | Device::NetworkCard
    ) {
        let file = File::create(&disk).context("cannot make a disk for the node")?;
        file.set_len(DISK_BYTES)
            .context("cannot size a disk for the node")?;
        let drive = format!("file={},if=none,id=disk{index},format=raw", disk.display());
        words.extend(["-drive".to_owned(), drive]);
    }
    let model = match device {
        Device::Nvme => format!("nvme,drive=disk{index},serial=pericarp{index}"),
        Device::VirtioBlk => {
            format!("virtio-blk-pci,drive=disk{index},iommu_platform=on,disable-legacy=on")
        }
        Device::PinOnly => {
            let options = "iommu_platform=on,disable-legacy=on,vectors=0";
            format!("virtio-blk-pci,drive=disk{index},{options}")
        }
        Device::VirtioGpu => "virtio-gpu-pci,iommu_platform=on".to_owned(),
        Device::Edu => "edu,dma_mask=0xffffffffffffffff".to_owned(),
        // Without the image for booting from it, which the built emulator lacks.
        Device::NetworkCard => "igb,romfile=".to_owned(),
    };
    words.extend([
        "-device".to_owned(),
        format!("{model},bus={port},id=device{index}"),
    ]);
    Ok(words)
}
