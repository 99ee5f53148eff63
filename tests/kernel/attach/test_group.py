"""An attached group, in the process that has its listeners."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import pytest

from steer.attach import ownership, watch
from steer.attach.group import AttachedGroup
from steer.attach.roster import State
from steer.config.planning import plan
from steer.config.service import Service
from steer.config.sources import changed
from steer.errors import KernelError
from steer.linux import cgroup, topology
from steer.linux.log import Log
from steer.loader import bpf_maps, find, programs, tracing
from steer.sockets import group_program
from testkit.namespaces import network_namespace
from testkit.processes import eventually, is_ready

pytestmark = [
    pytest.mark.needs("bpf", "migrate", "netns", "root", "pidfd_getfd"),
    pytest.mark.usefixtures("netns"),
]

HOST, PORT = "127.0.0.1", 8731


def listener() -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind((HOST, PORT))
    made.listen()
    return made


@pytest.fixture
def listeners() -> Iterator[list[socket.socket]]:
    made = [listener() for _ in range(3)]
    yield made
    for each in made:
        each.close()


Open = Callable[[], AttachedGroup]


@pytest.fixture
def attach() -> Iterator[Open]:
    with ExitStack() as stack:

        def begin() -> AttachedGroup:
            asked = {"bind": [f"{HOST}:{PORT}"], "policy": "least-conn", "workers": 3}
            service = changed(Service(), {**asked, "backend": "ebpf"}, "test")
            decided = plan(service, topology.read(), {}, find.find("least-conn"))
            group = AttachedGroup(decided, Log("error", "text"))
            stack.callback(group.close)
            group.begin()
            stack.callback(group.detach)
            return group

        yield begin


def opened(group: AttachedGroup) -> list[int | None]:
    return [group.backend.open(each.slot) for each in group.roster]


def connected(clients: ExitStack, number: int) -> list[socket.socket]:
    made = [socket.create_connection((HOST, PORT)) for _ in range(number)]
    for each in made:
        clients.enter_context(each)
    return made


def refuse(*_: object) -> int:
    raise KernelError("find a tracepoint", "ENOENT")


@pytest.mark.parametrize("is_traced", [True, False])
def test_connections_are_counted_on_a_tracepoint_or_in_cgroups(
    attach: Open,
    listeners: list[socket.socket],
    clients: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    is_traced: bool,
) -> None:
    if not is_traced:
        monkeypatch.setattr(tracing, "tracepoint_number", refuse)
    group = attach()
    assert group.counting.sees_older == is_traced
    connected(clients, 6)
    eventually(lambda: opened(group), [2, 2, 2])
    accepted = [each.accept()[0] for each in listeners]
    for each in accepted:
        each.close()
    eventually(lambda: opened(group), [1, 1, 1])


def test_listener_that_comes_is_let_in_and_one_that_goes_is_let_go(
    attach: Open, listeners: list[socket.socket]
) -> None:
    group = attach()
    listeners.append(listener())
    group.look()
    assert [each.state for each in group.roster] == [*[State.READY] * 3, State.STARTING]
    slot = slot_of(group, listeners[0])
    listeners.pop(0).close()
    group.look()
    assert {each.slot for each in group.roster} == {0, 1, 2, 3} - {slot}


def test_listener_that_cannot_join_is_tried_again(
    attach: Open, listeners: list[socket.socket]
) -> None:
    group = attach()
    with bpf_maps.Map("sockets", 1) as array:
        listeners.append(listener())
        array.put_socket(0, listeners[-1].fileno())
        eventually(lambda: looked(group).joining.refusals.by_reason() != {})
        (why,) = group.joining.refusals.by_reason()
        assert "in the sockarray or sockmap of another program" in why.found
        listeners.pop(0).close()
        listeners.append(listener())
        assert len(looked(group).roster) == 3
    eventually(lambda: len(looked(group).roster) == 4)
    assert not group.joining.refusals.by_reason()


def test_full_group_still_lets_listeners_go_and_joins_others_then(
    attach: Open, listeners: list[socket.socket]
) -> None:
    group = attach()
    capacity = group.roster.capacity
    listeners += [listener() for _ in range(capacity)]
    looked(group)
    assert (len(group.roster), group.joining.without_room) == (capacity, 3)
    assert not group.joining.has_new_room
    for _ in range(2):
        listeners.pop(0).close()
    looked(group)
    assert group.joining.has_new_room
    looked(group)
    assert (len(group.roster), group.joining.without_room) == (capacity, 1)


def test_table_that_could_not_be_written_is_written_at_the_next_look(
    attach: Open, listeners: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = attach()
    written: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(group.backend, "steer", refuse)
        listeners.pop(0).close()
        with pytest.raises(KernelError):
            group.look()
    monkeypatch.setattr(group.backend, "steer", lambda found: written.append(len(found)))
    looked(group)
    assert written == [2]


def slot_of(group: AttachedGroup, joined: socket.socket) -> int:
    """Slots follow inodes, and each CPU gives inodes out of a range of its own."""
    inode = os.fstat(joined.fileno()).st_ino
    return next(each.slot for each in group.roster if each.listener.inode == inode)


def looked(group: AttachedGroup) -> AttachedGroup:
    group.look()
    return group


def test_listener_of_a_removed_cgroup_is_watched(
    attach: Open, listeners: list[socket.socket], cgroup_below: Path
) -> None:
    """By a program on the root of the mount, which runs for those that were below it."""
    (cgroup_below / "cgroup.procs").write_text(str(os.getpid()))
    listeners.append(listener())
    (cgroup_below.parent / "cgroup.procs").write_text(str(os.getpid()))
    cgroup_below.rmdir()
    group = attach()
    slot = slot_of(group, listeners[-1])
    listeners.pop().close()
    assert group.attachment.is_closing(slot)


def test_listener_of_another_cgroup_is_watched(
    attach: Open, listeners: list[socket.socket], cgroup_below: Path
) -> None:
    (cgroup_below / "cgroup.procs").write_text(str(os.getpid()))
    listeners.append(listener())
    (cgroup_below.parent / "cgroup.procs").write_text(str(os.getpid()))
    group = attach()
    slot = slot_of(group, listeners[-1])
    listeners.pop().close()
    assert group.attachment.is_closing(slot)


@pytest.mark.needs("tracing")
def test_program_is_checked_again_without_loading_one(
    attach: Open, listeners: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = attach()
    assert group.check_program() is None
    monkeypatch.setattr(ownership, "Look", refuse)
    group_program.detach(listeners[0].fileno())
    found = group.check_program()
    assert found is not None
    assert "steer's program was detached" in found.found


@pytest.mark.parametrize("lack", [errno.EMFILE, errno.ENOMEM])
def test_listener_that_cannot_be_counted_for_lack_of_something_joins_later(
    attach: Open,
    listeners: list[socket.socket],
    cgroup_below: Path,
    monkeypatch: pytest.MonkeyPatch,
    lack: int,
) -> None:
    monkeypatch.setattr(tracing, "tracepoint_number", refuse)
    group = attach()
    (cgroup_below / "cgroup.procs").write_text(str(os.getpid()))
    listeners.append(listener())
    (cgroup_below.parent / "cgroup.procs").write_text(str(os.getpid()))

    def lacking(*_given: object) -> NoReturn:
        raise KernelError("attach", errno.errorcode[lack], errno=lack)

    with monkeypatch.context() as patch:
        patch.setattr(programs, "Link", lacking)
        assert len(looked(group).roster) == 3
    assert group.counting.why_not is None
    eventually(lambda: len(looked(group).roster) == 4)
    with ExitStack() as clients:
        connected(clients, 8)
        eventually(lambda: sum(each or 0 for each in opened(looked(group))), 8)


@pytest.fixture
def cgroup_below() -> Iterator[Path]:
    """Below the one that we are in."""
    with cgroup.own() as directory:
        made = Path(os.readlink(f"/proc/self/fd/{directory}"), f"steer-test-{os.getpid()}")
    made.mkdir()
    yield made
    (made.parent / "cgroup.procs").write_text(str(os.getpid()))
    if made.exists():
        made.rmdir()


@pytest.mark.parametrize("is_traced", [True, False])
def test_new_listener_is_reported(
    attach: Open,
    listeners: list[socket.socket],
    cgroup_below: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_traced: bool,
) -> None:
    """On a tracepoint from any cgroup, otherwise from those where others were created."""
    if not is_traced:
        monkeypatch.setattr(tracing, "tracepoint_number", refuse)
    group = attach()
    assert group.joining.watch is not None
    assert not is_ready(group.joining.watch.events)
    (cgroup_below if is_traced else cgroup_below.parent).joinpath("cgroup.procs").write_text(
        str(os.getpid())
    )
    with socket.create_server((HOST, 0)):
        assert not is_ready(group.joining.watch.events)
    listeners.append(listener())
    (cgroup_below.parent / "cgroup.procs").write_text(str(os.getpid()))
    assert is_ready(group.joining.watch.events)


@pytest.mark.needs("tracing")
def test_listener_in_another_network_namespace_is_not_reported(
    attach: Open, listeners: list[socket.socket]
) -> None:
    group = attach()
    assert group.joining.watch is not None
    with network_namespace(), listener():
        assert not is_ready(group.joining.watch.events)
    listeners.append(listener())
    assert is_ready(group.joining.watch.events)


def test_listeners_that_are_not_heard_of_are_still_found(
    attach: Open, listeners: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch.Watch, "__init__", refuse)
    group = attach()
    assert group.joining.why_unwatched is not None
    listeners.append(listener())
    group.look()
    assert len(group.roster) == 4
