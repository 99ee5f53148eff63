"""Where services are found: directories of control sockets, and who may put one there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from steer.errors import ControlError
from steer.linux import services, unix
from steer.linux.services import RUNTIME_DIR
from steer.linux.title import GUARD

_SYSTEM = Path("/run/steer")
_LOGINS = Path("/run/user")
_TMP = Path("/tmp")
_BACKLOG = 16
PATH_MAX_BYTES = 107
"""sun_path of unix(7), less the null byte at its end."""
_CREDENTIALS = struct.Struct("3i")
"""struct ucred of unix(7): pid, uid, gid."""
_TIMEVAL = struct.Struct("@ll")
"""struct timeval of socket(7): seconds, microseconds."""
_ANSWER_S = 1.0
RENEWED_S, _RENEWAL_S = 4.0, 0.05
"""A control socket that was removed is made again within 2 s."""
_TURN_S, _LOOK_AGAIN_S = 30.0, 0.01
"""How long to wait for another service of the user to be done with its start. Not
without end: a process that is stopped would keep all others from starting."""


def directories(environment: Mapping[str, str]) -> list[Path]:
    """Where the control socket of a service of ours may be, best first.

    STEER_RUNTIME_DIR is the only place if it is set. Root's is always the system's, whatever
    a login shell has in XDG_RUNTIME_DIR: cron and systemd have to find it, too. Another user's
    is their run directory, the system's if it was made for them, else one of their own in /tmp.
    """
    override = environment.get(RUNTIME_DIR)
    if override:
        return [Path(override)]
    user = os.geteuid()
    own = [] if user == 0 else [_of_login(environment, user)]
    return [*own, _SYSTEM, _TMP / f"steer-{user}"]


def _of_login(environment: Mapping[str, str], user: int) -> Path:
    """Where XDG_RUNTIME_DIR is, or would be in a login shell (pam_systemd(8))."""
    return Path(environment.get("XDG_RUNTIME_DIR") or _LOGINS / str(user), "steer")


def _directories_to_look_in(environment: Mapping[str, str]) -> Iterator[Path]:
    """All in which a service that we may ask can be: for root, those of all users."""
    yield from directories(environment)
    if environment.get(RUNTIME_DIR):
        return
    user = os.geteuid()
    yield _of_login(environment, user)
    yield _LOGINS / str(user) / "steer"
    if user == 0:
        yield from sorted(_LOGINS.glob("*/steer"))
        yield from sorted(_TMP.glob("steer-*"))


def find(environment: Mapping[str, str], name: str | None = None) -> list[Path]:
    """Control sockets, whether anybody answers there or not; our own services' first.

    Another user's directory does not let us list it, but one that we can name is found
    there. Where anybody could have made the directory it is passed over unless its owner is
    whom it is named after.
    """
    found: dict[Path, None] = {}
    for directory in _directories_to_look_in(environment):
        with contextlib.suppress(OSError, ValueError):
            if _is_whose_it_says(directory):
                named = directory / f"{name}.sock"
                there = [named] if name and named.exists() else sorted(directory.glob("*.sock"))
                found.update(dict.fromkeys(there))
    return list(found)


def of_others(environment: Mapping[str, str]) -> list[Path]:
    """Control sockets at which somebody listens, of services that we may not ask; for root there
    are none.

    Where a directory does not let us list it, the kernel's table of sockets still names them. That
    tells no user: what is ours is known by its directory's name, or by its processes.
    """
    user = os.geteuid()
    if user == 0:
        return []
    override = environment.get(RUNTIME_DIR)
    ours = {path for path in find(environment) if os.access(path, os.W_OK)}
    there = {path for _, path in unix.listening()} - ours
    others = [path for path in there if _may_be_control(path, override) and _user_of(path) != user]
    unnamed = any(_user_of(path) is None for path in others)
    by_process = services.names_of_ours() if unnamed else set()
    return sorted(path for path in others if not _is_gone(path, by_process))


def _is_gone(path: Path, ours: set[str]) -> bool:
    """Whether it was the socket of one of our services, in a directory that is no user's."""
    return _user_of(path) is None and path.stem in ours and not os.path.lexists(path)


def _may_be_control(path: Path, override: str | None) -> bool:
    if path.suffix != ".sock":
        return False
    if override:
        return path.parent == Path(override)
    return path.parent == _SYSTEM or _user_of(path) is not None


