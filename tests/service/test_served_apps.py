"""Applications of frameworks from PyPI, served by steer itself: `--server`."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from testkit.fixtures import StartService
from testkit.harness import PORT
from testkit.processes import DEADLINE_S, eventually
from testkit.programs import source
from testkit.service import Service

ADDRESS = ("127.0.0.1", PORT)
APPS = ("served_fastapi", "served_starlette", "served_django", "served_flask")


@pytest.fixture(autouse=True)
def apps(home: Path) -> None:
    for name in APPS:
        (home / f"{name}.py").write_text(source(name))


PRELOADED = pytest.mark.parametrize("more", [(), ("--preload",)], ids=["each imports", "preloaded"])


def needs(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.needs("bpf", *names)


def events(home: Path) -> list[str]:
    """What lifespans did."""
    file = home / "events"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


def get(target: str = "/", fields: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON of an answer, in a connection of its own."""
    connection = http.client.HTTPConnection(*ADDRESS, timeout=DEADLINE_S)
    try:
        connection.request("GET", target, headers=fields or {})
        answer = connection.getresponse()
        assert answer.status == 200, answer.status
        found: dict[str, Any] = json.loads(answer.read())
        return found
    finally:
        connection.close()


@PRELOADED
@pytest.mark.parametrize(
    "server, app",
    [
        pytest.param(server, f"served_{app}", marks=needs(framework, server))
        for server, framework, app in (
            ("uvicorn", "fastapi", "fastapi:app"),
            ("hypercorn", "fastapi", "fastapi:app"),
            ("uvicorn", "starlette", "starlette:app"),
            ("hypercorn", "starlette", "starlette:app"),
            ("uvicorn", "django", "django:asgi"),
            ("hypercorn", "django", "django:asgi"),
            ("hypercorn", "django", "django:wsgi"),
            ("waitress", "django", "django:wsgi"),
            ("waitress", "flask", "flask:create_app()"),
            ("hypercorn", "flask", "flask:create_app()"),
        )
    ],
)
def test_app_is_served_by_each_worker_and_ends(
    service: StartService, home: Path, server: str, app: str, more: Sequence[str]
) -> None:
    running = service("-w", "2", "--policy", "round-robin", "--server", server, app, *more)
    answers = [get() for _ in range(4)]
    pids = {each["slot"]: each["pid"] for each in running.workers()}
    assert {each["slot"]: each["pid"] for each in answers} == pids
    assert running.stop() == 0
    with_lifespan = "fastapi" in app or "starlette" in app
    assert events(home) == (["started"] * 2 + ["ended"] * 2 if with_lifespan else [])
    assert "Traceback" not in running.log


@needs("fastapi", "flask", "uvicorn", "waitress")
@pytest.mark.parametrize(
    "app, said",
    [
        ("served_fastapi:app", "served_fastapi:app is ASGI 3: uvicorn serves it"),
        ("served_flask:create_app()", "served_flask:create_app() is WSGI: waitress serves it"),
    ],
)
def test_auto_says_which_server_it_chose(service: StartService, app: str, said: str) -> None:
    running = service("-w", "3", "--server", "auto", app)
    assert running.log.count(f"steer: {said}") == 1
    assert get()["slot"] in (0, 1, 2)


def test_auto_leaves_a_callable_to_serve_by_itself(service: StartService, home: Path) -> None:
    (home / "own.py").write_text("from steer.child.demo import serve\n")
    running = service("-w", "2", "--server", "auto", "own:serve")
    assert "own:serve is a function of the worker: it serves by itself" in running.log
    assert get()["slot"] in (0, 1)


@contextmanager
def requests() -> Iterator[list[str]]:
    """Ask again and again, each time in a new connection; yields what failed."""
    failed: list[str] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            try:
                get()
            except (OSError, ValueError, http.client.HTTPException, AssertionError) as error:
                failed.append(repr(error))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for each in threads:
        each.start()
    try:
        yield failed
    finally:
        is_over.set()
        for each in threads:
            each.join()


@contextmanager
def open_stream() -> Iterator[socket.socket]:
    """A connection whose answer has begun, and ends when there is a file `go`."""
    with socket.create_connection(ADDRESS, DEADLINE_S) as sock:
        sock.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b""
        while b"first" not in received:
            received += sock.recv(1000)
        yield sock


def rest_of(sock: socket.socket) -> bytes:
    with sock.makefile("rb") as stream:
        return stream.read()


