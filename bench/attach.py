"""`steer attach` to servers that run already: what it is worth to them, and what it takes.

Where there is a figure without steer it is of the same run, one after the other and again.
"""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench import attached, attached_slow, attached_spread, inspect, servers, wrk
from bench.attached import ALL, APACHE, GRANIAN, GUNICORN, HAPROXY, NGINX, THREADS, Kind, Running
from bench.figures import Figure, Section, interleaved, ratio
from bench.inspect import GROUPS, SOCKETS
from bench.servers import HOST
from steer.attach.group import AttachedGroup
from steer.attach.target import Target
from steer.config import address
from steer.config.plan import Plan as ServicePlan
from steer.config.planning import plan
from steer.config.service import Service
from steer.config.sources import changed
from steer.linux import topology
from steer.linux.log import Log
from steer.loader import find, libbpf
from steer.loader.shared_memory import wait_for_programs

CONCURRENCY = 64
ATTACH_AT_MOST_MS, DETACH_AT_MOST_MS = 25.0, 2.0
KILLED_AT_MOST_S = 1.2
IDLE_AT_MOST_PERCENT, IDLE_AMONG_MANY_AT_MOST_PERCENT = 0.1, 0.4
JOINING = 320
LOOK_AT_MOST_MS = 100
_PORT = 9940
_GIVE_UP_S = 10.0


@dataclass(frozen=True)
class Size:
    """How much to do; --quick does little.

    Args:
        window_s: of all reloads of a round, by server: about what 50,000 requests take.
    """

    window_s: Mapping[str, float]
    connections: int = 400
    reloads: int = 10
    rounds: int = 2
    load_rounds: int = 8
    slow_rounds: int = 3
    slow_s: float = 10.0
    attaches: int = 200
    kills: int = 3
    idle_s: float = 20.0
    load_s: float = 3.0
    slow_servers: int = len(attached_slow.CASES)


_WINDOWS_S = {
    NGINX.name: 15.0,
    HAPROXY.name: 20.0,
    APACHE.name: 15.0,
    GUNICORN.name: 60.0,
    GRANIAN.name: 15.0,
}
_FULL = Size(_WINDOWS_S)
_QUICK = Size(dict.fromkeys(_WINDOWS_S, 0.3), 40, 1, 1, 1, 1, 0.2, 2, 1, 0.5, 0.3, 2)


def run(quick: bool) -> Iterator[Section]:
    size = _QUICK if quick else _FULL
    with tempfile.TemporaryDirectory(prefix="steer-bench-") as directory:
        environment = servers.environment(directory)
        Path(environment["STEER_RUNTIME_DIR"]).mkdir()
        os.environ["STEER_RUNTIME_DIR"] = environment["STEER_RUNTIME_DIR"]
        bench = _Bench(size, environment)
        yield from attached_spread.sections(_PORT, environment, size.connections)
        for kind in ALL:
            if kind.reload:
                yield bench.reloads(kind)
        slow = attached_slow.CASES[: size.slow_servers]
        yield from attached_slow.sections(slow, _PORT, environment, size.slow_s, size.slow_rounds)
        yield bench.attaching()
        yield bench.joining()
        yield bench.status()
        yield bench.killed()
        yield bench.load()
        yield bench.idle()


def _plan(at: Running, workers: int) -> ServicePlan:
    asked = {"policy": "round-robin", "bind": [f"{HOST}:{at.port}"], "backend": "ebpf"}
    service = changed(Service(), {**asked, "workers": workers}, "measure")
    return plan(service, topology.read(), {}, find.find("round-robin"))


