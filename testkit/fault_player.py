"""Does to a service what a sequence says, waits for what follows, and keeps account of it."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from steer.errors import ControlError, Refused
from steer.linux import activity, processes
from testkit.fault_load import PORT, Load, Record
from testkit.faults import Act, Death, Held, Kind, lost
from testkit.processes import eventually, is_running
from testkit.service import Service

Worker = dict[str, Any]
"""As in status."""
_LAST_ACTS = 25
_LISTEN = "0A"  # include/net/tcp_states.h, in hexadecimal


class Player:
    """One service, and what happens to it.

    Args:
        start: `steer run` with the service's options, not waited for.
        service: what that made, and is ready.
        workers: as many as the options say.
        replaces: whether who hangs is replaced.
        has_backup: whether connections can wait while nobody is there.

    Attributes:
        helds: what workers had accepted that were stopped or killed, but for those that
            went on and finished it.
        deaths: of those that were killed here.
        services: each has adopted what the one before it left.
        unmanned: spans in which there may have been nobody to choose.
        kinds: of the acts that had somebody to happen to.
    """

    def __init__(
        self,
        start: Callable[[], Service],
        service: Service,
        load: Load,
        record: Record,
        workers: int,
        replaces: bool,
        has_backup: bool,
    ) -> None:
        self.helds: list[Held] = []
        self.deaths: list[Death] = []
        self.unmanned: list[tuple[float, float]] = []
        self.kinds: set[Kind] = set()
        self.wanted = workers
        self._configured = workers
        self._replaces = replaces
        self._has_backup = has_backup
        self._load = load
        self._record = record
        self._stopped: set[int] = set()
        self._drained: dict[int, int | None] = {}
        self._unmanned_s: float | None = None
        self._diary: list[str] = []
        self._began_s = time.monotonic()
        self._start = start
        self.services = [service]

    @property
    def service(self) -> Service:
        return self.services[-1]

    def play(self, acts: Iterable[Act], for_s: float) -> None:
        """One act after the other until the time is over; then all is put right again."""
        end_s = time.monotonic() + for_s
        for act in acts:
            if time.monotonic() > end_s:
                break
            time.sleep(act.pause_s)  # for clients to go on: nothing is waited for
            self._note(act.kind, partial(_DO[act.kind], self, act))
        self._note(None, self._put_right)

    def let_go(self) -> None:
        """Leave nobody stopped, whatever went wrong: that would not end either."""
        for pid in self._stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def report(self) -> str:
        """What one wants to know when something went wrong."""
        now_s = time.monotonic()
        gone = {id(each) for each in lost(self._load.requests, self.helds, self.deaths)}
        failed = [
            f"{each.number} from port {each.port}, {self._at(each.begun_s)} to"
            f" {self._at(each.ended_s)}, {'LOST' if id(each) in gone else 'held'}: {each.error}"
            for each in self._load.requests
            if each.error
        ]
        waiting = [
            f"{number} from port {port}, since {self._at(begun_s)}"
            for number, (begun_s, port) in sorted(self._load.waiting.copy().items())
        ]
        logs = [service.log for service in self.services]
        parts = (
            ("last acts", self._diary[-_LAST_ACTS:]),
            ("failed", failed),
            (f"waiting at {self._at(now_s)}", waiting),
            ("counted by the kernel", _tcp_counts()),
            ("log", logs),
        )
        return "\n".join(f"{title}:\n" + "\n".join(lines) for title, lines in parts)

    def _at(self, time_s: float) -> str:
        return f"{time_s - self._began_s:.3f} s"

    def _note(self, kind: Kind | None, do: Callable[[], str]) -> None:
        """Have it done, with all that follows, and write it down."""
        name = kind.value if kind else "put right"
        begun_s, ready, deaths = time.monotonic(), self._ready(), len(self.deaths)
        self._diary.append(f"{self._at(begun_s)} {name}: not done")
        outcome = do()
        if outcome:
            self._wait_until_settled()
            self.kinds |= {kind} if kind else set()
        ended_s = time.monotonic()
        self._diary[-1] = f"{self._at(begun_s)} to {self._at(ended_s)} {name}: {outcome or '-'}"
        kills = len(self.deaths) - deaths
        # Together with a change it may have been the last that was to stay.
        some_died = kills > 0 and (kills >= ready or kind is not Kind.KILL)
        if some_died or not self._ready():
            self._unmanned_s = self._unmanned_s or begun_s
        if self._unmanned_s and self._ready():
            self.unmanned.append((self._unmanned_s, ended_s))
            self._unmanned_s = None

    # Acts. Each says what was done, or nothing if there was nobody to do it to.

    def _reload(self, act: Act) -> str:
        before = self.service.status()["generation"]
        answer, also = self._change(act, "reload")
        assert answer["generation"] == before + 1
        self.wanted = self._configured
        return f"generation {answer['generation']}{also}"

    def _scale(self, act: Act) -> str:
        _, also = self._change(act, "scale", workers=act.workers)
        before, self.wanted = self.wanted, act.workers
        return f"{before} to {self.wanted}{also}"

    def _change(self, act: Act, command: str, **more: Any) -> tuple[dict[str, Any], str]:
        """The answer; and whether a worker was killed meanwhile."""
        # The last that was to stay may be the victim.
        victim = self._pick(act) if self._has_backup and act.amid < 0.3 else None
        with ThreadPoolExecutor(1) as asker:
            answer = asker.submit(self.service.ask, command, timeout_s=None, **more)
            also = f", meanwhile killed {self._end(victim['pid'])}" if victim else ""
            return answer.result(), also

    def _drain(self, act: Act) -> str:
        worker = self._pick(act, "ready")
        if worker is None:
            return ""
        slot, pid = worker["slot"], worker["pid"]
        try:
            self.service.ask("drain", timeout_s=None, slot=slot)
        except Refused as refused:
            if "no other is ready" not in str(refused):
                raise
            return f"slot {slot}, refused"
        self._drained[pid] = self._selected(pid)
        return f"slot {slot}, pid {pid}"

    def _undrain(self, act: Act) -> str:
        worker = self._pick(act, "draining")
        return self._give_back(worker) if worker else ""

    def _restart(self, act: Act) -> str:
        worker = self._pick(act)
        if worker is None:
            return ""
        answer = self.service.ask("restart", timeout_s=None, slot=worker["slot"])
        return f"slot {worker['slot']}, now {answer['new_slot']}"

    def _kill(self, act: Act) -> str:
        worker = self._pick(act)
        may = self._has_backup or self._ready() > 1
        return self._end(worker["pid"]) if worker and may else ""

    def _stop(self, act: Act) -> str:
        """Who is replaced comes back before it is killed, or never."""
        worker = self._pick(act)
        if worker is None or worker["pid"] in self._stopped:
            return ""
        pid = worker["pid"]
        self._hold(pid)
        self._stopped.add(pid)
        if self._replaces and act.amid < 0.5:
            eventually(lambda: self._state(pid) == "stopping" or self._may_stay_stopped(pid))
            return f"{self._wake(pid)}, which had been stopped"
        return f"pid {pid}, which was {worker['state']}"

    def _cont(self, act: Act) -> str:
        living = sorted(pid for pid in self._stopped if is_running(pid))
        return self._wake(act.choose(living)) if living else ""

    def _rerun(self, act: Act) -> str:
        """The controller may just have begun something, or a worker die while there is none."""
        # Not the last: with nobody left a service without a controller ends.
        victim, also = self._pick(act) if self._ready() > 1 else None, ""
        generation = self.service.status()["generation"]
        with ThreadPoolExecutor(1) as asker:
            if act.amid < 0.25:
                pids = {each["pid"] for each in self._workers()}
                asker.submit(self._ask_in_vain, "reload")
                eventually(lambda: {each["pid"] for each in self._workers()} - pids)
                also = ", which had begun to reload"
            elif act.amid < 0.5 and victim:
                also = f", just after {self._end(victim['pid'])}"
            self.service.process.kill()
            self.service.wait()
        if act.amid > 0.75 and victim:
            also = f", then killed {self._end(victim['pid'])}"
        self.services.append(self._start())
        eventually(self._is_adopted)
        if self.service.status()["generation"] > generation:
            self.wanted = self._configured
        return f"pid {self.services[-2].pid}{also}; adopted by {self.service.pid}"

    def _put_right(self) -> str:
        for pid in list(self._stopped):
            self._wake(pid)
        for worker in self._workers():
            if worker["state"] == "draining":
                self._give_back(worker)
        eventually(lambda: {each["state"] for each in self._workers()} == {"ready"})
        return f"{self.wanted} workers"

    # What is done to a worker.

    def _hold(self, pid: int) -> None:
        """Stop it, and see what it has accepted."""
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: not is_running(pid) or activity.is_stopped(pid))
        self.helds.append(Held(pid, time.monotonic(), accepted(pid)))

    def _end(self, pid: int) -> str:
        with suppress(ProcessLookupError):
            self._hold(pid)
            from_s = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: not is_running(pid))
            self.deaths.append(Death(from_s, time.monotonic()))
            count = len(self.helds[-1].ports)
            return f"pid {pid} with {count} accepted at {self._at(from_s)}"
        return f"pid {pid}, too late"

    def _wake(self, pid: int) -> str:
        """What it has accepted it answers now, unless it had to be killed."""
        self._stopped.discard(pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
            if self._state(pid) in ("stopping", None):
                eventually(lambda: not is_running(pid))
            if is_running(pid) or pid in self._record.ended():
                self.helds = [held for held in self.helds if held.pid != pid]
        return f"pid {pid}"

    def _give_back(self, worker: Worker) -> str:
        self.service.ask("undrain", slot=worker["slot"])
        self._drained.pop(worker["pid"], None)
        return f"slot {worker['slot']}, pid {worker['pid']}"

    # What is seen.

    def _workers(self) -> list[Worker]:
        return self.service.workers()

    def _ready(self) -> int:
        return sum(each["state"] == "ready" for each in self._workers())

    def _pick(self, act: Act, *states: str) -> Worker | None:
        wanted = states or ("ready", "draining", "hung")
        found = {each["slot"]: each for each in self._workers() if each["state"] in wanted}
        return found[act.choose(sorted(found))] if found else None

    def _state(self, pid: int) -> str | None:
        return next((each["state"] for each in self._workers() if each["pid"] == pid), None)

    def _selected(self, pid: int) -> int | None:
        workers = self._workers()
        found = (each["connections"]["selected"] for each in workers if each["pid"] == pid)
        selected: int | None = next(found)
        return selected

    def _ask_in_vain(self, command: str) -> None:
        with suppress(ControlError):
            self.service.ask(command, timeout_s=None)

    def _is_adopted(self) -> bool:
        assert self.service.process.poll() is None, "the new controller has ended"
        with suppress(ControlError):
            return bool(self.service.status()["pid"] == self.service.pid)
        return False

    def _wait_until_settled(self) -> None:
        """Everybody is in the state to be in, and stays there."""
        try:
            eventually(self._is_settled)
        except AssertionError as error:
            found = [(each["slot"], each["pid"], each["state"]) for each in self._workers()]
            known = f"stopped {self._stopped}, drained {set(self._drained)}, {self.wanted} wanted"
            raise AssertionError(f"{found}, {known}") from error

    def _is_settled(self) -> bool:
        status = self.service.status()
        workers = {each["pid"]: each for each in status["workers"] if each["state"] != "stopping"}
        leaving = {each["pid"] for each in status["workers"]} - set(workers)
        self._stopped &= set(workers) | {pid for pid in leaving if is_running(pid)}
        self._drained = {pid: count for pid, count in self._drained.items() if pid in workers}
        return (
            status["state"] == "running"
            and len(workers) == self.wanted
            and {each["generation"] for each in workers.values()} == {status["generation"]}
            and all(self._is_right(each) for each in workers.values())
            and (not leaving if self._replaces else leaving <= self._stopped)
            and self._nobody_waits_in_vain(status["workers"])
        )

    def _nobody_waits_in_vain(self, workers: Iterable[Worker]) -> bool:
        """Whether what waited for those who are not chosen has gone to others."""
        idle = {each["sockets"][0] for each in workers if each["state"] in ("hung", "draining")}
        if not idle or not self._has_backup or not self._ready():
            return True
        return not any(each.queued for each in _sockets() if each.inode in idle)

    def _is_right(self, worker: Worker) -> bool:
        pid, state = worker["pid"], worker["state"]
        if pid in self._drained:
            now = worker["connections"]["selected"]
            assert now == self._drained[pid], f"slot {worker['slot']} is chosen, though drained"
            return bool(state == "draining")
        return self._may_stay_stopped(pid) if pid in self._stopped else bool(state == "ready")

    def _may_stay_stopped(self, pid: int) -> bool:
        """Who is last is not given up."""
        state = self._state(pid)
        if state == "hung":
            return not self._replaces
        return state == "draining" or (state == "ready" and self._ready() == 1)


_DO: dict[Kind, Callable[[Player, Act], str]] = {
    Kind.RELOAD: Player._reload,
    Kind.SCALE: Player._scale,
    Kind.DRAIN: Player._drain,
    Kind.UNDRAIN: Player._undrain,
    Kind.RESTART: Player._restart,
    Kind.KILL: Player._kill,
    Kind.STOP: Player._stop,
    Kind.CONT: Player._cont,
    Kind.RERUN: Player._rerun,
}


def _tcp_counts() -> list[str]:
    """What may tell why a connection was reset, see netstat(8)."""
    names, values = Path("/proc/thread-self/net/netstat").read_text().splitlines()[:2]
    wanted = re.compile("Migrate|Listen|Overflow|Abort|Cookies")
    pairs = zip(names.split(), values.split(), strict=True)
    return [f"{name} {value}" for name, value in pairs if wanted.search(name) and value != "0"]


def accepted(pid: int) -> frozenset[int]:
    """The clients' ports of the connections that a worker has; one in a queue is nobody's yet."""
    own, found = processes.open_sockets(pid), _sockets()
    return frozenset(each.peer for each in found if not each.listens and each.inode in own)


def listening() -> set[int]:
    """The inodes of the listeners on the service's port."""
    return {each.inode for each in _sockets() if each.listens}


class _Socket(NamedTuple):
    """One on the service's port. `peer` is the other end's, `queued` counts connections."""

    inode: int
    listens: bool
    peer: int
    queued: int


def _sockets() -> list[_Socket]:
    """As proc_net(5) lists them, of this thread's network namespace."""
    found = []
    for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, queues, *_, inode = line.split()[:10]
        if _number(local) == PORT:
            listens = state == _LISTEN
            queued = _number(queues) if listens else 0
            found.append(_Socket(int(inode), listens, _number(remote), queued))
    return found


def _number(pair: str) -> int:
    """The second of two, in hexadecimal."""
    return int(pair.partition(":")[2], 16)
