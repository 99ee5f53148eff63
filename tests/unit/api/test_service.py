"""A configuration made in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import steer
from steer.api import service
from steer.config.service import FIELDS


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


def test_settings_are_those_of_the_configuration() -> None:
    assert set(service.Settings.__annotations__) == set(FIELDS)
