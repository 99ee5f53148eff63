"""A service of any number of workers without processes, and what it costs to run it.

The pool, its rotation, the guard's client and the changes are the real ones. Workers, the
backend and the guard's process are fakes, which count what they are asked to do.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, cast

from steer.backends.base import Counts
from steer.config import planning
from steer.config.plan import Generation, Plan
from steer.config.servers import DEFAULT_STOP_SIGNALS
from steer.config.service import Service
from steer.control.notify import IgnoredReady
from steer.controller.rollout import Rollout
from steer.controller.turns import Turns
from steer.features import Answer, Finding
from steer.guard.channel import Frame
from steer.guard.client import GuardClient
from steer.guard.store import Settings
from steer.linux.family import Family
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.linux.spare import Spare
from steer.policy import builtin
from steer.policy.builtin import LayoutContext
from steer.policy.classic import Order
from steer.policy.cpus import Topology
from steer.policy.layout import Member
from steer.workers import process
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import Event
from steer.workers.pool import WorkerPool
from testkit import ROOT

FEW, MANY = 10, 200
READY = {"READY": "1"}
_CPUS = (0, 1)
_NO_PID = 1 << 23
"""Beyond any there can be (PID_MAX_LIMIT of include/linux/threads.h)."""
_NO_FD = 1 << 30
_OURS = (str(ROOT / "testkit"), str(ROOT / "tests"))


class Cost(Counter[str]):
    """What was done, by kind: `steps` are instructions of Python, `proc` files of /proc that were
    opened, and the rest is counted by the fakes."""

    @contextmanager
    def of_steps(self) -> Iterator[None]:
        """Count instructions of all but tests, and files of /proc."""

        steps = 0

        def look(frame: FrameType, event: str, _: object) -> Any:
            if frame.f_code.co_filename.startswith(_OURS):
                return None
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
            return step

        def step(_frame: FrameType, event: str, _: object) -> Any:
            nonlocal steps
            if event == "opcode":
                steps += 1
            return step

        before, _counted[:] = sys.gettrace(), [self]
        sys.settrace(look)
        try:
            yield
        finally:
            sys.settrace(before)
            _counted.clear()
            self["steps"] += steps


_counted: list[Cost] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """See audit hooks of sys: one cannot be taken away."""
    if _counted and event in ("open", "os.listdir", "os.scandir"):
        _counted[0]["proc"] += str(arguments[0]).startswith("/proc/")


sys.addaudithook(_audit)


class FakeChannel:
    """To a guard's process that does all it is told."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost

    def send_all(self, frames: Sequence[Frame], _fds: Sequence[int] = ()) -> None:
        self._cost["messages to the guard"] += 1
        self._cost["bytes to the guard"] += sum(len(frame.value) for frame in frames)
        self._cost["waits for the guard"] += any(frame.wait for frame in frames)

    def receive(self) -> object:
        return ()

    def close(self) -> None:
        pass


class FakeGuard(GuardClient):
    """Without its process."""

    def __init__(self, home: Path, cost: Cost) -> None:
        with socket.socket() as control:
            super().__init__(control, Settings("growth", str(home / "growth.sock")))
        self._process.pid = self._process._pidfd = _NO_PID
        self._process._channel = cast(Any, FakeChannel(cost))


