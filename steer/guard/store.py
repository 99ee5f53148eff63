"""The process that outlives a controller, while it does not yet have to.

It keeps what it is given and signals nobody. When its channel ends, so has the controller,
however it did, or it has executed itself anew and will be back: see `standby`. The
controller's side is in `client`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from steer.control import claim, peer
from steer.guard.channel import SAME, Channel, Frame, NotUnderstood
from steer.linux import family, fork
from steer.linux.family import Family

MAILBOX = "mailbox"
"""Key of an entry with a socket: without a controller it is read, and the value becomes what
was; see `mail`."""
SELECTION = "selection"
"""Key of an entry there is while a service runs: where connections wait for its workers."""
PATIENCE_S = 2.0
"""For another process to answer or to end, before it is done without."""


class Settings(msgspec.Struct, frozen=True):
    """What a keeper has to know once it is alone.

    Args:
        name: of the service.
        control: path of the control socket; removed at the end.
        remove_directory: whether its directory is steer's own, and goes too if empty.
        pid_file: removed at the end if it still names the controller.
        adopt_timeout_s: how long workers go on without a controller; 0 ends them at once.
        graceful_timeout_s: from the signal to finish to SIGKILL.
        log_format: "text" or "json": of what workers write.
    """

    name: str
    control: str
    remove_directory: bool = False
    pid_file: str | None = None
    adopt_timeout_s: float = 30.0
    graceful_timeout_s: float = 30.0
    log_format: str = "text"


class Traces(msgspec.Struct, frozen=True):
    """What tells the controller's files from others that may be in their place by now.

    Args:
        controller: its process id, as in its pid file.
        inode: of the control socket's path.
    """

    controller: int
    inode: int | None


class StoredEntry(msgspec.Struct, eq=False):
    """An entry; see `entry.Entry`."""

    value: bytes
    fds: list[int]
    group: int
    stop_signal: int = signal.SIGTERM
    _family: Family | None = None

    @property
    def is_worker(self) -> bool:
        return self.group != 0

    @property
    def has_ended(self) -> bool:
        """Its first process; others of it may be left."""
        return not self.fds

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def let_go(self) -> None:
        """Of a worker keep what it takes to see it end, and its channel, which would tell it
        to finish once more; of all else nothing."""
        kept = self.fds[:3] if self.is_worker else []
        for fd in self.fds[len(kept) :]:
            os.close(fd)
        self.fds = kept

    def terminate(self, quick: bool) -> None:
        """Its first process, as the controller does."""
        self.family.remember()
        fork.terminate(self.fds[0], self._told_by(quick))

    def terminate_others(self, quick: bool, pids: Iterable[int]) -> None:
        """What the first process left behind."""
        family.send(self._told_by(quick), pids)

    def _told_by(self, quick: bool) -> int:
        return signal.SIGTERM if quick else self.stop_signal

    @property
    def family(self) -> Family:
        """Of a worker."""
        if self._family is None:
            self._family = Family(self.group, is_child=False)
        return self._family


class FdStore:
    """What is kept, as the controller says.

    Args:
        channel: to the controller.
        predecessor: to the keeper that still has all this, until `relieve`.

    Attributes:
        is_to_be_back: whether the controller, once it is gone, will be again in a moment.
    """

    def __init__(
        self, settings: Settings, traces: Traces, channel: Channel, predecessor: Channel | None
    ) -> None:
        self.entries: dict[str, StoredEntry] = {}
        self.settings = settings
        self.is_to_be_back = False
        self._traces = traces
        self._channel = channel
        self._predecessor = predecessor
        self._has_all = predecessor is None

    def keep(self) -> bool:
        """Until the controller ends. Whether its service is now ours to look after."""
        try:
            while (received := self._channel.receive()) is not None:
                frame, fds = received
                if frame.act == "close":
                    return False
                self._understand(frame, fds)
                if frame.wait:
                    self._channel.send(Frame("done"))
        except ConnectionError:
            pass
        self._channel.close()
        if self._predecessor is not None and self._has_all:
            relieve(self._predecessor)
        return self._has_all

    def _understand(self, frame: Frame, fds: list[int]) -> None:
        """Raises NotUnderstood: there is nothing to obey in it."""
        try:
            self._obey(frame, fds)
        except (msgspec.MsgspecError, LookupError, ValueError) as error:
            raise NotUnderstood(f"{frame.act}: {error}") from None

    def _obey(self, frame: Frame, fds: list[int]) -> None:
        if frame.act == "put":
            self._put(frame, fds)
        elif frame.act == "update":
            self._update(frame.value)
        elif frame.act in ("drop", "let-go"):
            self._close(frame)
        elif frame.act == "configure":
            self.settings = msgspec.msgpack.decode(frame.value, type=Settings)
        elif frame.act == "reopen":
            _reopen(fds)
        elif frame.act == "expect-back":
            self.is_to_be_back = True
        elif frame.act == "has-all":
            self._has_all = True
        elif frame.act == "alone" and self._predecessor is not None:
            self._predecessor.close()
            self._predecessor = None

    def _put(self, frame: Frame, fds: list[int]) -> None:
        old = self.entries.get(frame.key)
        if old is not None and frame.fds == SAME:
            fds, old.fds = old.fds, []
        self.entries[frame.key] = StoredEntry(frame.value, fds, frame.group, frame.stop_signal)
        if old is not None:
            old.close()

    def _close(self, frame: Frame) -> None:
        for key in msgspec.msgpack.decode(frame.value, type=list[str]):
            if frame.act == "drop":
                self.entries.pop(key).close()
            else:
                self.entries[key].let_go()

    def _update(self, values: bytes) -> None:
        for key, value in msgspec.msgpack.decode(values, type=dict[str, bytes]).items():
            self.entries[key].value = value

    def relocated(self, control: Path) -> None:
        """The control socket is another: that is what is to be removed at the end."""
        self.settings = msgspec.structs.replace(self.settings, control=str(control))
        self._traces = msgspec.structs.replace(self._traces, inode=claim.inode(control))

    def leave_nothing(self) -> None:
        """Remove what the controller would have."""
        settings = self.settings
        claim.remove(Path(settings.control), self._traces.inode, settings.remove_directory)
        if settings.pid_file is not None:
            with suppress(OSError, ValueError):
                if int(Path(settings.pid_file).read_text()) == self._traces.controller:
                    os.unlink(settings.pid_file)


def _reopen(fds: Sequence[int]) -> None:
    for number, fd in zip((1, 2), fds, strict=True):
        os.dup2(fd, number)
        os.close(fd)


def relieve(predecessor: Channel) -> None:
    """Have the keeper that handed over end; return when it has.

    It is killed if it takes too long: two that believe to be alone would be one too many.
    """
    pid = peer.credentials(predecessor.sock)[0]
    predecessor.sock.settimeout(PATIENCE_S)
    try:
        predecessor.send(Frame("taken"))
        while predecessor.receive() is not None:
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        if pid > 0:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    predecessor.close()
