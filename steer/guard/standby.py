"""A service without a controller, in the care of the keeper that outlived it.

It does what cannot wait: it reads what workers write, lets go of what belonged to one that
has ended, and answers at the control socket; until another controller takes everything, or
nobody has for too long and the workers are ended.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector

import msgspec

from steer.control import claim
from steer.control.mailbox import Mailbox
from steer.control.protocol import ASKERS_MAX, Request
from steer.control.record import Record
from steer.errors import ControlError
from steer.guard.channel import Channel, Frame
from steer.guard.requests import Connection, StandbyServer
from steer.guard.store import MAILBOX, PATIENCE_S, STEERING, FdStore, Settings, StoredEntry, Traces
from steer.linux import descriptors, family, fork, output, title
from steer.linux.lines import Line, Lines, shown
from steer.linux.spare import Spare
from steer.values import plural

QUICK_S = 1.0
"""From SIGTERM to SIGKILL when it has to be quick."""
IGNORED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
)
"""Meant for the controller, and sent to all of a service by some."""
_BACK_S = 10.0
"""So long a controller that executes itself anew may take to be back."""
_LAST_S = 0.2
"""For who has connected to say what it wants, when somebody else is to answer the next."""
_LOOK_S = 0.1
_CONTROL_S = 2.0
"""How often it is looked whether the control socket can still be found, as a controller does."""
_SPARE = 4
"""Descriptors that a request takes: its connection, and a channel to who adopts."""
_CHUNK_BYTES = 65536
_CHUNKS_AT_END = 16
"""More than a pipe holds (pipe(7))."""

Say = Callable[[str, str], None]
"""Logs a line in a format, "text" or "json", without waiting for anybody."""


class Standby:
    """A service without a controller.

    Args:
        control: the listening control socket.
    """

    def __init__(self, keeper: FdStore, control: socket.socket, say: Say) -> None:
        self._keeper = keeper
        self._settings = keeper.settings
        self._claim = claim.Claim.inherited(
            Path(self._settings.control), control, self._settings.remove_directory
        )
        self._record = Record(self._claim.path)
        self._control_s = time.monotonic()
        self._is_lost = False
        self._back_s = time.monotonic() + (_BACK_S if keeper.is_to_be_back else 0.0)
        self._control = control
        self._say: Callable[[str], None] = lambda words: say(words, self._settings.log_format)
        self._selector = DefaultSelector()
        self._desk = StandbyServer(control, self._selector, self._on_request, self._refusal)
        self._adopter: Channel | None = None
        self._adopter_pid = 0
        self._lines: dict[int, _Lines] = {}
        self._ending = self._is_quick = False
        self._killed = False
        self._stoppers: list[Connection] = []
        self._spare = Spare(_SPARE)
        self._is_failing = False
        self._adopted = False
        self._fresh: set[StoredEntry] = set()
        self._mailbox: Mailbox | None = None
        if MAILBOX in keeper.entries:
            groups = frozenset(kept.group for kept in self._living())
            self._mailbox = Mailbox(keeper.entries[MAILBOX].fds[0], groups)
        self._read_mail()
        self._end_unfinished()
        # All workers may have ended a moment ago: connections wait for the next.
        is_service = self._living() or STEERING in keeper.entries
        after_s = self._settings.adopt_timeout_s if is_service else 0.0
        self._end_s = time.monotonic() + after_s
        for key, kept in keeper.entries.items():
            if kept.is_worker and not kept.has_ended:
                self._watch(key, kept)

    def run(self) -> None:
        """Until it is adopted or nobody is left."""
        output.stderr.watch(self._on_blocked)
        self._tell()
        while not self._is_over():
            for key, _ in self._selector.select(self._patience_s()):
                # One that came before may have done away with it.
                if self._selector.get_map().get(key.fd) is key:
                    self._do(key.data)
            self._do(self._look)
        for lines in self._lines.values():
            lines.end()
        output.stderr.watch(None)
        output.stderr.finish(_LAST_S)
        if self._adopted:
            self._back_s = math.inf
        else:
            self._keeper.leave_nothing()
        self._desk.close(_LAST_S)
        self._control.close()
        for talk in self._stoppers:
            talk.answer({"ok": True})

    def _do(self, act: Callable[[], object]) -> None:
        """Whatever the machine lacks, the workers are not left alone for it."""
        try:
            with self._spare.lent():
                act()
        except (OSError, MemoryError) as error:
            if not self._is_failing:
                self._say(f"the guard: {error}; it is tried again")
            self._is_failing = True
            time.sleep(_LOOK_S)
        else:
            self._is_failing = False

    # Time.

    def _tell(self) -> None:
        after_s = self._settings.adopt_timeout_s
        if after_s and not self._keeper.is_to_be_back:
            self._say(
                f"the controller is gone: {self._count()} still serving, for {after_s:g} s"
                " unless `steer run` adopts the service"
            )

    def _is_over(self) -> bool:
        return self._adopted or (self._ending and not self._living())

    def _living(self) -> list[StoredEntry]:
        return [kept for kept in self._workers() if kept.group]

    def _count(self) -> str:
        return plural(len(self._living()), "worker")

    def _workers(self) -> Iterable[StoredEntry]:
        return (kept for kept in self._keeper.entries.values() if kept.is_worker)

    def _patience_s(self) -> float:
        """How long nothing but what is watched can want anything."""
        leftovers = any(kept.has_ended for kept in self._living())
        if self._desk.is_busy or self._ending or leftovers:
            return _LOOK_S
        now_s = time.monotonic()
        left_s = math.inf if self._adopter is not None else self._end_s - now_s
        return max(min(left_s, self._control_s - now_s), 0.0)

    def _look(self) -> None:
        now_s = time.monotonic()
        self._desk.let_go()
        self._look_at_ended()
        if now_s >= self._control_s:
            self._control_s = now_s + _CONTROL_S
            self._see_that_it_is_found()
        # Who is about to adopt them may be slow, but not for nothing.
        if now_s >= self._end_s and self._adopter is None:
            self._overdue()

    def _look_at_ended(self) -> None:
        """Forget workers of whom nobody is left, as their number may then become another's. Who
        is left of those that have just ended is told to, if all are."""
        living = self._living()
        ended = [kept for kept in living if kept.has_ended]
        groups = [kept.group for kept in living]
        found = family.others([kept.family for kept in ended], groups) if ended else []
        for kept, others in zip(ended, found, strict=True):
            if not others:
                kept.group = 0
            elif self._ending and kept in self._fresh:
                kept.terminate_others(self._is_quick, others)
        self._fresh.clear()

    def _see_that_it_is_found(self) -> None:
        """A logout removes a run directory with all that is in it: then nobody could adopt the
        service, or stop it."""
        if self._adopter is not None:
            return
        if not self._claim.is_there:
            self._make_control_socket()
        if not self._record.is_there:
            self._record.renew([(kept.group, kept.stop_signal) for kept in self._living()])

    def _make_control_socket(self) -> None:
        before, settings = self._claim.path, self._settings
        wanted = None if settings.remove_directory else settings.control
        try:
            with self._desk.elsewhere():
                self._claim.renew(settings.name, wanted, os.environ)
        except ControlError as error:
            if not self._is_lost:
                self._say(f"the guard: make the control socket again: {error}; it is tried again")
            self._is_lost = True
            return
        self._is_lost = False
        self._keeper.relocated(self._claim.path)
        self._settings = self._keeper.settings
        self._record = Record(self._claim.path)
        self._say(f"control socket {before} was gone; it is {self._claim.path} now")

    def _overdue(self) -> None:
        if not self._ending:
            self._end(self._settings.graceful_timeout_s)
        elif not self._killed:
            family.kill([kept.family for kept in self._living()])
            self._killed = True
            self._end_s = time.monotonic() + PATIENCE_S
        else:
            # Not even SIGKILL ends what waits in the kernel.
            self._keeper.entries.clear()

    def _end(self, after_s: float) -> None:
        self._ending = True
        self._end_s = time.monotonic() + after_s
        self._say(f"the controller is gone: ending {self._count()}")
        # First, or what they no longer listen for would still get in, and wait for nothing.
        self._leave_mail()
        for kept in self._keeper.entries.values():
            kept.let_go()
        self._terminate(self._living())

    def _terminate(self, workers: Sequence[StoredEntry]) -> None:
        for kept in workers:
            if not kept.has_ended:
                kept.terminate(self._is_quick)
        self._fresh.update(kept for kept in workers if kept.has_ended)
        self._look_at_ended()

    # Workers.

    def _end_unfinished(self) -> None:
        """Of some no more is known than that they are there: not what for."""
        entries = self._keeper.entries
        for key, kept in list(entries.items()):
            if kept.is_worker and not kept.value:
                kept.family.kill()
                if not kept.has_ended:
                    fork.wait_for_end(kept.fds[0], PATIENCE_S)
                kept.close()
                del entries[key]

    def _watch(self, key: str, kept: StoredEntry) -> None:
        pidfd, stderr, *_ = kept.fds
        os.set_blocking(stderr, False)
        self._lines[stderr] = _Lines(kept, self._settings.log_format)
        self._selector.register(pidfd, EVENT_READ, lambda: self._on_end(key, kept))
        self._listen(stderr)

    def _on_end(self, key: str, kept: StoredEntry) -> None:
        """Nothing of it may stay open: a listener would go on taking connections."""
        pidfd, stderr, *_ = kept.fds
        for _ in range(_CHUNKS_AT_END):
            if not self._hear(stderr):
                break
        self._lines.pop(stderr).end()
        self._forget(stderr)
        self._forget(pidfd)
        kept.close()
        self._fresh.add(kept)
        # To the end: whoever adopts the others learns in which order sockets closed.
        entries = self._keeper.entries
        entries[key] = entries.pop(key)

    def _listen(self, stderr: int) -> None:
        if stderr in self._lines:
            self._selector.register(stderr, EVENT_READ, lambda: self._on_stderr(stderr))

    def _on_stderr(self, stderr: int) -> None:
        """While ours takes nothing theirs is not read: the worker waits, not we."""
        if output.stderr.is_clear:
            self._hear(stderr)
        else:
            self._forget(stderr)
            output.stderr.when_clear(lambda: self._listen(stderr))

    def _hear(self, stderr: int) -> bool:
        """Pass on a piece of what a worker wrote; whether there was one."""
        try:
            data = os.read(stderr, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._forget(stderr)
        self._lines[stderr].pass_on(data)
        return bool(data)

    def _on_blocked(self) -> None:
        self._selector.register(output.stderr, EVENT_WRITE, self._write_on)

    def _write_on(self) -> None:
        if output.stderr.flush():
            self._forget(output.stderr.fileno())

    def _forget(self, fd: int) -> None:
        with suppress(KeyError):
            self._selector.unregister(fd)

    # What they tell.

    def _read_mail(self) -> None:
        if self._mailbox is not None:
            self._selector.register(self._mailbox, EVENT_READ, self._mailbox.take)

    def _leave_mail(self) -> None:
        """It is another's to read; what we have is kept."""
        if self._mailbox is not None:
            self._forget(self._mailbox.fileno())
            self._keeper.entries[MAILBOX].value = self._mailbox.contents()

    # Requests.

    def _on_request(self, request: Request, talk: Connection) -> None:
        command = request.get("command")
        if command == "adopt" and self._adopter is None and not self._ending:
            self._hand_over(talk)
        elif command != "adopt" and time.monotonic() < self._back_s:
            talk.answer({**self._refusal("the controller is being replaced"), "again": True})
        elif command not in ("adopt", "status") and self._adopter is not None:
            # In a moment there is a controller to do it, or we do it as before.
            talk.answer({**self._refusal(self._state()), "again": True})
        elif command == "stop":
            if len(self._stoppers) < ASKERS_MAX:
                self._stoppers.append(talk)
            else:
                talk.answer(self._refusal(self._state()))
            self._stop(bool(request.get("quick")))
        else:
            talk.answer(self._refusal(self._state()))

    def _refusal(self, why: str) -> dict[str, object]:
        return {"ok": False, "error": why, "keeper": os.getpid()}

    def _state(self) -> str:
        if self._ending:
            return f"the controller is gone; ending {self._count()}"
        if self._adopter is not None:
            return f"the controller is gone; pid {self._adopter_pid} adopts it"
        left_s = max(self._end_s - time.monotonic(), 0.0)
        return (
            f"the controller is gone; {self._count()} still serving, for {left_s:.0f} s more"
            " unless `steer run` with the same name and configuration adopts the service;"
            f" or stop it: `steer stop {self._settings.name}`"
        )

    def _stop(self, quick: bool) -> None:
        after_s = min(QUICK_S, self._settings.graceful_timeout_s)
        hurry, self._is_quick = quick and not self._is_quick, quick or self._is_quick
        if not self._ending:
            self._end(after_s if quick else self._settings.graceful_timeout_s)
        elif hurry:
            self._end_s = min(self._end_s, time.monotonic() + after_s)
            # Those whose signal is SIGTERM were told so, and once is enough.
            self._terminate([each for each in self._living() if each.stop_signal != signal.SIGTERM])

    def _hand_over(self, talk: Connection) -> None:
        self._look_at_ended()
        ours, theirs = socket.socketpair()
        self._adopter_pid = talk.pid
        self._leave_mail()
        with theirs:
            talk.answer({"ok": True, "pid": os.getpid()}, [theirs.fileno()])
        ours.settimeout(PATIENCE_S)
        self._adopter = Channel(ours)
        try:
            self._adopter.send(Frame("configure", value=msgspec.msgpack.encode(self._settings)))
            for key, kept in self._keeper.entries.items():
                count, number = len(kept.fds), kept.stop_signal
                frame = Frame("put", key, kept.value, count, kept.group, stop_signal=number)
                self._adopter.send(frame, kept.fds)
            self._adopter.send(Frame("control", fds=1), [self._control.fileno()])
        except OSError:
            self._carry_on()
        else:
            ours.setblocking(False)
            self._selector.register(ours, EVENT_READ, self._on_adopter)

    def _on_adopter(self) -> None:
        assert self._adopter is not None
        try:
            self._adopted = self._adopter.receive() is not None
        except BlockingIOError:
            return
        except OSError:  # it has gone, or says what is not understood
            self._adopted = False
        self._forget(self._adopter.fileno())
        if not self._adopted:
            self._carry_on()

    def _carry_on(self) -> None:
        """It has gone without having taken them."""
        assert self._adopter is not None
        self._adopter.close()
        self._adopter = None
        self._read_mail()


