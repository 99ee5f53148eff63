"""What is said of counts that are not exact, or not there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

from steer.errors import KernelError
from steer.inspect import counting
from steer.inspect.seeing import View
from steer.linux import netns
from steer.loader.kernel_sockets import Look
from testkit.inspection import seen


class FakeCount:
    def __init__(self, counts: Mapping[int, int], missed: int) -> None:
        self._counts, self._missed = counts, missed

    def __enter__(self) -> FakeCount:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add_this_netns(self) -> None:
        pass

    def so_far(self) -> Mapping[int, int]:
        return self._counts

    def missed(self) -> int:
        return self._missed


class FakeLook:
    """Counts 5 at address 70, unless the protocol is refused."""

    def __init__(self, missed: int = 0, refused: str = "") -> None:
        self._missed, self._refused = missed, refused

    def count(self, protocol: str, _most: int) -> FakeCount:
        if protocol == self._refused:
            raise KernelError("attach a tracing program", "ENOTSUPP")
        return FakeCount({70: 5}, self._missed)


def counted(look: FakeLook | None, *protocols: str) -> counting.Counted:
    changes: dict[str, Any] = {"netns": netns.own(), "kernel_address": 70}
    socks = [seen(protocol=each, inode=at, **changes) for at, each in enumerate(protocols, 10)]
    view = View(socks, {}, cast(Look | None, look), [])
    return counting.count(view, socks, 0.0)


def test_exact_counts_need_no_note() -> None:
    found = counted(FakeLook(), "tcp", "udp")
    assert (found.counts, found.notes) == ({10: 5, 11: 5}, [])


def test_what_may_be_missing_is_told() -> None:
    (note,) = counted(FakeLook(missed=3), "udp").notes
    assert note.startswith("up to 3 more may have come: interrupts came while")


@pytest.mark.parametrize("refused, what", [("tcp", "connections"), ("udp", "datagrams")])
def test_one_is_counted_if_the_other_cannot_be(refused: str, what: str) -> None:
    found = counted(FakeLook(refused=refused), "tcp", "udp")
    assert found.counts == {11 if refused == "tcp" else 10: 5}
    assert found.notes == [f"cannot count {what}: attach a tracing program: ENOTSUPP"]


def test_without_privilege_that_is_told() -> None:
    found = counted(None, "udp")
    assert found.notes == ["cannot count without CAP_BPF and CAP_PERFMON; run as root"]