class _Bench:
    def __init__(self, size: Size, environment: Mapping[str, str]) -> None:
        self._size = size
        self._environment = environment

    # ---- reloads

    def reloads(self, kind: Kind) -> Section:
        subjects = {name: partial(self._reload, kind, name) for name in ("alone", "attached")}
        found = interleaved(subjects, self._size.rounds)
        figures = []
        for name, rounds in found.items():
            requests = sum(each.requests for each in rounds)
            failed = sum(each.errors for each in rounds)
            at_most = 0 if name == "attached" and not kind.drops_accepted else None
            figures.append(Figure(f"{name}, of {requests:,}", "failed", (failed,), at_most))
        title = f"{kind.name}: {self._size.rounds}×{self._size.reloads} reloads, c={CONCURRENCY}"
        return Section(title, figures)

    def _reload(self, kind: Kind, name: str) -> wrk.Counts:
        assert kind.reload
        window_s = self._size.window_s[kind.name]
        with ExitStack() as stack:
            at = stack.enter_context(attached.running(kind, _PORT, self._environment))
            if name == "attached":
                stack.enter_context(attached.attached(at, self._environment))
            asking = stack.enter_context(wrk.asking(_PORT, CONCURRENCY))
            for _ in range(self._size.reloads):
                time.sleep(window_s / (self._size.reloads + 1))
                kind.reload(at)
            time.sleep(window_s / (self._size.reloads + 1))
            return asking.finish()

    # ---- attach and detach

    def attaching(self) -> Section:
        """In this process, again and again, as a command would take most of its time to start."""
        attach_ms: list[float] = []
        detach_ms: list[float] = []
        made: set[tuple[str, int]] = set()
        with attached.running(NGINX, _PORT, self._environment) as at:
            self._attach_once(at, made)  # what is imported and cached stays
            with wrk.asking(_PORT, CONCURRENCY // 4) as asking:
                for _ in range(self._size.attaches):
                    attaching, detaching = self._attach_once(at, made)
                    attach_ms.append(attaching)
                    detach_ms.append(detaching)
                counts = asking.finish()
            left = _left(made)
        title = f"{self._size.attaches} attaches and detaches under load, round-robin, 4 listeners"
        return Section(
            title,
            [
                Figure("attach", "ms", tuple(attach_ms), ATTACH_AT_MOST_MS),
                Figure("detach", "ms", tuple(detach_ms), DETACH_AT_MOST_MS),
                Figure(f"of {counts.requests:,} requests", "failed", (counts.errors,), 0),
                Figure(f"of {len(made):,} programs, maps and links", "left", (left,), 0),
            ],
        )

    def _attach_once(self, at: Running, made: set[tuple[str, int]]) -> tuple[float, float]:
        """Milliseconds of CPU: from loading programs to steering; and to detach.

        Args:
            made: gets the programs, maps and links that there were meanwhile.
        """
        target = Target(address.parse(f"{HOST}:{at.port}"))
        decided = _plan(at, len(target.listeners))
        began_s = time.process_time()
        group = AttachedGroup(decided, Log("error", "text"))
        group.begin(target.pids)
        attach_s = time.process_time() - began_s
        made |= _objects()
        group.check_program()  # as an attacher does 1 s after it began, which takes 10 ms
        began_s = time.process_time()
        group.detach()
        detach_s = time.process_time() - began_s
        group.close()
        return 1000 * attach_s, 1000 * detach_s

    def joining(self) -> Section:
        """One look, while which no request is answered."""
        many = replace(THREADS, workers=JOINING)
        looks_ms = []
        for _ in range(self._size.rounds):
            with (
                attached.running(THREADS, _PORT, self._environment) as at,
                closing(AttachedGroup(_plan(at, JOINING), Log("error", "text"))) as group,
            ):
                group.begin()
                with attached.running(many, _PORT, self._environment):
                    began_s = time.monotonic()
                    group.look()
                    looks_ms.append(1000 * (time.monotonic() - began_s))
                group.detach()
        title = f"{JOINING} listeners of one process, each waited on by a thread, join"
        return Section(title, [Figure("look", "ms", tuple(looks_ms), LOOK_AT_MOST_MS)])

    # ---- the attacher is killed

    def status(self) -> Section:
        """How long a client waits for it, and other requests with it."""
        from steer.control import client

        took_ms = []
        with (
            attached.running(NGINX, _PORT, self._environment) as at,
            attached.attached(at, self._environment),
        ):
            path = Path(self._environment["STEER_RUNTIME_DIR"], f"{servers.name(at.port)}.sock")
            client.status(path)  # the first one loads what looks at the group
            for _ in range(self._size.attaches):
                began_s = time.monotonic()
                client.status(path)
                took_ms.append(1000 * (time.monotonic() - began_s))
        return Section("status of 4 listeners", [Figure("status", "ms", tuple(took_ms), 5)])

    def killed(self) -> Section:
        took_s, requests, failed = [], 0, 0
        for _ in range(self._size.kills):
            with attached.running(NGINX, _PORT, self._environment) as at, ExitStack() as stack:
                options = ("--policy", "round-robin", "--weights", "1000,1,1,1")
                attacher = stack.enter_context(attached.attached(at, self._environment, *options))
                asking = stack.enter_context(wrk.asking(_PORT, CONCURRENCY))
                time.sleep(0.5)
                attacher.kill()
                took_s.append(_until_hashed())
                counts = asking.finish()
                requests, failed = requests + counts.requests, failed + counts.errors
        return Section(
            f"attacher killed under load, {self._size.kills} times",
            [
                Figure("until the kernel's hash selects", "s", tuple(took_s), KILLED_AT_MOST_S),
                Figure(f"of {requests:,} requests", "failed", (failed,), 0),
            ],
        )

    # ---- what it costs

    def load(self) -> Section:
        subjects = {name: partial(self._per_second, name) for name in ("alone", "attached")}
        found = interleaved(subjects, self._size.load_rounds)
        return Section(
            "nginx, tiny answers",
            [
                Figure("alone", "req/s", tuple(found["alone"])),
                Figure("attached, least-conn", "req/s", tuple(found["attached"])),
                ratio("attached to alone", found["attached"], found["alone"], at_least=0.95),
            ],
        )

    def _per_second(self, name: str) -> float:
        with attached.running(NGINX, _PORT, self._environment) as at, ExitStack() as stack:
            if name == "attached":
                options = ("--policy", "least-conn")
                stack.enter_context(attached.attached(at, self._environment, *options))
            with wrk.asking(_PORT, CONCURRENCY) as asking:
                time.sleep(self._size.load_s)
                return asking.finish().per_second

    def idle(self) -> Section:
        many = "% of a CPU", (self._idle(SOCKETS),), IDLE_AMONG_MANY_AT_MOST_PERCENT
        return Section(
            f"attacher of {THREADS.workers} listeners, idle",
            [
                Figure("no other sockets", "% of a CPU", (self._idle(0),), IDLE_AT_MOST_PERCENT),
                Figure(f"{SOCKETS} other listeners", *many),
            ],
        )

    def _idle(self, others: int) -> float:
        with ExitStack() as stack:
            stack.enter_context(inspect.held(others, GROUPS))
            at = stack.enter_context(attached.running(THREADS, _PORT, self._environment))
            attacher = stack.enter_context(attached.attached(at, self._environment))
            time.sleep(1)
            before_s = _cpu_s(attacher.pid)
            time.sleep(self._size.idle_s)
            return 100 * (_cpu_s(attacher.pid) - before_s) / self._size.idle_s


def _until_hashed() -> float:
    """Seconds until several of nginx's workers answer, not only the one that the weights prefer."""
    began_s = time.monotonic()
    while time.monotonic() < began_s + _GIVE_UP_S:
        if len({servers.get(_PORT) for _ in range(_ASKED)}) > _BY_WEIGHT:
            return time.monotonic() - began_s
    return _GIVE_UP_S


_ASKED, _BY_WEIGHT = 12, 2


_OBJECT = re.compile(r"^(prog|map|link)_id:\s*(\d+)", re.M)


def _objects() -> set[tuple[str, int]]:
    """The programs, maps and links that this process has open, by their numbers."""
    found = set()
    for info in Path("/proc/self/fdinfo").iterdir():
        with suppress(FileNotFoundError):
            found |= {
                (name, int(number))
                for name, number in re.findall(
                    r"^(prog|map|link)_id:\s*(\d+)", info.read_text(), re.M
                )
            }
    return found


def _left(made: set[tuple[str, int]]) -> int:
    """How many of these are there still, once what is freed after a grace period is gone."""
    end_s = time.monotonic() + _GIVE_UP_S
    while (left := sum(_exists(*each) for each in made)) and time.monotonic() < end_s:
        wait_for_programs()
    return left


def _exists(kind: str, number: int) -> bool:
    fd: int = getattr(libbpf.libbpf(), f"bpf_{kind}_get_fd_by_id")(ctypes.c_uint32(number))
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def _cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9
