"""Whatever comes from outside, only our own errors come out.

Each door is fed with odd inputs: pieces that have upset some parser, joined at random. The seeds
are Hypothesis's, so a failure is found again; one seed makes many inputs, as drawing each of
100,000 by itself would take minutes.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer import values
from steer.config import address
from steer.config.service import FIELDS, Service
from steer.config.sources import changed, load, read
from steer.control import client, notify
from steer.errors import ConfigError, Refused, SteerError
from steer.linux import identity
from steer.policy import declarations
from steer.policy.declarations import Declared, Param
from steer.values import Invalid
from testkit.fixtures import RunSteer, StartService
from testkit.processes import python
from testkit.service import Service as Running

INPUTS = 100_000
SEEDS = 100
SURROGATE = "\udcff"
PIECES = (
    *("", "0", "1", "-1", "+1", "1_0", " 1 ", "01", "0x10", "1e9", "1e-300", "1e400", "0.0499"),
    *("nan", "inf", "-inf", "9" * 20, "9" * 400, "9" * 5000, "٣", "²", "1.5", ".", "-", "+"),
    *("true", "auto", "cpu", "hash", "kernel", "x.c", "a:b", "web", "K=V", "=", "==", "a=", ","),
    *("127.0.0.1", "[::1]", ":80", ":0", ":65536", "udp://", "tcp://", "[", "]", "[" * 2000),
    *("\0", "\n", "\r", "\t", SURROGATE, "é", "\U0001f600", "\\", '"', "'", "`", "%s"),
    *("{value}", "::", "$HOME", "STEER_TABLE("),
    *("{", "}", "{" * 2000, "[service]", "workers", "bind", "policy", "=1\n", "#", "\ufeff"),
    *("STEER_POLICY(ctx, table)", "STEER_PARAM(", 'STEER_PARAM(p, 1, 0, 9, "h")', ")"),
    *("STEER_COUNTER(", "/*", "*/", "//", "0" * 5000, "../", "/", "~", "\x1b[31m", "﷽" * 300),
)  # fmt: skip
PARAMS = Declared(params=(Param("percent", 10, 0, 100, ""), Param("mask", 0, 0, 2**32 - 1, "")))
Door = Callable[[Random], object]


def text(random: Random) -> str:
    return "".join(random.choices(PIECES, k=random.randrange(1, 5)))


def anything(random: Random, depth: int = 3) -> Any:
    """What TOML and JSON can hold."""
    kinds = 8 if depth else 6
    kind = random.randrange(kinds)
    if kind < 3:
        return text(random)
    if kind == 3:
        return random.choice((0, -1, 10**5000, -(2**63), 2**64, True, False, None))
    if kind < 6:
        return random.choice((0.0, 1e-300, -1.5, float("nan"), float("inf"), 86400.5))
    items = [anything(random, depth - 1) for _ in range(random.randrange(4))]
    return items if kind == 6 else {f"{index}": item for index, item in enumerate(items)}


def option(random: Random) -> object:
    return load({random.choice(KEYS): anything(random)}, {}, {}, "x.toml")


def environment(random: Random) -> object:
    name = random.choice((*(f"STEER_{key.upper()}" for key in KEYS), "WEB_CONCURRENCY"))
    return load({}, {name: text(random)}, {}, "x.toml")


def table(random: Random) -> object:
    return load({}, {}, {random.choice((*KEYS, text(random))): anything(random)}, "x.toml")


def toml(random: Random) -> object:
    key, value = random.choice(KEYS), text(random)
    forms = (value, f"[service]\n{key} = {value}", f'[service]\n{key} = "{value}"')
    data = random.choice(forms).encode(errors=random.choice(("surrogateescape", "replace")))
    return load({}, {}, read(data, "x.toml"), "x.toml")


def request(random: Random) -> object:
    asked = {key: anything(random) for key in ("policy", "params", "weights")}
    return changed(Service(), asked, "change it")


def bind(random: Random) -> object:
    return address.parse(text(random))


def parameter(random: Random) -> object:
    given_ = [f"{random.choice(('percent', 'mask', text(random)))}={text(random)}"]
    return declarations.values(PARAMS, given_, "run x")


def policy_text(random: Random) -> object:
    return declarations.parse("".join(text(random) for _ in range(3)), "read x.c")


def user(random: Random) -> object:
    return identity.identity(text(random).replace("\0", ""), None)


def group(random: Random) -> object:
    return identity.identity(None, text(random).replace("\0", ""))


def notification(random: Random) -> object:
    return notify.parse(text(random).encode(errors="surrogateescape"))


KEYS = tuple(FIELDS)
DOORS: tuple[Door, ...] = (
    *(option, environment, table, toml, request),
    *(bind, parameter, policy_text, user, group, notification),
)


@given(seed=st.integers(0, 2**64))
@settings(
    max_examples=SEEDS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_only_our_own_errors_come_out(door: Door, seed: int) -> None:
    random = Random(seed)
    for _ in range(INPUTS // SEEDS // len(DOORS) + 1):
        before = random.getstate()
        try:
            door(random)
        except SteerError as error:
            check_words(str(error))
        except BaseException as error:
            random.setstate(before)
            error.add_note(f"{door.__name__} was given {values.shown(anything(random))}, or so")
            raise


def check_words(said: str) -> None:
    """One line of bounded length, and no words of a library's or of Python's."""
    assert len(said) < 1500
    for noise in ("Expected `", "Traceback", "msgspec", "sys.set_int", "codec can't", "enum value"):
        assert noise not in said


@pytest.mark.parametrize("number", ["9" * 20, str(2**32 - 1), "9" * 5000, "²", "٣"])
def test_a_group_is_a_number_that_the_kernel_knows(number: str) -> None:
    with pytest.raises(ConfigError, match=r"^run workers as group .*: no such group$"):
        identity.identity(None, number)


@given(st.text() | st.integers().map(str), st.integers(), st.integers())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_a_whole_number_is_digits_in_range(given_: str, one: int, other: int) -> None:
    least, most = sorted((abs(one), abs(other)))
    try:
        number = values.whole_number(given_, least, most)
    except Invalid:
        assert not re.fullmatch("[0-9]{1,20}", given_) or not least <= int(given_) <= most
    else:
        assert number == int(given_)
        assert least <= number <= most


BROKEN = {
    b"[service]\nworkers = " + b"9" * 5000: "read steer.toml: a number has too many digits",
    b"[service]\nbind = " + b"[" * 2000: "read steer.toml: lists or tables are nested too deep",
    b"[service]\nhang_timeout = 1e-300": "steer.toml: hang_timeout = 1e-300: too small",
    b"[service]\nname = '\xff'": "read steer.toml: not UTF-8",
}


def test_a_broken_file_is_refused_at_start_and_at_reload(
    service: StartService, steer: RunSteer, home: Path
) -> None:
    """And by a service that runs nothing that is asked of it in an odd way."""
    file = home / "steer.toml"
    for content, words in BROKEN.items():
        file.write_bytes(content)
        done = steer("run", "--check-config")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"steer: {words}")
        assert done.stderr.count("\n") == 1
    file.write_text("[service]\nworkers = 1\n")
    running = service()
    for content, words in BROKEN.items():
        file.write_bytes(content)
        done = steer("reload")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert words in done.stderr
    ask_oddly(running)
    assert running.status()["state"] == "running"
    assert "bug" not in running.log


def ask_oddly(running: Running) -> None:
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    odd: tuple[Any, ...] = (deep, "9" * 5000, -1, 1.5, True, None, [], {}, "²", "\0", "x.c\0")
    requests = [
        *({"command": "scale", "workers": each} for each in odd),
        *({"command": "restart", "slot": each} for each in odd),
        *({"command": "drain", "slot": each} for each in odd),
        *(
            {"command": "policy", key: each}
            for each in odd
            for key in ("weights", "params")
            if each
        ),
        *({"command": "policy", "policy": each} for each in odd if each is not None),
    ]
    for request in requests:
        command = request.pop("command")
        with pytest.raises(Refused) as caught:
            client.ask(running.control_socket, command, **request)
        check_words(str(caught.value))


def test_options_and_environment_that_are_no_text(
    steer: RunSteer, environment: dict[str, str]
) -> None:
    for arguments in (
        ("run", "--log-level", SURROGATE),
        ("status", SURROGATE),
        ("stop", "--control-socket", f"/{SURROGATE}"),
        ("policies", "new", SURROGATE),
        ("check", "-c", SURROGATE),
    ):
        done = steer(*arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "steer: read argument {}: not UTF-8\n".format(
            repr(f"/{SURROGATE}" if arguments[0] == "stop" else SURROGATE)
        )
    environment["STEER_STRICT"] = SURROGATE
    done = steer("check")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("steer: STEER_STRICT: strict = ")


BUG = """
import sys
from steer.cli import main as cli
from steer.cli import options

def broken(*_):
    raise ZeroDivisionError("of nothing\\nby nothing")

options.Source.__call__ = broken
sys.argv[0] = "steer"
cli.main()
"""


@pytest.mark.parametrize("level, lines", [("info", 1), ("debug", 4)])
def test_a_bug_is_one_line_without_a_traceback(level: str, lines: int) -> None:
    command = python(BUG, "check", "--log-level", level)
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    first, *more = done.stderr.splitlines()
    assert re.fullmatch(
        r"steer: bug in steer: ZeroDivisionError: of nothing by nothing \(<string>:7\); "
        "please report it",
        first,
    )
    assert len(more) + 1 >= lines if lines > 1 else not more
    assert all(line.startswith("  | ") for line in more)