class FakeBackend:
    """Lays out a table as the real ones do, and puts it nowhere."""

    name = "ebpf"
    needs_order = False
    backup = None
    forget_flows = None
    counting = None
    anchors: Mapping[int, socket.socket] = {0: cast(Any, None)}

    def __init__(self, plan: Plan, cost: Cost) -> None:
        self._plan = plan
        self._cost = cost
        self.members: Sequence[Member] = ()

    def add_member(self, _slot: int, _fds: Sequence[int]) -> None:
        self._cost["joined"] += 1

    def remove_member(self, _slot: int) -> None:
        self._cost["left"] += 1

    def take_counts(self, _slot: int) -> Counts:
        self._cost["looks at counts"] += 1
        return Counts()

    def counts(self, _slot: int) -> Counts:
        self._cost["looks at counts"] += 1
        return Counts()

    def unsteered(self) -> int:
        return 0

    def steer(self, members: Sequence[Member]) -> None:
        self._cost["publications"] += 1
        self.members = members
        builtin.build_layout(
            self._plan.policy, members, LayoutContext(self._plan.topology, self._plan.hash_length)
        )

    def swap(self, plan: Plan, members: Sequence[Member], _lend: object) -> None:
        self._plan = plan
        self.steer(members)

    def grace_period(self) -> None:
        """The next publication waits for nothing."""

    def stored(self) -> tuple[object, Sequence[int]]:
        return None, ()

    def held(self, _slot: int) -> Sequence[int]:
        return ()

    def is_member(self, _slot: int, _bind: int) -> bool:
        return False

    def release(self) -> None:
        pass

    def migrate_queue(self, slot: int, owned: Mapping[int, socket.socket]) -> None:
        pass


class OrderedBackend(FakeBackend):
    """Which, as `cbpf`, holds a socket of each worker, and has to know their order."""

    name = "cbpf"
    needs_order = True
    controller_sockets = ()

    def __init__(self, plan: Plan, cost: Cost) -> None:
        super().__init__(plan, cost)
        self._order = Order()

    def add_member(self, slot: int, fds: Sequence[int]) -> None:
        super().add_member(slot, fds)
        self._order.joined(slot)

    def remove_member(self, slot: int) -> None:
        super().remove_member(slot)
        self._order.left(slot)

    @property
    def order(self) -> Sequence[int]:
        return list(self._order.indexes())

    def stored(self) -> tuple[object, Sequence[int]]:
        return self.order, ()

    def held(self, slot: int) -> Sequence[int]:
        return (_NO_FD + slot,) if slot in self._order else ()


class FakeProcess:
    """A worker that is there as long as nobody ends it."""

    problem = None
    left_behind: Sequence[int] = ()
    last_words = why_this_signal = ""
    is_callable = True
    inodes: frozenset[int] = frozenset()
    bound: tuple[int, ...] = ()
    pids = count(_NO_PID)

    def __init__(self, launch: Any, guard: GuardClient, cost: Cost) -> None:
        self.launch = launch
        self.pid = next(self.pids)
        self.family = Family(self.pid)
        self.told_to_finish = self.is_killed = False
        self.is_open = True
        self.started_s = 0.0
        self.has_ended = False
        self._guard = guard
        self._cost = cost
        cost["processes"] += 1

    def go_on(self) -> None:
        pass

    @property
    def key(self) -> str:
        return f"worker {self.pid}"

    @property
    def running(self) -> Any:
        return process.Running(self.pid, self.started_s, self.bound, self.told_to_finish)

    def keep(self, value: bytes, held: Sequence[int] = (), look: bool = True) -> None:
        self._cost["saves of a worker"] += 1
        self._cost["looks at a worker"] += look
        self._guard.put(self.key, value, (0, 1, 2, *held), self.pid, DEFAULT_STOP_SIGNALS.first)

    def watch(self, loop: Any, ended: Callable[[], None]) -> None:
        self._loop, self._ended = loop, ended

    def terminate(self, _quick: bool = False) -> None:
        self.told_to_finish = True
        self._loop.call_soon(self.exit, signal.SIGTERM)

    kill_group = terminate

    def end(self) -> None:
        self._guard.drop(self.key)

    def exit(self, number: int) -> None:
        """Its end is seen, once."""
        if not self.has_ended:
            self.has_ended, self._status = True, -number
            self._ended()

    def signal_others(self, _pids: Sequence[int]) -> None:
        pass

    def let_go(self) -> int:
        self._guard.drop(self.key)
        self.is_open = False
        return self._status

    @contextmanager
    def sockets(self) -> Iterator[Mapping[int, socket.socket]]:
        yield {}


