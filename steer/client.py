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
    path: Path, command: str, timeout_s: float | None = _TIMEOUT_S, **more: Any
) -> dict[str, Any]:
    """Send one request and wait for its answer.

    Raises:
        NotRunning: nobody is there.
        ControlError: refused, or no answer within `timeout_s`.
    """
    act = f"{command} {path.stem}"
    try:
        with rundir.connect(path, timeout_s) as sock:
            sock.sendall(msgspec.json.encode({"command": command, **more}) + b"\n")
            data = sock.makefile("rb").readline()
    except TimeoutError:
        raise ControlError(act, f"no answer within {timeout_s:g} s", "is it stopped?") from None
    except PermissionError:
        raise ControlError(act, "EACCES", "ask as root or as the service's own user") from None
    except OSError:
        raise NotRunning(act, "not running", "see `steer status`") from None
    if not data:
        raise ControlError(act, "the service ended before it answered")
    answer = msgspec.json.decode(data, type=dict[str, Any])
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
    known = {each: path for each, path in rundir.find(environment).items() if _answers(path)}
    if name is not None:
        if name not in known:
            running = f"running: {', '.join(known)}" if known else "no service is running"
            raise NotRunning(f"find service {name!r}", "not running", running)
        return known[name]
    if not known:
        raise NotRunning("find a service", "none is running", "start one with `steer run`")
    if len(known) > 1:
        raise ControlError(
            "find the service", f"several are running: {', '.join(known)}", "name one"
        )
    return next(iter(known.values()))


def status(paths: list[Path]) -> report.Status:
    """What these services say, with the lengths of their queues as the kernel tells them.

    Raises:
        ControlError
    """
    services = []
    for path in paths:
        answer = ask(path, "status")
        service = msgspec.convert(answer["service"], type=report.Service)
        _add_queues(service)
        services.append(service)
    return report.Status(schema=1, services=services)


def running(environment: Mapping[str, str]) -> list[Path]:
    """The control sockets at which somebody answers."""
    return [path for path in rundir.find(environment).values() if _answers(path)]


def stop(path: Path, quick: bool) -> None:
    """Stop a service and wait until its controller is gone.

    Raises:
        NotRunning, ControlError
    """
    pid = ask(path, "status")["service"]["pid"]
    pidfd = None
    with suppress(OSError):
        pidfd = os.pidfd_open(pid)
    ask(path, "stop", timeout_s=None, quick=quick)
    if pidfd is not None:
        select.select([pidfd], [], [])
        os.close(pidfd)


def _answers(path: Path) -> bool:
    try:
        rundir.connect(path).close()
    except PermissionError:
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
