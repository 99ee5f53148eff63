#!/bin/sh
# gunicorn's arbiter sleeps up to 0.1 s after each worker that it forks at its start: time.sleep(0.1 * random.random())
# in spawn_workers() of gunicorn/arbiter.py. So the time until all workers run is 50 ms times their number, on a machine of
# any speed: 13 s with 256 workers. A reload (SIGHUP) forks its new workers without a pause, and so is faster than a start.
# Whoever compares how fast servers start measures that sleep.
#
# Runs gunicorn 23.0.0 with 20 sync workers, starts and reloads it, and counts what the arbiter sleeps between its forks.
# Exits 1 if that is not one sleep below 0.1 s for each fork of the start and none in the reload.
set -eu

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check gunicorn==23.0.0 2>pip.log || { cat pip.log >&2; exit 1; }

cat >app.py <<'PYTHON'
def app(environ, start_response):
    start_response("200 OK", [])
    return []
PYTHON

cat >gunicorn.conf.py <<'PYTHON'
import time

bind, workers = "127.0.0.1:0", 20
slept = []
really_sleep = time.sleep


def sleep(seconds):
    slept.append(seconds)
    really_sleep(seconds)


time.sleep = sleep


def pre_fork(server, worker):
    """In the arbiter, before each fork: how often and how long it has slept so far."""
    with open("forks", "a") as file:
        print(len(slept), sum(slept), max(slept, default=0), file=file)
PYTHON

cat >run.py <<'PYTHON'
import os, signal, subprocess, sys, time


def forks():
    try:
        with open("forks") as file:
            return [line.split() for line in file]
    except FileNotFoundError:
        return []


def until(number):
    end = time.monotonic() + 60
    while len(forks()) < number:
        assert time.monotonic() < end, "does not fork"
        time.sleep(0.01)


with open("log", "w") as log:
    server = subprocess.Popen(["venv/bin/gunicorn", "app:app"], stderr=log)
try:
    until(20)
    # The arbiter reads signals once all are started.
    server.send_signal(signal.SIGHUP)
    until(40)
finally:
    server.terminate()
    server.wait()
changed = False
for what, of, wanted in (("start", forks()[:20], 1), ("reload", forks()[20:40], 0)):
    counts = [int(count) for count, _, _ in of]
    each = {after - before for before, after in zip(counts, counts[1:])}
    total = float(of[-1][1]) - float(of[0][1])
    right = each == {wanted} and float(of[-1][2]) < 0.1
    changed |= not right
    verdict = "as expected" if right else f"CHANGED: expected {wanted} each"
    print(f"{what:<7} 20 forks  sleeps between two: {sorted(each)}  in all {total:.2f} s  {verdict}")
sys.exit(changed)
PYTHON

echo "$(uname -sr), $(python3 --version), gunicorn 23.0.0"
python3 run.py
