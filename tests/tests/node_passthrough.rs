//! Functions of the node in pods, behind its emulated IOMMU.
//!
//! `PERICARP_FULL=1` makes the numbers those of SPEC.md; without it they fit a run of CI.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use pericarp_tests::node::containerd::{PASSTHROUGH, Pod};
use pericarp_tests::node::images::BUSYBOX;
use pericarp_tests::node::{Builder, Containerd, Device, Node, Session, Version, pericarp};
use pericarp_tests::pods::leftovers::Leftovers;
use pericarp_tests::pods::passthrough::{
    Function, VFIO, allow, draw, fill, interrupts, locked_kib,
};
use pericarp_tests::pods::{container_config, pod_config};
use serde_json::{Value, json};

/// The handler of containerd.
const HANDLER: &str = "pericarp";

/// Where the function is whose interrupts are MSI, and the one that has none but its pin.
const EDU: usize = 4;
const PIN_ONLY: usize = 5;

/// Where the network card is, whose driver is a module of the kernel with drivers.
const CARD: usize = 6;

/// The node with two disks, an NVMe disk, a display, QEMU's teaching device, a disk without
/// messages and a network card; None when what it needs is not built.
fn node(test: &str) -> Option<Session> {
    let builder = || {
        let devices = [
            Device::VirtioBlk,
            Device::VirtioBlk,
            Device::Nvme,
            Device::VirtioGpu,
            Device::Edu,
            Device::PinOnly,
            Device::NetworkCard,
        ];
        let builder = Builder::default().name("passthrough").memory_mib(4096);
        let builder = builder.numa_nodes(2);
        devices.into_iter().fold(builder, Builder::device)
    };
    pericarp::session(test, builder)
}

/// The node's functions, all with vfio-pci and allowed, in the order of [`node`].
fn functions(node: &Node) -> Result<Vec<Function>> {
    let functions = Function::all(node)?;
    ensure!(functions.len() == 7, "{functions:?}");
    for function in functions.iter().filter(|one| one.driver != VFIO) {
        function.bind(node, VFIO)?;
    }
    allow(node, &functions)?;
    Ok(functions)
}

fn sleeper(name: &str, functions: &[&Function]) -> Value {
    let mut config = container_config(name, BUSYBOX, "exec sleep 1000");
    for function in functions {
        function.ask(&mut config);
    }
    config
}

fn remove(node: &Node, containerd: &Containerd, container: &str) -> Result<()> {
    containerd.crictl_text(node, &["stop", "--timeout", "0", container])?;
    containerd.crictl_text(node, &["rm", container]).map(drop)
}

/// Time of a line that moves the whole of what SPEC.md says, by emulated processors.
const LONG_TIMEOUT_S: u64 = 1800;

/// Runs a line of shell in a container, which may take long.
fn exec_long(node: &Node, containerd: &Containerd, container: &str, line: &str) -> Result<String> {
    let command = containerd
        .crictl()
        .args(["exec", container, "sh", "-c", line]);
    let said = node.text(&command.timeout_s(LONG_TIMEOUT_S))?;
    Ok(said.trim().to_owned())
}

/// Where containerd looks for the CDI devices of the test.
const CDI: &str = "/etc/cdi/pericarp.json";

/// Gives functions names of CDI devices.
fn name_for_cdi(node: &Node, functions: &[(&str, &Function)]) -> Result<()> {
    let device = |(name, function): &(&str, &Function)| {
        let nodes = json!([{"path": format!("/dev/vfio/{}", function.group)}]);
        json!({"name": name, "containerEdits": {"deviceNodes": nodes}})
    };
    let devices: Vec<Value> = functions.iter().map(device).collect();
    let spec = json!({
        "cdiVersion": "0.6.0", "kind": "pericarp.dev/function", "devices": devices,
    });
    node.write(CDI, &spec.to_string())
}

/// Has a container ask for a CDI device by its name.
fn by_cdi(mut config: Value, name: &str) -> Value {
    config["CDI_devices"] = json!([{"name": format!("pericarp.dev/function={name}")}]);
    config
}