def _user_of(path: Path) -> int | None:
    """Whose control socket it is, where its directory is named after a user."""
    directory = path.parent
    with contextlib.suppress(ValueError):
        if directory.name == "steer" and directory.parent.parent == _LOGINS:
            return int(directory.parent.name)
        if directory.parent == _TMP and directory.name.startswith("steer-"):
            return int(directory.name.removeprefix("steer-"))
    return None


def _is_whose_it_says(directory: Path) -> bool:
    """Raises OSError, ValueError: there is none, or its name tells of no user."""
    if directory.parent == _TMP and directory.name.startswith("steer-"):
        user = int(directory.name.removeprefix("steer-"))
    elif directory.parent.parent == _LOGINS:
        user = int(directory.parent.name)
    else:
        return True
    found = directory.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == user


def connect(path: Path, timeout_s: float | None = None) -> socket.socket:
    """A connection to a control socket. Raises OSError as connect(2).

    Args:
        timeout_s: for the connection, and for each send and receive after it.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if timeout_s is not None:
            # Not settimeout() yet: with that a full backlog would fail at once.
            limit = _TIMEVAL.pack(int(timeout_s), int(timeout_s % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        sock.connect(str(path))
        sock.settimeout(timeout_s)
    except BlockingIOError:
        sock.close()
        raise TimeoutError(errno.ETIMEDOUT, "its backlog is full") from None
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
        turn_s: how long to wait for another service that is starting; None: as a start does.
        ours: inode of a control socket that may have the name already.
        places: as `refuse_taken` returned them a moment ago.

    Attributes:
        path: of the control socket.
        socket: the control socket.
        remove_directory: whether its directory is steer's own, and goes with it if empty.
        refusals: of better places, each with the reason.

    Raises:
        ControlError: the name is taken, or no socket can be made anywhere.
    """

    def __init__(
        self,
        name: str,
        wanted: str | None,
        environment: Mapping[str, str],
        turn_s: float | None = None,
        ours: int | None = None,
        places: Sequence[Path] | None = None,
    ) -> None:
        self.remove_directory = wanted is None
        self.refusals: list[str] = []
        for path in places or refuse_taken(name, wanted, environment, ours):
            try:
                self._take(name, path, _TURN_S if turn_s is None else turn_s)
                return
            except OSError as error:
                self.refusals.append(f"{path}: {error.strerror or error}")
        raise ControlError(
            f"make the control socket of {name!r}",
            "; ".join(self.refusals),
            "name another place: --control-socket PATH",
        )

    def _take(self, name: str, path: Path, turn_s: float) -> None:
        self._lock = _locked(path.parent, self.remove_directory, turn_s)
        try:
            _refuse_if_answering(name, path)
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
        """A name that stayed taken: a service's, whose last controller is gone. So may be the
        path."""
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
        """Whether it can be found: a logout removes a run directory with all that is in it."""
        return self._inode is not None and inode(self.path) == self._inode

    def renew(self, name: str, wanted: str | None, environment: Mapping[str, str]) -> None:
        """Make the control socket again, as at the start; `socket` keeps its descriptor. It does
        not wait for others that are starting.

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
        """Leave nothing: remove the socket, and its directory if that was steer's and is empty."""
        self.others_may_start()
        self.socket.close()
        remove(self.path, self._inode, self.remove_directory)


def inode(path: Path) -> int | None:
    """What tells this socket's path from that of another after it; None if there is none."""
    with contextlib.suppress(OSError):
        return path.lstat().st_ino
    return None


def record_of(path: Path) -> Path:
    """The file that tells of a service's workers; see `record`."""
    return path.parent / f"{path.name}.workers"


def remove(path: Path, wanted: int | None, directory: bool) -> None:
    """Remove a control socket if it is the one of `inode`, with the record of its workers, and
    its directory if empty.

    Args:
        directory: whether that may go.
    """
    with contextlib.suppress(OSError):
        if inode(path) == wanted:
            path.unlink(missing_ok=True)
            record_of(path).unlink(missing_ok=True)
        if directory:
            _remove_empty(path.parent)


