"""A configuration made in Python."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

import steer
from steer.api import service
from steer.config import planning
from steer.config.service import FIELDS
from steer.linux import topology
from steer.loader import find


def test_configuration_is_checked_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_WORKERS", "7")
    made = steer.Config(
        app="shop:serve",
        bind=":8000",
        policy="source",
        params={"prefix4": 24},
        env={"A": "1"},
        weights=(3, 1),
    )
    found = made.service
    assert (found.app, found.bind, found.workers) == ("shop:serve", (":8000",), "auto")
    assert (found.params, found.env, found.weights) == (("prefix4=24",), ("A=1",), (3, 1))
    assert made == steer.Config(
        app="shop:serve",
        bind=[":8000"],
        policy="source",
        params={"prefix4": 24},
        env={"A": "1"},
        weights=[3, 1],
    )
    assert repr(steer.Config(app="shop:serve", workers=2)) == (
        "Config(app='shop:serve', workers=2)"
    )
    assert hash(made) == hash(made)


def test_options_of_a_server_keep_their_types() -> None:
    options = {"log_level": "error", "access_log": False, "headers": [("a", "b")], "threads": 4}
    made = steer.Config(app="shop:app", server="uvicorn", server_options=options)
    assert made.service.server_options == (
        *("log_level=error", "access_log=false", 'headers=[["a","b"]]', "threads=4"),
    )


def local() -> Callable[..., object]:
    def function(worker: object) -> None: ...

    return function


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"app": "shop:serve", "workers": 0}, "steer.Config: workers = 0: "),
        ({"app": "shop:serve", "worker": 2}, "unknown key; did you mean 'workers'"),
        ({"app": "shop:serve", "bind": "nonsense"}, "steer.Config: bind = "),
        ({"policy": "hash"}, "neither an app nor a command is given"),
        ({"app": local()}, "workers cannot find it by a name"),
        ({"app": lambda worker: None}, "workers cannot find it by a name"),
    ],
)
def test_what_cannot_be_is_told(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(steer.ConfigError) as caught:
        steer.Config(**settings)
    assert error in str(caught.value)


@pytest.mark.parametrize(
    "file, name",
    [
        ("shop.py", "shop"),
        ("/srv/my shop.v2.py", "my-shop.v2"),
        ("/srv/shop/__main__.py", "shop"),
        ("_-_.py", "python"),
        (None, "python"),
    ],
)
def test_a_service_of_a_script_has_the_name_of_its_file(
    file: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise all would be named __main__, and only one could run."""

    def serve(worker: object) -> None: ...

    serve.__module__, serve.__qualname__ = "__main__", "serve"
    monkeypatch.setattr(sys.modules["__main__"], "__file__", file)
    assert steer.Config(app=serve).service.service_name == name
    assert steer.Config(app=serve, name="mine").service.service_name == "mine"
    assert steer.Config(app="shop:serve").service.service_name == "shop"


SPEAKS_OF_AN_OPTION = r"--[a-z]"


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "source", "params": {"nope": 1}},
        {"policy": "source", "params": {"prefix4": 99}},
        {"policy": "auto", "params": {"prefix4": 24}},
        {"policy": "round-robin", "backend": "cbpf", "strict": True},
        {"policy": "kernel", "weights": [2, 1]},
        {"policy": "hash", "backend": "xdp"},
    ],
)
def test_errors_and_reasons_speak_of_parameters(settings: dict[str, Any]) -> None:
    def make() -> None:
        made = steer.Config(app="shop:serve", **settings).service
        planning.plan(made, topology.read(), {}, find.find(made.policy))

    with pytest.raises(steer.SteerError) as caught:
        make()
    assert not re.search(SPEAKS_OF_AN_OPTION, str(caught.value))
    with steer.ReuseportGroup("127.0.0.1:0", "hash", slots=1, backend="kernel") as group:
        assert group.reason == "backend = kernel"


def test_settings_are_those_of_the_configuration() -> None:
    assert set(service.Settings.__annotations__) == set(FIELDS)
