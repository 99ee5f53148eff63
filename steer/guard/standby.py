"""The guard process while its service has no controller.

It reads the standard error of workers, closes the sockets of workers that have ended, and answers
at the control socket, until another controller adopts the service. After the adoption timeout the
guard process ends the workers.
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

from steer.control.notification_buffer import NotificationBuffer
from steer.control.protocol import CONNECTIONS_MAX, Request
from steer.guard.adoption import Adoption
from steer.guard.channel import Channel
from steer.guard.control_socket import ControlSocket
from steer.guard.ending import Ending, end_unfinished
from steer.guard.requests import Connection, StandbyServer
from steer.guard.store import (
    NOTIFICATIONS,
    SELECTION,
    ControllerFiles,
    FdStore,
    Settings,
    StoredEntry,
)
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
"""Signals to the controller. Some supervisors send them to every process of a service."""
_BACK_S = 10.0
"""How long a controller may take to re-execute itself."""
_LAST_S = 0.2
"""How long clients that are connected may take to send a request before another process answers."""
_LOOK_S = 0.1
_SPARE = 4
"""Descriptors that a request takes: its connection, and a channel to an adopting controller."""

Say = Callable[[str, str], None]
"""Logs a line in a format, "text" or "json". It must not block."""


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
        self._control_socket = ControlSocket(store, control, self._server.elsewhere, self._say)
        self._adoption = Adoption(
            store, control, self._selector, self._stop_reading, self._read_notifications
        )
        self._output = WorkerOutput(self._selector, store.settings.log_format)
        self._stoppers: list[Connection] = []
        self._spare = Spare(_SPARE)
        self._is_failing = False
        self._buffer: NotificationBuffer | None = None
        if NOTIFICATIONS in store.entries:
            groups = frozenset(each.group for each in store.entries.values() if each.group)
            self._buffer = NotificationBuffer(store.entries[NOTIFICATIONS].fds[0], groups)
        self._read_notifications()
        end_unfinished(store)
        # All workers may have ended a moment ago. Connections then wait for the next worker.
        is_service = (
            any(each.group for each in store.entries.values()) or SELECTION in store.entries
        )
        after_s = store.settings.adopt_timeout_s if is_service else 0.0
        self._ending = Ending(store, after_s, self._say, self._stop_reading)
        for key, entry in store.entries.items():
            if entry.is_worker and not entry.has_ended:
                self._watch(key, entry)

    def run(self) -> None:
        """Run until another controller has adopted the service, or no worker is left."""
        self._output.begin()
        self._announce()
        while not (self._adoption.is_done or self._ending.is_over):
            for key, _ in self._selector.select(self._timeout_s()):
                # What ran before in this turn may have unregistered it.
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
        for client in self._stoppers:
            client.answer({"ok": True})

    def _do(self, act: Callable[[], object]) -> None:
        """Call `act`. If it fails, for example for lack of memory, carry on: it will be tried
        again."""
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

    def _announce(self) -> None:
        after_s = self._store.settings.adopt_timeout_s
        if after_s and not self._store.is_to_be_back:
            self._say(
                f"the controller is gone: {self._ending.count()} still serving, for {after_s:g} s"
                " unless `steer run` adopts the service"
            )

    # Time.

    def _timeout_s(self) -> float:
        """How long to wait for the watched descriptors before `_look` has something to do."""
        if self._server.is_busy or self._ending.needs_polling:
            return _LOOK_S
        remaining_s = math.inf if self._adoption.is_under_way else self._ending.remaining_s
        return max(min(remaining_s, self._control_socket.remaining_s), 0.0)

    def _look(self) -> None:
        self._server.let_go()
        self._ending.look()
        if self._control_socket.remaining_s <= 0:
            self._control_socket.postpone()
            if not self._adoption.is_under_way:
                living = self._ending.living
                self._control_socket.look([(entry.group, entry.stop_signal) for entry in living])
        # While a controller is adopting the workers, their time is not over.
        if self._ending.remaining_s <= 0 and not self._adoption.is_under_way:
            self._ending.go_on()

    # Workers.

    def _watch(self, key: str, entry: StoredEntry) -> None:
        pidfd, stderr, *_ = entry.fds
        self._selector.register(pidfd, EVENT_READ, lambda: self._on_end(key, entry))
        self._output.add(stderr, entry)

    def _on_end(self, key: str, entry: StoredEntry) -> None:
        """Close all sockets of the worker: a listener that stays open would take more
        connections."""
        pidfd, stderr, *_ = entry.fds
        self._output.finish(stderr)
        self._selector.unregister(pidfd)
        entry.close()
        self._ending.has_ended(entry)
        # Entries of ended workers are last, in the order in which their sockets were closed: a
        # controller that adopts the others needs that order.
        entries = self._store.entries
        entries[key] = entries.pop(key)

    # Notifications.

    def _read_notifications(self) -> None:
        if self._buffer is not None:
            self._selector.register(self._buffer, EVENT_READ, self._buffer.take)

    def _stop_reading(self) -> None:
        """Another process reads the socket from here on. What was read is stored for it."""
        if self._buffer is not None:
            with suppress(KeyError):
                self._selector.unregister(self._buffer)
            self._store.entries[NOTIFICATIONS].value = self._buffer.contents()

    # Requests.

    def _on_request(self, request: Request, client: Connection) -> None:
        command, is_adopted = request.get("command"), self._adoption.is_under_way
        if command == "adopt" and not is_adopted and not self._ending.has_begun:
            self._ending.look()
            self._adoption.begin(client)
        elif command != "adopt" and time.monotonic() < self._back_s:
            client.answer({**self._refusal("the controller is being replaced"), "again": True})
        elif command not in ("adopt", "status") and is_adopted:
            # In a moment either a controller answers, or this process answers again.
            client.answer({**self._refusal(self._state()), "again": True})
        elif command == "stop":
            if len(self._stoppers) < CONNECTIONS_MAX:
                self._stoppers.append(client)
            else:
                client.answer(self._refusal(self._state()))
            self._ending.stop(bool(request.get("quick")))
        else:
            client.answer(self._refusal(self._state()))

    def _refusal(self, why: str) -> dict[str, object]:
        return {"ok": False, "error": why, "guard": os.getpid()}

    def _state(self) -> str:
        count = self._ending.count()
        if self._ending.has_begun:
            return f"the controller is gone; ending {count}"
        if self._adoption.is_under_way:
            return f"the controller is gone; pid {self._adoption.pid} adopts it"
        remaining_s = max(self._ending.remaining_s, 0.0)
        return (
            f"the controller is gone; {count} still serving, for {remaining_s:.0f} s more"
            " unless `steer run` with the same name and configuration adopts the service;"
            f" or stop it: `steer stop {self._store.settings.name}`"
        )


def main(
    files: ControllerFiles,
    channel: socket.socket,
    control: socket.socket,
    settings: Settings,
    say: Say,
    predecessor: socket.socket | None,
) -> int:
    """Run the guard process in the forked child; return its exit status."""
    # `killall steer` must not kill the guard process along with the controller.
    fork.rename("reuseport-guard")
    title.show(f"steer: guard {settings.name}")
    used = [channel, control] if predecessor is None else [channel, control, predecessor]
    descriptors.keep_only(sock.fileno() for sock in used)
    output.stderr.reset()
    _allow_descriptors()
    old = None if predecessor is None else Channel(predecessor)
    store = FdStore(settings, files, Channel(channel), old)
    try:
        is_ours = store.serve()
    except OSError as error:
        say(f"the guard process ends: {error.strerror}", store.settings.log_format)
        return 1
    if is_ours:
        Standby(store, control, say).run()
    return 0


def _allow_descriptors() -> None:
    """Allow as many as possible. Nothing here uses select(2), so their numbers may be high."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