@pytest.mark.parametrize(
    "server, code, options",
    [
        # uvicorn closes websockets when it ends (1012: service restart). hypercorn lets them go on,
        # and ends the application at its time limit (1011: internal error).
        pytest.param("uvicorn", 1012, (), marks=needs("uvicorn")),
        pytest.param("hypercorn", 1011, ("graceful_timeout=3",), marks=needs("hypercorn")),
    ],
)
@PRELOADED
@needs("fastapi", "migrate", "websockets")
def test_reload_fails_no_request_and_ends_streams_and_websockets_in_order(
    service: StartService,
    home: Path,
    server: str,
    code: int,
    options: tuple[str, ...],
    more: Sequence[str],
) -> None:
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    given = [word for each in options for word in ("--server-option", each)]
    running = service("-w", "2", "--server", server, *given, "served_fastapi:app", *more)
    with (
        connect(f"ws://127.0.0.1:{PORT}/ws", open_timeout=DEADLINE_S) as websocket,
        requests() as failed,
        open_stream() as stream,
    ):
        websocket.send("hello")
        assert websocket.recv(DEADLINE_S).split()[1] == "hello"
        reload(running)
        (home / "go").touch()
        assert rest_of(stream).endswith(b"last\n\r\n0\r\n\r\n")
        with pytest.raises(ConnectionClosed):
            websocket.recv(DEADLINE_S)
        assert websocket.close_code == code
        running.wait_ready(2)
    assert failed == []
    eventually(lambda: events(home), ["started"] * 4 + ["ended"] * 2)


def reload(running: Service) -> None:
    """Until all workers are new; older ones may still finish."""
    before = ready_pids(running)
    running.send_signal(signal.SIGHUP)
    eventually(lambda: len(ready_pids(running) - before) == len(ready_pids(running)) == 2)


def ready_pids(running: Service) -> set[int]:
    return {each["pid"] for each in running.workers() if each["state"] == "ready"}


@PRELOADED
@needs("flask", "migrate", "waitress")
def test_reload_fails_no_request_of_a_wsgi_app(
    service: StartService, home: Path, more: Sequence[str]
) -> None:
    running = service("-w", "2", "--server", "waitress", "served_flask:create_app()", *more)
    with requests() as failed, open_stream() as stream:
        reload(running)
        (home / "go").touch()
        assert b"last" in rest_of(stream)
        eventually(lambda: len(running.workers()), 2)
    assert failed == []


@needs("flask", "waitress")
def test_answer_is_sent_in_whole_to_a_slow_client_of_a_worker_that_ends(
    service: StartService,
) -> None:
    running = service("-w", "1", "--server", "waitress", "served_flask:create_app()")
    with socket.socket() as sock:
        sock.settimeout(DEADLINE_S)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(ADDRESS)
        sock.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        received = sock.recv(1000)
        running.send_signal(signal.SIGTERM)
        eventually(lambda: "stopping gracefully" in running.log)
        eventually(lambda: not accepts(ADDRESS))
        head, _, body = (received + rest_of(sock)).partition(b"\r\n\r\n")
    assert b" 200 " in head
    assert len(body) == 20_000_000
    assert running.wait() == 0


def accepts(address: tuple[str, int]) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(address) == 0


# Options


@needs("fastapi", "uvicorn")
def test_access_log_has_the_slot(service: StartService) -> None:
    running = service("-w", "2", "--server", "uvicorn", "served_fastapi:app")
    slot = get()["slot"]
    eventually(lambda: f"worker {slot} 127.0.0.1:" in running.output)
    assert '"GET / HTTP/1.1" 200' in running.output


@needs("fastapi", "hypercorn")
def test_access_log_of_hypercorn_has_the_slot(service: StartService) -> None:
    options = ("--server", "hypercorn", "--server-option", "accesslog=-")
    running = service("-w", "2", *options, "served_fastapi:app")
    slot = get()["slot"]
    eventually(lambda: f"worker {slot} 127.0.0.1:" in running.output)


@needs("fastapi", "uvicorn")
def test_proxy_headers_are_read_as_the_server_reads_them(service: StartService, home: Path) -> None:
    forwarded = {"X-Forwarded-For": "192.0.2.7", "X-Forwarded-Proto": "https"}
    file = home / "steer.toml"
    text = '[service]\napp = "served_fastapi:app"\nserver = "uvicorn"\nworkers = 1\n'
    file.write_text(text)
    running = service("--config", str(file))
    found = get("/", forwarded)
    assert (found["client"], found["scheme"]) == ("192.0.2.7", "https")
    file.write_text(text + "[service.server_options]\nproxy_headers = false\n")
    running.ask("reload")
    found = get("/", forwarded)
    assert (found["client"], found["scheme"]) == ("127.0.0.1", "http")


@pytest.fixture
def certificate(home: Path) -> tuple[Path, Path]:
    """A certificate and its key, for 127.0.0.1."""
    paths = home / "cert.pem", home / "key.pem"
    subject = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
    new = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    out = ("-nodes", "-days", "2", "-out", str(paths[0]), "-keyout", str(paths[1]))
    subprocess.run([*new, *out, *subject], check=True, capture_output=True)
    return paths


