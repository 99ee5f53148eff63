"""From command line, environment and file to one value; and what is said of a bad one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.config import address, sources
from steer.config.address import Bind
from steer.config.service import FIELDS, MAX_WEIGHT, MAX_WORKERS, SHORTEST_S, Service
from steer.errors import ConfigError
from steer.policy.builtin import POLICIES

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)

FILE = "steer.toml"


def load(
    command_line: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    file: Mapping[str, Any] | None = None,
) -> Service:
    return sources.load(command_line or {}, environment or {}, file or {}, FILE)


def refused(*sources: Mapping[str, Any] | None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(*sources)
    assert caught.value.exit_code == 1
    assert caught.value.__cause__ is None, "a traceback would show two errors"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    said = str(caught.value)
    for noise in ("`", "$", "Traceback", "msgspec", "Error", "regex", "\n"):
        assert noise not in said
    return caught.value


# What counts


def test_with_nothing_given_all_is_default() -> None:
    assert load() == Service()
    assert load().binds == (Bind("tcp", "127.0.0.1", 8080),)
    assert (load().workers, load().policy, load().backend) == ("auto", "auto", "auto")


# Of each key: a value in the file, in the environment (its text and what it means), on the
# command line; all different, and different from the default.
SOURCES: dict[str, tuple[Any, tuple[str, Any], tuple[Any, Any]]] = {
    "app": ("a:f", ("b:f", "b:f"), ("c:f", "c:f")),
    "command": (["a", "x y"], ("b -v", ("b", "-v")), (("c", "-v"), ("c", "-v"))),
    "server": ("auto", ("uvicorn", "uvicorn"), ("hypercorn", "hypercorn")),
    "server_options": (["a=1"], ("b=2, c=3", ("b=2", "c=3")), (("d=[4]",), ("d=[4]",))),
    "demo": (True, ("false", False), (True, True)),
    "preload": (True, ("false", False), (True, True)),
    "bind": ([":1"], (":2,:22", (":2", ":22")), ((":3", ":33"), (":3", ":33"))),
    "workers": (1, ("2", 2), ("3", 3)),
    "spares": (1, ("2", 2), ("3", 3)),
    "socket": ("adopt", ("inherit", "inherit"), ("adopt", "adopt")),
    "instances": (2, ("3", 3), ("4", 4)),
    "reload_signal": ("HUP", ("USR1", "USR1"), ("none", "none")),
    "policy": ("hash", ("random", "random"), ("round-robin", "round-robin")),
    "params": (["a=1"], ("b=2, c=3", ("b=2", "c=3")), (("d=4",), ("d=4",))),
    "backend": ("ebpf", ("cbpf", "cbpf"), ("kernel", "kernel")),
    "strict": (True, ("false", False), (True, True)),
    "weights": ([1, 2], ("3, 4", (3, 4)), (("5", "6"), (5, 6))),
    "name": ("a", ("b", "b"), ("c", "c")),
    "user": ("a", ("b", "b"), ("c", "c")),
    "group": ("a", ("b", "b"), ("c", "c")),
    "keep_privileges": (True, ("false", False), (True, True)),
    "env": (["A=1"], ("A=2,B=", ("A=2", "B=")), (("A=3",), ("A=3",))),
    "chdir": ("/a", ("/b", "/b"), ("/c", "/c")),
    "backlog": (1, ("2", 2), ("3", 3)),
    "socket_options": (
        ["mark=1"],
        ("keepalive=yes, mark=2", ("keepalive=yes", "mark=2")),
        (("mark=3",), ("mark=3",)),
    ),
    "graceful_timeout": (1, ("2.5", 2.5), ("3", 3.0)),
    "stop_signal": ("QUIT", ("SIGUSR1", "SIGUSR1"), ("winch", "winch")),
    "ready_timeout": (1.5, ("2", 2.0), ("3", 3.0)),
    "hang_timeout": (1, ("0", 0.0), ("3", 3.0)),
    "hang": ("skip", ("replace", "replace"), ("skip", "skip")),
    "watchdog": (1, ("2.5", 2.5), ("3", 3.0)),
    "max_memory": ("1G", ("512M", "512M"), ("2G", "2G")),
    "max_lifetime": (60, ("1h", "1h"), ("1h±10m", "1h±10m")),
    "reload_on_change": (True, ("false", False), (True, True)),
    "adopt_timeout": (1, ("0", 0.0), ("3", 3.0)),
    "pid": ("/a", ("/b", "/b"), ("/c", "/c")),
    "log_level": ("debug", ("warning", "warning"), ("error", "error")),
    "log_format": ("json", ("text", "text"), ("json", "json")),
    "control_socket": ("/a", ("/b", "/b"), ("/c", "/c")),
}


def test_every_key_is_tried() -> None:
    assert set(SOURCES) == set(FIELDS)


def frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


ADOPTS = {"command": ("x",), "socket": "adopt"}
WITH: dict[str, dict[str, Any]] = {
    "socket": {"command": ("x",)},
    "instances": ADOPTS,
    "reload_signal": ADOPTS,
}
"""What has to be on the command line, too."""


@pytest.mark.parametrize("key", list(SOURCES))
def test_command_line_over_environment_over_file_over_default(key: str) -> None:
    in_file, (text, in_environment), (option, on_command_line) = SOURCES[key]
    name = f"STEER_{key.upper()}"
    default = getattr(Service(), key)
    assert default not in (frozen(in_file), on_command_line)
    more = WITH.get(key, {})
    with_option, without = {**more, key: option}, {**more, key: None}
    assert getattr(load(with_option, {name: text}, {key: in_file}), key) == on_command_line
    assert getattr(load(without, {name: text}, {key: in_file}), key) == in_environment
    assert getattr(load(with_option, {}, {key: in_file}), key) == on_command_line
    assert getattr(load(more, {}, {key: in_file}), key) == frozen(in_file)
    assert getattr(load(without), key) == default


def test_each_key_comes_from_its_own_highest_source() -> None:
    service = load(
        {"policy": "hash"},
        {"STEER_POLICY": "random", "STEER_BACKLOG": "7"},
        {"policy": "kernel", "backlog": 8, "name": "web"},
    )
    assert (service.policy, service.backlog, service.name) == ("hash", 7, "web")


@pytest.mark.parametrize(
    "environment, file, workers",
    [
        ({"WEB_CONCURRENCY": "3"}, {}, 3),
        ({"WEB_CONCURRENCY": "3"}, {"workers": 5}, 3),
        ({"WEB_CONCURRENCY": "3", "STEER_WORKERS": "4"}, {"workers": 5}, 4),
        ({"STEER_WORKERS": "4", "WEB_CONCURRENCY": "3"}, {}, 4),
        ({"STEER_WORKERS": "auto", "WEB_CONCURRENCY": "3"}, {}, "auto"),
    ],
)
def test_web_concurrency_counts_as_workers(
    environment: dict[str, str], file: dict[str, Any], workers: object
) -> None:
    assert load({}, environment, file).workers == workers
    assert load({"workers": "2"}, environment, file).workers == 2


def test_other_variables_are_not_ours() -> None:
    """Among them those that a worker is given."""
    ours = {"STEER_SLOT": "1", "STEER_CPUS": "0", "STEERING": "x", "WORKERS": "9", "PATH": "/bin"}
    assert load({}, ours) == Service()


@pytest.mark.parametrize("option", [None, ()])
def test_an_option_that_was_not_given_hides_nothing(option: object) -> None:
    assert load({"bind": option}, {}, {"bind": [":5"]}).bind == (":5",)


def test_a_flag_that_is_off_is_given() -> None:
    assert not load({"strict": False}, {}, {"strict": True}).strict


# What is run

Sources = tuple[Mapping[str, Any], Mapping[str, str], Mapping[str, Any] | None]


def to_run(given_: Sources) -> Service:
    return sources.load(*given_, FILE, runs=True)


@pytest.mark.parametrize(
    "given_, named",
    [
        (({"workers": "2"}, {}, None), "--workers"),
        (({"params": ("a=1",), "strict": True}, {}, None), "--param, --strict"),
        (({}, {"STEER_BACKLOG": "7"}, None), "STEER_BACKLOG"),
        (({}, {"WEB_CONCURRENCY": "2"}, None), "WEB_CONCURRENCY"),
        (({}, {}, {"policy": "hash", "workers": 2}), FILE),
        (({}, {}, {"demo": False}), FILE),
        (({}, {}, {}), FILE),
        (({"workers": "2"}, {}, {}), f"{FILE}, --workers"),
        (
            ({"name": "web"}, {"STEER_DEMO": "false"}, {"bind": [":1"]}),
            f"{FILE}, STEER_DEMO, --name",
        ),
        (({}, {"STEER_COMMAND": ""}, None), "STEER_COMMAND"),
    ],
)
def test_a_service_without_anything_to_run_is_refused(given_: Sources, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_run(given_)
    what = f"find what to run in {named}: neither an app nor a command is given; give one: "
    assert str(caught.value).startswith(what)
    for cure in ("MODULE:CALLABLE", "-- COMMAND", "--demo", "demo = true"):
        assert cure in caught.value.cure
    assert sources.load(*given_, FILE), "what only looks at a machine may do without"


@pytest.mark.parametrize(
    "given_",
    [
        ({"workers": "2", "app": "a:f"}, {}, {}),
        ({"command": ("a",)}, {}, {"workers": 2}),
        ({"demo": True, "workers": "2"}, {}, {}),
        ({}, {"STEER_DEMO": "true", "STEER_WORKERS": "2"}, {}),
        ({"workers": "2"}, {}, {"demo": True}),
        ({"workers": "2"}, {}, {"command": ["a"]}),
    ],
)
def test_a_service_with_something_to_run_is_not_refused(given_: Sources) -> None:
    assert to_run(given_) == sources.load(*given_, FILE)


@pytest.mark.parametrize(
    "given_, said",
    [
        ({"server": "uvicorn"}, "--server: server = 'uvicorn': no app is given"),
        ({"server_options": ("a=1",)}, "--server-option: server_options = 'a=1': no server is"),
        ({"preload": True}, "--preload: preload = True: no app is given"),
        ({"preload": True, "command": ("a",)}, "--preload: preload = True: a command is no app"),
    ],
)
def test_what_needs_an_app_and_has_none_is_refused(given_: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_run((given_, {}, {"demo": True}))
    assert str(caught.value).startswith(said)


def test_who_gives_nothing_at_all_gets_the_demo() -> None:
    assert to_run(({"bind": (), "demo": None}, {"PATH": "/bin"}, None)) == Service(demo=True)


@pytest.mark.parametrize(
    "given_, name",
    [
        ({}, "demo"),
        ({"app": "shop.web:main"}, "shop-web"),
        ({"command": ("/usr/sbin/nginx", "-g", "x/y")}, "nginx"),
        ({"command": ("./serve",)}, "serve"),
        ({"command": ("serve",), "name": "web"}, "web"),
    ],
)
def test_service_name(given_: dict[str, Any], name: str) -> None:
    assert load(given_).service_name == name


def test_a_worker_without_a_weight_of_its_own_has_1() -> None:
    service = load({"weights": ("5", "7")})
    assert [service.weight(spec) for spec in range(4)] == [5, 7, 1, 1]


def test_limits_are_allowed() -> None:
    service = load({"workers": MAX_WORKERS, "weights": (1, MAX_WEIGHT), "graceful_timeout": 0})
    assert (service.workers, service.weights, service.graceful_timeout) == (1024, (1, 1000), 0)
    assert load({"name": "a" * 63}).service_name == "a" * 63


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_policy_can_be_asked_for(policy: str) -> None:
    assert load({"policy": policy}).policy == policy


@pytest.mark.parametrize("path", ["mine.c", "./mine.c", "/srv/policies/mine.c", "../a b.c"])
def test_a_policy_of_ones_own_is_the_path_of_its_file(path: str) -> None:
    """Whether there is one is seen when it is read."""
    assert load({"policy": path}).policy == path


# Changed while it runs


def test_changed_checks_and_converts_as_a_start_does() -> None:
    running = Service(workers=4, weights=(1, 2))
    asked = {"policy": "source", "params": ["prefix4=24"], "weights": ["3", "4"]}
    after = sources.changed(running, asked, "change it")
    assert after == Service(workers=4, policy="source", params=("prefix4=24",), weights=(3, 4))
    assert sources.changed(running, {}, "change it") == running


@pytest.mark.parametrize(
    "asked, said",
    [
        (
            {"policy": "x"},
            "change it: policy = 'x': unknown policy; allowed: auto, cpu, round-robin",
        ),
        ({"policy": 3}, "change it: policy = 3: a whole number, not a string; allowed: "),
        ({"params": ["prefix4"]}, "change it: params = 'prefix4': malformed; allowed: NAME=VALUE"),
        ({"params": "a=1"}, "change it: params = 'a=1': not a list; allowed: NAME=VALUE"),
        ({"weights": ["0"]}, "change it: weights = '0': too small; allowed: whole numbers"),
        ({"weights": ["x"]}, "change it: weights = 'x': not a whole number; allowed: whole"),
        (
            {"weights": [1, 2, 3]},
            "change it: weights = '1,2,3' and workers = 2: 3 weights for 2 workers; "
            "give each worker one at most",
        ),
        (
            {"weights": [1, 2], "policy": "kernel"},
            "change it: weights = '1,2' and policy = 'kernel': the kernel's own hash",
        ),
    ],
)
def test_changed_refuses_what_a_start_would(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sources.changed(Service(workers=2), asked, "change it")
    assert str(caught.value).startswith(said)


# What is refused

ADDRESSES = "allowed: host:port, [::1]:port, :port, udp://host:port"
NAMES = "allowed: letters, digits, '.', '_' and '-', 63 at most, the first a letter or digit"
WORKERS = "allowed: 1 to 1024, or auto"
TIMES = "allowed: seconds, 0 or from 0.05 to 86400"
APPS = "allowed: MODULE:CALLABLE"
HANG_TIMES = "allowed: seconds, 0 (for ever) or from 0.05 to 86400"
COPIES = f"is multicast or broadcast: {address.COPIES}"
WAITS = "allowed: seconds, from 0.05 to 86400"
WEIGHTS = "allowed: whole numbers from 1 to 1000"
EVERY_POLICY = (
    "allowed: auto, cpu, round-robin, least-conn, hash, source, flow, random, kernel, "
    "or a path/to/file.c"
)


@pytest.mark.parametrize(
    "key, value, cause",
    [
        ("workers", 0, f"too small; {WORKERS}"),
        ("workers", -1, f"too small; {WORKERS}"),
        ("workers", 10000, f"too large; {WORKERS}"),
        ("workers", "many", f"a string, not a whole number or auto; {WORKERS}"),
        ("workers", "4", f"a string, not a whole number or auto; {WORKERS}"),
        ("workers", True, f"a boolean, not a whole number or auto; {WORKERS}"),
        ("workers", 2.5, f"a number, not a whole number or auto; {WORKERS}"),
        ("policy", "fastest", f"unknown policy; {EVERY_POLICY}"),
        ("policy", "", f"unknown policy; {EVERY_POLICY}"),
        ("policy", "mine.h", f"unknown policy; {EVERY_POLICY}"),
        ("policy", "mine\0.c", f"a null byte; {EVERY_POLICY}"),
        ("policy", 1, f"a whole number, not a string; {EVERY_POLICY}"),
        ("backend", 3, "a whole number, not a string; allowed: auto, ebpf, cbpf, kernel"),
        ("backend", "xdp", "unknown; allowed: auto, ebpf, cbpf, kernel"),
        ("app", "shop", f"malformed; did you mean 'shop:NAME', a callable in it? {APPS}"),
        ("app", "shop.py", f"malformed; did you mean the command -- python shop.py? {APPS}"),
        ("app", "./serve", f"malformed; did you mean the command -- ./serve? {APPS}"),
        ("app", "two words", f"malformed; {APPS}"),
        ("app", ":main", "malformed; allowed: MODULE:CALLABLE"),
        ("app", "shop:", "malformed; allowed: MODULE:CALLABLE"),
        ("app", "shop:main\n", "malformed; allowed: MODULE:CALLABLE"),
        ("app", "../shop:main", "malformed; allowed: MODULE:CALLABLE"),
        ("app", "shop:main:x", "malformed; allowed: MODULE:CALLABLE"),
        ("command", "nginx -g x", "a string, not a list"),
        ("strict", "yes", "a string, not true or false; allowed: true, false"),
        ("strict", 1, "a whole number, not true or false; allowed: true, false"),
        ("name", "a/b", f"malformed; {NAMES}"),
        ("name", ".hidden", f"malformed; {NAMES}"),
        ("name", "", f"malformed; {NAMES}"),
        ("name", "a\n", f"malformed; {NAMES}"),
        ("name", "a" * 64, f"malformed; {NAMES}"),
        ("user", 0, "a whole number, not a string"),
        ("chdir", {}, "a table, not a string"),
        ("backlog", 0, "too small; allowed: 1 to 65535"),
        ("backlog", 65536, "too large; allowed: 1 to 65535"),
        ("graceful_timeout", -1, f"too small; {TIMES}"),
        ("graceful_timeout", 1e-300, f"too small; {TIMES}"),
        ("adopt_timeout", 0.0499, f"too small; {TIMES}"),
        ("hang_timeout", 0.0499, f"too small; {HANG_TIMES}"),
        ("graceful_timeout", 86401, f"too large; {TIMES}"),
        ("graceful_timeout", float("nan"), f"not a number; {TIMES}"),
        ("graceful_timeout", "30s", f"a string, not a number; {TIMES}"),
        ("ready_timeout", 0, f"too small; {WAITS}"),
        ("watchdog", 1e-9, f"too small; {WAITS}"),
        ("ready_timeout", float("inf"), f"too large; {WAITS}"),
        ("log_level", "loud", "unknown; allowed: debug, info, warning, error"),
        ("log_format", "xml", "unknown; allowed: text, json"),
    ],
)
def test_a_bad_value(key: str, value: Any, cause: str) -> None:
    assert str(refused({}, {}, {key: value})) == f"{FILE}: {key} = {value!r}: {cause}"


@pytest.mark.parametrize("text", ["+2", " 2", "02"])
def test_a_number_that_is_written_otherwise_is_not_called_too_large(text: str) -> None:
    for key, allowed in (("workers", WORKERS), ("hang_timeout", HANG_TIMES)):
        error = refused({key: text})
        assert error.cause == "malformed: write it without sign, space or leading zero"
        assert error.cure == allowed


@pytest.mark.parametrize(
    "text, cause",
    [
        ("inf", "too large"),
        ("+Infinity", "too large"),
        ("1e999", "too large"),
        ("-inf", "too small"),
        ("nan", "not a number"),
        ("infinite", "not a number"),
        ("", "not a number"),
    ],
)
def test_an_endless_time(text: str, cause: str) -> None:
    """In words that tell what to write for it, and the same ones from every source."""
    error = refused({"hang_timeout": text})
    assert str(error) == f"--hang-timeout: hang_timeout = {text!r}: {cause}; {HANG_TIMES}"
    if text in ("inf", "nan"):
        assert refused({}, {}, {"hang_timeout": float(text)}).cause == cause
        assert refused({}, {"STEER_HANG_TIMEOUT": text}).cause == cause


@pytest.mark.parametrize(
    "key, value, cause",
    [
        ("bind", ["80"], f"read address '80': malformed; did you mean ':80'? {ADDRESSES}"),
        ("bind", [":80", "host"], f"read address 'host': malformed; {ADDRESSES}"),
        ("bind", [":0"], f"read address ':0': port 0 is not in 1..65535; {ADDRESSES}"),
        ("bind", [":70000"], f"read address ':70000': port 70000 is not in 1..65535; {ADDRESSES}"),
        (
            "bind",
            ["example.com:80"],
            "read address 'example.com:80': 'example.com' is no numeric address; " + ADDRESSES,
        ),
        ("bind", [":80", "0.0.0.0:80"], f"tcp 0.0.0.0:80 is given twice; {ADDRESSES}"),
        ("bind", ["udp://224.0.0.251:5353"], f"udp 224.0.0.251:5353 {COPIES}; {ADDRESSES}"),
        ("bind", ["udp://[ff02::fb]:5353"], f"udp [ff02::fb]:5353 {COPIES}; {ADDRESSES}"),
        (
            "bind",
            ["udp://[::ffff:224.0.0.1]:1"],
            f"udp [::ffff:224.0.0.1]:1 {COPIES}; {ADDRESSES}",
        ),
        (
            "bind",
            ["udp://[::ffff:255.255.255.255]:1"],
            f"udp [::ffff:255.255.255.255]:1 {COPIES}; {ADDRESSES}",
        ),
        ("bind", ["udp://255.255.255.255:1"], f"udp 255.255.255.255:1 {COPIES}; {ADDRESSES}"),
        ("bind", [], f"no address given; {ADDRESSES}"),
        ("bind", [80], f"a whole number, not a string; {ADDRESSES}"),
        ("weights", [1, 0], f"too small; {WEIGHTS}"),
        ("weights", [-3], f"too small; {WEIGHTS}"),
        ("weights", [1001], f"too large; {WEIGHTS}"),
        ("weights", ["heavy"], f"a string, not a whole number; {WEIGHTS}"),
        ("weights", [1.5], f"a number, not a whole number; {WEIGHTS}"),
        ("params", ["prefix4"], "malformed; allowed: NAME=VALUE"),
        ("params", ["a=1", "=2"], "malformed; allowed: NAME=VALUE"),
        ("params", [24], "a whole number, not a string; allowed: NAME=VALUE"),
        ("env", ["PATH"], "malformed; allowed: NAME=VALUE"),
        ("env", ["A=1", "=2"], "malformed; allowed: NAME=VALUE"),
        ("command", [1], "a whole number, not a string"),
    ],
)
def test_a_bad_list(key: str, value: list[Any], cause: str) -> None:
    shown = ",".join(map(str, value))
    assert str(refused({}, {}, {key: value})) == f"{FILE}: {key} = '{shown}': {cause}"


@pytest.mark.parametrize(
    "key, value", [("bind", ":80"), ("weights", 3), ("env", {"A": "1"}), ("params", "a=1")]
)
def test_one_where_a_list_belongs(key: str, value: Any) -> None:
    error = refused({}, {}, {key: value})
    assert error.what == f"{FILE}: {key} = {value!r}"
    assert error.cause.endswith(", not a list")
    assert error.cure.startswith("allowed: ")


@pytest.mark.parametrize("key", ["worker", "graceful-timeout", "Workers", "", "service"])
def test_an_unknown_key(key: str) -> None:
    error = refused({}, {}, {key: 3})
    assert (error.what, error.cause) == (f"{FILE}: {key} = 3", "unknown key")
    assert "allowed: adopt_timeout, app, backend, backlog, " in error.cure
    assert all(name in error.cure for name in FIELDS)


@pytest.mark.parametrize(
    "sources, what",
    [
        (({"workers": "0"}, None, None), "--workers: workers = '0'"),
        (({"graceful_timeout": "-1"}, None, None), "--graceful-timeout: graceful_timeout = '-1'"),
        (({"bind": (":0",)}, None, None), "--bind: bind = ':0'"),
        (({"policy": "x"}, {"STEER_POLICY": "hash"}, None), "--policy: policy = 'x'"),
        (({"params": ("x",)}, None, None), "--param: params = 'x'"),
        ((None, {"STEER_PARAMS": "a=1,x"}, None), "STEER_PARAMS: params = 'a=1,x'"),
        ((None, {"STEER_WORKERS": "0"}, None), "STEER_WORKERS: workers = '0'"),
        ((None, {"WEB_CONCURRENCY": "0"}, None), "WEB_CONCURRENCY: workers = '0'"),
        ((None, {"STEER_BIND": ""}, None), "STEER_BIND: bind = ''"),
        ((None, {"STEER_POLICY": "x"}, None), "STEER_POLICY: policy = 'x'"),
        ((None, {"STEER_STRICT": "maybe"}, None), "STEER_STRICT: strict = 'maybe'"),
        ((None, {"STEER_WEIGHTS": "1,,2"}, None), "STEER_WEIGHTS: weights = '1,,2'"),
        ((None, {"STEER_GRACEFUL_TIMEOUT": "nan"}, None), "STEER_GRACEFUL_TIMEOUT: graceful_ti"),
        ((None, {"STEER_APP": "x"}, None), "STEER_APP: app = 'x'"),
        (({"name": "ok"}, None, {"name": "a b"}), f"{FILE}: name = 'a b'"),
    ],
)
def test_the_source_is_named(sources: tuple[Any, Any, Any], what: str) -> None:
    assert refused(*sources).what.startswith(what)


@pytest.mark.parametrize(
    "sources, said",
    [
        (
            ({"command": ("nginx", "-q")}, None, {"app": "shop:main"}),
            f"{FILE}: app = 'shop:main' and command after --: 'nginx,-q': both are given; give one",
        ),
        (
            ({"server": "uvicorn", "command": ("nginx",)}, None, None),
            "--server: server = 'uvicorn' and command after --: 'nginx': a command runs a server "
            "of its own; leave one of them out",
        ),
        (
            ({"server": "uvicorn", "app": "shop:app"}, None, {"bind": [":80", "udp://:53"]}),
            f"--server: server = 'uvicorn' and {FILE}: bind = ':80,udp://:53': udp 0.0.0.0:53 is "
            "not TCP; leave that bind out",
        ),
        (
            ({"workers": "2"}, {"STEER_WEIGHTS": "1,2,3"}, None),
            "STEER_WEIGHTS: weights = '1,2,3' and --workers: workers = '2': "
            "3 weights for 2 workers; give each worker one at most",
        ),
        (
            ({"policy": "kernel"}, None, {"weights": [1, 2]}),
            f"{FILE}: weights = '1,2' and --policy: policy = 'kernel': the kernel's own hash "
            "knows no weights; allowed: auto, cpu, round-robin, least-conn, hash, source, flow, "
            "random",
        ),
    ],
)
def test_two_keys_that_do_not_go_together(sources: tuple[Any, Any, Any], said: str) -> None:
    assert str(refused(*sources)) == said


# Files


def test_a_file_without_the_table_says_nothing() -> None:
    assert sources.read(b"# nothing\n", FILE) == {}


def test_a_file() -> None:
    text = b"""
        [service]
        app = "shop.web:main"
        bind = [":80", "udp://[::1]:53"]
        weights = [1, 2]
        graceful_timeout = 5
    """
    service = load(file=sources.read(text, FILE))
    assert service.binds == (Bind("tcp", "0.0.0.0", 80), Bind("udp", "::1", 53))
    assert (service.app, service.weights) == ("shop.web:main", (1, 2))
    assert service.graceful_timeout == 5.0


def test_options_of_a_server_may_be_a_table() -> None:
    text = b"""
        [service]
        app = "shop:app"
        server = "uvicorn"
        [service.server_options]
        timeout_keep_alive = 3
        access_log = false
        log_level = "error"
        headers = [["x-by", "shop"]]
    """
    options = load(file=sources.read(text, FILE)).server_options
    assert options == (
        "timeout_keep_alive=3",
        "access_log=false",
        "log_level=error",
        'headers=[["x-by","shop"]]',
    )


@pytest.mark.parametrize(
    "text, said",
    [
        (b"[service", "read steer.toml: Expected ']' at the end of a table declaration"),
        (b"workers 3", "read steer.toml: Expected '=' after a key"),
        (b"name = '\xff'", "read steer.toml: not UTF-8 at byte 8"),
        (b"[service]\nname = 'a'\nname = 'b'", "read steer.toml: Cannot overwrite a value"),
        (b"[servce]", "read steer.toml: unknown table or key 'servce'; did you mean 'service'? "),
        (b"[web]", "read steer.toml: unknown table or key 'web'; allowed: [service]"),
        (b"workers = 3", "read steer.toml: workers stands in no table; write [service] above it"),
        (b"service = 3", "read steer.toml: service is no table; write [service]"),
        (b"[[service]]", "read steer.toml: service is no table; write [service]"),
    ],
)
def test_a_bad_file(text: bytes, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sources.read(text, FILE)
    assert str(caught.value).startswith(said)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


words = st.text("aZ09 =,'\"\\#[]\t\n\u00e9\u2192", max_size=8)


@quick
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "bind": st.just((":80", "udp://[::1]:53")),
            "workers": st.just("auto") | st.integers(1, MAX_WORKERS),
            "policy": st.sampled_from(["cpu", "hash", '/srv/"my" policy.c']),
            "params": st.lists(words.map(lambda text: f"a={text}"), max_size=3).map(tuple),
            "strict": st.booleans(),
            "env": st.lists(words.map(lambda text: f"A={text}"), max_size=3).map(tuple),
            "user": words,
            "command": st.lists(words, max_size=3).map(tuple),
            "graceful_timeout": st.floats(SHORTEST_S, 86400),
            "backlog": st.integers(1, 65535),
        },
    )
)
def test_as_toml_reads_back(given_: dict[str, Any]) -> None:
    service = Service(**given_)
    assert load(file=sources.read(sources.as_toml(service).encode(), FILE)) == service


@pytest.mark.parametrize("text", ["K=a\0b", "K=\udcff"])
def test_what_no_variable_can_hold_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--env: env = .*: (a null byte|not UTF-8)"):
        sources.load({"env": (text,)}, {}, {}, "steer.toml")
