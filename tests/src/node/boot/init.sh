#!/bin/busybox sh
# First program of the node. The computer's root (9p tag "root", read-only) goes under a tmpfs, and
# the program named by node= on the kernel command line becomes PID 1 of it.
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev
for module in $($B cat /modules/order); do
	# Modules that bring devices of their own when they load.
	case $module in dummy.ko) options=numdummies=0 ;; ifb.ko) options=numifbs=0 ;; *) options= ;; esac
	$B insmod "/modules/$module" $options 2>/dev/null || skipped="$skipped $module"
done
echo "node: modules not loaded:${skipped:- none}"
$B mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro root /lower
$B mount -t tmpfs -o size=75% tmpfs /upper
$B mkdir -p /upper/u /upper/w
$B mount -t overlay -o lowerdir=/lower,upperdir=/upper/u,workdir=/upper/w overlay /newroot
for folder in proc sys dev; do $B mount --move "/$folder" "/newroot/$folder"; done
program=$($B sed -n 's/.*node=\([^ ]*\).*/\1/p' /newroot/proc/cmdline)
exec $B switch_root /newroot "$program" inside init
