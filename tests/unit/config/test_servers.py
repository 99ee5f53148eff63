"""Servers that steer knows, and what tells them to end."""

from __future__ import annotations

import signal
import sys
from signal import Signals
from typing import Any

import pytest

from steer.config import servers
from steer.config.servers import SERVERS, ProcessInfo, stop_signals_of
from steer.config.service import Service
from steer.config.sources import load
from steer.errors import ConfigError


def shown(*arguments: str, name: str = "") -> ProcessInfo:
    return ProcessInfo(arguments, name)


@pytest.mark.parametrize(
    "line, first, others",
    [
        ([], "TERM", "TERM"),
        ([shown("nginx: master process /usr/sbin/nginx -c /etc/x.conf")], "QUIT", "QUIT"),
        ([shown("php-fpm: master process (/etc/php/fpm.conf)")], "QUIT", "QUIT"),
        ([shown("unicorn master -c /srv/config.rb")], "QUIT", "QUIT"),
        ([shown("web", name="php-fpm8.2")], "QUIT", "QUIT"),
        ([shown("gunicorn: master [nginx]", name="gunicorn")], "TERM", "TERM"),
        ([shown("sh", name="tini"), shown("/usr/sbin/haproxy", "-db")], "USR1", "USR1"),
        ([shown("sh", name="sh"), shown("httpd")], "TERM", "WINCH"),
        ([shown("sh", name="tini"), shown("sh", name="sh"), shown("nginx")], "TERM", "QUIT"),
        ([shown("sh", name="sh"), shown("sleep", "nginx", name="sleep")], "TERM", "TERM"),
    ],
)
def test_a_server_is_known_by_what_it_shows(
    line: list[ProcessInfo], first: str, others: str
) -> None:
    found = stop_signals_of(line)
    assert (found.first, found.others) == (Signals[f"SIG{first}"], Signals[f"SIG{others}"])


@pytest.mark.parametrize(
    "name, cause",
    [
        ("QIUT", "no such signal; did you mean 'QUIT'?"),
        ("CHLDD", "no such signal; allowed: "),  # and not one that is refused in turn
        ("9", "no such signal; "),
        ("SIG", "no such signal; "),
        ("KILL", "no process can act on it; "),
        ("SIGSTOP", "no process can act on it; "),
        ("tstp", "it stops a process; "),
        ("TTIN", "it stops a process; "),
        ("CHLD", "it ends no process; "),
        ("CLD", "it ends no process; "),
        ("URG", "it ends no process; "),
        ("CONT", "it ends no process; "),
    ],
)
def test_what_ends_no_server_is_refused(name: str, cause: str) -> None:
    keys: dict[str, Any] = {"stop_signal": name}
    with pytest.raises(ConfigError) as caught:
        load({}, {}, keys, "steer.toml")
    assert str(caught.value).startswith(f"steer.toml: stop_signal = '{name}': {cause}")
    assert "allowed: the name of a signal on which a server ends: QUIT" in caught.value.cure


@pytest.mark.parametrize("number", {each.stop_signal for each in SERVERS.values()})
def test_what_a_known_server_ends_on_is_allowed(number: Signals) -> None:
    assert Service(stop_signal=number.name).finish_signal is number
    assert Service(stop_signal="IOT").finish_signal is signal.SIGABRT


@pytest.mark.parametrize(
    "command, arguments, wanted",
    [
        (("uvicorn", "m:a"), (), "--fd {fd}"),
        ((sys.executable, "-m", "hypercorn", "m:a"), (), "--bind fd://{fd}"),
        (("sh", "-c", "exec gunicorn m:a"), ("gunicorn: master [m:a]",), "reuse_port"),
        (("uv", "run", "gunicorn", "m:a"), ("python", "/bin/gunicorn"), "--bind fd://{fd}"),
        (("./mine",), ("./mine",), "LISTEN_FDS"),
        ((), (), "worker.sockets"),
    ],
)
def test_what_to_change(command: tuple[str, ...], arguments: tuple[str, ...], wanted: str) -> None:
    first = command if "uv" in command else arguments
    assert wanted in servers.listen_cure(command, first, arguments)


def test_one_whose_address_is_in_use_was_not_given_its_sockets() -> None:
    words = "[ERROR] Can't connect to ('127.0.0.1', 8080): [Errno 98] Address already in use"
    cause, cure = servers.why_it_ended(("./start", "gunicorn", "m:a"), 1, words)
    assert cause == "it binds an address itself, which is in use"
    assert cure.endswith("add to its command: --bind fd://{fd}")
    assert servers.why_it_ended(("./start",), 1, "no such file") == ("", "")
