//! Our kernel and image under QEMU and under our VMM, in one node: the figures of QEMU's microvm
//! are what `pericarp-vmm` has to beat.

use std::path::PathBuf;

use anyhow::{Context, Result};
use pericarp_tests::node::pericarp::guest_files;
use pericarp_tests::node::{Builder, Command, Node, Session, session};

/// Time that a guest gets in emulation on a busy computer.
const GUEST_TIMEOUT_S: u64 = 300;

/// What both machines have in common. QEMU 7.2 does not emulate XSETBV in nested guests: no XSAVE.
const QEMU: &str = "qemu-system-x86_64 -enable-kvm -cpu host,-xsave -nodefaults \
    -no-user-config -nographic -no-reboot";

/// Boots of each machine that is compared.
const BOOTS: usize = 3;

/// SPEC.md: our exits beside microvm's. Times depend on the computer's load and are only printed.
const RATIO_MAX: f64 = 0.6;

/// SPEC.md: what our VMM may hold beyond its guest's memory.
const OWN_KIB_MAX: f64 = 5.0 * 1024.0;

/// The kernel's words of the design; the root file system is the caller's.
const COMMAND_LINE: &str = "quiet panic=-1 pci=noearly console=hvc0 ro";

fn node(test: &str) -> Session {
    session(test, || Builder::default().name("guest")).expect("the node boots")
}

/// Copies kernel and image into the node's memory, so that no figure depends on how it reads files.
fn copy_guest(node: &Node) -> Result<()> {
    let guest = guest_files();
    let missing = "the guest is not built: run `make kernel guest-image`";
    let kernel: PathBuf = guest.kernel.context(missing)?.canonicalize()?;
    let image: PathBuf = guest.image.context(missing)?.canonicalize()?;
    node.shell(&format!(
        "mkdir -p /run/guest && cp {} /run/guest/vmlinux && cp {} /run/guest/guest.erofs",
        kernel.display(),
        image.display()
    ))?;
    Ok(())
}

/// Boots the guest with the agent and measures when its hello arrives: a line of `key=value` words.
///
/// The agent dials vsock port 1024 of the host as its first act; `socat` in the node answers.
fn measure(node: &Node, machine: &str) -> Result<String> {
    let script = format!(
        r#"
        cd $(mktemp -d -p /run/guest)
        ln -s ../vmlinux ../guest.erofs .
        mkfifo stream
        guest=
        socat -u VSOCK-LISTEN:1024 OPEN:stream &
        listener=$!
        trap 'kill $listener $guest 2>/dev/null; wait' EXIT
        start=$(date +%s%N)
        {QEMU} {machine} -kernel vmlinux -device vhost-vsock-pci,guest-cid=3 \
            -device virtio-serial-pci -chardev file,id=c,path=console \
            -device virtconsole,chardev=c </dev/null >qemu.log 2>&1 &
        guest=$!
        timeout 250 dd if=stream of=hello bs=4096 count=1 status=none ||
            {{ cat qemu.log console >&2; exit 1; }}
        end=$(date +%s%N)
        echo "ms=$(((end - start) / 1000000))" \
            "exits=$(cat /sys/kernel/debug/kvm/$guest-*/exits)" \
            "irq_exits=$(cat /sys/kernel/debug/kvm/$guest-*/irq_exits)" \
            "pss_kib=$(awk '/^Pss:/ {{ print $2 }}' /proc/$guest/smaps_rollup)" \
            "hello=$(tail -c +5 hello | strings -n 3 | tr '\n' ',')"
        "#
    );
    let command = Command::shell(script).timeout_s(GUEST_TIMEOUT_S);
    Ok(node.text(&command)?.trim().to_owned())
}

/// A figure of a line of `key=value` words.
fn figure(line: &str, key: &str) -> f64 {
    let mut words = line.split_whitespace();
    let found = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    found
        .and_then(|value| value.parse().ok())
        .unwrap_or_else(|| panic!("{key} is no number in {line}"))
}