class _Seated(msgspec.Struct):
    """What of a worker's entry tells its slot; the rest is the controller's."""

    slot: int | None = None


class _Lines:
    """What one worker writes, passed on."""

    def __init__(self, kept: StoredEntry, form: str) -> None:
        self._lines = Lines()
        self._form, self._pid = form, kept.group
        self._slot: int | None = None
        with suppress(msgspec.MsgspecError):  # what is kept need not tell
            self._slot = msgspec.json.decode(kept.value, type=_Seated).slot

    def pass_on(self, data: bytes) -> None:
        self._show(self._lines.feed(data))

    def end(self) -> None:
        """Of a line that has no end yet, as the next piece is another's to read."""
        self._show(self._lines.end())

    def _show(self, lines: Iterable[Line]) -> None:
        output.stderr.pass_on(shown(lines, self._form, self._pid, self._slot, time.time()))


def main(
    traces: Traces,
    channel: socket.socket,
    control: socket.socket,
    settings: Settings,
    say: Say,
    predecessor: socket.socket | None,
) -> int:
    """Be a keeper. Runs in the forked child; returns its exit status."""
    # So that who kills all that is called steer does not kill the guard with the controller.
    fork.rename("reuseport-guard")
    title.show(f"steer: guard {settings.name}")
    used = [channel, control] if predecessor is None else [channel, control, predecessor]
    descriptors.keep_only(sock.fileno() for sock in used)
    output.stderr.reset()
    _allow_descriptors()
    old = None if predecessor is None else Channel(predecessor)
    keeper = FdStore(settings, traces, Channel(channel), old)
    try:
        is_ours = keeper.keep()
    except OSError as error:
        say(f"the keeper ends: {error.strerror}", keeper.settings.log_format)
        return 1
    if is_ours:
        Standby(keeper, control, say).run()
    return 0


def _allow_descriptors() -> None:
    """Ours and all that we are given: nothing here selects, so there may be many."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
