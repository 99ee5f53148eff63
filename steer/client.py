"""Asking running services, from short-lived commands."""

from __future__ import annotations

import os
import select
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from steer import report
from steer.errors import ControlError, KernelError, NotRunning
from steer.kernel import diag, proc, rundir

_TIMEOUT_S = 5.0


def ask(
    path: Path, command: str, timeout_s: float | None = _TIMEOUT_S, act: str = "", **more: Any
) -> dict[str, Any]:
    """Send one request and wait for its answer.

    Args:
        act: what it is for, if not the command itself; for errors.

    Raises:
        NotRunning: nobody is there.
        ControlError: refused, no answer within `timeout_s`, or none of steer's.
    """
    act = act or f"{command} {path.stem}"
    limit_s = _TIMEOUT_S if timeout_s is None else timeout_s
    try:
        with rundir.connect(path, limit_s) as sock:
            sock.settimeout(timeout_s)
            sock.sendall(msgspec.json.encode({"command": command, **more}) + b"\n")
            data = sock.makefile("rb").readline()
        answer = msgspec.json.decode(data or b"{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ControlError(act, f"answer not understood: {error}", "is it steer's?") from None
    except TimeoutError:
        cure = "is it stopped? see ps(1), then kill -CONT or -KILL"
        raise ControlError(act, f"no answer within {limit_s:g} s", cure) from None
    except PermissionError:
        raise ControlError(act, "EACCES", "ask as root or as the service's own user") from None
    except OSError:
        raise NotRunning(act, "not running", "see `steer status`") from None
    if not data:
        raise NotRunning(act, "the service ended before it answered")
    if not answer.get("ok"):
        raise ControlError(act, str(answer.get("error")))
    return answer


def locate(name: str | None, control_socket: str | None, environment: Mapping[str, str]) -> Path:
    """The control socket of a service; NAME may be left out where one runs.

    Raises:
        NotRunning: there is none, or of that name.
        ControlError: there are several, and no name was given.
    """
    if control_socket:
        return Path(control_socket)
    known = rundir.find(environment, name)
    if name is not None and name in known and _answers(known[name]):
        return known[name]
    paths = running(environment)
    names = ", ".join(path.stem for path in paths)
    if name is not None:
        others = f"running: {names}" if names else "no service is running"
        raise NotRunning(f"find service {name!r}", "not running", others)
    if not paths:
        raise NotRunning("find a service", "none is running", "start one with `steer run`")
    if len(paths) > 1:
        raise ControlError("find the service", f"several are running: {names}", "name one")
    return paths[0]


def status(path: Path) -> report.Status:
    """What a service says, with the lengths of its queues as the kernel tells them.

    Raises:
        ControlError
    """
    service = _status(path)
    _add_queues(service)
    return report.Status(schema=1, services=[service])


def status_of_all(environment: Mapping[str, str]) -> report.Status:
    """The same of every service that runs.

    Raises:
        ControlError
    """
    services = []
    for path in running(environment):
        with suppress(NotRunning):  # it has ended since
            services += status(path).services
    return report.Status(schema=1, services=services)


def _status(path: Path) -> report.Service:
    answer = ask(path, "status")
    try:
        return msgspec.convert(answer.get("service"), type=report.Service)
    except msgspec.ValidationError as error:
        raise ControlError(
            f"status {path.stem}", f"answer not understood: {error}", "is it of this version?"
        ) from None


def running(environment: Mapping[str, str]) -> list[Path]:
    """The control sockets at which somebody answers; other users' only if none is ours."""
    found = [path for path in rundir.find(environment).values() if _answers(path)]
    return [path for path in found if os.access(path, os.W_OK)] or found


def stop(path: Path, quick: bool) -> None:
    """Stop a service and wait until its controller is gone.

    Raises:
        NotRunning, ControlError
    """
    pidfd = None
    with suppress(OSError), rundir.connect(path, _TIMEOUT_S) as sock:
        pidfd = os.pidfd_open(rundir.peer(sock)[0])
    # Is anybody listening? The answer to the next may rightly take long.
    ask(path, "status", act=f"stop {path.stem}")
    ask(path, "stop", timeout_s=None, quick=quick)
    if pidfd is not None:
        select.select([pidfd], [], [])
        os.close(pidfd)


def _answers(path: Path) -> bool:
    """Also where we may not ask, or the answer takes long: the question then says so."""
    try:
        rundir.connect(path, _TIMEOUT_S).close()
    except (PermissionError, TimeoutError):
        return True
    except OSError:
        return False
    return True


def _add_queues(service: report.Service) -> None:
    """Left out where the kernel does not let us look."""
    try:
        here = proc.network_namespace() == proc.network_namespace(service.pid)
        queues = diag.listen_queues(None if here else service.pid)
    except (KernelError, OSError):
        return
    for worker in service.workers:
        own = [queues[inode] for inode in worker.sockets if inode in queues]
        tcp = [queue.queued for queue in own if queue.queued is not None]
        udp = [queue.queued_bytes for queue in own if queue.queued_bytes is not None]
        worker.connections.queued = sum(tcp) if tcp else None
        worker.connections.queued_bytes = sum(udp) if udp else None
