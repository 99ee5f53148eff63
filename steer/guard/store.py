"""What the guard process stores while there is a controller.

It stores what the controller sends, and signals no process. The end of its channel means that the
controller has ended, or that it re-executes itself: then `standby` takes over. The controller's
side is in `client`.
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

NOTIFICATIONS = "mailbox"
"""Key of the entry with the notification socket. While there is no controller the guard process
reads that socket, and stores what it read as the value; see `notification_buffer`."""
SELECTION = "selection"
"""Key of an entry that exists while a service runs. Its sockets hold connections that wait."""
PEER_TIMEOUT_S = 2.0
"""How long another process may take to answer or to end."""


class Settings(msgspec.Struct, frozen=True):
    """What the guard process needs to know once there is no controller.

    Args:
        name: the name of the service.
        control: path of the control socket, which is removed at the end.
        remove_directory: whether to remove the directory of the control socket, too, if empty.
        pid_file: path of the pid file, which is removed at the end if it names the controller.
        adopt_timeout_s: how long workers continue without a controller; 0: they end at once.
        graceful_timeout_s: the time between the signal to finish and SIGKILL.
        log_format: "text" or "json": the format of the lines that workers write.
    """

    name: str
    control: str
    remove_directory: bool = False
    pid_file: str | None = None
    adopt_timeout_s: float = 30.0
    graceful_timeout_s: float = 30.0
    log_format: str = "text"


class ControllerFiles(msgspec.Struct, frozen=True):
    """Identifies the files of the controller, as other files may be at the same paths by now.

    Args:
        controller: the process ID in its pid file.
        inode: the inode of the control socket's path.
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
        """Whether the first process of the worker has ended. Others may still run."""
        return not self.fds

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def let_go(self) -> None:
        """Close all descriptors but those that are needed to see a worker end. Its channel stays
        open, as the end of the channel would tell the worker to finish a second time."""
        stays = self.fds[:3] if self.is_worker else []
        for fd in self.fds[len(stays) :]:
            os.close(fd)
        self.fds = stays

    def terminate(self, quick: bool) -> None:
        """Tell the first process of the worker to finish, as the controller does."""
        self.family.remember()
        fork.terminate(self.fds[0], self._signal(quick))

    def terminate_others(self, quick: bool, pids: Iterable[int]) -> None:
        """Tell other processes of the worker to finish."""
        family.send(self._signal(quick), pids)

    def _signal(self, quick: bool) -> int:
        return signal.SIGTERM if quick else self.stop_signal

    @property
    def family(self) -> Family:
        """The processes of the worker."""
        if self._family is None:
            self._family = Family(self.group, is_child=False)
        return self._family


class FdStore:
    """The entries that the controller has stored.

    Args:
        channel: the channel to the controller.
        predecessor: the channel to the guard process that hands over, until that has ended.

    Attributes:
        is_to_be_back: whether the controller re-executes itself, and so will be back soon.
    """

    def __init__(
        self,
        settings: Settings,
        files: ControllerFiles,
        channel: Channel,
        predecessor: Channel | None,
    ) -> None:
        self.entries: dict[str, StoredEntry] = {}
        self.settings = settings
        self.is_to_be_back = False
        self._files = files
        self._channel = channel
        self._predecessor = predecessor
        self._has_all = predecessor is None

    def serve(self) -> bool:
        """Store what the controller sends until it ends. Returns whether this process has to stand
        in for the controller."""
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
            end_predecessor(self._predecessor)
        return self._has_all

    def _understand(self, frame: Frame, fds: list[int]) -> None:
        """Raises NotUnderstood: the frame cannot be carried out."""
        try:
            self._carry_out(frame, fds)
        except (msgspec.MsgspecError, LookupError, ValueError) as error:
            raise NotUnderstood(f"{frame.act}: {error}") from None

    def _carry_out(self, frame: Frame, fds: list[int]) -> None:
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
        """Note that the control socket has another path, which is removed at the end."""
        self.settings = msgspec.structs.replace(self.settings, control=str(control))
        self._files = msgspec.structs.replace(self._files, inode=claim.inode(control))

    def leave_nothing(self) -> None:
        """Remove the files that the controller would have removed."""
        settings = self.settings
        claim.remove(Path(settings.control), self._files.inode, settings.remove_directory)
        if settings.pid_file is not None:
            with suppress(OSError, ValueError):
                if int(Path(settings.pid_file).read_text()) == self._files.controller:
                    os.unlink(settings.pid_file)


def _reopen(fds: Sequence[int]) -> None:
    for number, fd in zip((1, 2), fds, strict=True):
        os.dup2(fd, number)
        os.close(fd)


def end_predecessor(predecessor: Channel) -> None:
    """End the guard process that handed over; return when it has ended.

    It is killed if it takes too long, as two guard processes would both look after the service.
    """
    pid = peer.credentials(predecessor.sock)[0]
    predecessor.sock.settimeout(PEER_TIMEOUT_S)
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
