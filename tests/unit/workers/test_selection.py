"""Who is chosen, with a fake backend and a real loop."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, cast

import pytest

from steer.linux.log import Log
from steer.policy.layout import Member
from steer.workers import backup_watch
from steer.workers.selection import Selection

TURNS = 500


class FakeBackup:
    """One backup listener. What waits there comes back to it, for `returns` times."""

    def __init__(self, sock: socket.socket, returns: int) -> None:
        self.sockets = [sock]
        self.emptied = 0
        self._returns = returns

    def empty(self) -> None:
        self.emptied += 1
        if self.emptied > self._returns:
            self.sockets[0].accept()[0].close()


class RefusingBackup(FakeBackup):
    """As where no descriptor is left."""

    def empty(self) -> None:
        super().empty()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class FakeBackend:
    name = "fake"
    needs_order = False
    forget_flows: Callable[[int], None] | None = None

    def __init__(self, backup: FakeBackup | None = None) -> None:
        self.backup = backup

    def steer(self, members: Sequence[Member]) -> None:
        pass

    def reattach(self, lend: object) -> None:
        pass

    def grace_period(self) -> tuple[object, int] | None:
        return None

    def stored(self) -> tuple[object, Sequence[int]]:
        return None, ()


class FakeGuard:
    def __init__(self) -> None:
        self.puts: list[str] = []

    def put(self, key: str, *_: object) -> None:
        self.puts.append(key)

    def drop(self, key: str) -> None:
        pass


class FakeRetry:
    def until_done(self, act: str, do: Callable[[], object]) -> None:
        do()

    def attempt(self, act: str, do: Callable[[], object]) -> bool:
        try:
            do()
        except OSError:
            return False
        return True


class FakeHandle:
    serves = True

    def __init__(self, slot: int = 0) -> None:
        self.slot = slot

    def member(self) -> Member:
        return Member(self.slot)


@pytest.fixture
def waited_for() -> Iterator[socket.socket]:
    """A listener with a connection in its queue."""
    with (
        socket.create_server(("127.0.0.1", 0)) as made,
        socket.create_connection(made.getsockname()),
    ):
        made.setblocking(False)
        yield made


async def until_emptied(backup: FakeBackup, times: int, turns: int = 0) -> None:
    """So often, and so many turns of the loop more."""
    selection = Selection(
        cast(Any, FakeBackend(backup)),
        [cast(Any, FakeHandle())],
        4,
        cast(Any, FakeGuard()),
        Log("error", "text"),
        cast(Any, FakeRetry()),
    )
    loop = asyncio.get_running_loop()
    selection.watch(loop)
    selection.publisher.now()
    async with asyncio.timeout(60):
        while backup.emptied < times:
            await asyncio.sleep(0.001)
    for _ in range(turns):
        await asyncio.sleep(0)
    loop.remove_reader(backup.sockets[0])


def test_what_comes_back_to_a_backup_listener_is_not_moved_at_every_turn(
    waited_for: socket.socket,
) -> None:
    backup = FakeBackup(waited_for, returns=TURNS)
    asyncio.run(until_emptied(backup, 1, TURNS))
    assert backup.emptied < TURNS / 10


def test_what_comes_back_to_a_backup_listener_is_moved_again_later(
    monkeypatch: pytest.MonkeyPatch, waited_for: socket.socket
) -> None:
    monkeypatch.setattr(backup_watch, "_AGAIN_S", 0.01)
    backup = FakeBackup(waited_for, returns=2)
    asyncio.run(until_emptied(backup, 3))
    assert backup.emptied == 3


def test_when_it_cannot_be_moved_that_is_not_tried_at_every_turn(waited_for: socket.socket) -> None:
    backup = RefusingBackup(waited_for, returns=TURNS)
    asyncio.run(until_emptied(backup, 1, TURNS))
    assert backup.emptied < TURNS / 10


class JoinableBackend(FakeBackend):
    """Of a kind that does, or does not, have to know in which order sockets are."""

    controller_sockets: Sequence[object] = ()
    order: Sequence[int] | None = ()

    def __init__(self, needs_order: bool) -> None:
        super().__init__()
        self.needs_order = needs_order

    def add_member(self, slot: int, fds: Sequence[int]) -> None:
        pass

    def remove_member(self, slot: int) -> None:
        pass

    def take_counts(self, slot: int) -> None:
        pass

    def release(self) -> None:
        pass


def kept_after(needs_order: bool, *, has_loop: bool = True) -> list[int]:
    """How often the guard was told: after each of three that joined, of one that left and gave
    its slot up, and in the next turn of the loop."""
    guard, told = FakeGuard(), list[int]()

    async def run() -> None:
        backend, retry = JoinableBackend(needs_order), FakeRetry()
        args = (backend, [], 4, guard, Log("error", "text"), retry)
        selection = Selection(*cast(Any, args))
        loop = asyncio.get_running_loop()
        if has_loop:
            selection.watch(loop)
        for slot in range(3):
            selection.add_sockets(slot, ())
            told.append(len(guard.puts))
        selection.remove_sockets(0)
        selection.release_slot(0)
        told.append(len(guard.puts))
        if not has_loop:
            selection.watch(loop)
        await asyncio.sleep(0)
        told.append(len(guard.puts))

    asyncio.run(run())
    return told


def test_who_adopts_knows_the_order_of_sockets_at_any_moment() -> None:
    assert kept_after(needs_order=True) == [1, 2, 3, 4, 5]
    assert kept_after(needs_order=True, has_loop=False) == [1, 2, 3, 4, 5]


def kept_together(backend: JoinableBackend, *, has_loop: bool = True) -> list[int]:
    """How often the guard was told: after the first, after each of two that joined together, and
    when both had; and in the next turn of the loop."""
    guard, told = FakeGuard(), list[int]()

    async def run() -> None:
        args = (backend, [], 4, guard, Log("error", "text"), FakeRetry())
        selection = Selection(*cast(Any, args))
        if has_loop:
            selection.watch(asyncio.get_running_loop())
        selection.add_sockets(0, ())
        told.append(len(guard.puts))
        with selection.together():
            for slot in (1, 2):
                selection.add_sockets(slot, ())
                told.append(len(guard.puts))
        told.append(len(guard.puts))
        await asyncio.sleep(0)
        told.append(len(guard.puts))

    asyncio.run(run())
    return told


@pytest.mark.parametrize("has_loop", [True, False])
def test_the_order_of_those_who_join_together_is_told_once(has_loop: bool) -> None:
    backend = JoinableBackend(needs_order=True)
    assert kept_together(backend, has_loop=has_loop) == [1, 1, 1, 2, 2]


def test_the_order_is_told_at_once_where_sockets_of_ours_move_too() -> None:
    backend = JoinableBackend(needs_order=True)
    backend.controller_sockets = [object()]
    assert kept_together(backend) == [1, 2, 3, 3, 3]


def test_the_order_is_told_at_once_where_groups_have_different_ones() -> None:
    backend = JoinableBackend(needs_order=True)
    backend.order = None
    assert kept_together(backend) == [1, 2, 3, 3, 3]


def test_who_needs_no_order_is_not_kept_sooner_together() -> None:
    assert kept_together(JoinableBackend(needs_order=False)) == [1, 1, 1, 1, 2]


def test_order_is_told_at_once_also_right_after_another_backend_has_taken_over() -> None:
    guard, backend = FakeGuard(), JoinableBackend(needs_order=False)

    async def run() -> None:
        args = (backend, [], 4, guard, Log("error", "text"), FakeRetry())
        selection = Selection(*cast(Any, args))
        selection.watch(asyncio.get_running_loop())
        for slot in range(2):
            selection.add_sockets(slot, ())
        backend.needs_order = True
        selection.add_sockets(2, ())
        assert len(guard.puts) == 2

    asyncio.run(run())


def test_all_else_is_told_once_in_a_turn_of_the_loop() -> None:
    """But for the first, without which there would be nothing to adopt."""
    assert kept_after(needs_order=False) == [1, 1, 1, 1, 2]
    assert kept_after(needs_order=False, has_loop=False) == [1, 1, 1, 1, 2]


class WaitingBackend(JoinableBackend):
    """Whose next publication has to wait for programs, unless those were waited for.

    Attributes:
        publications: at each, whether it had to wait itself.
    """

    def __init__(self) -> None:
        super().__init__(needs_order=False)
        self.publications: list[bool] = []
        self._is_synchronized = False

    def grace_period(self) -> tuple[object, int] | None:
        return None if self._is_synchronized else (self, len(self.publications))

    def grace_period_ended(self, publication: tuple[object, int]) -> None:
        self._is_synchronized = publication == (self, len(self.publications))

    def steer(self, members: Sequence[Member]) -> None:
        self.publications.append(not self._is_synchronized)
        self._is_synchronized = False


def publications_of(
    script: Callable[[Selection, WaitingBackend], Coroutine[Any, Any, None]],
    backend: WaitingBackend | None = None,
) -> Any:
    backend = backend or WaitingBackend()

    async def run() -> None:
        args = (backend, [], 4, FakeGuard(), Log("error", "text"), FakeRetry())
        selection = Selection(*cast(Any, args))
        selection.watch(asyncio.get_running_loop())
        async with asyncio.timeout(60):
            await script(selection, backend)

    asyncio.run(run())
    return backend.publications


def test_loop_goes_on_while_a_publication_waits_for_programs() -> None:
    async def script(selection: Selection, backend: WaitingBackend) -> None:
        selection.publisher.soon()
        while not backend.publications:
            await asyncio.sleep(0)
            selection.publisher.soon()  # part of the same

    assert publications_of(script) == [False]


def test_who_cannot_wait_publishes_at_once_and_it_is_not_done_again() -> None:
    async def script(selection: Selection, _: WaitingBackend) -> None:
        selection.publisher.soon()
        await asyncio.sleep(0)
        selection.publisher.if_due()
        assert selection.publisher._grace_period is not None
        await selection.publisher._grace_period

    assert publications_of(script) == [True]


def test_table_is_published_also_where_there_are_no_more_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)

    async def script(selection: Selection, backend: WaitingBackend) -> None:
        selection.publisher.soon()
        while not backend.publications:
            await asyncio.sleep(0)

    assert publications_of(script) == [False]


def test_programs_are_waited_for_after_a_publication_so_that_the_next_need_not_wait() -> None:
    async def script(selection: Selection, backend: WaitingBackend) -> None:
        for _ in range(2):
            selection.publisher.soon()
            await selection.publisher.synchronized()
        selection.publisher.now()

    assert publications_of(script) == [False, False, False]


def test_what_is_not_to_come_back_waits_for_the_publication_and_for_programs() -> None:
    seen: list[tuple[int, bool]] = []

    async def script(selection: Selection, backend: WaitingBackend) -> None:
        def look() -> None:
            seen.append((len(backend.publications), backend.grace_period() is None))

        await selection.publisher.synchronized()
        selection.publisher.soon()
        selection.publisher.when_synchronized("look", look)
        assert not seen
        await selection.publisher.synchronized()
        selection.publisher.when_synchronized("look", look)

    publications_of(script)
    assert seen == [(1, True), (1, True)]


def test_flows_are_let_go_when_nobody_is_sent_there_any_more() -> None:
    let_go: list[int] = []

    class LettingGo(WaitingBackend):
        def forget_flows(self, slot: int) -> None:
            let_go.append(len(self.publications))

    async def script(selection: Selection, _: WaitingBackend) -> None:
        selection.forget_flows_soon(1)
        assert not let_go
        await selection.publisher.synchronized()
        selection.publisher.now()

    publications_of(script, LettingGo())
    assert let_go == [1]


def test_nobody_waits_for_a_service_that_ends() -> None:
    async def script(selection: Selection, backend: WaitingBackend) -> None:
        selection.publisher.soon()
        waiting = [
            asyncio.ensure_future(each())
            for each in (selection.publisher.published, selection.publisher.synchronized)
        ]
        await asyncio.sleep(0)
        selection.release()
        await asyncio.gather(*waiting)

    publications_of(script)


def test_a_publication_that_fails_is_not_waited_for_again_and_again() -> None:
    class FailingBackend(WaitingBackend):
        def steer(self, members: Sequence[Member]) -> None:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    async def script(selection: Selection, _: WaitingBackend) -> None:
        selection.publisher.soon()
        await selection.publisher.published()
        with pytest.raises(OSError, match="memory"):
            selection.publisher.if_due()

    publications_of(script, FailingBackend())


class RememberingBackend(JoinableBackend):
    def __init__(self, remembers: bool) -> None:
        super().__init__(needs_order=False)
        self.forgotten: list[int] = []
        self.forget_flows = self.forgotten.append if remembers else None
        self.chosen: list[list[int]] = []

    def steer(self, members: Sequence[Member]) -> None:
        self.chosen.append([member.slot for member in members])


@pytest.mark.parametrize(
    ("remembers", "chosen"), [(True, [[0, 2], [0, 2], [0, 1, 2]]), (False, [[0, 1, 2]] * 2)]
)
def test_who_has_ended_is_out_at_once_where_flows_are_remembered(
    remembers: bool, chosen: list[list[int]]
) -> None:
    """And in any publication until its slot is given up, whoever else that is for."""

    async def run() -> None:
        backend, workers = RememberingBackend(remembers), [FakeHandle(slot) for slot in range(3)]
        args = (backend, workers, 4, FakeGuard(), Log("error", "text"), FakeRetry())
        selection = Selection(*cast(Any, args))
        selection.watch(asyncio.get_running_loop())
        selection.exclude_ended([1])
        selection.publisher.now()
        selection.release_slot(1)
        selection.publisher.now()
        assert backend.chosen == chosen

    asyncio.run(run())