/// Boots the guest on QEMU's `machine` and prints the figures; the agent must name our kernel.
#[expect(clippy::print_stdout, reason = "the figures are a result of the test")]
fn boot(node: &Node, name: &str, machine: &str) -> Result<String> {
    let figures = measure(node, machine)?;
    println!("QEMU {name}, 1 vCPU: {figures}");
    assert!(
        figures.contains("-pericarp"),
        "the agent names our kernel: {figures}"
    );
    Ok(figures)
}

/// Boots it under `pericarp-vmm`.
#[expect(clippy::print_stdout, reason = "the figures are a result of the test")]
fn boot_ours(node: &Node) -> Result<String> {
    let program = env!("CARGO_BIN_EXE_vmm-bars");
    let line = format!(
        "{program} --cpu-features=-xsave --kernel /run/guest/vmlinux \
         --image /run/guest/guest.erofs boot"
    );
    let figures = node.text(&Command::shell(line).timeout_s(GUEST_TIMEOUT_S))?;
    println!("pericarp-vmm, 1 vCPU, 128 MiB: {}", figures.trim());
    Ok(figures)
}

// microvm has no memory devices, so the image is a disk there.
fn microvm() -> String {
    format!(
        "-M microvm,pcie=on,acpi=on,pit=off,pic=off,rtc=off -smp 1 -m 128M \
         -drive file=guest.erofs,if=none,id=r,format=raw,readonly=on \
         -device virtio-blk-pci,drive=r \
         -append '{COMMAND_LINE} root=/dev/vda rootfstype=erofs init=/sbin/pericarp-agent'"
    )
}

/// Reads a figure of a line.
type Value<'a> = &'a dyn Fn(&str) -> f64;

/// Medians of some boots in turn. What interrupts of the node itself cost depends on its load, so
/// exits are also compared without them.
#[expect(clippy::print_stdout, reason = "the figures are a result of the test")]
fn compare(node: &Node) -> Result<()> {
    let (mut qemu, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..BOOTS {
        qemu.push(boot(node, "microvm, 128 MiB, image as a disk", &microvm())?);
        ours.push(boot_ours(node)?);
    }
    let median = |lines: &[String], value: Value<'_>| {
        let mut values: Vec<f64> = lines.iter().map(|line| value(line)).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let own = |line: &str| figure(line, "exits") - figure(line, "irq_exits");
    let compared: [(&str, Value<'_>); 3] = [
        ("time (ms)", &|line| figure(line, "ms")),
        ("exits", &|line| figure(line, "exits")),
        ("exits without the node's interrupts", &own),
    ];
    for (what, value) in compared {
        let (theirs, mine) = (median(&qemu, value), median(&ours, value));
        let ratio = mine / theirs;
        println!("{what}: {mine} beside {theirs} of QEMU microvm: ratio {ratio:.2}");
    }
    let ratio = median(&ours, &own) / median(&qemu, &own);
    assert!(ratio <= RATIO_MAX, "exits: ratio {ratio:.2}");
    let held = median(&ours, &|line| figure(line, "pss_kib"));
    println!("memory beyond the guest's: {held} KiB, at most {OWN_KIB_MAX}");
    assert!(held <= OWN_KIB_MAX, "memory beyond the guest's: {held} KiB");
    Ok(())
}

/// One test: all machines answer at the same vsock port of the node.
#[test]
fn our_guest_boots_to_the_agents_first_word() -> Result<()> {
    let node = node("our_guest_boots");
    copy_guest(&node)?;
    let q35 = format!(
        "-M q35 -smp 1 -m 256M,slots=1,maxmem=2G \
         -object memory-backend-file,id=i,share=on,mem-path=guest.erofs,\
         size=$(stat -Lc %s guest.erofs),readonly=on -device virtio-pmem-pci,memdev=i \
         -append '{COMMAND_LINE} root=/dev/pmem0 rootfstype=erofs rootflags=dax=always \
         init=/sbin/pericarp-agent'"
    );
    boot(&node, "q35, 256 MiB, image on virtio-pmem with DAX", &q35)?;
    compare(&node)
}
