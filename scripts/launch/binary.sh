# Sourced by the scripts beside it: finds the program that they start, and says what they take.

launch_usage() {
    echo "usage: ${0##*/} RANKS MODEL [FLAGS of shardlift load]" >&2
    exit 2
}

# Sets `shardlift` to $SHARDLIFT, or the program of this checkout, or the one on PATH.
launch_binary() {
    local built
    built=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/target/release/shardlift
    shardlift=${SHARDLIFT:-}
    if [ -z "$shardlift" ]; then
        if [ -x "$built" ]; then shardlift=$built; else shardlift=$(command -v shardlift) || shardlift=; fi
    fi
    if [ -z "$shardlift" ]; then
        echo "${0##*/}: no shardlift: build it (cargo build --release), or name it in SHARDLIFT" >&2
        exit 2
    fi
}

launch_needs() {
    if ! command -v "$1" >/dev/null; then
        echo "${0##*/}: no $1 on this machine" >&2
        exit 2
    fi
}

[ $# -ge 2 ] || launch_usage
case $1 in '' | *[!0-9]* | 0) launch_usage ;; esac
ranks=$1 model=$2
shift 2
launch_binary