def refuse_taken(
    name: str,
    wanted: str | None,
    environment: Mapping[str, str],
    ours: int | None = None,
    lost: Sequence[services.Running] | None = None,
) -> list[Path]:
    """Where the control socket may be, unless a service of that name is running.

    Args:
        ours: inode of a control socket that may have the name.
        lost: as `await_guard` returned them a moment ago.

    Raises:
        ControlError: one is; or no path is short enough.
    """
    found = places(name, wanted, environment)
    _refuse_too_long(name, found)
    for path in found:
        _refuse_if_answering(name, path)
    for each in unreachable(found, environment) if lost is None else lost:
        if each.inode != ours:
            raise running(name, f"pid {each.pid}", each.path)
    return found


def _refuse_too_long(name: str, paths: Iterable[Path]) -> None:
    """Raises ControlError: none of them can be that of a socket."""
    lengths = {path: len(os.fsencode(path)) for path in paths}
    if all(length > PATH_MAX_BYTES for length in lengths.values()):
        causes = "; ".join(f"{path} has {length}" for path, length in lengths.items())
        cause = f"a socket's path has {PATH_MAX_BYTES} bytes at most, {causes}"
        cure = "name another place: --control-socket PATH, STEER_RUNTIME_DIR"
        raise ControlError(f"make the control socket of {name!r}", cause, cure)


def unreachable(paths: Iterable[Path], environment: Mapping[str, str]) -> list[services.Running]:
    """The services of this user whose control sockets were at one of these paths, and are gone.
    They are made again soon."""
    missing = {path.absolute() for path in paths if not os.path.lexists(path)}
    if not unix.may_listen(missing):
        return []
    found = services.find(environment)
    return [each for each in found if each.path in missing and each.is_gone]


def await_guard(
    paths: Iterable[Path], environment: Mapping[str, str]
) -> Sequence[services.Running]:
    """Where a control socket at one of these was removed while no controller is there, wait until
    the guard process has made it again: for a moment, as it may be stopped.

    Returns:
        Those that are `unreachable` then.
    """
    from steer.linux import fork

    end_s = time.monotonic() + RENEWED_S
    places = list(paths)
    while True:
        lost = unreachable(places, environment)
        if all(each.title.role != GUARD for each in lost) or time.monotonic() >= end_s:
            return lost
        fork.pause(_RENEWAL_S)


def places(name: str, wanted: str | None, environment: Mapping[str, str]) -> list[Path]:
    """Where the control socket of a service may be, best first."""
    if wanted is not None:
        return [Path(wanted)]
    return [directory / f"{name}.sock" for directory in directories(environment)]


def _refuse_if_answering(name: str, path: Path) -> None:
    """A socket that nobody answers at is what a killed controller left: it is no obstacle."""
    try:
        with connect(path, _ANSWER_S) as sock:
            holder = f"pid {peer(sock)[0]}"
    except TimeoutError:
        holder = "it does not answer"
    except OSError:
        return
    raise running(name, holder, path)


def running(name: str, holder: str, path: Path) -> ControlError:
    """What it means that somebody answers where a service's control socket is to be."""
    return ControlError(
        f"start service {name!r}",
        f"one of that name is running ({holder}, {path})",
        f"stop it with `steer stop {name}`, or give this one another --name",
    )


def _remove_dead(path: Path) -> None:
    """Of what may stand at a path that a user typed only our own sockets are ours to remove."""
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        if not stat.S_ISSOCK(found.st_mode):
            raise FileExistsError(errno.EEXIST, "something is there that is no socket")
        if os.geteuid() not in (0, found.st_uid):
            raise PermissionError(errno.EPERM, "another user's socket is there")
        path.unlink()


def _remove_empty(directory: Path) -> None:
    """Unless somebody is about to put a socket there."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        directory.rmdir()
    finally:
        os.close(fd)


def _make_directory(directory: Path) -> None:
    """Not for others to open, or they could hold its lock; in /tmp they may have been first."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700 if directory.parent == _TMP else 0o711)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, f"{directory} is no directory")
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"{directory} is another user's")


def _locked(directory: Path, make: bool, turn_s: float) -> int:
    """A lock on the directory itself, so no lock file is left. It may be removed while we wait."""
    from steer.linux import fork

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
        fork.pause(_LOOK_AGAIN_S)
    raise ControlError(
        "start a service",
        f"another has been starting for {turn_s:g} s" if turn_s else "another is starting",
        f"see who has {directory} locked: fuser {directory}",
    )
