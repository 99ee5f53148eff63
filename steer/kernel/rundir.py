"""Where services are found: directories of control sockets, and who may put one there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Mapping
from pathlib import Path

from steer.errors import ControlError

_BACKLOG = 16
_CREDENTIALS = struct.Struct("3i")
"""struct ucred of unix(7): pid, uid, gid."""


def directories(environment: Mapping[str, str]) -> list[Path]:
    """Where control sockets may be, best first: the user's run directory, the system's,
    and for a user who can write to neither, one of their own in /tmp."""
    runtime = environment.get("XDG_RUNTIME_DIR")
    own = [Path(runtime) / "steer"] if runtime else []
    return [*own, Path("/run/steer"), Path(f"/tmp/steer-{os.geteuid()}")]


def find(environment: Mapping[str, str]) -> dict[str, Path]:
    """Control sockets by the name of their service, whether anybody answers there or not."""
    found: dict[str, Path] = {}
    for directory in directories(environment):
        with contextlib.suppress(OSError):
            for path in sorted(directory.glob("*.sock")):
                found.setdefault(path.stem, path)
    return found


def connect(path: Path, timeout_s: float | None = None) -> socket.socket:
    """A connection to a control socket. Raises OSError as connect(2)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


def peer(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as the kernel vouches (unix(7), SO_PEERCRED)."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


class Claim:
    """A service's name, taken: its control socket, listening.

    Services of one user start one after the other: until `others_may_start` is
    called no other gets past here, so none can join a port between our check that
    it is free and our bind.

    Args:
        wanted: path of the control socket; None looks for a directory.

    Raises:
        ControlError: the name is taken, or no socket can be made anywhere.
    """

    def __init__(self, name: str, wanted: str | None, environment: Mapping[str, str]) -> None:
        self._ours_to_remove = wanted is None
        places = [d / f"{name}.sock" for d in directories(environment)]
        if wanted is not None:
            places = [Path(wanted)]
        refusals = []
        for path in places:
            _refuse_if_answering(name, path)
        for path in places:
            try:
                self._take(name, path)
                return
            except OSError as error:
                refusals.append(f"{path}: {os.strerror(error.errno or 0)}")
        raise ControlError(
            f"make the control socket of {name!r}",
            "; ".join(refusals),
            "name another place: --control-socket PATH",
        )

    def _take(self, name: str, path: Path) -> None:
        if self._ours_to_remove:
            _make_directory(path.parent)
        self._lock = _locked(path.parent)
        try:
            _refuse_if_answering(name, path)
            path.unlink(missing_ok=True)
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            mask = os.umask(0o177)
            try:
                self.socket.bind(str(path))
            finally:
                os.umask(mask)
            self.socket.listen(_BACKLOG)
            self._inode = path.stat().st_ino
            self.path = path
        except BaseException:
            self.others_may_start()
            raise

    def others_may_start(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def release(self) -> None:
        """Leave nothing: remove the socket, and its directory if that was steer's and is empty."""
        self.others_may_start()
        self.socket.close()
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()
            if self._ours_to_remove:
                self.path.parent.rmdir()


def _refuse_if_answering(name: str, path: Path) -> None:
    """A socket that nobody answers at is what a killed controller left: it is no obstacle."""
    try:
        sock = connect(path)
    except OSError:
        return
    with sock:
        pid, _ = peer(sock)
    raise ControlError(
        f"start service {name!r}",
        f"one of that name is running (pid {pid}, {path})",
        f"stop it with `steer stop {name}`, or give this one another --name",
    )


def _make_directory(directory: Path) -> None:
    """Ours alone; in /tmp somebody else may have been there first."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700 if directory.parent == Path("/tmp") else 0o755)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(1, "not ours")


def _locked(directory: Path) -> int:
    """A lock on the directory itself, so no lock file is left. Tried again if the
    directory was removed while we waited."""
    while True:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if directory.exists() and os.fstat(fd).st_ino == directory.stat().st_ino:
            return fd
        os.close(fd)
        _make_directory(directory)
