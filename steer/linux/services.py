"""Finds services by their processes, also if their control socket was removed or is in an unusual
place.

The titles of controllers and guards name their service (see `title`), and the kernel says at which
path their socket listens. Only services of this network namespace are found, as the kernel's table
lists only those.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from steer.errors import KernelError
from steer.linux import processes, title, unix
from steer.linux.title import GUARD, WORKER, Title

RUNTIME_DIR, NAME = "STEER_RUNTIME_DIR", "STEER_NAME"
MARK = "STEER_WORKER"
"""Environment variable with the process id of the worker's first process."""


class Running(msgspec.Struct, frozen=True):
    """A service that runs.

    Args:
        pid: the process ID of its controller, or of its guard if there is no controller.
        inode: the inode of its control socket, as in /proc/net/unix.
        path: where the control socket was bound; it may have been removed.
    """

    title: Title
    pid: int
    inode: int
    path: Path

    @property
    def is_gone(self) -> bool:
        """Whether the path of its control socket was removed. The path is looked up as the service
        sees it, which may be in a container."""
        return not os.path.lexists(f"/proc/{self.pid}/root{self.path}") and processes.is_alive(
            self.pid
        )


def find(environment: Mapping[str, str], but: Collection[int] = ()) -> list[Running]:
    """The services of this user, for root those of all users.

    If STEER_RUNTIME_DIR is set, only services that were started with the same value.

    Args:
        but: controllers to skip, with their guards. To examine them takes long, as they have many
            files open.
    """
    found: dict[int, Running] = {}
    listening = dict(unix.listening())
    for pid, shown in _processes(environment):
        if pid in but or (shown.role == GUARD and processes.parent(pid) in but):
            continue
        for inode in _open_in(pid) & listening.keys():
            known = found.get(inode)
            if known is None or known.title.role == GUARD:
                found[inode] = Running(shown, pid, inode, _absolute(pid, listening[inode]))
    return list(found.values())


class Member(msgspec.Struct, frozen=True):
    """A process of a worker.

    Args:
        name: the name of its service.
        runtime_dir: STEER_RUNTIME_DIR of the process; None if it was not set.
        first: the worker's first process, by its environment; None if its title names the
            service.
    """

    pid: int
    name: str
    runtime_dir: str | None
    first: int | None


def unattended(environment: Mapping[str, str]) -> list[Member]:
    """The processes of workers whose service has neither a controller nor a guard: those of this
    user, for root of all users, in this network and pid namespace.

    If STEER_RUNTIME_DIR is set, only processes that were started with the same value.
    """
    titles = {pid: title.of(pid) for pid in processes.all_pids()}
    attended = [
        (shown, processes.environment(pid).get(RUNTIME_DIR))
        for pid, shown in titles.items()
        if shown is not None and shown.role != WORKER and pid != os.getpid() and _is_here(pid)
    ]
    return [each for each in _members(environment, titles, attended) if _is_here(each.pid)]


def name_of(pid: int) -> str | None:
    """The service that a process belongs to; None if it belongs to none, or cannot be examined."""
    shown = title.of(pid)
    if shown is not None:
        return shown.name
    given = processes.environment(pid)
    return given.get(NAME) if MARK in given else None


def name_of_any(pids: Collection[int]) -> str | None:
    """The service that one of the processes, or an ancestor of one, belongs to. A worker may have
    overwritten its environment, or be another user's, but its controller has a title."""
    if name := next(filter(None, map(name_of, pids)), None):
        return name
    seen: set[int] = set()
    for pid in pids:
        above = processes.parent(pid)
        while above and above not in seen:
            if (shown := title.of(above)) is not None:
                return shown.name
            seen.add(above)
            above = processes.parent(above)
    return None


def _members(
    environment: Mapping[str, str],
    titles: Mapping[int, Title | None],
    attended: Sequence[tuple[Title, str | None]],
) -> Iterator[Member]:
    """The processes of workers whose service has no controller or guard.

    Args:
        titles: by pid.
        attended: title and STEER_RUNTIME_DIR of each controller and guard.
    """
    user, wanted = os.geteuid(), environment.get(RUNTIME_DIR)
    for pid, shown in titles.items():
        is_ours = user in (0, _owner(pid))
        if not is_ours or (shown is not None and shown.role != WORKER):
            continue
        given = processes.environment(pid)
        at, first = given.get(RUNTIME_DIR), first_of(given)
        if wanted not in (None, at):
            continue
        if shown is not None:
            name, first = shown.name, None
        elif first is not None and NAME in given:
            name = given[NAME]
        else:
            continue
        if not any(by.may_name(name) and place in (None, at) for by, place in attended):
            yield Member(pid, name, at, first)


def first_of(environment: Mapping[str, str]) -> int | None:
    """The first process of a worker, from the environment of one of its processes."""
    value = environment.get(MARK, "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else None


def _is_here(pid: int) -> bool:
    """Whether a process is in the network and pid namespaces of this one."""
    with suppress(OSError):
        return all(
            os.readlink(f"/proc/{pid}/ns/{each}") == os.readlink(f"/proc/self/ns/{each}")
            for each in ("net", "pid")
        )
    return False


def names_of_ours() -> set[str]:
    """The names of the services of this user, by the titles of their processes."""
    user = os.geteuid()
    return {shown.name for pid, shown in _shown() if _owner(pid) == user}


def _processes(environment: Mapping[str, str]) -> Iterator[tuple[int, Title]]:
    user, wanted = os.geteuid(), environment.get(RUNTIME_DIR)
    for pid, shown in _shown():
        is_ours = user in (0, _owner(pid))
        if is_ours and wanted in (None, processes.environment(pid).get(RUNTIME_DIR)):
            yield pid, shown


def _shown() -> Iterator[tuple[int, Title]]:
    for pid in processes.all_pids():
        shown = title.of(pid)
        if shown is not None and shown.role != WORKER:
            yield pid, shown


def _owner(pid: int) -> int | None:
    with suppress(OSError):
        return os.stat(f"/proc/{pid}").st_uid
    return None


def _open_in(pid: int) -> set[int]:
    with suppress(OSError, KernelError):
        return {inode for _, inode in processes.sockets_by_fd(pid)}
    return set()


def _absolute(pid: int, path: Path) -> Path:
    if not path.is_absolute():
        with suppress(OSError):
            return Path(os.readlink(f"/proc/{pid}/cwd"), path)
    return path
