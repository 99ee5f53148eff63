"""Requests that fail while workers are replaced, under load.

Each part runs every server that can do it, one after the other, with the same client.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench import datagrams, load, outcome, peers, servers, slow, wrk
from bench.figures import Figure, Section
from bench.load import Plan, Request
from bench.peers import WORKERS, Peer, Running
from bench.servers import HOST, Server, tool

CONCURRENCY = 64
AT_LEAST = 100_000
SIZES = (1, 8, WORKERS)
SOCKETS = 64
DATAGRAMS = 10_000
_PAUSE_S = 0.4
_PORT = 9500


@dataclass(frozen=True)
class Size:
    """How much to do; --quick does little.

    Args:
        peers: to compare; the parts that only steer can do take steer's of them.
        reloads, scales: of steer; others do half as many reloads and a quarter of the scales.
        rounds, window_s, import_s: of the part with a slow import, see `slow`.
        kills: of a controller.
    """

    peers: Sequence[Peer] = peers.ALL
    reloads: int = 20
    scales: int = 20
    at_least: int = AT_LEAST
    rounds: int = 3
    window_s: float = 8.0
    import_s: float = 2.0
    kills: int = 5
    sockets: int = SOCKETS
    datagrams: int = DATAGRAMS


_QUICK = Size(peers.FEW, 2, 1, 100, 1, 1.0, 0.1, 1, 8, 500)


def run(quick: bool) -> Iterator[Section]:
    size = _QUICK if quick else Size()
    yield _reloads(size)
    yield _through_wrk(size)
    yield _scales(size)
    yield _adoption(size)
    yield slow.section(size.import_s, size.window_s, size.rounds)
    yield _udp(size)


# ---- reload and scale


@dataclass(frozen=True)
class _Found:
    """What was done to a server, and what became of the requests meanwhile.

    Args:
        marks_s, took_s: when each thing was begun and how long it took.
    """

    requests: Sequence[Request]
    marks_s: Sequence[float]
    took_s: Sequence[float]


def _reloads(size: Size) -> Section:
    able = [peer for peer in size.peers if peer.reload]
    failures: list[str] = []
    found = peers.each(able, partial(_reload, size), failures)
    title = f"reload at c={CONCURRENCY}, {size.reloads} times ({size.reloads // 2} others)"
    figures = [_failed(peer, each) for peer, each in found.items()]
    figures += [
        Figure(f"{peer.name}, requests", "", (len(each.requests),), at_least=size.at_least)
        for peer, each in found.items()
        if peer.is_steer
    ]
    figures += [
        Figure(f"{peer.name}, a reload takes", "s", tuple(each.took_s))
        for peer, each in found.items()
    ]
    lines = [outcome.timeline(peer.name, x.requests, x.marks_s) for peer, x in found.items()]
    return Section(title, figures, failures, lines)


def _reload(size: Size, peer: Peer) -> _Found:
    assert peer.reload
    times = size.reloads if peer.is_steer else max(size.reloads // 2, 1)
    at_least = size.at_least if peer.is_steer else 0
    return _under_load(peer, at_least, [peer.reload] * times)


def _scales(size: Size) -> Section:
    """Of steer only one policy: with both it would be too long."""
    able = [peer for peer in size.peers if peer.scale and peer not in _steers(size)[1:]]
    failures: list[str] = []
    found = peers.each(able, partial(_scale, size), failures)
    way = " → ".join(map(str, (WORKERS, *SIZES)))
    title = f"scale {way} at c={CONCURRENCY}, {size.scales} times ({_fewer(size)} others)"
    return Section(title, [_failed(peer, each) for peer, each in found.items()], failures)


def _scale(size: Size, peer: Peer) -> _Found:
    times = size.scales if peer.is_steer else _fewer(size)
    assert peer.scale
    steps = [partial(_scale_to, peer.scale, count) for count in SIZES]
    return _under_load(peer, 0, steps * times)


def _scale_to(scale: Callable[[Running, int], None], count: int, running: Running) -> None:
    scale(running, count)


def _steers(size: Size) -> list[Peer]:
    return [peer for peer in size.peers if peer.is_steer]


def _fewer(size: Size) -> int:
    return max(size.scales // 4, 1)


def _under_load(peer: Peer, at_least: int, acts: Sequence[Callable[[Running], None]]) -> _Found:
    """Do one after the other to a server that is asked all the while."""
    plan = Plan(_PORT, concurrency=CONCURRENCY, at_least=at_least)
    marks_s, took_s = [], []
    with peers.running(peer, _PORT) as running, load.load(plan) as client:
        time.sleep(1 + _PAUSE_S)  # the client has to start
        for act in acts:
            marks_s.append(time.monotonic())
            act(running)
            took_s.append(time.monotonic() - marks_s[-1])
            time.sleep(_PAUSE_S)
        return _Found(client.finish(), marks_s, took_s)


def _failed(peer: Peer, found: _Found) -> Figure:
    return outcome.failed(peer.name, found.requests, at_most=0 if peer.is_steer else None)


def _through_wrk(size: Size) -> Section:
    """The same for steer, with a client that others wrote."""
    failures: list[str] = []
    found = peers.each(_steers(size), partial(_wrk, size.reloads), failures)
    title = f"reload at c={CONCURRENCY} through wrk, {size.reloads} times"
    figures = [
        Figure(f"{peer.name}, of {counts.requests:,}", "failed", (counts.errors,), at_most=0)
        for peer, counts in found.items()
    ]
    return Section(title, figures, failures)


def _wrk(reloads: int, peer: Peer) -> wrk.Counts:
    assert peer.reload
    with peers.running(peer, _PORT) as running, wrk.asking(_PORT, CONCURRENCY) as client:
        time.sleep(1)
        for _ in range(reloads):
            peer.reload(running)
            time.sleep(_PAUSE_S)
        return client.finish()


# ---- the controller is killed


def _adoption(size: Size) -> Section:
    failures: list[str] = []
    found = peers.each(_steers(size), partial(_adopt, size.kills), failures)
    title = f"controller killed and adopted at c={CONCURRENCY}, {size.kills} times"
    figures = [_failed(peer, each) for peer, each in found.items()]
    figures += [
        Figure(f"{peer.name}, until adopted", "s", tuple(each.took_s))
        for peer, each in found.items()
    ]
    return Section(title, figures, failures)


def _adopt(kills: int, peer: Peer) -> _Found:
    plan = Plan(_PORT, concurrency=CONCURRENCY)
    marks_s, took_s = [], []
    with ExitStack() as stack:
        running = stack.enter_context(peers.running(peer, _PORT))
        client = stack.enter_context(load.load(plan))
        time.sleep(1 + _PAUSE_S)
        for turn in range(kills):
            marks_s.append(time.monotonic())
            running = _with_new_controller(running, running.site.directory / f"log-{turn}")
            stack.callback(running.server.kill)
            took_s.append(time.monotonic() - marks_s[-1])
            time.sleep(_PAUSE_S)
        return _Found(client.finish(), marks_s, took_s)


def _with_new_controller(running: Running, log: Path) -> Running:
    """Kill it, and start another with the same arguments, which takes the workers as they are."""
    workers = running.workers()
    running.server.process.kill()
    running.server.process.wait()
    server = Server(running.server.command, _PORT, running.site.environment, log)
    new = replace(running, server=server)
    new.wait_for(
        lambda: peers.status(new).get("pid") == server.pid and new.workers() == workers,
        "the same workers under it",
    )
    return new


# ---- UDP


def _udp(size: Size) -> Section:
    workers = 8
    with tempfile.TemporaryDirectory(prefix="steer-bench-") as directory:
        file = Path(directory, "received")
        file.touch()
        replaced = _send_across(size, workers, file)
        received = Counter(file.read_text().split())
    sent = size.datagrams
    figures = [
        Figure(f"lost, of {sent:,}", "", (sent - len(received),), at_most=0),
        Figure("received twice", "", (received.total() - len(received),), at_most=0),
        Figure("sockets replaced meanwhile", "", (replaced,), at_least=size.sockets),
    ]
    return Section("UDP, a datagram a millisecond across reloads", figures)


def _send_across(size: Size, workers: int, file: Path) -> int:
    """Returns how many sockets were replaced before the last datagram was sent."""
    peer = replace(peers.steered("round-robin"), command=partial(_udp_command, workers))
    send = [sys.executable, "-m", "bench.datagrams", str(_PORT), str(size.datagrams)]
    replaced = 0
    with peers.running(peer, _PORT, {datagrams.FILE: str(file)}, workers) as running:
        with subprocess.Popen(send, cwd=servers.ROOT) as sender:
            for _ in range(size.sockets // workers):
                peers.steer(running, "reload")
                replaced += workers if sender.poll() is None else 0
        time.sleep(_PAUSE_S)
    return replaced


def _udp_command(workers: int, site: peers.Site) -> list[str]:
    base = [tool("steer"), "run", "-w", str(workers), "-b", f"udp://{HOST}:{site.port}"]
    name = ["--name", servers.name(site.port)]
    return [*base, *name, "--policy", "round-robin", "bench.datagrams:serve"]
