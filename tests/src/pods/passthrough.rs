//! Functions of the node that are given to pods.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::node::Node;

/// Driver of the node for functions that are passed through.
pub const VFIO: &str = "vfio-pci";

/// Drop-in of the configuration that allows functions.
const DROP_IN: &str = "/etc/pericarp/config.d/60-passthrough.toml";

/// Prints every function behind a root port: address, class, group, driver.
const LIST: &str = "
cd /sys/bus/pci/devices
for function in *; do
    case $(basename $(dirname $(readlink -f $function))) in 0000:*) ;; *) continue ;; esac
    driver=none
    [ ! -e $function/driver ] || driver=$(basename $(readlink $function/driver))
    echo $function $(cat $function/class) $(basename $(readlink $function/iommu_group)) $driver
done";

/// A function of the node behind the IOMMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Its address in the node.
    pub address: String,
    /// Its class, as sysfs writes it.
    pub class: String,
    /// Its IOMMU group.
    pub group: u32,
    /// Its driver in the node, or "none".
    pub driver: String,
}

impl Function {
    /// Every function that the node was given, in the order of their ports.
    pub fn all(node: &Node) -> Result<Vec<Self>> {
        let text = node.shell(LIST)?;
        text.lines().map(Self::parse).collect()
    }

    fn parse(line: &str) -> Result<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [address, class, group, driver] = words.as_slice() else {
            anyhow::bail!("{line:?} is no function");
        };
        Ok(Self {
            address: (*address).to_owned(),
            class: (*class).to_owned(),
            group: group.parse().context("group")?,
            driver: (*driver).to_owned(),
        })
    }

    /// Gives it to a driver, which must take it; an empty name leaves it to the one that fits.
    pub fn bind(&self, node: &Node, driver: &str) -> Result<()> {
        let address = &self.address;
        let line = format!(
            "cd /sys/bus/pci/devices/{address}
             [ ! -e driver ] || echo {address} >driver/unbind
             echo '{driver}' >driver_override
             echo {address} >/sys/bus/pci/drivers_probe
             basename $(readlink driver)"
        );
        let bound = node.shell(&line)?;
        ensure!(
            driver.is_empty() || bound.trim() == driver,
            "{address} is bound to {bound}"
        );
        Ok(())
    }

    /// Runs a line of shell while its own driver has it, a disk, which is `$d`. It is for pods
    /// afterwards.
    pub fn on_host(&self, node: &Node, line: &str) -> Result<String> {
        self.bind(node, "")?;
        // Drivers find disks after they are bound, NVMe's in a work queue. Below a controller that
        // may be one of several it has the path (nvme0c0n1), of which its own name is a part.
        let line = format!(
            "cd /sys/bus/pci/devices/{}; shopt -s nullglob
             until set -- virtio*/block/* nvme/*/nvme*n1
                 d=${{1-}} d=${{d##*/}} d=/dev/${{d/c*n/n}}
                 [ -b $d ]; do sleep 0.1; done
             {line}",
            self.address
        );
        let said = node.shell(&line)?;
        self.bind(node, VFIO)?;
        Ok(said.trim().to_owned())
    }

    /// The sum of a disk's first `mib`, as the host reads them.
    pub fn sum(&self, node: &Node, mib: u32) -> Result<String> {
        self.on_host(node, &sum(mib))
    }

    /// Has a container's configuration ask for it by its group.
    pub fn ask(&self, config: &mut Value) {
        let path = format!("/dev/vfio/{}", self.group);
        let device = json!({"container_path": path, "host_path": path, "permissions": "rwm"});
        match config["devices"].as_array_mut() {
            Some(devices) => devices.push(device),
            None => config["devices"] = json!([device]),
        }
    }
}

/// Lets pods have these functions and no others.
pub fn allow(node: &Node, functions: &[Function]) -> Result<()> {
    let addresses = functions.iter().map(|function| &function.address);
    let addresses: Vec<_> = addresses.collect();
    let text = format!("[security]\npassthrough_devices = {addresses:?}\n");
    node.write(DROP_IN, &text)
}

/// Memory that the VMMs of the node have locked or, by iommufd, pinned.
pub fn locked_kib(node: &Node) -> Result<u64> {
    let line = "for pid in $(pgrep -f '^[^ ]*pericarp-vmm'); do
            grep -E 'Vm(Lck|Pin)' /proc/$pid/status; done |
        awk '{ sum += $2 } END { print sum + 0 }'";
    node.shell(line)?.trim().parse().context("VmLck, VmPin")
}

/// A line of shell, for host and guest: the sum of the first `mib` of the disk `$d`.
#[must_use]
pub fn sum(mib: u32) -> String {
    format!("dd if=$d bs=1M count={mib} 2>/dev/null | md5sum | cut -d ' ' -f 1")
}

/// Lines that write `mib` to the disk `$d` and read them back, past the page cache: their sum.
#[must_use]
pub fn fill(mib: u32) -> String {
    format!(
        "set -e; dd if=/dev/urandom of=/tmp/x bs=1M count={mib} 2>/dev/null
         dd if=/tmp/x of=$d bs=1M conv=notrunc,fsync 2>/dev/null
         echo 3 >/proc/sys/vm/drop_caches 2>/dev/null || true
         a=$(md5sum </tmp/x); a=${{a%% *}}; b=$({})
         [ \"$a\" = \"$b\" ]; rm /tmp/x; echo $a",
        sum(mib)
    )
}

/// A line that fails, and says what there is, unless interrupts by MSI-X of what `name` is a
/// pattern of were counted in the guest. Containers of the kubelet have no `/proc/interrupts`.
#[must_use]
pub fn interrupts(name: &str) -> String {
    format!(
        "cd /sys/kernel/irq
         for i in $(grep -l '{name}' */actions | cut -d / -f 1); do
             grep -q PCI-MSIX $i/chip_name && grep -q '[1-9]' $i/per_cpu_count && exit
         done
         grep . */actions */chip_name */per_cpu_count >&2; exit 1"
    )
}

/// Draws into a dumb buffer of the display and reads it back through a second mapping: ioctls of
/// DRM (uapi/drm/drm_mode.h) by number, since perl is on every Debian and libdrm is not.
const DRAW: &str = r#"
use strict; use warnings;
sub call { my $r = syscall($_[0], @_[1 .. $#_]); die "syscall $_[0]: $!" if $r == -1; $r }
my ($open, $read, $write, $mmap, $ioctl) = (2, 0, 1, 9, 16);
open(my $card, '+<', '/dev/dri/card0') or die "card0: $!";
my $make = pack('L4 L2 Q', 64, 256, 32, 0, 0, 0, 0);
ioctl($card, 0xC02064B2, $make) or die "create: $!";
my ($handle, $pitch, $size) = (unpack('L4 L2 Q', $make))[4 .. 6];
my @mapped;
for (1 .. 2) {
    my $map = pack('L L Q', $handle, 0, 0);
    ioctl($card, 0xC01064B3, $map) or die "map: $!";
    my $offset = (unpack('L L Q', $map))[2];
    push @mapped, call($mmap, 0, $size, 3, 1, fileno($card), $offset);
}
my $pattern = pack('L*', map { ($_ * 2654435761) & 0xffffffff } 0 .. $size / 4 - 1);
open(my $file, '+>', '/tmp/pattern') or die; syswrite($file, $pattern); sysseek($file, 0, 0);
call($read, fileno($file), $mapped[0], $size + 0) == $size or die 'short';
my $frame = pack('L7', 0, 256, 64, $pitch, 32, 24, $handle);
ioctl($card, 0xC01C64AE, $frame) or die "frame: $!";
my $id = (unpack('L7', $frame))[0];
my $dirty = pack('L4 Q', $id, 0, 0, 0, 0);
ioctl($card, 0xC01864B1, $dirty) or die "dirty: $!";
open(my $back, '+>', '/tmp/back') or die;
call($write, fileno($back), $mapped[1], $size + 0) == $size or die 'short';
sysseek($back, 0, 0); sysread($back, my $seen, $size) == $size or die;
die 'another picture' unless $seen eq $pattern;
print "drawn $size\n";
"#;

/// Lines that draw on the display, in a container with the node's `/usr` beneath `/host`; says
/// "drawn" and how much.
#[must_use]
pub fn draw() -> String {
    let lib = "/host/usr/lib/x86_64-linux-gnu";
    format!(
        "cat >/tmp/draw <<'END'\n{DRAW}\nEND\n\
         {lib}/ld-linux-x86-64.so.2 --library-path {lib} /host/usr/bin/perl \
         -I{lib}/perl-base /tmp/draw"
    )
}
