//! Our kernel and image without our VMM: QEMU in the node boots them. The kernel has what
//! containers and the design need, and the figures of QEMU's microvm are what `pericarp-vmm` has to
//! beat.

use std::path::PathBuf;

use anyhow::{Context, Result};
use pericarp_tests::node::pericarp::guest_files;
use pericarp_tests::node::{Builder, Command, Node, Session, session};

/// Time that a guest gets in emulation on a busy computer.
const GUEST_TIMEOUT_S: u64 = 300;

/// What both machines have in common. QEMU 7.2 does not emulate XSETBV in nested guests: no XSAVE.
const QEMU: &str = "qemu-system-x86_64 -enable-kvm -cpu host,-xsave -nodefaults \
    -no-user-config -nographic -no-reboot";

/// The kernel's words of the design; the root file system is the caller's.
const COMMAND_LINE: &str = "quiet panic=-1 pci=noearly console=hvc0 ro";

fn node(test: &str) -> Session {
    session(test, || Builder::default().name("guest").without_pericarp()).expect("the node boots")
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
            "pss_kib=$(awk '/^Pss:/ {{ print $2 }}' /proc/$guest/smaps_rollup)" \
            "hello=$(tail -c +5 hello | strings -n 3 | tr '\n' ',')"
        "#
    );
    let command = Command::shell(script).timeout_s(GUEST_TIMEOUT_S);
    Ok(node.text(&command)?.trim().to_owned())
}

/// Boots the guest on `machine` and prints the figures; the agent must name our kernel.
#[expect(clippy::print_stdout, reason = "the figures are a result of the test")]
fn boot(node: &Node, name: &str, machine: &str) -> Result<()> {
    let figures = measure(node, machine)?;
    println!("QEMU {name}, 1 vCPU, 256 MiB: {figures}");
    assert!(
        figures.contains("-pericarp"),
        "the agent names our kernel: {figures}"
    );
    Ok(())
}

/// One test: both machines answer at the same vsock port of the node.
#[test]
fn qemu_boots_our_guest_to_the_agents_first_word() -> Result<()> {
    let node = node("qemu_boots_our_guest");
    copy_guest(&node)?;
    // microvm has no memory devices, so the image is a disk there.
    let microvm = format!(
        "-M microvm,pcie=on,acpi=on,pit=off,pic=off,rtc=off -smp 1 -m 256M \
         -drive file=guest.erofs,if=none,id=r,format=raw,readonly=on \
         -device virtio-blk-pci,drive=r \
         -append '{COMMAND_LINE} root=/dev/vda rootfstype=erofs init=/sbin/pericarp-agent'"
    );
    boot(&node, "microvm, image as a disk", &microvm)?;
    let q35 = format!(
        "-M q35 -smp 1 -m 256M,slots=1,maxmem=2G \
         -object memory-backend-file,id=i,share=on,mem-path=guest.erofs,\
         size=$(stat -Lc %s guest.erofs),readonly=on -device virtio-pmem-pci,memdev=i \
         -append '{COMMAND_LINE} root=/dev/pmem0 rootfstype=erofs rootflags=dax=always \
         init=/sbin/pericarp-agent'"
    );
    boot(&node, "q35, image on virtio-pmem with DAX", &q35)
}
