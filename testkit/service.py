"""A service in a process of its own, and commands that ask it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steer.control import client
from steer.errors import ControlError
from testkit.bpf_objects import bpf_exists, bpf_ids
from testkit.confine import as_user
from testkit.processes import DEADLINE_S, eventually, session
from testkit.programs import source

_WOUND = source("wound")


STEER = str(Path(sys.executable).parent / "steer")


@dataclass
class Service:
    """`steer run` in a process of its own.

    Args:
        home: directory it runs in, with its run and cache directories.
        records: directory of what it writes.
        environment: what `steer` commands that speak to it need.
    """

    process: subprocess.Popen[bytes]
    name: str
    home: Path
    records: Path
    environment: Mapping[str, str]
    _bpf: set[tuple[str, int]] = field(default_factory=set)

    @property
    def pid(self) -> int:
        """Of the controller."""
        return self.process.pid

    @property
    def control_socket(self) -> Path:
        return self.home / "run" / "steer" / f"{self.name}.sock"

    @property
    def log(self) -> str:
        """What it and its workers wrote to standard error so far."""
        return (self.records / "stderr").read_text(errors="replace")

    @property
    def output(self) -> str:
        """What it and its workers wrote to standard output so far."""
        return (self.records / "stdout").read_text(errors="replace")

    def ask(self, command: str, **more: Any) -> dict[str, Any]:
        """Send a request to its control socket. Raises ControlError."""
        return client.ask(self.control_socket, command, **more)

    def status(self) -> dict[str, Any]:
        """What it says of itself; queue lengths are not in it, as `steer status` adds them."""
        status: dict[str, Any] = self.ask("status")["service"]
        return status

    def workers(self) -> list[dict[str, Any]]:
        workers: list[dict[str, Any]] = self.status()["workers"]
        return workers

    def selected(self) -> dict[int, int]:
        """Connections (UDP: datagrams) by slot."""
        return {each["slot"]: each["connections"]["selected"] for each in self.workers()}

    def steer(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another `steer` command where it finds this service."""
        return run_steer(*arguments, environment=self.environment, cwd=self.home)

    def wait_ready(self, workers: int | None = None) -> Service:
        """Until `workers`, or all, are ready; spares count too. Fails at once if the service ends
        before."""

        def ready() -> bool:
            assert self.process.poll() is None, f"exit {self.process.returncode}\n{self.log}"
            with suppress(ControlError):
                status = self.status()
                states = [each["state"] for each in status["workers"]]
                wanted = len(states) if workers is None else workers
                return status["state"] == "running" and _ready(states) >= wanted > 0
            return False

        eventually(ready)
        # A worker is reported ready in the turn of the loop before the one that publishes the
        # table for it: once a second request is answered, it is chosen.
        self.status()
        self._note_bpf()
        return self

    def wait_asked(self) -> dict[str, Any]:
        """Until it answers, whether any worker is ready or not; what it says then."""

        def answer() -> dict[str, Any] | None:
            assert self.process.poll() is None, f"exit {self.process.returncode}\n{self.log}"
            with suppress(ControlError):
                return self.status()
            return None

        found = eventually(answer)
        assert found is not None
        return found

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Its exit status, negative for the signal that ended it."""
        return self.process.wait(timeout_s)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and return its exit status."""
        self._note_bpf()
        self.send_signal(number)
        return self.wait()

    def leaves_nothing(self) -> None:
        """Once it has ended: no process, program, map or control socket is left of it."""
        eventually(lambda: session(self.pid), [])
        eventually(lambda: [each for each in self._bpf if bpf_exists(*each)], [])
        if self.process.returncode != -signal.SIGKILL:
            assert not self.control_socket.exists()

    def end(self) -> None:
        """Stop it if it still runs. Raises TimeoutExpired if it had to be killed."""
        try:
            if self.process.poll() is None:
                self.stop()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def clean_up(self) -> None:
        """End it; see that nothing is left, and do not leave it to others."""
        try:
            self.end()
            self.leaves_nothing()
        finally:
            for pid in session(self.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def _note_bpf(self) -> None:
        self._bpf |= bpf_ids(self.pid)


def _ready(states: Sequence[str]) -> int:
    return states.count("ready") + states.count("spare")


def lose_directory(running: Service) -> None:
    """Remove its run directory, at once: the control socket may be made again meanwhile."""
    gone = running.home / f"gone-{time.monotonic_ns()}"
    running.control_socket.parent.rename(gone)
    shutil.rmtree(gone)


def wound(*constants: str) -> tuple[str, ...]:
    """Has a `steer` command go by other times: "steer.health.split._AGAIN_S=1.0"."""
    return (sys.executable, "-c", _WOUND, str(len(constants)), *constants)


def clean_environment(home: Path) -> dict[str, str]:
    """Nothing that would configure steer, but for the demo, which may run without being asked for
    in each test; and its directories, in `home`."""
    unwanted = ("STEER_", "LISTEN_", "NOTIFY_SOCKET", "WEB_CONCURRENCY", "XDG_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return {
        **kept,
        "STEER_DEMO": "true",
        "STEER_RUNTIME_DIR": str(home / "run" / "steer"),
        "XDG_RUNTIME_DIR": str(home / "run"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run_steer(
    *arguments: str,
    environment: Mapping[str, str],
    cwd: Path,
    user: int | None = None,
    timeout_s: float = DEADLINE_S,
) -> subprocess.CompletedProcess[str]:
    """A `steer` command, to its end."""
    return subprocess.run(
        as_user(user, STEER, *arguments),
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def launch(
    command: Sequence[str], *, environment: Mapping[str, str], home: Path, records: Path
) -> subprocess.Popen[bytes]:
    """A command in a session of its own, that writes to `stdout` and `stderr` in `records`."""
    with (records / "stdout").open("wb") as out, (records / "stderr").open("wb") as err:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def start_service(
    *arguments: str,
    name: str,
    environment: Mapping[str, str],
    home: Path,
    user: int | None = None,
    under: Sequence[str] = (),
) -> Service:
    """`steer run ARGUMENTS`, in a session of its own; not yet ready."""
    records = Path(tempfile.mkdtemp(prefix="records-", dir=home))
    command = [*under, *as_user(user, STEER, "run", "--name", name, *arguments)]
    process = launch(command, environment=environment, home=home, records=records)
    return Service(process, name, home, records, environment)
