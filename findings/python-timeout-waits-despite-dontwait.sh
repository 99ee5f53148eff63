#!/bin/sh
# A Python socket with a timeout waits even if recv() is told MSG_DONTWAIT: the timeout makes the descriptor non-blocking and
# has Python call poll(2) before recv(2) (sock_call_impl() of Modules/socketmodule.c), whatever the flags say. So a peek that is
# meant to take what is there returns only when something comes or the timeout is over, with TimeoutError in place of
# BlockingIOError. On a socket without a timeout the same call returns at once.
#
# Asks an empty socketpair in the three modes. Exits 1 if an outcome is not as listed below.
set -eu

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

cat >peek.py <<'PYTHON'
import socket, sys, time

TIMEOUT_S = 0.5
changed = False
ours, theirs = socket.socketpair()
for mode, expected in (
    (None, ("BlockingIOError", "at once")),
    (0.0, ("BlockingIOError", "at once")),
    (TIMEOUT_S, ("TimeoutError", "after the timeout")),
):
    ours.settimeout(mode)
    begun = time.monotonic()
    try:
        ours.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError as error:
        found = type(error).__name__
    took = time.monotonic() - begun
    seen = found, "after the timeout" if took >= TIMEOUT_S else "at once"
    changed |= seen != expected
    verdict = "as expected" if seen == expected else f"CHANGED: expected {expected}"
    print(f"settimeout({mode})".ljust(17), f"MSG_DONTWAIT: {seen[0]:<16} {seen[1]:<18} {verdict}")
sys.exit(changed)
PYTHON

echo "$(uname -sr), $(python3 --version)"
python3 peek.py
