"""Servers as children: started, waited for, and gone when we are done with them."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from steer.errors import SteerError

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
_CHANGING = ("WEB_CONCURRENCY", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID")
_POLL_S = 0.001
_TIMEOUT_S = 20.0


def tool(name: str) -> str:
    """The command `name` of the environment this Python is in.

    Raises:
        SteerError: it is not installed.
    """
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise SteerError(f"run {name}", f"no {path}", "install it: ./dev setup bench")
    return str(path)


def system_tool(name: str) -> str:
    """The system's command `name`, also where only root has it on PATH.

    Raises:
        SteerError: it is not installed.
    """
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        raise SteerError(f"run {name}", "not installed", "install it: ./dev setup bench")
    return path


def environment(run_directory: str, **more: str) -> dict[str, str]:
    """Ours, without what would change a service, and with a run directory of its own.

    Python's settings go too: without its cache of compiled modules only what pip had
    compiled would start fast.
    """
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("STEER_", "PYTHON")) and key not in _CHANGING
    }
    return {**kept, "STEER_RUNTIME_DIR": f"{run_directory}/steer", **more}


class Server:
    """A server that was started a moment ago.

    Args:
        command: what to execute, in the checkout.
        port: where it will answer HTTP on loopback.
        log: what it writes is kept there, for when it fails.
    """

    def __init__(
        self, command: Sequence[str], port: int, environment: Mapping[str, str], log: Path
    ) -> None:
        self.command = command
        self.port = port
        self._log = log
        with log.open("wb") as output:
            self._started_s = time.perf_counter()
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def first_answer_s(self, within_s: float = _TIMEOUT_S) -> float:
        """Wait for an answer; how long after exec it came.

        Raises:
            SteerError: the server ended, or does not answer.
        """
        while time.perf_counter() < self._started_s + within_s:
            with contextlib.suppress(ConnectionError, TimeoutError):
                get(self.port)
                return time.perf_counter() - self._started_s
            if self.process.poll() is not None:
                raise self.failure(f"exit status {self.process.returncode}")
            time.sleep(_POLL_S)
        raise self.failure(f"no answer in {within_s:g} s")

    def stop(self) -> None:
        """SIGTERM, and wait. Raises SteerError: it does not end, and was killed."""
        self.process.terminate()
        self.wait()

    def wait(self) -> None:
        """Until it has ended. Raises SteerError: it does not, and was killed."""
        try:
            self.process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise self.failure(f"does not end in {_TIMEOUT_S:g} s") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """All of its session; what is gone is no error."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()

    def failure(self, cause: str) -> SteerError:
        """An error that ends with what the server last said."""
        words = self._log.read_text(errors="replace").splitlines()[-10:]
        return SteerError(f"measure {' '.join(self.command)}", cause, detail="\n".join(words))


@contextlib.contextmanager
def server(command: Sequence[str], port: int, environment: Mapping[str, str]) -> Iterator[Server]:
    """Start one; it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="steer-bench-") as directory:
        started = Server(command, port, environment, Path(directory, "log"))
        try:
            yield started
            if started.process.poll() is None:
                started.stop()
        finally:
            started.kill()


def get(port: int) -> bytes:
    """One answer from loopback. Raises ConnectionError, TimeoutError: as they say."""
    connection = http.client.HTTPConnection(HOST, port, timeout=_TIMEOUT_S)
    with contextlib.closing(connection):
        connection.request("GET", "/")
        response = connection.getresponse()
        body = response.read()
    if response.status != 200:
        raise SteerError(f"GET port {port}", f"status {response.status}")
    return body


def steer_run(port: int, workers: int, *arguments: str) -> list[str]:
    """The service's name is `name(port)`; with no arguments that say else, it is the demo."""
    bind = f"{HOST}:{port}"
    base = [tool("steer"), "run", "--demo", "-w", str(workers), "-b", bind, "--name", name(port)]
    return [*base, *arguments]


def name(port: int) -> str:
    """One that no other service on this machine has."""
    return f"bench-{os.getpid()}-{port}"


def gunicorn(port: int, workers: int, app: str = "bench.apps:wsgi") -> list[str]:
    return [tool("gunicorn"), "-w", str(workers), "-b", f"{HOST}:{port}", app]
