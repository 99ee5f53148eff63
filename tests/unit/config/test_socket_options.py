"""Options of sockets as users write them."""

from __future__ import annotations

from typing import Any

import pytest

from steer.config import socket_options, sources
from steer.config.service import Service
from steer.config.socket_options import OPTIONS
from steer.errors import ConfigError
from steer.sockets import sockopt
from testkit.option_values import ALL


@pytest.mark.parametrize("name", OPTIONS)
def test_each_reads_what_it_allows_and_refuses_what_it_does_not(name: str) -> None:
    (setting,) = (x for x in socket_options.parse([f"{name}={ALL[name]}"]) if x.name == name)
    assert str(setting) == f"{name}={ALL[name]}"
    assert setting.raw
    names = ("-1", "1e999", "nan") if name != "congestion" else ()
    for bad in ("", "9" * 5000, "\x7f", "é", "\u0661", "a" * 16, *names):
        with pytest.raises(ValueError, match=rf"^{name} is "):
            socket_options.parse([f"{name}={bad}"])


@pytest.mark.parametrize(
    "keys, says",
    [
        (
            {"socket_options": ["nodlay=yes"]},
            "unknown 'nodlay'; did you mean 'nodelay'? allowed: NAME=VALUE",
        ),
        ({"socket_options": ["mark=1", "MARK=2"]}, "mark is given twice"),
        ({"socket_options": ["keepcnt=128"]}, "keepcnt is probes from 1 to 127, not '128'"),
        ({"socket_options": ["priority=1"]}, "priority is for UDP, and no bind is"),
        (
            {"socket_options": ["nodelay=no"], "bind": ["udp://:1"]},
            "nodelay is for TCP, and no bind is",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_the_door(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sources.load({}, {}, keys, "steer.toml")
    assert str(caught.value).startswith("steer.toml: socket_options = ")
    assert says in str(caught.value)


def test_sockets_are_given_those_of_their_protocol() -> None:
    service = Service(bind=("udp://:1",), socket_options=("rcvbuf=1M",))
    assert [str(each) for each in service.settings] == ["rcvbuf=1M"]
    service = Service(bind=(":1", "udp://:1"), socket_options=("priority=3",))
    assert [str(x) for x in socket_options.for_protocol(service.settings, "tcp")] == ["nodelay=yes"]
    assert [str(x) for x in socket_options.for_protocol(service.settings, "udp")] == ["priority=3"]
    assert list(sockopt.refused(service.binds, service.settings)) == []
