"""The command line: what it prints, and what it ends with."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

import steer as package
from steer.cli.arguments import TakesCommand, given_command, service_options
from steer.cli.options import Source
from steer.config import service as config
from steer.control.server import Progress
from steer.errors import ConfigError, WorkersFailed
from steer.policy.builtin import POLICIES
from testkit.clients import http_get
from testkit.confine import NOBODY
from testkit.fake_service import fake_service
from testkit.fixtures import RunSteer, StartService
from testkit.processes import DEADLINE_S, eventually
from testkit.service import STEER, Service, run_steer
from testkit.terminal import Terminal

OPTIONS = (
    *("-b", "127.0.0.1:8080", "-b", "udp://[::1]:53", "-w", "3", "--policy", "hash"),
    *("--weights", "3,1", "--backend", "cbpf", "--strict", "--name", "shop", "-e", "A=1"),
    *("-e", 'B="\\ü', "--chdir", "/", "--backlog", "7", "--graceful-timeout", "1.5"),
    *("--ready-timeout", "9", "--pid", "x.pid", "--log-level", "debug", "--log-format", "json"),
    *("--control-socket", "x.sock", "--user", "root", "--group", "0"),
    *("--hang-timeout", "0.5", "--hang", "skip", "--watchdog", "4", "--adopt-timeout", "0"),
)


@pytest.fixture
def cli(home: Path, environment: dict[str, str]) -> RunSteer:
    """Commands that start nothing, and so need no namespace."""

    def run(*arguments: str, user: int | None = None) -> subprocess.CompletedProcess[str]:
        return run_steer(*arguments, environment=environment, cwd=home, user=user)

    return run


@pytest.fixture
def alone(home: Path, environment: dict[str, str]) -> RunSteer:
    """As if nobody else's service were on the machine: with a /run of its own."""

    def run(*arguments: str, user: int | None = None) -> subprocess.CompletedProcess[str]:
        private = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh")
        return subprocess.run(
            [*private, STEER, *arguments],
            env=environment,
            cwd=home,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

    return run


def test_version_and_help(cli: RunSteer) -> None:
    assert cli("--version").stdout == f"steer, version {package.__version__}\n"
    commands = (
        *("check", "doctor", "drain", "policies", "reload", "restart", "run", "scale", "status"),
        *("stop", "undrain"),
    )
    said = cli("-h").stdout
    for command in commands:
        assert re.search(rf"^  {command} ", said, re.M)
        done = cli(command, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith(f"Usage: steer {command}")


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("run", "--no-such-option"),
        ("run", "a:b", "c:d"),
        ("run", "--"),
        ("run", "--policy", "hash", "--"),
        ("status", "a", "b"),
        ("reload", "a", "b"),
        ("scale",),
        ("scale", "web"),
        ("scale", "8", "web"),
        ("scale", "web", "8", "9"),
        ("scale", "web", "1.5"),
        ("scale", "+0"),
        ("scale", "--", "-1025"),
        ("scale", "--no-such-option", "1"),
        ("scale", "1025"),
        ("scale", "9" * 5000),
        ("drain", "web", "4096"),
        ("undrain", ""),
        ("restart", "web", "x"),
    ],
)
def test_wrong_usage_is_exit_2(cli: RunSteer, arguments: tuple[str, ...]) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: ")
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments, right",
    [
        (("scale", "+1", "web"), "scale web +1"),
        (("scale", "-1", "web"), "scale web -1"),
        (("scale", "8", "web"), "scale web 8"),
        (("drain", "3", "web"), "drain web 3"),
    ],
)
def test_number_before_the_name(cli: RunSteer, arguments: tuple[str, ...], right: str) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert done.stderr.endswith(f"\nError: The name comes first: steer {right}\n")


