"""The controller's side of its guard.

All that must outlive the controller is kept twice: by itself, and by its guard process (see
`store`), a small process forked from it, as systemd keeps descriptors for services
(FDSTORE=1 of sd_notify(3)). When the controller goes, however it does, the guard process hands
everything to the next one that asks (see `handover`), or after a time ends the workers.
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

    Entries' descriptors stay the caller's, and open for as long as the entry is here.
    Should the guard process be killed nothing here fails: what changes is remembered, and
    `revive` starts another one with all of it.

    Args:
        control: the listening control socket. The guard process has a duplicate, so connections
            wait while no controller is there.
        say: how the guard process logs; must not wait.
        handover: of the service that is adopted. Until `handover.taken(guard)` the new
            guard process steps back should we end.

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
        """Fork it, with all entries there are by now.

        Raises:
            OSError: no more processes, or no more files; see `process.fork_error`.
        """
        self._process.start(self._settings, self._inode)
        for key, entry in self.entries.items():
            self._outbox.tell(put_frame(key, entry), fds=entry.fds)

    @property
    def pid(self) -> int:
        """Of the guard process."""
        return self._process.pid

    def fileno(self) -> int:
        """A pidfd of the guard process, readable once that has ended. Another after `revive`."""
        return self._process.fileno()

    @property
    def has_ended(self) -> bool:
        """Whether `fileno()` is readable."""
        return self._process.has_ended

    @property
    def alive(self) -> bool:
        """Whether the guard process takes what it is told, as far as we know."""
        return self._process.is_told

    @property
    def adopt_timeout_s(self) -> float:
        """How long workers go on without a controller; 0: they end with it."""
        return self._settings.adopt_timeout_s

    def expect_back(self) -> bool:
        """We end now, but another that is to adopt all is on its way: who asks meanwhile is
        to ask again. Whether the guard process is there."""
        self._outbox.tell(Frame("expect-back", wait=True))
        return self.alive

    def configure(self, settings: Settings) -> None:
        """From now on; the name and the control socket stay."""
        self._settings = settings
        self._outbox.tell(Frame("configure", value=msgspec.msgpack.encode(settings)))

    def give_up(self) -> None:
        """Should we end now, nobody is to adopt what is left: the workers end, too."""
        self.configure(replace(self._settings, adopt_timeout_s=0.0))

    def reopen(self) -> None:
        """The guard process's standard output and error become what ours are now."""
        self._outbox.tell(Frame("reopen", fds=2), fds=(1, 2))

    def settle(self, has_all: bool) -> None:
        """Before (`has_all`) and after the guard process we adopted from has been relieved."""
        self._outbox.tell(Frame("has-all" if has_all else "alone", wait=True))
        if not has_all:
            self._process.predecessor = None

    def close(self) -> None:
        """Nothing is left to guard: the guard process ends, and ends nobody."""
        if self._process.fileno() >= 0:
            self._outbox.tell(Frame("close"))
            self._process.wait_for_end()

    def revive(self) -> None:
        """Start another guard process in place of one that was killed, with all entries.

        To be called when `fileno()` is readable, after it was taken out of any loop.

        Raises:
            OSError: no more processes, or no more files; `alive` is then false, and this
                may be tried again.
        """
        self._process.kill()
        old = self._process.fileno()
        self.start()
        os.close(old)

    def relocate(self, settings: Settings) -> None:
        """The control socket is another, under the same descriptor: so is the guard process,
        which has its own copy. To be called after `fileno()` was taken out of any loop.

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
        """Store an entry, or another in place of that of the same key, at once.

        An entry that is the same in all is not sent again, and descriptors of the same
        numbers are taken for the same: drop an entry before closing any of its. Where an
        entry has some no more, the guard process has closed those when this returns, or
        `together` does.

        Args:
            group: not 0 makes it a worker's; see `Entry`.

        Raises:
            OSError: EBADF, a descriptor is not open.
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
        """Another value for an entry there is. Raises KeyError."""
        entry = self.entries[key]
        self.put(key, value, entry.fds, entry.group, entry.stop_signal)

    def drop(self, *keys: str) -> None:
        """Forget entries, if there; when this returns the guard process has closed their sockets.
        What ties a worker to us (see `Entry`) it closes soon: nobody has to wait for that."""
        dropped = {key: self.entries.pop(key) for key in keys if key in self.entries}
        for key in dropped:
            self._recorded.drop(key)
        if dropped:
            wait = any(map(sockets_of, dropped.values()))
            self._outbox.tell(Frame("drop", value=msgspec.msgpack.encode(list(dropped)), wait=wait))

    def let_go(self, *keys: str) -> None:
        """Of workers, if there, store only what ties them to us (see `Entry`); when this returns
        the guard process has closed their sockets."""
        stored = {key: self.entries.get(key, NOTHING) for key in keys}
        have = {key: entry for key, entry in stored.items() if sockets_of(entry)}
        for key, entry in have.items():
            self.entries[key] = replace(entry, fds=entry.fds[:TIES])
        if have:
            keys_of = msgspec.msgpack.encode(list(have))
            self._outbox.tell(Frame("let-go", value=keys_of, wait=True))