@needs("fastapi", "openssl", "uvicorn")
def test_uvicorn_speaks_tls(service: StartService, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    options = (f"ssl_certfile={cert}", f"ssl_keyfile={key}")
    given = [word for each in options for word in ("--server-option", each)]
    service("-w", "2", "--server", "uvicorn", *given, "served_fastapi:app")
    context = ssl.create_default_context(cafile=str(cert))
    connection = http.client.HTTPSConnection(*ADDRESS, timeout=DEADLINE_S, context=context)
    connection.request("GET", "/")
    assert json.loads(connection.getresponse().read())["scheme"] == "https"
    connection.close()


@needs("curl", "fastapi", "hypercorn", "openssl")
def test_hypercorn_speaks_http2(service: StartService, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    options = ("--server-option", f"certfile={cert}", "--server-option", f"keyfile={key}")
    service("-w", "2", "--server", "hypercorn", *options, "served_fastapi:app")
    url = f"https://127.0.0.1:{PORT}/"
    asked = ["curl", "-s", "--http2", "--cacert", str(cert), url]
    found = json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)
    assert (found["http"], found["scheme"]) == ("2", "https")


@pytest.mark.parametrize(
    "server, app",
    [
        pytest.param("uvicorn", "served_starlette:app", marks=needs("starlette", "uvicorn")),
        pytest.param("hypercorn", "served_starlette:app", marks=needs("starlette", "hypercorn")),
        pytest.param("waitress", "served_flask:create_app()", marks=needs("flask", "waitress")),
    ],
)
def test_watchdog_is_served(service: StartService, server: str, app: str) -> None:
    running = service("-w", "1", "--watchdog", "0.3", "--server", server, app)
    (worker,) = running.workers()
    ended_s = time.monotonic() + 1.5
    while time.monotonic() < ended_s:
        assert get()["pid"] == worker["pid"]
    assert "hung" not in running.log


@pytest.mark.parametrize(
    "server, option, app",
    [
        pytest.param(*each, marks=needs(each[0], framework))
        for *each, framework in (
            ("uvicorn", "limit_max_requests", "served_starlette:app", "starlette"),
            ("hypercorn", "max_requests", "served_starlette:app", "starlette"),
            ("hypercorn", "max_requests", "served_flask:create_app()", "flask"),
        )
    ],
)
@needs("migrate")
def test_worker_is_replaced_after_its_requests_and_another_is_ready_before(
    service: StartService, server: str, option: str, app: str
) -> None:
    options = ("--server-option", f"{option}=20")
    running = service("-w", "1", "--policy", "round-robin", "--server", server, *options, app)
    before = ready_pids(running)
    for _ in range(19):
        assert get()["pid"] in before
    assert ready_pids(running) == before
    with requests() as failed:
        eventually(lambda: running.status()["recycled"].get("asked"))
    assert failed == []
    assert before.isdisjoint(ready_pids(running))
    assert "worker 0: it asks to be replaced; replacing it" in running.log
    assert all(each["restarts"] == 0 for each in running.workers())


# What goes wrong


@pytest.mark.parametrize(
    "arguments, said",
    [
        pytest.param(
            ("uvicorn", "--server-option", "timeout_keepalive=3", "served_starlette:app"),
            r"server option timeout_keepalive: uvicorn [\d.]+ has no such option; "
            "did you mean 'timeout_keep_alive'\\?",
            marks=needs("starlette", "uvicorn"),
        ),
        pytest.param(
            ("uvicorn", "--server-option", "log_level=loud", "served_starlette:app"),
            "uvicorn with log_level=loud: KeyError: 'loud'",
            marks=needs("starlette", "uvicorn"),
        ),
        pytest.param(
            ("hypercorn", "--server-option", "max_request=3", "served_starlette:app"),
            r"max_request: hypercorn [\d.]+ has no such option; did you mean 'max_requests'\?",
            marks=needs("starlette", "hypercorn"),
        ),
        pytest.param(
            ("hypercorn", "--server-option", "workers=3", "served_starlette:app"),
            "server option workers: steer sets it; use --workers",
            marks=needs("starlette", "hypercorn"),
        ),
        pytest.param(
            ("hypercorn", "--server-option", "certfile=/no", "served_starlette:app"),
            "server option certfile: without keyfile there would be no TLS; give it, too",
            marks=needs("starlette", "hypercorn"),
        ),
        pytest.param(
            ("hypercorn", "--server-option", "ca_certs=/no", "served_starlette:app"),
            "ca_certs: without certfile and keyfile there would be no TLS; give both, too",
            marks=needs("starlette", "hypercorn"),
        ),
        pytest.param(
            ("uvicorn", "--server-option", "ssl_keyfile=/no", "served_starlette:app"),
            "server option ssl_keyfile: without ssl_certfile there would be no TLS; give it, too",
            marks=needs("starlette", "uvicorn"),
        ),
        pytest.param(
            ("uvicorn", "--server-option", "ssl_ca_certs=/no", "served_starlette:app"),
            "server option ssl_ca_certs: without ssl_certfile there would be no TLS",
            marks=needs("starlette", "uvicorn"),
        ),
        pytest.param(
            ("waitress", "--server-option", "thread=3", "served_flask:create_app()"),
            r"thread: waitress [\d.]+ has no such option; did you mean 'threads'\?",
            marks=needs("flask", "waitress"),
        ),
        pytest.param(
            ("waitress", "--server-option", "threads=x", "served_flask:create_app()"),
            "waitress with threads=x: ValueError: invalid literal",
            marks=needs("flask", "waitress"),
        ),
        pytest.param(
            ("waitress", "served_starlette:app"),
            r"waitress serves WSGI; it looks like an ASGI 3 application .*; use --server uvicorn",
            marks=needs("starlette", "waitress"),
        ),
        pytest.param(
            ("uvicorn", "served_flask:create_app"),
            r"it takes no argument.*steer run --server auto 'served_flask:create_app\(\)'",
            marks=needs("flask", "uvicorn"),
        ),
        pytest.param(
            ("uvicorn", "served_starlette:no_app"),
            "module 'served_starlette' has no attribute 'no_app'",
            marks=needs("starlette", "uvicorn"),
        ),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_cure(
    service: StartService, arguments: tuple[str, ...], said: str
) -> None:
    running = service("-w", "2", "--server", *arguments, ready=False)
    assert running.wait() == 4
    (line,) = [line for line in running.log.splitlines() if line.startswith("steer: ")]
    assert re.search(said, line), line
    assert "Traceback" not in running.log
    assert f"{Path('steer') / 'child'}" not in running.log


def test_server_that_is_not_installed_is_named_with_the_command_that_installs_it(
    service: StartService, home: Path, environment: dict[str, str]
) -> None:
    (home / "sitecustomize.py").write_text(
        "import sys\nsys.modules['uvicorn'] = sys.modules['hypercorn'] = None\n"
    )
    (home / "own.py").write_text("async def app(scope, receive, send): ...\n")
    environment["PYTHONPATH"] = str(home)
    for server, said in (
        ("uvicorn", "uvicorn is not installed"),
        ("auto", "and uvicorn or hypercorn is not installed"),
    ):
        running = service("--server", server, "own:app", ready=False)
        assert running.wait() == 4
        assert f"{said}; pip install 'steer-reuseport[uvicorn]'" in running.log


FAILS = """
async def app(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})
"""


@pytest.mark.parametrize(
    "server", [pytest.param(name, marks=needs(name)) for name in ("uvicorn", "hypercorn")]
)
def test_lifespan_that_fails(service: StartService, home: Path, server: str) -> None:
    (home / "own.py").write_text(FAILS)
    running = service("-w", "2", "--server", server, "own:app", ready=False)
    assert running.wait() == 3
    assert "own:app: Lifespan failure in startup" in running.log
    assert "no database" in running.log
    assert "Traceback" not in running.log


@needs("starlette", "uvicorn")
def test_reload_to_an_app_that_does_not_load_leaves_the_old_one(
    service: StartService, home: Path
) -> None:
    running = service("-w", "2", "--server", "uvicorn", "served_starlette:app")
    before = ready_pids(running)
    (home / "served_starlette.py").write_text("import no_such_module\n")
    refused = running.steer("reload", "test")
    assert refused.returncode == 4
    assert "No module named 'no_such_module'" in refused.stderr
    assert ready_pids(running) == before
    assert get()["pid"] in before


IMPORTED = ("uvicorn", "starlette.applications", "steer.child.servers")
HOOK = f"""
import os, sys
NAMES = {IMPORTED}

def note(event, arguments):
    if event == "import" and arguments[0] in NAMES:
        with open("imports", "a") as file:
            file.write(arguments[0] + f" {{os.getpid()}}\\n")

sys.addaudithook(note)
"""


@needs("starlette", "uvicorn")
def test_only_workers_import_the_server_and_the_app(
    service: StartService, home: Path, environment: dict[str, str]
) -> None:
    (home / "sitecustomize.py").write_text(HOOK)
    environment["PYTHONPATH"] = str(home)
    running = service("-w", "2", "--server", "uvicorn", "served_starlette:app")
    running.ask("reload")
    eventually(lambda: len(running.workers()), 2)
    lines = (home / "imports").read_text().split()
    assert set(IMPORTED) <= set(lines)
    assert str(running.pid) not in lines
