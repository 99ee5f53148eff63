"""Claims the name of a service: makes its control socket, and holds a lock while it starts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from steer.control.peer import connect
from steer.control.rundir import TMP
from steer.control.taken import refuse_if_answering, refuse_taken
from steer.errors import ControlError, in_words

_BACKLOG = 16
_ANSWER_S = 0.1
_TURN_S, _LOOK_AGAIN_S = 30.0, 0.01
"""How long to wait while another service of the user starts. If the process of that service is
stopped, no other service can start: then the limit ends the wait with an error."""


class Claim:
    """The claim to the name of a service: its listening control socket.

    Services of one user start one after the other. No other service gets past this point until
    `others_may_start` is called, so none can bind a port between our check that the port is free
    and our own bind.

    Args:
        wanted: path of the control socket; None: in the first directory that works.
        turn_s: how long to wait for another service that is starting; None: as long as a start.
        own_inode: inode of a control socket that may have the name already.
        paths: the result of `refuse_taken`, if it was called a moment ago.

    Attributes:
        path: the path of the control socket.
        socket: the control socket.
        remove_directory: whether to remove the directory of the control socket, too, if empty.
        refusals: the paths that were tried before, each with the reason why it did not work.

    Raises:
        ControlError: the name is taken, or no socket can be made anywhere.
    """

    def __init__(
        self,
        name: str,
        wanted: str | None,
        environment: Mapping[str, str],
        turn_s: float | None = None,
        own_inode: int | None = None,
        paths: Sequence[Path] | None = None,
    ) -> None:
        self.remove_directory = wanted is None
        self.refusals: list[str] = []
        for path in paths or refuse_taken(name, wanted, environment, own_inode):
            try:
                self._take(name, path, _TURN_S if turn_s is None else turn_s)
                return
            except OSError as error:
                self.refusals.append(f"{path}: {in_words(error)}")
        raise ControlError(
            f"make the control socket of {name!r}",
            "; ".join(self.refusals),
            "set control_socket to another path",
        )

    def _take(self, name: str, path: Path, turn_s: float) -> None:
        self._lock = _locked(path.parent, self.remove_directory, turn_s)
        try:
            refuse_if_answering(name, path)
            _remove_dead(path)
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            mask = os.umask(0o177)
            try:
                self.socket.bind(str(path))
            finally:
                os.umask(mask)
            self.socket.listen(_BACKLOG)
            self._holds(path)
        except BaseException:
            self.others_may_start()
            raise

    @classmethod
    def inherited(cls, path: Path, control: socket.socket, remove_directory: bool) -> Claim:
        """The claim of an earlier controller, whose control socket still listens. Its path may have
        been removed."""
        claim = cls.__new__(cls)
        claim.remove_directory, claim.refusals, claim._lock = remove_directory, [], -1
        claim.socket = control
        claim._holds(path)
        return claim

    def _holds(self, path: Path) -> None:
        self.path = path
        self._inode = inode(path)

    @property
    def is_there(self) -> bool:
        """Whether the socket still has its path: a logout removes a runtime directory with all
        files."""
        return self._inode is not None and inode(self.path) == self._inode

    def renew(self, name: str, wanted: str | None, environment: Mapping[str, str]) -> None:
        """Make the control socket again, as at the start. `socket` keeps its descriptor. This does
        not wait for other services that are starting.

        Raises:
            ControlError: the name is taken by now, or no socket can be made anywhere.
        """
        fresh = Claim(name, wanted, environment, 0.0, os.fstat(self.socket.fileno()).st_ino)
        fresh.others_may_start()
        os.dup2(fresh.socket.fileno(), self.socket.fileno(), inheritable=False)
        fresh.socket.close()
        self.refusals = fresh.refusals
        self._holds(fresh.path)

    def others_may_start(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def release(self) -> None:
        """Remove the socket, and its directory if that is empty and steer made it."""
        self.others_may_start()
        self.socket.close()
        self.remove()

    def remove(self) -> None:
        """Remove the path of the socket, and its directory, as `release` does."""
        remove(self.path, self._inode, self.remove_directory)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Let no other service start meanwhile. Raises ControlError: another takes too long."""
        lock = _locked(self.path.parent, self.remove_directory, _TURN_S)
        try:
            yield
        finally:
            os.close(lock)


def inode(path: Path) -> int | None:
    """The inode of a socket, by which to tell it from a later one at the path; None: there is
    none."""
    with contextlib.suppress(OSError):
        return path.lstat().st_ino
    return None


def record_of(path: Path) -> Path:
    """The path of the record of workers; see `record`."""
    return path.parent / f"{path.name}.workers"


def remove(path: Path, wanted: int | None, directory: bool) -> None:
    """Remove a control socket if its inode is `wanted`, and the record of its workers.

    Args:
        directory: whether to remove its directory, too, if empty.
    """
    with contextlib.suppress(OSError):
        if inode(path) == wanted:
            path.unlink(missing_ok=True)
            record_of(path).unlink(missing_ok=True)
        if directory:
            _remove_empty(path.parent)


def remove_dead(path: Path) -> None:
    """Remove a control socket of this user at which nobody listens. If there is a record beside
    it, it stays: workers may be running, and are found by it. If another service is starting, this
    does nothing, as it may have made the socket and not yet listen."""
    with contextlib.suppress(OSError, ControlError):
        if not is_dead(path):
            return
        lock = _locked(path.parent, False, 0.0)
        try:
            if is_dead(path):
                path.unlink()
        finally:
            os.close(lock)
        _remove_empty(path.parent)


def is_dead(path: Path) -> bool:
    """Whether it is a socket of this user's, without a record, at which nobody listens."""
    try:
        found = path.lstat()
        is_ours = stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid()
        if is_ours and not record_of(path).exists():
            connect(path, _ANSWER_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


def _remove_dead(path: Path) -> None:
    """Remove a socket at which nobody answers. A user may have mistyped the path, so only a socket
    of this user is removed."""
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        if not stat.S_ISSOCK(found.st_mode):
            raise FileExistsError(errno.EEXIST, "something is there that is no socket")
        if os.geteuid() not in (0, found.st_uid):
            raise PermissionError(errno.EPERM, "another user's socket is there")
        path.unlink()


def _remove_empty(directory: Path) -> None:
    """Remove a directory if it is empty and no other service is about to put a socket there."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        directory.rmdir()
    finally:
        os.close(fd)


def _make_directory(directory: Path) -> None:
    """Make a directory that other users cannot open, as they could hold its lock. In /tmp another
    user may have made it before."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700 if directory.parent == TMP else 0o711)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, f"{directory} is no directory")
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"{directory} is another user's")


def _locked(directory: Path, make: bool, turn_s: float) -> int:
    """Lock the directory itself, so that no lock file is left. It may be removed while we wait."""
    from steer.linux import signals

    end_s = time.monotonic() + turn_s
    passing = (BlockingIOError, FileNotFoundError) if make else (BlockingIOError,)
    while True:
        if make:
            _make_directory(directory)
        with contextlib.suppress(*passing), contextlib.ExitStack() as undo:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), directory.stat()):
                undo.pop_all()
                return fd
        if time.monotonic() >= end_s:
            break
        signals.pause(_LOOK_AGAIN_S)
    raise ControlError(
        "start a service",
        f"another has been starting for {turn_s:g} s" if turn_s else "another is starting",
        f"see who has {directory} locked: fuser {directory}",
    )