/// A disk that the default kernel drives: into a container, to its neighbour, back to the host.
fn disk_travels(node: &Node) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let functions = functions(node)?;
    let disk = &functions[0];
    let before = Leftovers::look(node)?;
    let pod = containerd.run_pod(node, HANDLER, &pod_config("disk"))?;
    let other = containerd.run_container(node, &pod, &sleeper("other", &[]))?;
    ensure!(locked_kib(node)? == 0, "memory is locked without a device");
    let first = containerd.run_container(node, &pod, &sleeper("first", &[disk]))?;
    let in_guest = |line: &str| containerd.exec_shell(node, &first, line);
    let nodes = in_guest("cd /dev; ls -d vd* vfio 2>/dev/null; true")?;
    ensure!(
        nodes.starts_with("vd") && !nodes.contains("vfio"),
        "/dev has {nodes}"
    );
    let mib = if pericarp::full_sizes() { 256 } else { 8 };
    let line = format!("d=/dev/{nodes}\n{}", fill(mib));
    let sum = exec_long(node, &containerd, &first, &line)?;
    in_guest(&interrupts("virtio.*-req"))?;
    ensure!(locked_kib(node)? >= 192 << 10, "guest memory is not pinned");
    // The neighbour has neither the node nor the right to make itself one.
    let line = "set -- $(cat /sys/class/block/NAME/dev | tr : ' '); mknod /tmp/d b $1 $2 &&
        head -c 1 /tmp/d 2>&1; ls /dev/NAME 2>&1"
        .replace("NAME", &nodes);
    let refused = containerd.crictl_run(node, &["exec", &other, "sh", "-c", &line])?;
    let said = format!("{}{}", refused.stdout, refused.stderr);
    ensure!(
        said.contains("not permitted") && said.contains("No such file"),
        "the other container: {said}"
    );
    remove(node, &containerd, &first)?;
    ensure!(locked_kib(node)? == 0, "memory stays pinned");
    let gone = containerd.exec_shell(node, &other, "ls /sys/class/block")?;
    ensure!(!gone.contains(&nodes), "the guest keeps the disk: {gone}");
    // Hot-plugged once more, into another container of the living pod.
    // This time by the name of a CDI device, which containerd turns into the same node.
    name_for_cdi(node, &[("disk", disk)])?;
    let config = by_cdi(sleeper("second", &[]), "disk");
    let second = containerd.run_container(node, &pod, &config)?;
    let line = format!("dd if=$(ls /dev/vd*) bs=1M count={mib} 2>/dev/null | md5sum");
    let again = exec_long(node, &containerd, &second, &line)?;
    ensure!(again.starts_with(&sum), "{again}, not {sum}");
    node.shell(&format!("rm {CDI}"))?;
    containerd.remove_pod(node, &pod)?;
    Leftovers::nothing_since(node, &before)?;
    ensure!(disk.sum(node, mib)? == sum, "the host reads else");
    Ok(())
}

#[test]
fn a_disk_goes_from_container_to_container_and_back_to_the_host() {
    let Some(node) = node("passthrough-disk") else {
        return;
    };
    disk_travels(&node).unwrap();
}

/// A container that has the node's own programs beneath `/host`, read-only.
fn with_host_programs(name: &str, functions: &[&Function]) -> Value {
    let mut config = sleeper(name, functions);
    config["mounts"] = json!([
        {"host_path": "/usr", "container_path": "/host/usr", "readonly": true}
    ]);
    config
}

/// An NVMe disk and a display, by the names of CDI devices.
fn disk_and_display(node: &Node) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let functions = functions(node)?;
    let (nvme, display) = (&functions[2], &functions[3]);
    let before = Leftovers::look(node)?;
    let pod = containerd.run_pod(node, PASSTHROUGH, &pod_config("nvme"))?;
    name_for_cdi(node, &[("nvme", nvme), ("display", display)])?;
    let container = by_cdi(sleeper("c", &[]), "nvme");
    let container = containerd.run_container(node, &pod, &container)?;
    let mib = if pericarp::full_sizes() { 256 } else { 8 };
    let line = format!("d=/dev/nvme0n1\n{}", fill(mib));
    let sum = exec_long(node, &containerd, &container, &line)?;
    containerd.exec_shell(node, &container, &interrupts("nvme0q"))?;
    // A second function into the living pod, for another container.
    let drawing = by_cdi(with_host_programs("draw", &[]), "display");
    let drawing = containerd.run_container(node, &pod, &drawing)?;
    let nodes = containerd.exec_shell(node, &drawing, "cd /dev; ls -d nvme* dri/*; true")?;
    ensure!(
        nodes.contains("dri/card0") && !nodes.contains("nvme"),
        "/dev has {nodes}"
    );
    let drawn = containerd.exec_shell(node, &drawing, &draw())?;
    ensure!(drawn.starts_with("drawn "), "{drawn}");
    containerd.remove_pod(node, &pod)?;
    node.shell(&format!("rm {CDI}"))?;
    Leftovers::nothing_since(node, &before)?;
    ensure!(nvme.sum(node, mib)? == sum, "the host reads else");
    Ok(())
}

#[test]
fn an_nvme_disk_stores_and_a_display_draws() {
    if pericarp::passthrough_kernel().is_none() {
        eprintln!("skipped: not built: the kernel with drivers (make kernel FLAVOUR=passthrough)");
        return;
    }
    let Some(node) = node("passthrough-nvme") else {
        return;
    };
    disk_and_display(&node).unwrap();
}

