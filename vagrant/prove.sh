#!/bin/sh
# On a fresh Debian, as root: the README's first command, the Vagrantfile's set-up, and then the
# README's second command, or the one given.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
patience_s=900 # it installs

say() {
    echo "prove.sh: $*" >&2
}

answers() {
    until curl --silent --fail --max-time 5 http://127.0.0.1:8080/; do
        kill -0 "$1" 2>/dev/null || return 1
        [ $((patience_s -= 1)) -gt 0 ] || return 1
        sleep 1
    done 2>/dev/null # there is no curl yet
}

say "./dev run"
./dev run &
service=$!
trap 'kill $service 2>/dev/null || :' EXIT
answers $service || {
    say "./dev run does not answer on 127.0.0.1:8080"
    exit 1
}
kill $service
wait $service
trap - EXIT

say "vagrant/provision.sh"
vagrant/provision.sh
(cd / && steer policies >/dev/null) || {
    say "steer is not on PATH, or does not start"
    exit 1
}

[ $# -gt 0 ] || set -- ./dev test
say "$*"
"$@"
