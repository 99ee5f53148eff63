"""A service without a controller, in the care of the guard process that outlived it.

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
from collections.abc import Callable
from contextlib import suppress
from selectors import EVENT_READ, DefaultSelector

from steer.control.mailbox import Mailbox
from steer.control.protocol import ASKERS_MAX, Request
from steer.guard.adoption import Adoption
from steer.guard.channel import Channel
from steer.guard.control_socket import ControlSocket
from steer.guard.ending import Ending, end_unfinished
from steer.guard.requests import Connection, StandbyServer
from steer.guard.store import MAILBOX, SELECTION, FdStore, Settings, StoredEntry, Traces
from steer.guard.worker_output import WorkerOutput
from steer.linux import descriptors, fork, output, title
from steer.linux.spare import Spare

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
_SPARE = 4
"""Descriptors that a request takes: its connection, and a channel to who adopts."""

Say = Callable[[str, str], None]
"""Logs a line in a format, "text" or "json", without waiting for anybody."""


class Standby:
    """A service without a controller.

    Args:
        control: the listening control socket.
    """

    def __init__(self, store: FdStore, control: socket.socket, say: Say) -> None:
        self._store = store
        self._back_s = time.monotonic() + (_BACK_S if store.is_to_be_back else 0.0)
        self._control = control
        self._say: Callable[[str], None] = lambda words: say(words, store.settings.log_format)
        self._selector = DefaultSelector()
        self._server = StandbyServer(control, self._selector, self._on_request, self._refusal)
        self._place = ControlSocket(store, control, self._server.elsewhere, self._say)
        self._adoption = Adoption(
            store, control, self._selector, self._leave_mailbox, self._read_mailbox
        )
        self._output = WorkerOutput(self._selector, store.settings.log_format)
        self._stoppers: list[Connection] = []
        self._spare = Spare(_SPARE)
        self._is_failing = False
        self._mailbox: Mailbox | None = None
        if MAILBOX in store.entries:
            groups = frozenset(each.group for each in store.entries.values() if each.group)
            self._mailbox = Mailbox(store.entries[MAILBOX].fds[0], groups)
        self._read_mailbox()
        end_unfinished(store)
        # All workers may have ended a moment ago: connections wait for the next.
        is_service = (
            any(each.group for each in store.entries.values()) or SELECTION in store.entries
        )
        after_s = store.settings.adopt_timeout_s if is_service else 0.0
        self._ending = Ending(store, after_s, self._say, self._leave_mailbox)
        for key, entry in store.entries.items():
            if entry.is_worker and not entry.has_ended:
                self._watch(key, entry)

    def run(self) -> None:
        """Until it is adopted or nobody is left."""
        self._output.begin()
        self._tell()
        while not (self._adoption.is_done or self._ending.is_over):
            for key, _ in self._selector.select(self._patience_s()):
                # One that came before may have done away with it.
                if self._selector.get_map().get(key.fd) is key:
                    self._do(key.data)
            self._do(self._look)
        self._output.end(_LAST_S)
        if self._adoption.is_done:
            self._back_s = math.inf
        else:
            self._store.leave_nothing()
        self._server.close(_LAST_S)
        self._control.close()
        for asked in self._stoppers:
            asked.answer({"ok": True})

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

    def _tell(self) -> None:
        after_s = self._store.settings.adopt_timeout_s
        if after_s and not self._store.is_to_be_back:
            self._say(
                f"the controller is gone: {self._ending.count()} still serving, for {after_s:g} s"
                " unless `steer run` adopts the service"
            )

    # Time.

    def _patience_s(self) -> float:
        """How long nothing but what is watched can want anything."""
        if self._server.is_busy or self._ending.wants_looks:
            return _LOOK_S
        left_s = math.inf if self._adoption.is_under_way else self._ending.left_s
        return max(min(left_s, self._place.left_s), 0.0)

    def _look(self) -> None:
        self._server.let_go()
        self._ending.look()
        if self._place.left_s <= 0:
            self._place.looked()
            if not self._adoption.is_under_way:
                living = self._ending.living
                self._place.look([(entry.group, entry.stop_signal) for entry in living])
        # Who is about to adopt them may be slow, but not for nothing.
        if self._ending.left_s <= 0 and not self._adoption.is_under_way:
            self._ending.go_on()

    # Workers.

    def _watch(self, key: str, entry: StoredEntry) -> None:
        pidfd, stderr, *_ = entry.fds
        self._selector.register(pidfd, EVENT_READ, lambda: self._on_end(key, entry))
        self._output.add(stderr, entry)

    def _on_end(self, key: str, entry: StoredEntry) -> None:
        """Nothing of it may stay open: a listener would go on taking connections."""
        pidfd, stderr, *_ = entry.fds
        self._output.finish(stderr)
        self._selector.unregister(pidfd)
        entry.close()
        self._ending.has_ended(entry)
        # To the end: whoever adopts the others learns in which order sockets closed.
        entries = self._store.entries
        entries[key] = entries.pop(key)

    # What they notify.

    def _read_mailbox(self) -> None:
        if self._mailbox is not None:
            self._selector.register(self._mailbox, EVENT_READ, self._mailbox.take)

    def _leave_mailbox(self) -> None:
        """It is another's to read; what we have is stored."""
        if self._mailbox is not None:
            with suppress(KeyError):
                self._selector.unregister(self._mailbox)
            self._store.entries[MAILBOX].value = self._mailbox.contents()

    # Requests.

    def _on_request(self, request: Request, asked: Connection) -> None:
        command, is_adopted = request.get("command"), self._adoption.is_under_way
        if command == "adopt" and not is_adopted and not self._ending.has_begun:
            self._ending.look()
            self._adoption.begin(asked)
        elif command != "adopt" and time.monotonic() < self._back_s:
            asked.answer({**self._refusal("the controller is being replaced"), "again": True})
        elif command not in ("adopt", "status") and is_adopted:
            # In a moment there is a controller to do it, or we do it as before.
            asked.answer({**self._refusal(self._state()), "again": True})
        elif command == "stop":
            if len(self._stoppers) < ASKERS_MAX:
                self._stoppers.append(asked)
            else:
                asked.answer(self._refusal(self._state()))
            self._ending.stop(bool(request.get("quick")))
        else:
            asked.answer(self._refusal(self._state()))

    def _refusal(self, why: str) -> dict[str, object]:
        return {"ok": False, "error": why, "keeper": os.getpid()}

    def _state(self) -> str:
        count = self._ending.count()
        if self._ending.has_begun:
            return f"the controller is gone; ending {count}"
        if self._adoption.is_under_way:
            return f"the controller is gone; pid {self._adoption.pid} adopts it"
        left_s = max(self._ending.left_s, 0.0)
        return (
            f"the controller is gone; {count} still serving, for {left_s:.0f} s more"
            " unless `steer run` with the same name and configuration adopts the service;"
            f" or stop it: `steer stop {self._store.settings.name}`"
        )


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
