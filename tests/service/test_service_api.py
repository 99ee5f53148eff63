"""Services that are run from Python: a script that calls `steer.run`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from steer.api import service
from steer.linux import processes
from testkit.clients import http_get
from testkit.namespaces import Netns
from testkit.processes import DEADLINE_S, eventually
from testkit.programs import source
from testkit.service import clean_environment

SERVE = source("shop")
ASGI = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        length = [(b"content-length", b"16")]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": b'{"served": true}'})
"""


@contextmanager
def script(home: Path, text: str) -> Iterator[subprocess.Popen[str]]:
    """Run a Python script there; it is ended, if it has not."""
    (home / "main.py").write_text(textwrap.dedent(text))
    with subprocess.Popen(
        [sys.executable, "main.py"],
        cwd=home,
        env=clean_environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def answered() -> dict[str, Any]:
    try:
        return http_get("127.0.0.1", 8000)[1]
    except OSError:
        return {}


def test_an_app_is_run_until_it_is_told_to_end(netns: Netns, home: Path) -> None:
    (home / "shop.py").write_text(SERVE)
    text = """
        import ctypes, gc, os, resource, signal, steer
        FILES = resource.RLIMIT_NOFILE
        def process():
            subreaper = ctypes.c_int()
            ctypes.CDLL(None).prctl(37, ctypes.byref(subreaper), 0, 0, 0)
            shown = [open(f"/proc/self/{name}", "rb").read() for name in ("cmdline", "comm")]
            return subreaper.value, shown
        def state():
            handler = signal.getsignal(signal.SIGTERM)
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            collector = gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()
            open_files = len(os.listdir("/proc/self/fd"))
            return handler, mask, collector, resource.getrlimit(FILES), open_files, process()
        resource.setrlimit(FILES, (64, resource.getrlimit(FILES)[1]))
        before = state()
        steer.run("shop:serve", bind="127.0.0.1:8000", workers=2, policy="round-robin")
        after = state()
        print("ended", before == after or (before, after))
    """
    with script(home, text) as process:
        eventually(lambda: len({answered().get("slot") for _ in range(4)} - {None}), 2)
        assert {answered()["slot"] for _ in range(4)} == {0, 1}
        assert answered()["module"] == "shop"
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (0, "ended True\n"), errors
    assert "Traceback" not in errors


def test_a_function_of_the_script_is_run(netns: Netns, home: Path) -> None:
    call = 'steer.run(serve, bind=("127.0.0.1:8000",), workers=1, name="shop")'
    text = f"{SERVE}\nimport steer\nif __name__ == '__main__':\n    {call}\n"
    with script(home, text) as process:
        assert eventually(answered) == {"slot": 0, "module": "__main__"}
        with_directory = {"XDG_RUNTIME_DIR": str(home / "run"), **clean_environment(home)}
        done = subprocess.run(
            [str(Path(sys.executable).parent / "steer"), "reload", "shop"],
            env=with_directory,
            capture_output=True,
            text=True,
        )
        assert "reloaded shop: generation 2" in done.stdout, done.stderr
        eventually(answered)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0


def children_named(pid: int, title: str) -> list[int]:
    children = processes.children(pid)
    return [each for each in children if " ".join(processes.arguments(each)).startswith(title)]


STARTED = """
import os, signal, subprocess, sys, steer
group = subprocess.Popen([*CHILD, "7"], stdin=subprocess.PIPE)
session = subprocess.Popen([*CHILD, "8"], stdin=subprocess.PIPE, start_new_session=True)
def late(number, frame):
    global during
    for each in (group, session):
        each.stdin.close()
    during = subprocess.Popen([*CHILD, "9"], stdin=subprocess.DEVNULL)
    print(group.pid, session.pid, during.pid, flush=True)
signal.signal(signal.SIGURG, late)
steer.run("shop:serve", bind="127.0.0.1:8000", workers=1)
print([os.waitstatus_to_exitcode(os.waitpid(each.pid, 0)[1]) for each in (group, session, during)])
"""


def test_children_of_the_program_are_left_to_it(netns: Netns, home: Path) -> None:
    """It gets their exit codes, also after steer has looked for ended children."""
    (home / "shop.py").write_text(SERVE)
    child = [sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit(int(sys.argv[1]))"]
    with script(home, f"CHILD = {child}\n{STARTED}") as process:
        eventually(answered)
        process.send_signal(signal.SIGURG)
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        eventually(lambda: not any(map(processes.is_alive, pids)))
        left = processes.children(process.pid)
        assert set(pids) <= set(left)
        (worker,) = children_named(process.pid, "steer: worker")
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: worker not in processes.children(process.pid))
        eventually(answered)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=DEADLINE_S)
    assert out == "[7, 8, 9]\n", errors


@pytest.mark.parametrize("way", ["command", "connection"])
def test_a_stop_is_over_before_the_program_is(netns: Netns, home: Path, way: str) -> None:
    """The program waits for the one that stops it, which would be for ever otherwise."""
    (home / "shop.py").write_text(SERVE)
    stoppers = {
        "command": ["-m", "steer", "stop", "shop"],
        "connection": ["-c", "import steer; steer.connect('shop').stop()"],
    }
    text = f"""
        import os, signal, subprocess, sys, steer
        def stop(number, frame):
            global stopper
            stopper = subprocess.Popen([sys.executable, *{stoppers[way]}])
        signal.signal(signal.SIGURG, stop)
        steer.run("shop:serve", bind="127.0.0.1:8000", workers=1)
        print(stopper.wait(), os.path.exists("run/steer/shop.sock"))
    """
    with script(home, text) as process:
        eventually(answered)
        process.send_signal(signal.SIGURG)
        out, errors = process.communicate(timeout=DEADLINE_S)
    assert out.splitlines()[-1] == "0 False", errors


def test_a_start_that_fails_raises(netns: Netns, home: Path) -> None:
    text = """
        import steer
        try:
            steer.run("nowhere:serve", bind="127.0.0.1:8000")
        except steer.AppLoadError as error:
            print(error)
    """
    with script(home, text) as process:
        out, errors = process.communicate(timeout=DEADLINE_S)
    assert "load nowhere:serve: ModuleNotFoundError" in out, errors
    assert process.returncode == 0


def test_not_in_another_thread(netns: Netns, home: Path) -> None:
    text = """
        import threading, steer
        def run():
            try:
                steer.run(demo=True)
            except steer.ControlError as error:
                print(error)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    """
    with script(home, text) as process:
        out, errors = process.communicate(timeout=DEADLINE_S)
    assert out.startswith("run a service: this is not the main thread; "), errors


def test_it_is_imported_when_it_is_used() -> None:
    code = "import sys, steer; print('steer.api.service' in sys.modules); steer.Config"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"
    assert os.path.basename(service.__file__) == "service.py"


@pytest.mark.needs("uvicorn")
@pytest.mark.parametrize("app", ['"shop:app"', "shop.app", "app"])
def test_a_server_serves_an_app(netns: Netns, home: Path, app: str) -> None:
    """By its name, as a function of a module, or as an object of the script."""
    (home / "shop.py").write_text(ASGI)
    text = f"""
        import functools, shop, steer
        app = functools.partial(shop.app)
        steer.run({app}, server="uvicorn", bind="127.0.0.1:8000", workers=1)
        print("ended")
    """
    with script(home, text) as process:
        eventually(answered, {"served": True})
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out.splitlines()[-1]) == (0, "ended"), errors
