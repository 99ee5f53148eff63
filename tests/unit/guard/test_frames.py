"""The guard process keeps what its client was told to keep, whatever comes after what.

The client and the store are the real ones, and so is the channel between them. The store is in
this process: it takes each frame as soon as that is sent.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from steer.guard.channel import Channel, Frame
from steer.guard.client import GuardClient
from steer.guard.entry import Entry
from steer.guard.store import ControllerFiles, FdStore, Settings

KEYS = st.sampled_from(["worker a", "worker b", "selection", "mailbox"])
VALUES = st.sampled_from([b"", b"1", b"two", b"3" * 20_000])
TIES = 3
"""Descriptors of a worker's that are no sockets of its."""
_GROUP = 1 << 23
"""No process has such a number (PID_MAX_LIMIT of include/linux/threads.h)."""


class Obeyed:
    """A channel to a store that has done all it is told when `send_all` returns."""

    def __init__(self, ours: socket.socket, theirs: socket.socket, store: FdStore) -> None:
        self._ours, self._theirs, self._store = Channel(ours), Channel(theirs), store

    def send_all(self, frames: Iterable[Frame], fds: Sequence[int] = ()) -> None:
        sent = list(frames)
        self._ours.send_all(sent, fds)
        for _ in sent:
            received = self._theirs.receive()
            assert received
            frame, given = received
            self._store._understand(frame, given)
            if frame.wait:
                self._theirs.send(Frame("done"))

    def receive(self) -> object:
        return self._ours.receive()

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()
        for entry in self._store.entries.values():
            entry.close()


class Client(GuardClient):
    """Of which the store is in this process."""

    def __init__(self, control: socket.socket, settings: Settings) -> None:
        super().__init__(control, settings)
        cast(Any, self._process).start = self._begin

    def _begin(self, settings: Settings, _inode: int | None) -> None:
        ours, theirs = socket.socketpair()
        self.store = FdStore(settings, ControllerFiles(os.getpid(), None), cast(Any, None), None)
        self._process._channel = cast(Any, Obeyed(ours, theirs, self.store))

    def fork_again(self) -> None:
        """As after the guard process was killed."""
        assert self._process._channel
        self._process._channel.close()
        self.start()


def opened(number: int) -> tuple[int, ...]:
    """Descriptors that are told from one another by their inodes."""
    return tuple(os.memfd_create("kept") for _ in range(number))


def inodes(fds: Sequence[int]) -> Sequence[int]:
    return [os.fstat(fd).st_ino for fd in fds]


class Frames(RuleBasedStateMachine):
    """Attributes:
    kept: what is to be kept, by key.
    """

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="steer-test-"))
        with socket.socket() as control:
            self.guard = Client(control, Settings("test", str(self.home / "test.sock")))
        self.open_before = len(os.listdir("/proc/self/fd"))
        self.guard.start()
        self.kept: dict[str, Entry] = {}

    @rule(key=KEYS, value=VALUES, number=st.integers(0, 3))
    def put(self, key: str, value: bytes, number: int) -> None:
        """Others in place of those that were kept, if any."""
        is_worker = key.startswith("worker")
        group = _GROUP if is_worker else 0
        entry = Entry(value, opened(number + TIES * is_worker), group)
        self.guard.put(key, entry.value, entry.fds, entry.group)
        self.replace(key, entry)

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), value=VALUES, fewer=st.integers(0, 1), more=st.integers(0, 1))
    def put_again(self, data: st.DataObject, value: bytes, fewer: int, more: int) -> None:
        """The same with another value, and a descriptor more or less."""
        key = data.draw(st.sampled_from(sorted(self.kept)))
        old = self.kept[key]
        least = TIES if old.group else 0
        fds = old.fds[: max(least, len(old.fds) - fewer)] + opened(more)
        entry = Entry(value, fds, old.group)
        self.guard.put(key, entry.value, entry.fds, entry.group)
        self.replace(key, entry)

    @rule(values=st.dictionaries(KEYS, VALUES), number=st.integers(1, 2))
    def put_together(self, values: dict[str, bytes], number: int) -> None:
        """Some of them new, of others only the value is."""
        after = dict(self.kept)
        for key, value in values.items():
            old = self.kept.get(key)
            is_worker = key.startswith("worker")
            fds = old.fds if old else opened(number + TIES * is_worker)
            after[key] = Entry(value, fds, old.group if old else _GROUP * is_worker)
        with self.guard.together():
            for key in values:
                self.guard.put(key, after[key].value, after[key].fds, after[key].group)
        self.kept = after

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), value=VALUES)
    def update(self, data: st.DataObject, value: bytes) -> None:
        key = data.draw(st.sampled_from(sorted(self.kept)))
        self.guard.update(key, value)
        old = self.kept[key]
        self.kept[key] = Entry(value, old.fds, old.group)

    @rule(keys=st.lists(KEYS, unique=True))
    def drop(self, keys: list[str]) -> None:
        """Those too that there are not."""
        self.guard.drop(*keys)
        for key in keys:
            self.replace(key, None)

    @rule(keys=st.lists(st.sampled_from(["worker a", "worker b"]), unique=True))
    def let_go(self, keys: list[str]) -> None:
        self.guard.let_go(*keys)
        for key in keys:
            if key in self.kept:
                old = self.kept[key]
                self.replace(key, Entry(old.value, old.fds[:TIES], old.group))

    @rule(keys=st.lists(KEYS, unique=True), value=VALUES)
    def drop_and_put_together(self, keys: list[str], value: bytes) -> None:
        """All in the order in which it is told."""
        with self.guard.together():
            for key in keys:
                self.put(key, value, 1)
                self.drop([key])
                self.put(key, value, 2)
                self.guard.update(key, b"for a moment")
                self.put(key, value, 1)

    @rule()
    def fork_again(self) -> None:
        self.guard.fork_again()

    def replace(self, key: str, entry: Entry | None) -> None:
        """Close what is kept no more, as a caller does."""
        old = self.kept.pop(key, None)
        if entry is not None:
            self.kept[key] = entry
        for fd in set(old.fds if old else ()) - set(entry.fds if entry else ()):
            os.close(fd)

    @invariant()
    def both_have_what_is_to_be_kept(self) -> None:
        assert self.guard.entries == self.kept
        theirs = self.guard.store.entries
        assert theirs.keys() == self.kept.keys()
        for key, entry in self.kept.items():
            assert (theirs[key].value, theirs[key].group) == (entry.value, entry.group)
            assert inodes(theirs[key].fds) == inodes(entry.fds)

    @invariant()
    def nothing_else_is_open(self) -> None:
        channel = 2
        kept = 2 * sum(len(entry.fds) for entry in self.kept.values())
        assert len(os.listdir("/proc/self/fd")) == self.open_before + channel + kept

    def teardown(self) -> None:
        for key in list(self.kept):
            self.replace(key, None)
        with suppress(AttributeError):
            cast(Any, self.guard)._process._channel.close()
        shutil.rmtree(self.home)


TestFrames = Frames.TestCase
TestFrames.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
