"""The configuration that results when a running service is asked for another policy."""

from __future__ import annotations

import msgspec
import pytest

from steer.config.service import Service
from steer.controller.requested_policy import with_params_of, with_requested
from steer.errors import ConfigError
from steer.policy.builtin import built_in
from steer.policy.declarations import Declared, Param

ACT = "change the policy of web"
SOURCE = Service(policy="source", params=("prefix4=24", "prefix6=48"), weights=(1, 2))
POLICY = msgspec.structs.replace(
    built_in("source"),
    declared=Declared(params=(Param("prefix4", 32, 0, 32, ""), Param("depth", 1, 0, 9, ""))),
)


def test_what_is_not_asked_for_stays_but_parameters() -> None:
    found = with_requested(SOURCE, {"policy": "hash"}, ACT)
    assert (found.policy, found.params, found.weights) == ("hash", (), (1, 2))


def test_what_is_asked_for_is_taken_and_what_is_none_is_not() -> None:
    requested = {"policy": "hash", "weights": [3, 4], "params": None}
    assert with_requested(SOURCE, requested, ACT).weights == (3, 4)


def test_the_kernels_own_hash_has_no_weights() -> None:
    assert with_requested(SOURCE, {"policy": "kernel"}, ACT).weights == ()


def test_what_is_no_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match=ACT):
        with_requested(SOURCE, {"policy": 7}, ACT)


def test_of_the_same_policy_parameters_that_are_not_named_keep_their_values() -> None:
    requested = msgspec.structs.replace(SOURCE, params=("depth=3",))
    # One that the policy does not know any more, as its file was edited, goes.
    assert with_params_of(SOURCE, requested, POLICY).params == ("prefix4=24", "depth=3")
    renamed = msgspec.structs.replace(SOURCE, params=("prefix4=8",))
    assert with_params_of(SOURCE, renamed, POLICY).params == ("prefix4=8",)


def test_of_another_policy_parameters_are_those_asked_for() -> None:
    requested = msgspec.structs.replace(SOURCE, policy="hash", params=())
    assert with_params_of(SOURCE, requested, POLICY) == requested
