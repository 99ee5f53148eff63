"""Memory that the attacher shares with programs: struct steer_attachment of bpf/steer.h."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from steer import abi
from steer.linux import netns
from steer.loader.bpf_maps import Map

_ALIVE, _OFFSETS = struct.Struct("=Q"), struct.Struct("=3I")
BEAT_S = 0.25
"""The interval of heartbeats. After four of them without one, programs ignore the table."""


class Heartbeat:
    """Renews the heartbeat in a thread: on busy CPUs, looking for listeners or membarrier(2) may
    take long.

    Args:
        beat: renews it once.
    """

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over.wait(BEAT_S):
            self._beat()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()


class Attachment:
    """The heartbeat, the marks of closing listeners, and the slot of each listener.

    Args:
        port: that the listeners are bound to.
        slots: capacity.
    """

    def __init__(self, port: int, slots: int) -> None:
        with ExitStack() as undo:
            self.maps: Mapping[str, Map] = {
                name: undo.enter_context(Map(name, slots))
                for name in ("attachment", "members", "events")
            }
            self._members = self.maps["members"]
            self._memory = self.maps["attachment"].memory()
            undo.callback(self._memory.close)
            head = abi.ATTACHMENT.pack(0, port, netns.own(), 0, 0, 0, 0, b"")
            self._memory.view[: len(head)] = head
            self.beat()
            self.close = undo.pop_all().close

    def tell_offsets(self, port: int, net: int, netns: int) -> None:
        """Where fields of kernel structures are, in bytes.

        Args:
            port, net: of struct sock_common: its port, and the pointer to its struct net.
            netns: of struct net: the number of the network namespace.
        """
        _OFFSETS.pack_into(self._memory.view, abi.OFFSETS_OFFSET, port, net, netns)

    def beat(self) -> None:
        """Renew the heartbeat."""
        _ALIVE.pack_into(self._memory.view, 0, time.monotonic_ns())

    def abandon(self) -> None:
        """Have programs ignore the table from now on. A forked child may call this: it maps the
        memory again, as it has not inherited that."""
        memory = self.maps["attachment"].memory()
        _ALIVE.pack_into(memory.view, 0, 0)
        memory.close()

    def joins(self, slot: int, cookie: int) -> None:
        """Assign the slot to the listener with that cookie."""
        self._memory.view[abi.CLOSING_OFFSET + slot] = 0
        self._members.put(cookie, slot.to_bytes(4, "little"))

    def leaves(self, cookie: int) -> None:
        self._members.delete(cookie)

    def is_closing(self, slot: int) -> bool:
        """Whether its listener has begun to close."""
        return bool(self._memory.view[abi.CLOSING_OFFSET + slot])
