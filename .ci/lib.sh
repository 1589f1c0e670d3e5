# Helpers of the scripts in this folder; sourced by them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CARGO_INCREMENTAL=0 CARGO_TERM_COLOR=never

# Runs a command under its name and says how long it took.
step() {
    local start=$SECONDS
    echo "== $*"
    "$@"
    echo "== $((SECONDS - start)) s: $*"
}

# Whether these Debian packages are there; installs them where that is possible.
have_packages() {
    dpkg --status "$@" >/dev/null 2>&1 && return
    local root=()
    [[ $EUID -eq 0 ]] || root=(sudo -n)
    export DEBIAN_FRONTEND=noninteractive
    "${root[@]}" dpkg --add-architecture arm64 &&
        "${root[@]}" apt-get update -qq &&
        "${root[@]}" apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# Leaves the script because something is missing that the machine cannot get: an error if QUANT_CI_REQUIRE_ALL is set.
skip() {
    echo "== SKIPPED ${0##*/}: $*" >&2
    [[ -z "${QUANT_CI_REQUIRE_ALL:-}" ]] && exit 0
    echo "== QUANT_CI_REQUIRE_ALL is set, so this is an error" >&2
    exit 1
}
