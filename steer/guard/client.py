"""The controller's side of its guard process.

The guard process is a small process, forked from the controller. It stores a copy of all that must
outlive the controller (see `store`), as systemd's file descriptor store does (FDSTORE=1 of
sd_notify(3)). When the controller has ended, for whatever reason, the guard process hands
everything over to the next controller (see `handover`), or ends the workers after a while.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec.structs import replace

from steer.control import claim
from steer.guard import standby
from steer.guard.channel import Frame
from steer.guard.entry import NOTHING, TIES, Entry, put_frame, sockets_of
from steer.guard.handover import Handover
from steer.guard.outbox import Outbox
from steer.guard.process import GuardProcess
from steer.guard.recorded import RecordedWorkers
from steer.guard.store import Settings


class GuardClient:
    """There is no guard process before `start`.

    The caller owns the descriptors of entries, and keeps them open for as long as the entry is
    here.
    If the guard process is killed, nothing here fails: changes are remembered, and `revive` starts
    another guard process with all entries.

    Args:
        control: the listening control socket. The guard process has a duplicate, so connections
            wait while there is no controller.
        say: logs a line in the guard process; it must not block.
        handover: the handover of the service that is adopted. Until `handover.taken(guard)`, the
            new guard process leaves the service to the old one if this process ends.

    Attributes:
        entries: what is stored, by key.
    """

    def __init__(
        self,
        control: socket.socket,
        settings: Settings,
        say: standby.Say = lambda *_: None,
        handover: Handover | None = None,
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self._settings = settings
        self._inode = claim.inode(Path(settings.control))
        predecessor = handover.channel.sock if handover is not None else None
        self._process = GuardProcess(control, say, predecessor)
        self._outbox = Outbox(self._process)
        self._recorded = RecordedWorkers(Path(settings.control))

    # The process.

    def start(self) -> None:
        """Start the guard process, with all entries that there are.

        Raises:
            OSError: no more processes, or no more files; see `fork.fork_error`.
        """
        self._process.start(self._settings, self._inode)
        for key, entry in self.entries.items():
            self._outbox.send(put_frame(key, entry), fds=entry.fds)

    @property
    def pid(self) -> int:
        """The process ID of the guard process."""
        return self._process.pid

    def fileno(self) -> int:
        """A pidfd of the guard process, readable once that has ended. `revive` makes another
        one."""
        return self._process.fileno()

    @property
    def has_ended(self) -> bool:
        """Whether `fileno()` is readable."""
        return self._process.has_ended

    @property
    def alive(self) -> bool:
        """Whether the guard process still takes what is sent, as far as we know."""
        return self._process.is_connected

    @property
    def adopt_timeout_s(self) -> float:
        """How long workers go on without a controller; 0: they end with it."""
        return self._settings.adopt_timeout_s

    def expect_back(self) -> bool:
        """Tell the guard process that this controller re-executes itself, so that it asks clients
        to try again. Returns whether the guard process is there."""
        self._outbox.send(Frame("expect-back", wait=True))
        return self.alive

    def configure(self, settings: Settings) -> None:
        """Change the settings. The name and the control socket stay the same."""
        self._settings = settings
        self._outbox.send(Frame("configure", value=msgspec.msgpack.encode(settings)))

    def give_up(self) -> None:
        """Forbid adoption: if the controller ends from now on, the workers end, too."""
        self.configure(replace(self._settings, adopt_timeout_s=0.0))

    def reopen(self) -> None:
        """Give our standard output and error to the guard process."""
        self._outbox.send(Frame("reopen", fds=2), fds=(1, 2))

    def commit(self, has_all: bool) -> None:
        """Call this with `has_all` before the guard process that hands over ends, and without it
        afterwards."""
        self._outbox.send(Frame("has-all" if has_all else "alone", wait=True))
        if not has_all:
            self._process.predecessor = None

    def close(self) -> None:
        """End the guard process, as no worker is left. It ends no other process."""
        if self._process.fileno() >= 0:
            self._outbox.send(Frame("close"))
            self._process.wait_for_end()

    def revive(self) -> None:
        """Start another guard process, with all entries, after one was killed.

        Call this when `fileno()` is readable and no event loop watches it any more.

        Raises:
            OSError: no more processes, or no more files; `alive` is then false, and this
                may be called again.
        """
        self._process.kill()
        old = self._process.fileno()
        self.start()
        os.close(old)

    def relocate(self, settings: Settings) -> None:
        """Start another guard process after the control socket was made again: the present one has
        a duplicate of the old socket. No event loop may watch `fileno()`.

        Raises:
            OSError: as `revive`.
        """
        self._settings = settings
        control = Path(settings.control)
        self._inode = claim.inode(control)
        self._recorded.relocate(control)
        self.revive()

    def renew_record(self) -> None:
        """See `RecordedWorkers.renew_if_gone`."""
        self._recorded.renew_if_gone()

    # Entries.

    def put(
        self,
        key: str,
        value: bytes,
        fds: Sequence[int] = (),
        group: int = 0,
        stop_signal: int = signal.SIGTERM,
    ) -> None:
        """Store an entry. It replaces the entry of the same key.

        An entry that has not changed is not sent again. Descriptors with the same numbers count as
        unchanged, so drop an entry before you close one of its descriptors. If the new entry lacks
        descriptors of the old one, the guard process has closed those when this returns, or when
        `together` does.

        Args:
            group: the process group, if the entry is a worker's; see `Entry`.

        Raises:
            OSError: EBADF: a descriptor is not open.
        """
        assert not group or len(fds) != 1, "a worker has a pidfd and a standard error, or neither"
        old, new = self.entries.get(key), Entry(value, tuple(fds), group, stop_signal)
        if new == old:
            return
        if group and (old is None or old.stop_signal != stop_signal):
            self._recorded.add(key, (group, stop_signal))
            if not self._outbox.is_together:
                self._recorded.write()
        self._outbox.put(key, new, old)
        self.entries[key] = new

    @contextmanager
    def together(self) -> Iterator[None]:
        """See `Outbox.together`. Raises OSError: as `put`."""
        try:
            with self._outbox.together():
                yield
        finally:
            self._recorded.write()

    def update(self, key: str, value: bytes) -> None:
        """Change the value of an entry. Raises KeyError: there is no such entry."""
        entry = self.entries[key]
        self.put(key, value, entry.fds, entry.group, entry.stop_signal)

    def drop(self, *keys: str) -> None:
        """Remove entries; unknown keys are ignored. When this returns, the guard process has closed
        their sockets. It closes the other descriptors of a worker (see `Entry`) soon after."""
        dropped = {key: self.entries.pop(key) for key in keys if key in self.entries}
        for key in dropped:
            self._recorded.drop(key)
        if dropped:
            wait = any(map(sockets_of, dropped.values()))
            self._outbox.send(Frame("drop", value=msgspec.msgpack.encode(list(dropped)), wait=wait))

    def let_go(self, *keys: str) -> None:
        """Remove the sockets of workers; unknown keys are ignored. When this returns, the guard
        process has closed them. The other descriptors of the workers (see `Entry`) stay stored."""
        stored = {key: self.entries.get(key, NOTHING) for key in keys}
        have = {key: entry for key, entry in stored.items() if sockets_of(entry)}
        for key, entry in have.items():
            self.entries[key] = replace(entry, fds=entry.fds[:TIES])
        if have:
            keys_of = msgspec.msgpack.encode(list(have))
            self._outbox.send(Frame("let-go", value=keys_of, wait=True))
