"""What workers write reaches the log: all of it, each line whole, wherever the log is by now."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from steer.linux.output import Output
from testkit.fixtures import StartService
from testkit.processes import DEADLINE_S, eventually, session
from testkit.service import STEER

WRITES = """
import os, sys, time
from pathlib import Path

def serve(worker):
    for number in range(COUNT):
        line = f"<{worker.slot}:{number}:" + "x" * (number % 300) + ">\\n"
        os.write(2, line.encode())
    os.write(2, b"the last word")
    if Path("crash").exists() and worker.slot < 2:
        os._exit(1)
    worker.ready()
    while not worker.stopping:
        time.sleep(0.01)
"""
SAYS = """
import sys, time
from pathlib import Path

def serve(worker):
    worker.ready()
    while not worker.stopping:
        for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
            print(name, worker.slot, "says", Path("say").read_text(), file=stream, flush=True)
        time.sleep(0.05)
"""


# How a stream is cut into lines


def test_own_lines_never_wait_and_how_many_are_missing_is_said() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader:
        output = Output(writing)
        for number in range(10_000):
            output.say(b"%d " % number + b"z" * 100 + b"\n")
        assert not output.is_clear
        cleared: list[bool] = []
        output.when_clear(lambda: cleared.append(True))
        os.set_blocking(reading, False)
        taken = b""
        while not output.flush():
            taken += reader.read()
        taken += reader.read()
    os.close(writing)
    *lines, last = taken.decode().splitlines()
    assert cleared == [True]
    assert [int(line.split()[0]) for line in lines] == list(range(len(lines)))
    assert last == f"dropped: {10_000 - len(lines)} lines"


# From a worker to whoever reads


@contextmanager
def slowly_read(
    *arguments: str, environment: dict[str, str], home: Path
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """`steer run ARGUMENTS`, and a pipe with what it writes to standard error."""
    with subprocess.Popen(
        (STEER, "run", "--name", "test", *arguments),
        env=environment,
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            assert process.stderr is not None
            yield process, process.stderr
        finally:
            for pid in session(process.pid):
                os.kill(pid, signal.SIGKILL)


def is_full(fd: int) -> bool:
    """Whether a pipe has so much in it that nothing of PIPE_BUF goes in any more."""
    return available(fd) >= 65536 - 2 * 4096


def available(fd: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


COUNT = 4_000


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("is_alone", [False, True])
def test_all_lines_arrive_whole_whoever_passes_them_on(
    netns: object, environment: dict[str, str], home: Path, form: str, is_alone: bool
) -> None:
    """Through a pipe that nobody reads until all workers wait; and also by the guard alone, once
    the controller has been killed."""
    (home / "app.py").write_text(WRITES.replace("COUNT", str(COUNT)))
    arguments = ("-w", "2", "--log-format", form, "--adopt-timeout", "60", "app:serve")
    with slowly_read(*arguments, environment=environment, home=home) as (process, stderr):
        eventually(lambda: is_full(stderr.fileno()))
        if is_alone:
            process.kill()
            process.wait()
        found: dict[int, list[int]] = {0: [], 1: []}
        torn, pids = [], set()
        for raw in stderr:
            line = raw.decode().rstrip("\n")
            if form == "json":
                fields = json.loads(line)
                line = fields["message"]
            one = re.fullmatch(r"<(\d):(\d+):x*>", line)
            if one:
                slot = int(one[1])
                found[slot].append(int(one[2]))
                if form == "json":
                    assert (fields["stream"], fields["slot"]) == ("worker", slot)
                    pids.add(fields["pid"])
            elif "<" in line or ">" in line:
                torn.append(line)
            if all(COUNT - 1 in numbers[-1:] for numbers in found.values()):
                break
        assert len(pids) == (2 if form == "json" else 0)
        # What the controller had read and not passed on died with it.
        assert len(torn) <= (2 if is_alone else 0), torn
        for slot in found:
            numbers = found[slot]
            assert numbers == sorted(set(numbers))
            if not is_alone:
                assert numbers == list(range(COUNT))


def test_both_outputs_follow_the_log(
    netns: object, environment: dict[str, str], home: Path
) -> None:
    """Both outputs to one file, as it is with `steer run > log 2>&1`."""
    (home / "say").write_text("before")
    (home / "app.py").write_text(SAYS)
    log = home / "log"
    with log.open("wb") as both:
        process = subprocess.Popen(
            (STEER, "run", "--name", "test", "-w", "1", "app:serve"),
            env=environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=both,
            stderr=both,
            start_new_session=True,
        )
    try:
        eventually(lambda: {"out 0 says before", "err 0 says before"} <= set(lines_of(log)))
        log.rename(home / "log.1")
        process.send_signal(signal.SIGUSR1)
        eventually(log.exists)
        (home / "say").write_text("after")
        eventually(lambda: {"out 0 says after", "err 0 says after"} <= set(lines_of(log)))
        assert not [line for line in lines_of(home / "log.1") if "after" in line]
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        assert lines_of(log)[-1].endswith("[INFO] ended")
    finally:
        for pid in session(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def test_both_outputs_follow_into_files_of_their_own(service: StartService, home: Path) -> None:
    """That of workers, which they write to themselves, with those that a reload starts."""
    (home / "say").write_text("before")
    (home / "app.py").write_text(SAYS)
    running = service("-w", "1", "app:serve")
    out, err = (running.records / name for name in ("stdout", "stderr"))
    eventually(lambda: "out 0 says before" in running.output)
    for file in (out, err):
        file.rename(f"{file}.1")
    running.send_signal(signal.SIGUSR1)
    eventually(lambda: err.exists() and "goes to" in running.log)
    assert out.exists()
    assert running.ask("reload", timeout_s=None)["ok"]
    (home / "say").write_text("after")
    eventually(lambda: "out 1 says after" in running.output and "err 1 says after" in running.log)
    assert "after" not in err.with_suffix(".1").read_text()


def lines_of(log: Path) -> list[str]:
    return log.read_text().splitlines()


def test_last_words_without_an_end(service: StartService, home: Path) -> None:
    (home / "app.py").write_text(WRITES.replace("COUNT", "3"))
    (home / "crash").touch()
    running = service("-w", "3", "app:serve", ready=False)
    eventually(lambda: len(re.findall(r"^the last word\n", running.log, re.MULTILINE)) >= 2)
    assert not re.search(r"word[^\n]", running.log)
    running.wait_ready()
