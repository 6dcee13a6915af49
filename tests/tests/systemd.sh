# A pod of kubelet's systemd cgroup driver, in a node whose cgroups systemd manages: systemd as the first
# process of a PID namespace, containerd as its service. Prints `name value` lines.
# Its environment: crictl's, POD and CONTAINER (their configurations), SLICE (of the pod), LOG (systemd's).
set -euo pipefail
# Of systemd the manager alone: the node's devices, logs and network are not its own.
for unit in /lib/systemd/system/systemd-*.{service,socket}; do
    ln -sf /dev/null "/etc/systemd/system/${unit##*/}"
done
mkdir -p /run/dbus
# From the root cgroup, which is then systemd's own.
bash -c 'echo 0 >/sys/fs/cgroup/cgroup.procs
exec unshare --pid --mount --fork --kill-child --mount-proc \
    env container=node /lib/systemd/systemd --unit=basic.target --log-target=console' </dev/null >"$LOG" 2>&1 &
manager=(org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager)
until busctl --timeout=2 get-property "${manager[@]}" Version >/dev/null 2>&1; do
    kill -0 $! || { cat "$LOG"; exit 1; }
done
inside=(nsenter -t "$(pgrep -o -f '^/lib/systemd/systemd ')" -m -p)

daemon=$(pgrep -o -f '^[^ ]*containerd --config')
program=$(readlink "/proc/$daemon/exe")
mapfile -d '' -t words <"/proc/$daemon/cmdline"
search_path=$(tr '\0' '\n' <"/proc/$daemon/environ" | sed -n 's/^PATH=//p')
kill "$daemon"
tail -s 0.1 --pid="$daemon" -f /dev/null
"${inside[@]}" systemd-run --quiet --unit=containerd --setenv="PATH=$search_path" "$program" "${words[@]:1}"
until crictl version >/dev/null 2>&1; do :; done

pod=$(crictl runp --runtime pericarp "$POD")
container=$(crictl create "$pod" "$CONTAINER" "$POD")
crictl start "$container" >/dev/null
scope=cri-containerd-$pod.scope
show() { "${inside[@]}" systemctl show --value --property="$1" "$scope"; }
# Of the pod's VMM: not of that of a template, which may be in the making. The pod's state has its PID in the
# namespace of systemd.
vmm_cgroup() {
    local vmm
    for vmm in $(pgrep -f '^[^ ]*pericarp-vmm'); do
        cut -d: -f3 "/proc/$vmm/cgroup" 2>/dev/null || true
    done | grep -vx /pericarp-templates
}
echo "state $(show ActiveState)"
echo "slice $(show Slice)"
echo "unit_cgroup $(show ControlGroup)"
echo "vmm_cgroup $(vmm_cgroup)"
# Another unit comes and goes in the slice: systemd arranges it anew.
"${inside[@]}" systemctl daemon-reload
"${inside[@]}" systemd-run --quiet --slice="$SLICE" --unit=neighbour --wait true
echo "controllers $(cat "/sys/fs/cgroup$(show ControlGroup)/cgroup.controllers")"
echo "said $(crictl exec "$container" echo alive)"
directory=/sys/fs/cgroup$(show ControlGroup)
crictl rmp -f "$pod" >/dev/null
echo "after $(show LoadState)"
[ ! -e "$directory" ] || echo "left $directory"