@pytest.mark.parametrize(
    "arguments, error",
    [
        (("--policy", "x"), "--policy: policy = 'x': unknown policy; allowed: auto, cpu, "),
        (("--backend", "x"), "--backend: backend = 'x': "),
        (("-w", "0"), "--workers: workers = '0': too small; allowed: 1 to 1024, or auto"),
        (("-w", "10000"), "--workers: workers = '10000': too large; allowed: 1 to 1024"),
        (("-w", "few"), "--workers: workers = 'few': "),
        (("-b", "8080"), "--bind: bind = '8080': read address '8080': malformed; did you mean"),
        (("-b", ":0"), "--bind: bind = ':0': read address ':0': port 0 is not in 1..65535"),
        (("-b", "http://x:1"), "--bind: bind = 'http://x:1': read address "),
        (("-b", "[::1:80"), "--bind: bind = '[::1:80': read address '[::1:80': malformed"),
        (("-b", "h.example:80"), "--bind: bind = 'h.example:80': read address 'h.example:80': "),
        (("-b", ":80", "-b", "0.0.0.0:80"), "--bind: bind = ':80,0.0.0.0:80': tcp 0.0.0.0:80 is"),
        (("--name", "a/b"), "--name: name = 'a/b': malformed; allowed: letters, digits"),
        (("a", ), "argument 'a': malformed; did you mean 'a:NAME', a "),
        (("a:b", "--", "c"), "argument 'a:b' and command after --: 'c': both are given"),
        (("-c", "no.toml"), "read no.toml: no such file"),
        (("-c", "."), "read .: Is a directory"),
        (("--hang-timeout", "-1"), "--hang-timeout: hang_timeout = '-1': too small; allowed: "),
        (("--hang", "x"), "--hang: hang = 'x': unknown; allowed: replace, skip"),
        (("--watchdog", "0"), "--watchdog: watchdog = '0': too small; allowed: seconds, from"),
        (("--adopt-timeout", "x"), "--adopt-timeout: adopt_timeout = 'x': not a number; "),
        (("--user", "no-such-user"), "run workers as user 'no-such-user': no such user"),
        (("--group", "no-such-group"), "run workers as group 'no-such-group': no such group"),
    ],
)  # fmt: skip
def test_bad_value_is_exit_1(cli: RunSteer, arguments: tuple[str, ...], error: str) -> None:
    done = cli("run", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"steer: {error}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


# Configuration


def test_printed_configuration_gives_the_same_one(cli: RunSteer, home: Path) -> None:
    for what in ((), ("app:serve",), ("--", "sh", "-c", "exec 'a b' {fd}", "--", "-w", "9")):
        printed = cli("run", "--print-config", *OPTIONS, *what).stdout
        assert printed.startswith("[service]\n")
        (home / "x.toml").write_text(printed)
        assert cli("run", "-c", "x.toml", "--print-config").stdout == printed


def test_check_config_says_nothing_where_all_is_well(cli: RunSteer, home: Path) -> None:
    done = cli("run", "--check-config", *OPTIONS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (home / "steer.toml").write_text("[service]\nworkrs = 2\n")
    done = cli("run", "--check-config")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "steer: steer.toml: workrs = 2: unknown key; did you mean 'workers'? allowed: "
    )


def test_command_line_over_environment_over_file(
    cli: RunSteer, home: Path, environment: dict[str, str]
) -> None:
    def configured(*arguments: str) -> str:
        found = re.search(r"^workers = (.+)", cli("run", "--print-config", *arguments).stdout, re.M)
        assert found
        return found[1]

    assert configured() == '"auto"'
    (home / "steer.toml").write_text("[service]\nworkers = 2\n")
    (home / "other.toml").write_text("[service]\nworkers = 3\n")
    assert configured() == "2"
    assert configured("-c", "other.toml") == "3"
    environment["STEER_CONFIG"] = "other.toml"
    assert configured() == "3"
    environment["WEB_CONCURRENCY"] = "4"
    assert configured() == "4"
    environment["STEER_WORKERS"] = "5"
    assert configured() == "5"
    assert configured("-w", "6") == "6"


# What is run


def test_what_has_nothing_to_run_is_refused(
    cli: RunSteer, home: Path, environment: dict[str, str]
) -> None:
    del environment["STEER_DEMO"]
    (home / "x.toml").write_text("[service]\nworkers = 2\n")
    (home / "empty.toml").touch()
    words = "steer: find what to run in {}: neither an app nor a command is given; give one: "
    for command in ("run", "check"):
        for file, options, named in (
            ("", ("--policy", "hash"), "--policy"),
            ("x.toml", (), "x.toml"),
            ("empty.toml", (), "empty.toml"),
            ("empty.toml", ("-w", "2"), "empty.toml, --workers"),
            ("/dev/null", (), "/dev/null"),
        ):
            environment["STEER_CONFIG"] = file
            done = cli(command, *options)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.startswith(words.format(named))
            assert done.stderr.count("\n") == 1
    del environment["STEER_CONFIG"]
    for given in ((), ("-c", "x.toml", "--demo"), ("-c", "empty.toml", "--demo")):
        done = cli("run", "--print-config", *given)
        assert "\ndemo = true\n" in done.stdout
    (home / "steer.toml").touch()
    done = cli("run", "--print-config")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(words.format("steer.toml"))
    assert cli("doctor", "-w", "2", "--json").stderr == ""


def test_the_demo_runs_where_nothing_is_given(
    netns: object, home: Path, environment: dict[str, str]
) -> None:
    del environment["STEER_DEMO"]
    with subprocess.Popen([STEER, "run"], env=environment, cwd=home) as process:
        running = Service(process, "demo", home, home, environment)
        try:
            (home / "stderr").touch()
            running.wait_ready()
            assert http_get("127.0.0.1", 8080)[1]["name"] == "demo"
        finally:
            process.terminate()
            assert process.wait(DEADLINE_S) == 0


# The configuration read again


def source(*arguments: str) -> Source:
    """What `run` reads from."""

    @click.command(cls=TakesCommand)
    @service_options
    def run(**options: Any) -> Source:
        return Source(options, given_command())

    found: Source = run.main(list(arguments), standalone_mode=False)
    return found


def test_configuration_is_read_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same command line, environment and file, wherever the process is by now."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("STEER_BACKLOG", "7")
    (home / "x.toml").write_text("[service]\nworkers = 2\nbacklog = 5\n")
    read = source("-c", "x.toml", "--weights", "3,1", "--", "sleep", "-w")
    first = read()
    assert (first.workers, first.backlog, first.weights) == (2, 7, (3, 1))
    assert first.command == ("sleep", "-w")
    assert read() == first

    monkeypatch.chdir(tmp_path)
    (home / "x.toml").write_text("[service]\nworkers = 3\n")
    assert read() == msgspec.structs.replace(first, workers=3)
    (home / "x.toml").write_text("[service]\nworkers = 0\n")
    with pytest.raises(ConfigError, match=r"^x\.toml: workers = 0: too small"):
        read()
    (home / "x.toml").unlink()
    with pytest.raises(ConfigError, match=r"^read x\.toml: no such file$"):
        read()


def test_default_file_may_come_but_not_go(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    read = source()
    assert read() == config.Service(demo=True)
    (home / "steer.toml").touch()
    with pytest.raises(ConfigError, match=r"^find what to run in steer\.toml: neither an app "):
        read()
    (home / "steer.toml").write_text("[service]\nworkers = 2\ndemo = true\n")
    assert read().workers == 2
    (home / "steer.toml").unlink()
    with pytest.raises(ConfigError, match=r"^read steer\.toml: no such file$"):
        read()


def test_directory_that_is_gone_holds_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert source()() == config.Service(demo=True)
    with pytest.raises(ConfigError, match=r"^read x\.toml: no such file$"):
        source("-c", "x.toml")()


# Acts on a running service

Requests = list[Mapping[str, Any]]
ANSWERS = {
    "reload": {"generation": 3, "workers": 4, "took_s": 1.24},
    "scale": {"workers": 1, "took_s": 0.06},
    "drain": {"slot": 2},
    "undrain": {"slot": 2},
    "restart": {"slot": 2, "new_slot": 5, "took_s": 61},
}


@pytest.fixture
def web(home: Path) -> Iterator[Requests]:
    """A service of that name, the only one, to which all succeeds; what it is asked."""
    with answering(home, "web") as asked:
        yield asked


@contextmanager
def answering(home: Path, name: str) -> Iterator[Requests]:
    asked: Requests = []

    async def answer(request: Mapping[str, Any], _tell: Progress) -> Mapping[str, Any]:
        asked.append(request)
        return ANSWERS[request["command"]]

    async def status(_request: Mapping[str, Any], _tell: Progress) -> Mapping[str, Any]:
        return {}

    handlers = {**dict.fromkeys(ANSWERS, answer), "status": status}
    with fake_service(home / "run" / "steer" / f"{name}.sock", **handlers):
        yield asked


acts = pytest.mark.parametrize(
    "arguments, request_, done, words",
    [
        (("reload", "web"), {}, "reloaded", "generation 3, 4 workers, 1.2 s"),
        (("scale", "web", "1"), {"workers": 1}, "scaled", "1 worker, 0.1 s"),
        (("scale", "web", "+2"), {"more": 2}, "scaled", "1 worker, 0.1 s"),
        (("scale", "web", "-1"), {"more": -1}, "scaled", "1 worker, 0.1 s"),
        (("drain", "web", "2"), {"slot": 2}, "drained", "slot 2"),
        (("undrain", "web", "2"), {"slot": 2}, "undrained", "slot 2"),
        (("restart", "web", "2"), {"slot": 2}, "restarted", "slot 5 in place of slot 2, 61.0 s"),
    ],
)


@acts
def test_act_says_what_was_done(
    cli: RunSteer,
    web: Requests,
    arguments: tuple[str, ...],
    request_: dict[str, int],
    done: str,
    words: str,
) -> None:
    said = cli(*arguments)
    assert (said.returncode, said.stdout, said.stderr) == (0, f"{done} web: {words}\n", "")
    said = cli(*arguments, "--json")
    assert (said.returncode, said.stderr) == (0, "")
    assert json.loads(said.stdout) == {done: "web", **ANSWERS[arguments[0]]}
    # Without a terminal no progress is asked for.
    assert web == [{"command": arguments[0], **request_}] * 2


@acts
def test_act_needs_no_name_where_one_runs(
    alone: RunSteer,
    web: Requests,
    arguments: tuple[str, ...],
    request_: dict[str, int],
    done: str,
    words: str,
) -> None:
    command, _, *number = arguments
    assert alone(command, *number).stdout == f"{done} web: {words}\n"
    assert web == [{"command": command, **request_}]


def test_service_may_have_a_number_for_a_name(cli: RunSteer, home: Path) -> None:
    with answering(home, "8") as asked:
        assert cli("drain", "8", "2").stdout == "drained 8: slot 2\n"
    assert asked == [{"command": "drain", "slot": 2}]


def test_act_goes_where_it_is_told_to(cli: RunSteer, home: Path, web: Requests) -> None:
    path = str(home / "run" / "steer" / "web.sock")
    assert cli("scale", "0", "--control-socket", path).stdout == "scaled web: 1 worker, 0.1 s\n"
    assert web == [{"command": "scale", "workers": 0}]


def test_act_on_none_and_on_one_of_several(alone: RunSteer, home: Path, web: Requests) -> None:
    done = alone("scale", "other", "2")
    words = "steer: find service 'other': not running; running: web\n"
    assert (done.returncode, done.stderr) == (1, words)
    with answering(home, "shop") as asked:
        done = alone("reload")
        words = "steer: find the service: several are running: shop, web; name one\n"
        assert (done.returncode, done.stderr) == (1, words)
        assert alone("drain", "shop", "2").returncode == 0
    assert asked == [{"command": "drain", "slot": 2}]
    assert web == []


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_act_that_failed_ends_as_its_error_does(
    cli: RunSteer, home: Path, more: tuple[str, ...]
) -> None:
    async def reload(_request: Mapping[str, Any], _tell: Progress) -> Mapping[str, Any]:
        raise WorkersFailed("reload web", "no worker came up", detail="Traceback\nValueError: x")

    with fake_service(home / "run" / "steer" / "web.sock", reload=reload):
        done = cli("reload", "web", *more)
    assert (done.returncode, done.stdout) == (3, "")
    words = "steer: reload web: no worker came up\n  | Traceback\n  | ValueError: x\n"
    assert done.stderr == words


@dataclass(frozen=True)
class Reloading:
    """A reload that was asked for on a terminal, and is under way until it is to finish."""

    terminal: Terminal
    finish: Callable[[], object]
    done: threading.Event


@contextmanager
def reloading(home: Path, environment: dict[str, str]) -> Iterator[Reloading]:
    go, done = asyncio.Event(), threading.Event()

    async def reload(request: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        assert request["progress"] is True
        progress("starting [workers]", 1, 4)
        await go.wait()
        done.set()
        return ANSWERS["reload"]

    async def status(_request: Mapping[str, Any], _tell: Progress) -> Mapping[str, Any]:
        return {}

    path = home / "run" / "steer" / "web.sock"
    with fake_service(path, reload=reload, status=status) as loop:
        terminal = Terminal(STEER, "reload", "web", environment=environment)
        try:
            terminal.read_until(lambda shown: "starting [workers] 1/4" in shown)
            yield Reloading(terminal, lambda: loop.call_soon_threadsafe(go.set), done)
        finally:
            terminal.close()


def test_terminal_shows_how_far_it_is(home: Path, environment: dict[str, str]) -> None:
    with reloading(home, environment) as under_way:
        assert under_way.terminal.process.poll() is None
        under_way.finish()
        last = "reloaded web: generation 3, 4 workers, 1.2 s\r\n"
        under_way.terminal.read_until(lambda shown: shown.endswith(last))
        assert under_way.terminal.process.wait(DEADLINE_S) == 0
        # The line of progress is erased, and the cursor is back.
        assert re.search(r"\x1b\[\?25h.*\x1b\[2K", under_way.terminal.shown, re.S)


def test_interrupted_act_goes_on(home: Path, environment: dict[str, str]) -> None:
    with reloading(home, environment) as under_way:
        under_way.terminal.type(b"\x03")
        assert under_way.terminal.process.wait(DEADLINE_S) == 130
        under_way.terminal.read_until(lambda shown: "\x1b[?25h" in shown)
        assert "Traceback" not in under_way.terminal.shown
        under_way.finish()
        assert under_way.done.wait(DEADLINE_S)


# Other commands


def test_policies(cli: RunSteer) -> None:
    names = list(POLICIES)
    found = json.loads(cli("policies", "--json").stdout)["policies"]
    assert [each["name"] for each in found] == names
    [prefix4, _] = next(each["params"] for each in found if each["name"] == "source")
    assert (prefix4["name"], prefix4["default"], prefix4["most"]) == ("prefix4", 32, 32)
    lines = cli("policies").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["policy", *names]
    assert "\x1b" not in cli("policies").stdout


@pytest.mark.needs("bpf")
def test_check_prints_the_plan_and_changes_nothing(steer: RunSteer, home: Path) -> None:
    before = sorted(home.rglob("*"))
    done = steer("check", "-w", "2", "--policy", "round-robin", "--name", "shop")
    assert (done.returncode, done.stderr) == (0, "")
    *steps, memory = done.stdout.splitlines()
    assert steps == [
        "1. claim the name shop",
        "2. load round-robin as ebpf",
        "3. check that nothing listens on tcp 127.0.0.1:8080",
        "4. start 2 workers",
    ]
    assert re.fullmatch(r"memory: \d+\.\d MB in the kernel, for maps", memory)
    found = json.loads(steer("check", "--json", "-w", "2", "--name", "shop").stdout)
    became = found["policy"], found["policy_asked"], found["policy_reason"]
    assert became == ("least-conn", "auto", "open connections are counted")
    assert (found["backend"], found["backend_reason"]) == ("ebpf", None)
    assert len(found["workers"]) == 2
    assert 10**6 < found["memory_bytes"] < 10**7
    assert sorted(home.rglob("*")) == before


@pytest.mark.needs("bpf", "nobody")
@pytest.mark.usefixtures("netns")
def test_check_tells_of_the_backend_that_is_used(home: Path, environment: dict[str, str]) -> None:
    """Which probes alone do not tell: without CAP_PERFMON only this policy is refused."""
    less = "-sys_admin,-perfmon"
    without = ["setpriv", "--bounding-set", less, "--inh-caps", less]
    check = [STEER, "check", "--policy", "least-conn", "--json"]
    done = subprocess.run([*without, *check], capture_output=True, env=environment, cwd=home)
    found = json.loads(done.stdout)
    assert found["backend"] == "kernel"
    assert "give CAP_PERFMON too" in found["backend_reason"]


def test_check_sees_who_has_the_port(service: StartService, steer: RunSteer) -> None:
    running = service("-w", "1")
    done = steer("check", "--name", "other")
    assert done.returncode == 1
    assert "bind tcp 127.0.0.1:8080: EADDRINUSE, in use by " in done.stderr
    assert f"steer-worker (pid {running.workers()[0]['pid']})" in done.stderr


@pytest.mark.needs("root", "netns")
def test_status_of_none_one_and_several(service: StartService, alone: RunSteer) -> None:
    assert alone("status").stdout == "no service is running\n"
    nothing = {"schema": 1, "services": [], "orphaned": [], "others": 0}
    assert json.loads(alone("status", "--json").stdout) == nothing
    for command in ("status", "stop"):
        done = alone(command, "one")
        words = "steer: find service 'one': not running; no service is running\n"
        assert (done.returncode, done.stderr) == (1, words)
    done = alone("stop")
    assert done.returncode == 1
    assert done.stderr == "steer: find a service: none is running; start one with `steer run`\n"

    one = service("-w", "2", "--policy", "hash", name="one")
    (found,) = json.loads(alone("status", "--json").stdout)["services"]
    assert found == json.loads(alone("status", "one", "--json").stdout)["services"][0] | {
        "uptime_s": found["uptime_s"],
        "loop_delay_ms": found["loop_delay_ms"],
        "workers": found["workers"],
    }
    assert_contract(found, one)
    title, columns, *rows = alone("status").stdout.splitlines()
    assert title.startswith("one  running  hash on ")
    assert columns.split()[:3] == ["slot", "pid", "state"]
    assert [row.split()[:3] for row in rows] == [
        [str(each["slot"]), str(each["pid"]), "ready"] for each in one.workers()
    ]

    two = service("-w", "1", "-b", "127.0.0.1:8081", name="two")
    names = [each["name"] for each in json.loads(alone("status", "--json").stdout)["services"]]
    assert names == ["one", "two"]
    assert len(re.findall(r"^(?:one|two)  running", alone("status").stdout, re.M)) == 2
    assert json.loads(alone("status", "two", "--json").stdout)["services"][0]["pid"] == two.pid
    done = alone("stop")
    words = "steer: find the service: several are running: one, two; name one\n"
    assert (done.returncode, done.stderr) == (1, words)

    assert alone("stop", "two").stdout == "stopped two\n"
    assert json.loads(alone("stop", "--json").stdout) == {"stopped": "one"}
    assert alone("status").stdout == "no service is running\n"


def assert_contract(found: dict[str, Any], running: Service) -> None:
    assert (found["name"], found["pid"], found["state"]) == ("one", running.pid, "running")
    assert (found["generation"], found["policy"]) == (1, "hash")
    assert {"backend", "backend_reason", "uptime_s", "totals"} <= found.keys()
    assert found["binds"] == [{"protocol": "tcp", "address": "127.0.0.1", "port": 8080}]
    worker = found["workers"][1]
    assert (worker["slot"], worker["state"], worker["weight"]) == (1, "ready", 1)
    assert {"pid", "generation", "cpus", "restarts", "uptime_s"} <= worker.keys()
    assert worker["connections"].keys() >= {"selected", "open", "queued", "migrated"}
    assert worker["connections"]["queued"] == 0


def test_watch_shows_what_changes_until_interrupted(
    service: StartService, environment: dict[str, str]
) -> None:
    running = service("-w", "1", "--policy", "hash")
    terminal = Terminal(STEER, "status", "test", "--watch", environment=environment)
    try:
        (before,) = running.workers()
        terminal.read_until(lambda shown: str(before["pid"]) in shown)
        os.kill(before["pid"], signal.SIGKILL)
        eventually(lambda: running.workers()[0]["pid"] not in (None, before["pid"]))
        terminal.read_until(lambda shown: str(running.workers()[0]["pid"]) in shown)
        terminal.type(b"\x03")
        assert terminal.process.wait(DEADLINE_S) == 130
        terminal.read_until(lambda shown: "\x1b[?25h" in shown)  # the cursor is back
        assert "Traceback" not in terminal.shown
    finally:
        terminal.close()


@pytest.mark.parametrize("argument", ["--watch", "--json"])
def test_status_of_a_service_that_has_ended(
    service: StartService, steer: RunSteer, argument: str
) -> None:
    service("-w", "1").stop()
    done = steer("status", "test", argument)
    assert done.returncode == 1
    assert "find service 'test': not running" in done.stderr


# Where output goes


def test_watch_ends_when_nobody_reads_it(
    service: StartService, environment: dict[str, str]
) -> None:
    service("-w", "1")
    with subprocess.Popen(
        [STEER, "status", "test", "--watch"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith(b"test  running  least-conn on ")
        watching.stdout.close()
        assert watching.wait(DEADLINE_S) == 1
        assert watching.stderr is not None
        assert watching.stderr.read() == b""


@pytest.mark.parametrize("arguments", [("policies",), ("policies", "--json"), ("--help",)])
def test_reader_who_has_had_enough_is_no_error(
    environment: dict[str, str], arguments: tuple[str, ...]
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [STEER, *arguments], env=environment, stdout=write_end, stderr=subprocess.PIPE
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("arguments", [("policies",), ("policies", "--json"), ("check", "-h")])
def test_full_disk_is_said(environment: dict[str, str], arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [STEER, *arguments], env=environment, stdout=full, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (1, b"steer: [Errno 28] No space left on device\n")


def test_closed_output_is_no_error(environment: dict[str, str]) -> None:
    for arguments in (("policies",), ("policies", "--json"), ("--version",)):
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" >&-', "sh", STEER, *arguments],
            env=environment,
            stderr=subprocess.PIPE,
        )
        assert (done.returncode, done.stderr) == (0, b"")


def test_service_whose_standard_streams_are_closed(
    netns: object, home: Path, environment: dict[str, str]
) -> None:
    """As some start their daemons: sockets and pipes would then come to stand at 0, 1 and 2."""
    run = (STEER, "run", "-w", "1", "--name", "test")
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *run], env=environment, cwd=home
    )
    running = Service(process, "test", home, home, environment)
    try:
        (home / "stderr").touch()
        running.wait_ready()
        for pid in (running.pid, running.workers()[0]["pid"]):
            targets = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)]
            assert targets[:2] == ["/dev/null"] * 2
            assert targets[2].startswith("/dev/null" if pid == running.pid else "pipe:")
    finally:
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


# Log and pid file


def test_log_as_text(service: StartService) -> None:
    running = service("-w", "1")
    running.stop()
    form = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\] \[(\d+)\] \[[A-Z]+\] .+"
    lines = running.log.splitlines()
    matches = [re.fullmatch(form, line) for line in lines]
    assert all(matches), lines
    assert {match[1] for match in matches if match} == {str(running.pid)}
    assert lines[-1].endswith("[INFO] ended")


def test_log_as_json(service: StartService) -> None:
    running = service("-w", "1", "--log-format", "json")
    running.stop()
    lines = [json.loads(line) for line in running.log.splitlines()]
    assert all(line.keys() == {"time", "pid", "level", "message"} for line in lines)
    assert [line["message"] for line in lines][-1] == "ended"
    assert abs(lines[0]["time"] - time.time()) < DEADLINE_S


def test_log_level(service: StartService) -> None:
    quiet = service("-w", "1", "--log-level", "error")
    quiet.stop()
    assert quiet.log == ""


def test_pid_file_is_there_as_long_as_the_service(service: StartService, home: Path) -> None:
    file = home / "pid"
    running = service("-w", "1", "--pid", "pid")
    assert file.read_text() == f"{running.pid}\n"

    other = service("-w", "1", "-b", ":9", "--pid", "pid", name="other", ready=False)
    assert other.wait() == 1
    words = f"steer: write pid file pid: it names a running process, {running.pid}"
    assert other.log.startswith(words)

    assert running.stop() == 0
    assert not file.exists()


@pytest.mark.parametrize("left", ["4194305\n", "9" * 30, "-1", "0", "", "what\n", "\0\xff"])
def test_pid_file_that_names_nobody_is_no_obstacle(
    service: StartService, home: Path, left: str
) -> None:
    (home / "pid").write_text(left)
    running = service("-w", "1", "--pid", "pid")
    assert (home / "pid").read_text() == f"{running.pid}\n"


def test_pid_file_that_is_somebody_elses_by_now_is_left(service: StartService, home: Path) -> None:
    running = service("-w", "1", "--pid", "pid")
    (home / "pid").write_text("1\n")
    assert running.stop() == 0
    assert (home / "pid").read_text() == "1\n"


@pytest.mark.parametrize("path", [".", "nowhere/pid", "file/pid"])
def test_pid_file_that_cannot_be_written(
    service: StartService, steer: RunSteer, home: Path, path: str
) -> None:
    (home / "file").touch()
    running = service("-w", "1", "--pid", path, ready=False)
    assert running.wait() == 1
    assert f"steer: write pid file {path}: " in running.log
    assert running.log.endswith("; set pid to another path\n")
    checked = steer("check", "--pid", path)
    assert (checked.returncode, checked.stderr) == (1, running.log.splitlines(True)[-1])


@pytest.mark.needs("nobody")
def test_check_sees_whether_a_pid_file_can_be_written(steer: RunSteer, home: Path) -> None:
    """It writes none."""
    directory = home / "roots"
    directory.mkdir(mode=0o755)
    done = steer("check", "--pid", f"{directory}/pid", user=NOBODY)
    assert done.returncode == 1
    assert done.stderr.startswith(f"steer: write pid file {directory}/pid: Permission denied; ")
    assert steer("check", "--pid", f"{directory}/pid").returncode == 0
    assert not list(directory.iterdir())
    (directory / "pid").write_text(f"{os.getpid()}\n")
    assert (
        f"it names a running process, {os.getpid()}"
        in steer("check", "--pid", f"{directory}/pid").stderr
    )
    (directory / "pid").write_text("old\n")
    assert steer("check", "--pid", f"{directory}/pid").returncode == 0
    assert (directory / "pid").read_text() == "old\n"


@pytest.mark.parametrize(
    "option, words",
    [
        ("--app", "The app is an argument: MODULE:CALLABLE."),
        ("--command", "The command goes after --."),
        ("--workrs", "Did you mean '--workers'?"),
    ],
)
def test_what_is_no_option_is_said_how_to_give(steer: RunSteer, option: str, words: str) -> None:
    for command in ("run", "check"):
        done = steer(command, option, "x")
        assert done.returncode == 2
        assert done.stderr.endswith(f"Error: No such option '{option}'. {words}\n")
