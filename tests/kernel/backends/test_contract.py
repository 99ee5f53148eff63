"""What the pool may rely on, of all backends and of the fakes that stand for them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import msgspec
import pytest

from steer.backends.base import Backend, Counts
from steer.policy.builtin import CBPF, EBPF, KERNEL
from steer.policy.layout import Member
from testkit.growth_fakes import Cost, FakeBackend, OrderedBackend, plan_for
from testkit.harness import Harness

FAKES = {"fake": FakeBackend, "fake with an order": OrderedBackend}
WORKERS = 3


class Fake:
    """A harness without sockets."""

    def __init__(self, kind: type[FakeBackend]) -> None:
        self.plan = plan_for(WORKERS, "hash")
        self.backend = cast(Backend, kind(self.plan, Cost()))
        self.slots: set[int] = set()

    def join(self, *slots: int) -> None:
        for slot in slots:
            self.slots.add(slot)
            self.backend.add_member(slot, ())

    def leave(self, *slots: int) -> None:
        for slot in slots:
            self.slots.remove(slot)
            self.backend.remove_member(slot)

    def steer(self) -> None:
        self.backend.steer([Member(slot) for slot in sorted(self.slots)])


@pytest.fixture(params=[*FAKES, EBPF, CBPF, KERNEL])
def harness(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Three have joined, in this order."""
    if request.param in FAKES:
        made: Any = Fake(FAKES[request.param])
        made.join(*range(WORKERS))
        yield made
        return
    request.getfixturevalue("netns")
    policy = KERNEL if request.param == KERNEL else "hash"
    with Harness(request.param, policy, "tcp4", workers=WORKERS) as harness:
        harness.join(*range(WORKERS))
        yield harness


def ordered(harness: Any) -> Sequence[int] | None:
    return list(harness.backend.order) if harness.backend.needs_order else None


def test_order_is_known_where_it_is_needed(harness: Any) -> None:
    if harness.backend.needs_order:
        assert ordered(harness) == [0, 1, 2]
        harness.leave(0)
        assert sorted(ordered(harness) or ()) == [1, 2]
        harness.join(0)
        assert sorted(ordered(harness) or ()) == [0, 1, 2]
        assert (ordered(harness) or ())[-1] == 0


def test_any_number_may_be_chosen_and_the_same_again(harness: Any) -> None:
    for slots in ((0, 1, 2), (0, 1, 2), (), (1,), (2, 0)):
        harness.backend.steer([Member(slot) for slot in slots])


def test_who_left_may_come_back_at_once_and_others_at_its_slot(harness: Any) -> None:
    harness.steer()
    for _ in range(3):
        harness.leave(1)
        harness.steer()
        harness.join(1)
        harness.steer()


def test_it_can_be_saved_at_any_moment(harness: Any) -> None:
    """As JSON, and with descriptors that are open."""
    for act in (harness.steer, lambda: harness.leave(1), harness.steer, lambda: harness.join(1)):
        act()
        value, fds = harness.backend.stored()
        written = msgspec.json.encode(value)
        assert msgspec.json.encode(msgspec.json.decode(written)) == written
        for fd in fds:
            os.fstat(fd)


def test_nothing_is_held_of_who_left(harness: Any) -> None:
    harness.steer()
    harness.leave(1)
    assert list(harness.backend.held(1)) == []


def test_counts_are_counts_or_unknown_and_begin_anew(harness: Any) -> None:
    harness.steer()
    assert harness.backend.counts(0) in (None, Counts())
    assert harness.backend.take_counts(0) in (None, Counts())
    assert harness.backend.unsteered() in (None, 0)


def test_programs_are_waited_for_where_any_may_run(harness: Any) -> None:
    harness.steer()
    publication = harness.backend.grace_period()
    if publication is not None:
        harness.backend.grace_period_ended(publication)
    assert harness.backend.grace_period() is None


def test_what_remembers_no_flows_forgets_none(harness: Any) -> None:
    harness.steer()
    assert harness.backend.forget_flows is None


def public(kind: type) -> dict[str, Callable[..., object]]:
    return {
        name: each
        for name, each in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
    }


@pytest.mark.parametrize("fake", FAKES.values(), ids=FAKES.keys())
def test_a_fake_has_only_what_backends_have_and_is_called_as_they_are(
    fake: type[FakeBackend],
) -> None:
    real = public(cast(type, Backend))
    for name, method in public(fake).items():
        assert name in real, name
        wanted = inspect.signature(real[name]).parameters.values()
        takes = inspect.signature(method)
        needed = [each for each in wanted if each.default is each.empty]
        takes.bind(*needed)
        assert [each.kind for each in takes.parameters.values()] == [
            each.kind for each in needed
        ] or len(takes.parameters) == len(wanted)