/// Rounds of memory that is taken, filled, written by the device, freed (and reported free), read
/// back by the device into other memory and compared. `$d` is the disk.
const ROUNDS: &str = "
set -e; n=0; d=$(ls /dev/vd*)
while [ $n -lt ROUNDS ]; do
    dd if=/dev/urandom of=/dev/shm/a bs=512k count=1 2>/dev/null
    dd if=/dev/shm/a of=$d bs=512k oflag=direct conv=notrunc 2>/dev/null
    a=$(md5sum </dev/shm/a); rm /dev/shm/a
    dd if=$d of=/dev/shm/b bs=512k count=1 iflag=direct 2>/dev/null
    b=$(md5sum </dev/shm/b); rm /dev/shm/b
    [ \"$a\" = \"$b\" ] || { echo round $n: $a, $b; exit 1; }
    n=$((n + 1))
done
echo $n rounds";

fn rounds(node: &Node) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let functions = functions(node)?;
    let before = Leftovers::look(node)?;
    let pod = containerd.run_pod(node, HANDLER, &pod_config("rounds"))?;
    let container = sleeper("c", &[&functions[0]]);
    let container = containerd.run_container(node, &pod, &container)?;
    let count = if pericarp::full_sizes() { 1000 } else { 10 };
    let line = ROUNDS.replace("ROUNDS", &count.to_string());
    let said = exec_long(node, &containerd, &container, &line)?;
    ensure!(said == format!("{count} rounds"), "{said}");
    containerd.remove_pod(node, &pod)?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn memory_that_is_freed_and_taken_again_is_what_the_device_sees() {
    let Some(node) = node("passthrough-rounds") else {
        return;
    };
    rounds(&node).unwrap();
}

/// Why a container of `pod` with `function` is refused.
fn refusal(
    node: &Node,
    containerd: &Containerd,
    pod: &Pod,
    name: &str,
    function: &Function,
) -> Result<String> {
    let created = containerd.run_container(node, pod, &sleeper(name, &[function]));
    let error = created.err().context("it was accepted")?;
    Ok(format!("{error:#}"))
}

fn refusals(node: &Node) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let functions = functions(node)?;
    let (disk, other) = (&functions[0], &functions[1]);
    let before = Leftovers::look(node)?;
    let pod = containerd.run_pod(node, HANDLER, &pod_config("refusals"))?;
    let keeper = containerd.run_pod(node, HANDLER, &pod_config("keeper"))?;
    containerd.run_container(node, &keeper, &sleeper("keeper", &[disk]))?;
    let mut seen = vec![(
        refusal(node, &containerd, &pod, "in-use", disk)?,
        "in use by another pod",
    )];
    let error = refusal(node, &containerd, &pod, "no-driver", &functions[2])?;
    seen.push((error, "FLAVOUR=passthrough"));
    let error = refusal(node, &containerd, &pod, "pin", &functions[PIN_ONLY])?;
    seen.push((error, "interrupts by its pin alone"));
    // The settings are those of the pod's start.
    allow(node, &functions[..1])?;
    let denied = containerd.run_pod(node, HANDLER, &pod_config("denied"))?;
    let error = refusal(node, &containerd, &denied, "denied", other)?;
    seen.push((error, "security.passthrough_devices"));
    allow(node, &functions)?;
    let mut small = pod_config("small");
    small["linux"] = json!({
        "cgroup_parent": "/small", "resources": {"memory_limit_in_bytes": 128 << 20}
    });
    node.shell(
        "mkdir -p /sys/fs/cgroup/small; echo 128M >/sys/fs/cgroup/small/memory.max
         echo +memory >/sys/fs/cgroup/small/cgroup.subtree_control || true",
    )?;
    let small = containerd.run_pod(node, HANDLER, &small)?;
    let error = refusal(node, &containerd, &small, "small", other)?;
    seen.push((error, "overhead.podFixed.memory"));
    for (error, words) in &seen {
        let named = error.contains("linux.devices[/dev/vfio/") && error.contains("function 0000:");
        ensure!(named && error.contains(words), "{words}: {error}");
    }
    for pod in [&pod, &keeper, &denied, &small] {
        containerd.remove_pod(node, pod)?;
    }
    node.shell("rmdir /sys/fs/cgroup/small")?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn what_cannot_be_given_is_refused_by_name_and_remedy() {
    let Some(node) = node("passthrough-refusals") else {
        return;
    };
    refusals(&node).unwrap();
}

/// Two pods with a disk each at once, then one of the disks through pods in turn.
fn pods_share_the_node(node: &Node) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let functions = functions(node)?;
    let before = Leftovers::look(node)?;
    let mut pods = Vec::new();
    for (index, disk) in functions[..2].iter().enumerate() {
        let pod = containerd.run_pod(node, HANDLER, &pod_config(&format!("at-once-{index}")))?;
        let container = containerd.run_container(node, &pod, &sleeper("c", &[disk]))?;
        let line = format!("echo pod-{index} | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null");
        let line = line.replace("/dev/vda", "$(ls /dev/vd*)");
        containerd.exec_shell(node, &container, &line)?;
        pods.push((pod, container));
    }
    let read = "head -c 5 $(ls /dev/vd*)";
    for (index, (pod, container)) in pods.iter().enumerate() {
        let seen = containerd.exec_shell(node, container, read)?;
        ensure!(seen == format!("pod-{index}"), "pod {index} reads {seen}");
        containerd.remove_pod(node, pod)?;
    }
    let turns = if pericarp::full_sizes() { 20 } else { 3 };
    for turn in 0..turns {
        let pod = containerd.run_pod(node, HANDLER, &pod_config(&format!("turn-{turn}")))?;
        let container = sleeper("c", &[&functions[0]]);
        let container = containerd.run_container(node, &pod, &container)?;
        let seen = containerd.exec_shell(node, &container, read)?;
        ensure!(seen == "pod-0", "turn {turn} reads {seen}");
        containerd.remove_pod(node, &pod)?;
    }
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn pods_have_a_disk_each_at_once_and_one_disk_in_turn() {
    let Some(node) = node("passthrough-pods") else {
        return;
    };
    pods_share_the_node(&node).unwrap();
}

/// The end of VMM, shim or agent gives the function back, and the next pod can have it.
fn kills(node: &Node) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let functions = functions(node)?;
    let disk = &functions[0];
    let before = Leftovers::look(node)?;
    // The last is for the guest: its kernel dies, and the agent with it.
    let panic = "mount -o remount,rw /proc/sys; echo 2 >/proc/sys/vm/panic_on_oom; tail /dev/zero";
    for (name, kill) in [
        ("vmm", "kill -9 $(pgrep -f '^[^ ]*pericarp-vmm')"),
        (
            "shim",
            "kill -9 $(pgrep -f '^[^ ]*containerd-shim-pericarp-v2 ')",
        ),
        ("agent", panic),
    ] {
        let mut config = pod_config(&format!("killed-{name}"));
        config["linux"] = json!({"security_context": {"privileged": true}});
        let pod = containerd.run_pod(node, HANDLER, &config)?;
        let mut config = sleeper("c", &[disk]);
        config["linux"] = json!({
            "security_context": {"privileged": true},
            "resources": {"memory_limit_in_bytes": 32 << 20},
        });
        let container = containerd.run_container(node, &pod, &config)?;
        if name == "agent" {
            let line = ["exec", &container, "sh", "-c", kill];
            let ended = containerd.crictl_run(node, &line)?;
            ensure!(!ended.exit.success(), "the guest outlived its kernel");
        } else {
            node.shell(kill)?;
        }
        containerd.wait_for_end_of_containers(node, &pod)?;
        containerd.remove_pod(node, &pod)?;
        ensure!(locked_kib(node)? == 0, "{name}: memory stays pinned");
        Leftovers::nothing_since(node, &before).with_context(|| format!("{name} was killed"))?;
    }
    let pod = containerd.run_pod(node, HANDLER, &pod_config("after-kills"))?;
    containerd.run_container(node, &pod, &sleeper("c", &[disk]))?;
    containerd.remove_pod(node, &pod)?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn whoever_is_killed_the_next_pod_has_the_function() {
    let Some(node) = node("passthrough-kills") else {
        return;
    };
    kills(&node).unwrap();
}

/// Faults of the IOMMU that the node's kernel counts against a function.
fn iommu_faults(node: &Node, function: &Function) -> Result<u64> {
    // The kernel names a function without its segment in some lines and with it in others.
    let short = function.address.trim_start_matches("0000:");
    let line = format!("dmesg | grep 'DMAR:.*fault addr' | grep -c '{short}' || true");
    node.shell(&line)?.trim().parse().context("faults")
}

/// What the kernel says when it is hurt.
fn kernel_is_sound(node: &Node) -> Result<()> {
    let line = "dmesg | grep -E 'BUG:|Oops|WARNING: CPU|general protection|soft lockup' || true";
    let said = node.shell(line)?;
    ensure!(said.is_empty(), "the node's kernel: {said}");
    Ok(())
}

/// A pod with every right in its VM, and in it a container with `function` and the program that
/// misuses it. Gives the pod, the container, the program's line and the function's address there.
fn hostile_pod(
    node: &Node,
    containerd: &Containerd,
    name: &str,
    function: &Function,
) -> Result<(Pod, String, String, String)> {
    let rights = json!({"security_context": {"privileged": true}});
    let mut config = pod_config(name);
    config["linux"] = rights.clone();
    let pod = containerd.run_pod(node, HANDLER, &config)?;
    let mut config = with_host_programs("c", &[function]);
    config["linux"] = rights;
    let program = env!("CARGO_BIN_EXE_hostile-guest");
    if let Some(mounts) = config["mounts"].as_array_mut() {
        mounts.push(json!(
            {"host_path": program, "container_path": "/hostile-guest", "readonly": true}
        ));
    }
    let container = containerd.run_container(node, &pod, &config)?;
    let lib = "/host/usr/lib/x86_64-linux-gnu";
    let line = format!("{lib}/ld-linux-x86-64.so.2 --library-path {lib} /hostile-guest");
    // It came last.
    let find = "cd /sys/bus/pci/devices; ls -d * | tail -n 1";
    let address = containerd.exec_shell(node, &container, find)?;
    Ok((pod, container, line, address.trim().to_owned()))
}

/// Runs a line in a container whose guest may die of it: what it printed.
fn misuse(node: &Node, containerd: &Containerd, container: &str, line: &str) -> Result<String> {
    const SECONDS: u64 = 60;
    let line = format!("timeout -s KILL {SECONDS} crictl exec {container} {line} 2>&1 || true");
    containerd.script(node, 2 * SECONDS, &line)
}

/// Removes a pod whose guest may not let go of its disk: containerd's patience with a container may
/// end before ours with the guest does, and a kubelet asks again.
fn remove_broken(node: &Node, containerd: &Containerd, pod: &Pod) -> Result<()> {
    const ATTEMPTS: usize = 4;
    let attempt = |_| containerd.remove_pod(node, pod);
    let mut attempts = (0..ATTEMPTS).map(attempt);
    let removed = attempts.find(Result::is_ok);
    removed.with_context(|| format!("no removal of {ATTEMPTS} ended"))?
}

/// Interrupts by MSI arrive, each of them; memory of the guest is reached and no other.
fn messages_and_memory(node: &Node) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let functions = functions(node)?;
    let edu = &functions[EDU];
    let before = Leftovers::look(node)?;
    let (pod, container, program, address) = hostile_pod(node, &containerd, "edu", edu)?;
    let run = |words: &str| {
        let line = format!("{program} {words}");
        containerd.exec_shell(node, &container, &line)
    };
    let said = run(&format!("msi {address} 50"))?;
    ensure!(said == "50 interrupts", "{said}");
    let faults = iommu_faults(node, edu)?;
    let said = run(&format!("dma {address}"))?;
    ensure!(said.ends_with("not our memory: tried"), "{said}");
    let seen = iommu_faults(node, edu)?;
    ensure!(seen > faults, "the IOMMU has let everything through");
    // The guest goes on.
    containerd.exec_shell(node, &container, "true")?;
    containerd.remove_pod(node, &pod)?;
    kernel_is_sound(node)?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn messages_arrive_and_other_memory_is_out_of_reach() {
    let Some(node) = node("passthrough-edu") else {
        return;
    };
    messages_and_memory(&node).unwrap();
}

/// A function reads the registers of another one of its pod, also after the guest has moved them,
/// and no more when that one is gone.
fn peers(node: &Node) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let functions = functions(node)?;
    let (edu, disk) = (&functions[EDU], &functions[0]);
    let before = Leftovers::look(node)?;
    let (pod, container, program, address) = hostile_pod(node, &containerd, "peers", edu)?;
    let run = |words: &str| {
        let line = format!("{program} {words}");
        containerd.exec_shell(node, &container, &line)
    };
    let other = containerd.run_container(node, &pod, &sleeper("disk", &[disk]))?;
    let find = "cd /sys/bus/pci/devices; ls -d * | tail -n 1";
    let peer = containerd.exec_shell(node, &container, find)?;
    ensure!(peer != address, "the disk is not on the bus");
    let said = run(&format!("peer {address} {peer}"))?;
    ensure!(said.ends_with("moved: read"), "{said}");
    let there = said.lines().find_map(|line| line.strip_prefix("there: "));
    let there = there.with_context(|| said.clone())?;
    remove(node, &containerd, &other)?;
    let faults = iommu_faults(node, edu)?;
    let said = run(&format!("reach {address} {there}"))?;
    ensure!(said == "nothing there", "{said}");
    let seen = iommu_faults(node, edu)?;
    ensure!(seen > faults, "the IOMMU has let it through");
    containerd.remove_pod(node, &pod)?;
    ensure!(locked_kib(node)? == 0, "memory stays pinned");
    kernel_is_sound(node)?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn functions_of_a_pod_reach_each_other() {
    let Some(node) = node("passthrough-peers") else {
        return;
    };
    peers(&node).unwrap();
}

/// A guest that does all it can to its function suffers alone.
fn hostile_guests(node: &Node) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let functions = functions(node)?;
    let disk = &functions[0];
    let before = Leftovers::look(node)?;
    let neighbour = containerd.run_pod(node, HANDLER, &pod_config("neighbour"))?;
    let bystander = containerd.run_container(node, &neighbour, &sleeper("c", &[&functions[1]]))?;
    let load = "while :; do dd if=/dev/vdX of=/dev/null bs=4k count=512 iflag=direct; done \
                >/dev/null 2>&1 &";
    for (turn, (work, written)) in [
        ("scribble ADDRESS 11 400", "BARs: written"),
        ("table ADDRESS 12 4000", ""),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("hostile-{turn}");
        let (pod, container, program, address) = hostile_pod(node, &containerd, &name, disk)?;
        let start = load.replace("/dev/vdX", "$(ls /dev/vd*)");
        containerd.exec_shell(node, &container, &start)?;
        let line = format!("{program} {}", work.replace("ADDRESS", &address));
        let said = misuse(node, &containerd, &container, &line)?;
        ensure!(said.contains(written), "{work}: {said}");
        containerd.exec_shell(node, &bystander, "head -c 512 $(ls /dev/vd*) | wc -c")?;
        remove_broken(node, &containerd, &pod)?;
        let next = containerd.run_pod(node, HANDLER, &pod_config(&format!("after-{turn}")))?;
        let container = containerd.run_container(node, &next, &sleeper("c", &[disk]))?;
        let read = "dd if=$(ls /dev/vd*) bs=64k count=16 2>/dev/null | wc -c";
        let seen = containerd.exec_shell(node, &container, read)?;
        ensure!(seen == (1 << 20).to_string(), "the next pod reads {seen}");
        containerd.remove_pod(node, &next)?;
        kernel_is_sound(node)?;
    }
    containerd.remove_pod(node, &neighbour)?;
    ensure!(locked_kib(node)? == 0, "memory stays pinned");
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn a_hostile_guest_suffers_alone() {
    if !pericarp::full_sizes() {
        eprintln!("skipped: removals of hung guests take minutes (PERICARP_FULL=1 runs it)");
        return;
    }
    let Some(node) = node("passthrough-hostile") else {
        return;
    };
    hostile_guests(&node).unwrap();
}

/// Drop-in of the configuration that lets pods name functions.
const NAMING: &str = "/etc/pericarp/config.d/61-naming.toml";

fn naming(name: &str, function: &Function) -> Value {
    let mut config = pod_config(name);
    config["annotations"] = json!({"pericarp.dev/devices.functions": function.address});
    config
}

/// A pod that names a function has it from its start to its end, each of its containers.
fn pods_name_functions(node: &Node) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let functions = functions(node)?;
    let disk = &functions[0];
    let before = Leftovers::look(node)?;
    let refused = |config: &Value| -> Result<String> {
        let error = containerd.run_pod(node, HANDLER, config).err();
        Ok(format!("{:#}", error.context("it was accepted")?))
    };
    let error = refused(&naming("not-allowed", disk))?;
    ensure!(error.contains("security.allowed_annotations"), "{error}");
    node.write(
        NAMING,
        "[security]\nallowed_annotations = ['devices.functions']\n",
    )?;
    allow(node, &functions[1..])?;
    let error = refused(&naming("not-for-pods", disk))?;
    let words = ["devices.functions[0000:", "security.passthrough_devices"];
    ensure!(words.iter().all(|word| error.contains(word)), "{error}");
    allow(node, &functions)?;
    let error = refused(&naming("pin", &functions[PIN_ONLY]))?;
    ensure!(error.contains("interrupts by its pin alone"), "{error}");
    Leftovers::nothing_since(node, &before)?;
    let pod = containerd.run_pod(node, HANDLER, &naming("naming", disk))?;
    ensure!(
        locked_kib(node)? > 0,
        "the function is not there before a container is"
    );
    let first = containerd.run_container(node, &pod, &sleeper("first", &[]))?;
    let line = "echo named | dd of=$(ls /dev/vd*) bs=512 conv=sync,fsync 2>/dev/null";
    containerd.exec_shell(node, &first, line)?;
    // Asked for again by its group, it is the one that the pod has.
    let second = containerd.run_container(node, &pod, &sleeper("second", &[disk]))?;
    for container in [&second, &first] {
        let seen = containerd.exec_shell(node, container, "head -c 5 $(ls /dev/vd*)")?;
        ensure!(seen == "named", "{seen}");
        remove(node, &containerd, container)?;
        ensure!(locked_kib(node)? > 0, "it went with a container");
    }
    containerd.remove_pod(node, &pod)?;
    node.shell(&format!("rm {NAMING}"))?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn a_pod_that_names_a_function_has_it_for_all_its_containers() {
    let Some(node) = node("passthrough-naming") else {
        return;
    };
    pods_name_functions(&node).unwrap();
}

/// Memory and processors of a VM with a function are those that the container may use.
fn near_the_function(node: &Node) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let functions = functions(node)?;
    let before = Leftovers::look(node)?;
    node.shell(
        "mkdir -p /sys/fs/cgroup/near; echo +cpuset >/sys/fs/cgroup/cgroup.subtree_control
         echo +cpuset >/sys/fs/cgroup/near/cgroup.subtree_control",
    )?;
    for near in ["0", "1"] {
        let mut config = pod_config(&format!("near-{near}"));
        config["linux"] = json!({"cgroup_parent": "/near"});
        let pod = containerd.run_pod(node, HANDLER, &config)?;
        let mut config = sleeper("c", &[&functions[0]]);
        config["linux"] = json!({"resources": {"cpuset_cpus": near, "cpuset_mems": near}});
        containerd.run_container(node, &pod, &config)?;
        let line = "cd /proc/$(pgrep -f '^[^ ]*pericarp-vmm')
             grep memfd numa_maps | grep -o 'N[01]=' | sort -u
             cat task/*/status | grep Cpus_allowed_list | awk '{ print $2 }' | sort -u";
        let seen = node.shell(line)?;
        let seen: Vec<&str> = seen.split_whitespace().collect();
        ensure!(seen == [&format!("N{near}="), near], "{near}: {seen:?}");
        containerd.remove_pod(node, &pod)?;
    }
    node.shell("rmdir /sys/fs/cgroup/near")?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn the_guest_is_where_the_container_may_be() {
    let Some(node) = node("passthrough-near") else {
        return;
    };
    near_the_function(&node).unwrap();
}

/// Drop-in of the configuration that names an image of drivers, the image and its folder.
const DRIVERS: &str = "/etc/pericarp/config.d/62-drivers.toml";
const IMAGE: &str = "/var/tmp/drivers.erofs";
const FOLDER: &str = "/var/tmp/drivers";

/// Makes an image of drivers for the pods that `table` of the configuration is about: what goes
/// with disks, and the modules of `folder`, of which those of `list` are loaded.
fn make_drivers(node: &Node, table: &str, modules: Option<(&Path, &str)>) -> Result<()> {
    let edits = json!({
        "env": ["DISK_DRIVER=ours"],
        "deviceNodes": [
            {"path": "/dev/extra0", "type": "c", "major": 1, "minor": 11},
            // As the guest's own /dev has it.
            {"path": "/dev/extra1", "hostPath": "/dev/kmsg"},
        ],
        "mounts": [{"hostPath": "/lib/libdisk.so", "containerPath": "/usr/lib/libdisk.so"}],
    });
    let spec = json!({
        "cdiVersion": "0.6.0", "kind": "example.com/disk",
        "annotations": {"pericarp.dev/pci": "class:01"},
        "devices": [{"name": "all", "containerEdits": edits}],
    });
    node.shell(&format!(
        "rm -rf {FOLDER} {IMAGE}; mkdir -p {FOLDER}/lib {FOLDER}/cdi
         echo library >{FOLDER}/lib/libdisk.so.1
         ln -s /lib/libdisk.so.1 {FOLDER}/lib/libdisk.so"
    ))?;
    node.write(&format!("{FOLDER}/cdi/disk.json"), &spec.to_string())?;
    if let Some((modules, list)) = modules {
        let modules = modules.display();
        let all = format!("find {modules} -name '*.ko' -exec cp -t {FOLDER}/modules {{}} +");
        node.shell(&format!("mkdir {FOLDER}/modules {FOLDER}/firmware; {all}"))?;
        node.write(&format!("{FOLDER}/modules.load"), list)?;
    }
    node.shell(&format!(
        "mkfs.erofs --quiet -T0 --all-root {IMAGE} {FOLDER}"
    ))?;
    node.write(DRIVERS, &format!("[{table}]\nmodules = {IMAGE:?}\n"))
}

fn remove_drivers(node: &Node) -> Result<()> {
    let line = format!("rm -r {DRIVERS} {IMAGE} {FOLDER}");
    node.shell(&line).map(drop)
}

/// Why a pod with the image of drivers is refused.
fn refused_drivers(node: &Node, containerd: &Containerd, handler: &str) -> Result<String> {
    let refused = containerd.run_pod(node, handler, &pod_config("refused"));
    let error = refused.err().context("it was accepted")?;
    Ok(format!("{error:#}"))
}

/// What the image says of disks is in the container that has one, and not in its neighbour.
fn additions_of_the_image(node: &Node) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let functions = functions(node)?;
    let before = Leftovers::look(node)?;
    make_drivers(node, "paths", None)?;
    let pod = containerd.run_pod(node, HANDLER, &pod_config("additions"))?;
    let look = "echo variable ${DISK_DRIVER:-none}
        ls /dev/extra0 /dev/extra1 /usr/lib/libdisk.so 2>/dev/null
        mknod /tmp/extra c 1 11 && dd if=/tmp/extra of=/dev/null bs=8192 count=1 2>/dev/null &&
            echo readable; true";
    let all = "variable ours\n/dev/extra0\n/dev/extra1\n/usr/lib/libdisk.so\nreadable";
    let disk = containerd.run_container(node, &pod, &sleeper("disk", &[&functions[0]]))?;
    let edu = containerd.run_container(node, &pod, &sleeper("edu", &[&functions[EDU]]))?;
    let other = containerd.run_container(node, &pod, &sleeper("other", &[]))?;
    for (container, wanted) in [
        (&disk, all),
        (&edu, "variable none"),
        (&other, "variable none"),
    ] {
        let seen = containerd.exec_shell(node, container, look)?;
        ensure!(seen == wanted, "{seen}, not {wanted}");
    }
    let line = "cat /usr/lib/libdisk.so; echo 2>/dev/null >/usr/lib/libdisk.so || echo refused
        dd if=/dev/extra1 bs=8192 count=1 2>/dev/null | grep -c ';'";
    let seen = containerd.exec_shell(node, &disk, line)?;
    ensure!(
        seen == "library\nrefused\n1",
        "the library, the log: {seen}"
    );
    containerd.remove_pod(node, &pod)?;
    // The kernel of this handler loads no modules, and says so.
    let none = Path::new(FOLDER);
    make_drivers(node, "paths", Some((none, "# a list\nmodules/card.ko\n")))?;
    let error = refused_drivers(node, &containerd, HANDLER)?;
    let words = ["paths.modules", IMAGE, "firmware", "FLAVOUR=passthrough"];
    ensure!(words.iter().all(|word| error.contains(word)), "{error}");
    remove_drivers(node)?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn an_image_of_drivers_adds_to_containers_with_their_functions() {
    let Some(node) = node("passthrough-additions") else {
        return;
    };
    additions_of_the_image(&node).unwrap();
}

/// A card is driven by a module, which is loaded before any container.
fn modules_of_the_image(node: &Node, modules: &Path) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let functions = functions(node)?;
    let before = Leftovers::look(node)?;
    let table = "flavour.passthrough.paths";
    let list = "# what igb needs, and igb\nmodules/i2c-algo-bit.ko\nmodules/igb.ko max_vfs=0\n";
    make_drivers(node, table, Some((modules, list)))?;
    let pod = containerd.run_pod(node, PASSTHROUGH, &pod_config("modules"))?;
    let other = containerd.run_container(node, &pod, &sleeper("other", &[]))?;
    let line = "cut -d ' ' -f 1 /proc/modules; ls /sys/bus/pci/drivers/igb | grep 0000: || true
        cat /sys/module/firmware_class/parameters/path";
    let loaded = containerd.exec_shell(node, &other, line)?;
    let wanted = "igb\ni2c_algo_bit\n/run/pericarp/drivers/firmware";
    ensure!(loaded == wanted, "before the card: {loaded}");
    let card = containerd.run_container(node, &pod, &sleeper("card", &[&functions[CARD]]))?;
    let line = "cd /sys/bus/pci/drivers/igb; ls -d 0000* | wc -l; ls 0000*/net | wc -l";
    let bound = containerd.exec_shell(node, &card, line)?;
    ensure!(
        bound == "1\n1",
        "functions of igb, their interfaces: {bound}"
    );
    containerd.remove_pod(node, &pod)?;
    // igb cannot do without the other.
    make_drivers(node, table, Some((modules, "modules/igb.ko\n")))?;
    let error = refused_drivers(node, &containerd, PASSTHROUGH)?;
    let words = [
        IMAGE,
        "modules.load:1",
        "modules/igb.ko",
        "Unknown symbol",
        "before it",
    ];
    ensure!(words.iter().all(|word| error.contains(word)), "{error}");
    remove_drivers(node)?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn a_module_of_an_image_of_drivers_drives_a_card() {
    let Some(modules) = pericarp::passthrough_modules() else {
        eprintln!("skipped: not built: the kernel with drivers (make kernel FLAVOUR=passthrough)");
        return;
    };
    let Some(node) = node("passthrough-modules") else {
        return;
    };
    modules_of_the_image(&node, &modules).unwrap();
}
