# What the recipes of this folder share: the cache, locks, and one way to fail. Sourced by bash.

CACHE=${PERICARP_CACHE:-$HOME/.cache/pericarp}
GUEST=$CACHE/guest                                               # newest results, stable names
OUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/out # links to them, for this checkout

# fail WHAT DO [LOG]: one line that says what, where the log is and what to do; exit status 1.
fail() {
    echo "pericarp: $1.${3:+ Log: $3.} $2." >&2
    exit 1
}

# need COMMAND PACKAGE: installs a Debian package when its command is missing.
need() {
    command -v "$1" >/dev/null && return
    local log=$CACHE/apt.log
    mkdir -p "$CACHE"
    echo "pericarp: installing $2 for $1"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y "$2"; } >"$log" 2>&1 </dev/null ||
        fail "$1 is missing and $2 cannot be installed" "Install $2 by hand" "$log"
}

# publish FILE NAME FOLDER...: points a stable name in each folder at a finished file, in one step.
publish() {
    local file=$1 name=$2 folder
    for folder in "${@:3}"; do
        mkdir -p "$folder"
        ln -sfn "$file" "$folder/.$name.$$"
        mv -T "$folder/.$name.$$" "$folder/$name"
    done
}

# step MESSAGE LOG COMMAND...: runs a long command into a log; on a terminal or not, one line at start and end.
step() {
    local message=$1 log=$2 start=$SECONDS
    shift 2
    echo "pericarp: $message (log: $log)"
    "$@" >"$log" 2>&1 </dev/null || return
    echo "pericarp: $message: done in $((SECONDS - start)) s"
}
