"""For your tests: a group of sockets or a whole service, on a free port of the loopback interface.
Works with any test framework.

from steer.testing import reuseport_group, service

with reuseport_group("round-robin", slots=2) as group, group.listen(0) as sock:
    group.activate(0)
    ...

with service(app="shop:serve", workers=2) as running:
    requests.get(f"http://127.0.0.1:{running.address[1]}/")
    running.reload()
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from steer.api import group_input
from steer.api.connection import ServiceConnection
from steer.api.group import ReuseportGroup
from steer.api.service import Config, Settings
from steer.config import address
from steer.config.sources import as_toml
from steer.errors import NotRunning, WorkersFailed
from steer.sockets import port_checks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Unpack

_LOOK_S = 0.02
_GRACEFUL_TIMEOUT_S = 1.0
"""A test has no open requests at its end that would have to be finished."""


@contextmanager
def reuseport_group(
    policy: str = "auto",
    *,
    slots: int = 2,
    protocol: str = "tcp",
    params: Mapping[str, int] | None = None,
    backend: str = "auto",
) -> Iterator[ReuseportGroup]:
    """A group at 127.0.0.1 and a free port, which `group.address` tells. It is closed at the end of
    the block.

    Args:
        protocol: "tcp" or "udp".
        policy, slots, params, backend: see `ReuseportGroup`.

    Raises: as `ReuseportGroup`.
    """
    address = f"{protocol}://127.0.0.1:0"
    with ReuseportGroup(address, policy, slots=slots, params=params, backend=backend) as group:
        yield group


class RunningService(ServiceConnection):
    """A running service of a test, with the methods of the object that `steer.connect` returns.

    Attributes:
        address: host and port, as socket.create_connection() takes them.
    """

    def __init__(self, control_socket: Path, address: tuple[str, int]) -> None:
        super().__init__(control_socket)
        self.address = address


@contextmanager
def service(*, timeout_s: float = 30.0, **settings: Unpack[Settings]) -> Iterator[RunningService]:
    """Run a service in a new process until the end of the block, which begins when all workers are
    ready.

    The process starts in the current directory and imports the application there by its name.

    Args:
        timeout_s: how long the workers may take to become ready.
        settings: see `steer.Config`. Port 0 in `bind` means a free port. The defaults are
            "127.0.0.1:0" for `bind`, "test" for `name`, and 1 second for `graceful_timeout`.

    Raises:
        ConfigError: as `steer.Config`.
        BindError: no port is free.
        WorkersFailed: the service did not start in time; `detail` has its log.
    """
    settings.setdefault("name", "test")
    settings.setdefault("graceful_timeout", _GRACEFUL_TIMEOUT_S)
    settings["bind"] = _with_free_ports(settings.get("bind", "127.0.0.1:0"))
    with tempfile.TemporaryDirectory(prefix="steer-") as directory:
        control = Path(directory, "service.sock")
        settings["control_socket"] = str(control)
        configured = Config(**settings).service
        file, log = Path(directory, "steer.toml"), Path(directory, "log")
        file.write_text(as_toml(configured))
        bind = configured.binds[0]
        host_and_port = bind.address or "127.0.0.1", bind.port
        with (
            log.open("wb") as stderr,
            _running(file, stderr.fileno()) as process,
            RunningService(control, host_and_port) as running,
        ):
            _await_ready(running, process, log, timeout_s)
            yield running


def _with_free_ports(given: str | Sequence[str]) -> str | Sequence[str]:
    """The addresses, with a free port in place of port 0. `Config` checks anything else.

    Raises:
        ConfigError: one is malformed.
        BindError: no port is free.
    """
    if isinstance(given, str):
        bind = address.parse(given, any_port=True)
        return given if bind.port else group_input.text_of(port_checks.with_port(bind))
    if isinstance(given, list | tuple):
        return [str(_with_free_ports(each)) for each in given]
    return given


@contextmanager
def _running(file: Path, stderr: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run `steer run` with this configuration file until the end of the block."""
    ours = ("STEER_", "WEB_CONCURRENCY")  # these variables take precedence over the file
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    command = [sys.executable, "-m", "steer", "run", "-c", str(file)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=stderr, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def _await_ready(
    running: RunningService, process: subprocess.Popen[bytes], log: Path, timeout_s: float
) -> None:
    """Raises WorkersFailed."""
    end_s = time.monotonic() + timeout_s
    while not _is_ready(running):
        if process.poll() is not None or time.monotonic() > end_s:
            cause = (
                "it ended" if process.returncode is not None else f"not ready in {timeout_s:g} s"
            )
            raise WorkersFailed("start a service", cause, detail=log.read_text(errors="replace"))
        time.sleep(_LOOK_S)


def _is_ready(running: RunningService) -> bool:
    try:
        workers = running.status().workers
    except NotRunning:
        return False
    return bool(workers) and all(worker.state in ("ready", "spare") for worker in workers)
