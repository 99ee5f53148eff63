"""From an edited policy to its figures on a live service: the wait of who tries things.

As one would by hand: the file is changed, `steer policy` compiles it and puts it in force, a few
connections come, and `steer status` tells who got them. The VM's side of it is `./dev vm run`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import msgspec

from bench import peers, servers, swap
from bench.figures import Figure, Section
from bench.peers import WORKERS, Running, under_steer

AT_MOST_MS = 1000.0
CONNECTIONS = 200
_PORT = 9860


def run(quick: bool) -> list[Section]:
    """Raises SteerError: steer is not installed beside this Python."""
    rounds = 2 if quick else 21
    peer = under_steer("steer", WORKERS, "--policy", "hash")
    with peers.running(peer, _PORT) as running, tempfile.TemporaryDirectory() as home:
        file = Path(swap.custom_policy(Path(home)))
        parts_ms = [_try(running, file) for _ in range(rounds + 1)][1:]
    policy_ms, load_ms, status_ms = zip(*parts_ms, strict=True)
    all_ms = tuple(sum(each) for each in parts_ms)
    about = f"from an edited policy to its figures, {CONNECTIONS} connections on a live service"
    return [
        Section(
            about,
            [
                Figure("all", "ms", all_ms, AT_MOST_MS),
                Figure("steer policy, which compiles it", "ms", policy_ms),
                Figure("the connections", "ms", load_ms),
                Figure("steer status", "ms", status_ms),
            ],
        )
    ]


def _try(running: Running, file: Path) -> tuple[float, float, float]:
    """No edit is known to a cache, of this run or another."""
    with file.open("a") as edited:
        edited.write(f"static const int edit_{time.time_ns()} __attribute__((unused));\n")
    begun_s = time.perf_counter()
    peers.steer(running, "policy", str(file))
    chosen_s = time.perf_counter()
    for _ in range(CONNECTIONS):
        servers.get(_PORT)
    served_s = time.perf_counter()
    status = msgspec.json.decode(peers.steer(running, "status", "--json"))
    told_s = time.perf_counter()
    workers = status["services"][0]["workers"]
    assert sum(each["connections"]["selected"] for each in workers) >= CONNECTIONS
    return (
        1000 * (chosen_s - begun_s),
        1000 * (served_s - chosen_s),
        1000 * (told_s - served_s),
    )
