# Measures one pod under $HANDLER in the node; prints `name value` lines. Times in microseconds.
# Its environment: HANDLER, POD and CONTAINER (their configurations), LOG (the container's), IDLE_S.
set -euo pipefail
now() { echo "${EPOCHREALTIME/./}"; }
timed() {
    local name=$1 start
    shift
    start=$(now)
    "$@" >"/run/bench/$name.out"
    echo "$name $(($(now) - start))"
}
pids() { ps --ppid 2 -p 2 --deselect -o pid= | tr -d ' ' | sort; }
# Exits of every VM that lives, zero without one.
exits() { { cat /sys/kernel/debug/kvm/*-*/exits 2>/dev/null || true; } | awk '{ sum += $1 } END { print sum + 0 }'; }
# First output: containerd's time stamp of the first line of the container's log.
first_line() {
    local follower stamp
    exec 5< <(exec tail -s 0.05 -n +1 -F "$LOG" 2>/dev/null)
    follower=$!
    read -r -t 60 stamp _ <&5
    kill "$follower"
    exec 5<&-
    echo $(($(date -d "$stamp" +%s%N) / 1000))
}

mkdir -p /run/bench
pids >/run/bench/before
timed runp crictl runp --runtime "$HANDLER" "$POD"
pod=$(cat /run/bench/runp.out)
echo "exits_ready $(exits)"
# Whether the pod went on from a template.
echo "forked $(grep -c '"template":"' "/run/pericarp/$pod/state.json" 2>/dev/null || true)"
start=$(now)
timed create crictl create "$pod" "$CONTAINER" "$POD"
container=$(cat /run/bench/create.out)
timed start crictl start "$container"
echo "first_output $(($(first_line) - start))"
timed exec crictl exec "$container" true

if [ "$IDLE_S" -gt 0 ]; then
    # Nothing is asked of the pod from here. The first half is the command's aftermath: averages of pressure
    # and solicitations of routers run out. Nothing is waited for, time itself is measured.
    for half in settling idle; do
        counted=$(exits)
        start=$(now)
        read -r -t "$IDLE_S" <> <(:) || true
        echo "exits_${half}_per_s $((($(exits) - counted) * 1000000 / ($(now) - start)))"
    done
    for pid in $(pids | comm -13 /run/bench/before -); do
        pss=$(awk '/^Pss:/ { print $2 }' "/proc/$pid/smaps_rollup" 2>/dev/null) || continue
        [ -n "$pss" ] || continue
        name=$(tr '\0' ' ' <"/proc/$pid/cmdline" | cut -d' ' -f1)
        [ "$pid" = $$ ] || [ "$PPID" = "$pid" ] || echo "pss_kib ${name##*/} $pss"
    done
fi
timed rmp crictl rmp -f "$pod"