class FakeService:
    """Its workers, once it is `up`; each that is started gets ready in the next turn of the loop.

    Attributes:
        cost: of what was done since `count`.
    """

    def __init__(
        self,
        home: Path,
        workers: int,
        policy_name: str = "random",
        backend: type[FakeBackend] = FakeBackend,
        **keys: Any,
    ) -> None:
        self.cost = Cost()
        self.plan = plan_for(workers, policy_name, **keys)
        self.guard = FakeGuard(home, self.cost)
        self.backend = backend(self.plan, self.cost)
        self.pool = WorkerPool(
            Generation(1, self.plan),
            self.plan.slots,
            cast(Any, self.backend),
            self.guard,
            cast(Any, self._launch),
            Log("error", "text"),
            Retry(Log("error", "text"), Spare(0)),
            IgnoredReady(lambda _: None),
        )
        self.changes = Rollout(self.pool, lambda *_: None, Turns(), lambda _: nullcontext())
        self._loop: asyncio.AbstractEventLoop | None = None

    def _launch(self, worker: WorkerHandle) -> object:
        service = worker.service
        return SimpleNamespace(
            service=service, binds=(), anchored=(), slot=worker.slot, niced=False
        )

    def fork_all(
        self, launches: Sequence[Any], guard: GuardClient, *_owned: object
    ) -> Sequence[FakeProcess]:
        """Take the place of that of `spawn`."""
        self.cost["lots of forks"] += 1
        return [self._fork(launch, guard) for launch in launches]

    def _fork(self, launch: Any, guard: GuardClient) -> FakeProcess:
        begun = FakeProcess(launch, guard, self.cost)
        if self._loop is not None:
            self._loop.call_soon(self.pool.notified, (begun.pid,), READY)
        return begun

    async def up(self) -> None:
        """Start all workers and have them ready."""
        self._loop = asyncio.get_running_loop()
        self.pool.start(lambda: None)
        self.pool.watch(self._loop, lambda _: None, self._drain)
        self.pool.fill()
        while len(self.ready(len(self.plan.specs))) < len(self.plan.specs):
            await rest()

    def _drain(self, worker: WorkerHandle) -> Any:
        """Nothing waits for it: see `Drainer.begin`."""
        assert self._loop
        return self._loop.call_soon(self.pool.report, worker, Event.DRAINED)

    @contextmanager
    def counted(self, steps: bool = True) -> Iterator[Cost]:
        """What is done meanwhile. Counting steps makes it several times as long."""
        self.cost.clear()
        with self.cost.of_steps() if steps else nullcontext():
            yield self.cost

    def ready(self, workers: int = 1) -> list[WorkerHandle]:
        """The first that serve."""
        return [worker for worker in self.pool.workers if worker.serves][:workers]


def pid_of(worker: WorkerHandle) -> int:
    assert worker.process
    return worker.process.pid


def plan_for(workers: int, policy_name: str = "random", **keys: Any) -> Plan:
    service = Service(workers=workers, policy=policy_name, **keys)
    return planning.plan(service, Topology(_CPUS, _CPUS, {}), {"ebpf": Finding(Answer.YES)})


async def rest() -> None:
    """Until everybody waits for something."""
    for _ in range(10):
        await asyncio.sleep(0)


Script = Callable[[FakeService], Coroutine[Any, Any, None]]


def cost_of(script: Script, home: Path, workers: int, **keys: Any) -> Cost:
    """Of what a script counts, in a service of so many."""
    service = FakeService(home, workers, **keys)
    real = process.fork_all
    process.fork_all = cast(Any, service.fork_all)

    async def run() -> None:
        await service.up()
        await script(service)

    try:
        asyncio.run(run())
    finally:
        process.fork_all = real
    return service.cost
