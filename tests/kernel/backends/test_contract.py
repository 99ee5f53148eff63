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
from testkit.crew import Crew
from testkit.growth_fakes import Cost, FakeBackend, OrderedBackend, plan_for

FAKES = {"fake": FakeBackend, "fake with an order": OrderedBackend}
WORKERS = 3


class Fake:
    """A crew without sockets."""

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
def crew(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Three have joined, in this order."""
    if request.param in FAKES:
        made: Any = Fake(FAKES[request.param])
        made.join(*range(WORKERS))
        yield made
        return
    request.getfixturevalue("netns")
    policy = KERNEL if request.param == KERNEL else "hash"
    with Crew(request.param, policy, "tcp4", workers=WORKERS) as crew:
        crew.join(*range(WORKERS))
        yield crew


def ordered(crew: Any) -> Sequence[int] | None:
    return list(crew.backend.order) if crew.backend.needs_order else None


def test_order_is_known_where_it_is_needed(crew: Any) -> None:
    if crew.backend.needs_order:
        assert ordered(crew) == [0, 1, 2]
        crew.leave(0)
        assert sorted(ordered(crew) or ()) == [1, 2]
        crew.join(0)
        assert sorted(ordered(crew) or ()) == [0, 1, 2]
        assert (ordered(crew) or ())[-1] == 0


def test_any_number_may_be_chosen_and_the_same_again(crew: Any) -> None:
    for slots in ((0, 1, 2), (0, 1, 2), (), (1,), (2, 0)):
        crew.backend.steer([Member(slot) for slot in slots])


def test_who_left_may_come_back_at_once_and_others_at_its_slot(crew: Any) -> None:
    crew.steer()
    for _ in range(3):
        crew.leave(1)
        crew.steer()
        crew.join(1)
        crew.steer()


def test_it_can_be_saved_at_any_moment(crew: Any) -> None:
    """As JSON, and with descriptors that are open."""
    for act in (crew.steer, lambda: crew.leave(1), crew.steer, lambda: crew.join(1)):
        act()
        value, fds = crew.backend.stored()
        written = msgspec.json.encode(value)
        assert msgspec.json.encode(msgspec.json.decode(written)) == written
        for fd in fds:
            os.fstat(fd)


def test_nothing_is_held_of_who_left(crew: Any) -> None:
    crew.steer()
    crew.leave(1)
    assert list(crew.backend.held(1)) == []


def test_counts_are_counts_or_unknown_and_begin_anew(crew: Any) -> None:
    crew.steer()
    assert crew.backend.counts(0) in (None, Counts())
    assert crew.backend.take_counts(0) in (None, Counts())
    assert crew.backend.unsteered() in (None, 0)


def test_programs_are_waited_for_where_any_may_run(crew: Any) -> None:
    crew.steer()
    publication = crew.backend.grace_period()
    if publication is not None:
        crew.backend.grace_period_ended(publication)
    assert crew.backend.grace_period() is None


def test_what_remembers_no_flows_forgets_none(crew: Any) -> None:
    crew.steer()
    assert crew.backend.forget_flows is None


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
