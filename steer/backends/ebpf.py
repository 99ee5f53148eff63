"""The backend with everything: an eBPF program for each group, all reading one table."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import islice

import msgspec

from steer import abi
from steer.backends import backup, connections, groups, loaded_policy, shortfalls
from steer.backends.anchors import Anchors, is_left_to_hash
from steer.backends.backup import BackupListeners
from steer.backends.connections import Counting
from steer.backends.ebpf_counters import EbpfCounters
from steer.backends.ebpf_selector import EbpfSelector
from steer.backends.groups import Groups
from steer.backends.loaded_policy import LoadedPolicy
from steer.backends.policy_cache import PolicyCache
from steer.config.plan import Plan
from steer.config.service import Service
from steer.loader.bpf_maps import Map
from steer.loader.libbpf import Descriptor
from steer.sockets import group_program, listeners

NO_MAPS: Mapping[str, Map] = {}


class StoredEbpf(msgspec.Struct):
    """What the next controller needs to use the descriptors that are stored beside it.

    Args:
        backups: how many backup listeners each bind has.
        anchored: the binds that have an anchor.
    """

    policy: loaded_policy.StoredPolicy
    backups: list[int]
    counting: connections.StoredCounting
    anchored: list[int] = []


class Ebpf(EbpfSelector, EbpfCounters):
    """One program for each group.

    Args:
        empty: load no policy, because `restore` follows.
        counting: counts open connections already, for the backend in force; None: start to count.
        attachment: the maps of `steer attach`, if the sockets are those of other servers.
        sockmap: select from a sockmap, as the sockets are in one already: such a socket cannot be
            in a sockarray.
    """

    name = "ebpf"
    order = None
    needs_order = False

    def __init__(
        self,
        plan: Plan,
        empty: bool = False,
        counting: Counting | None = None,
        attachment: Mapping[str, Map] = NO_MAPS,
        sockmap: bool = False,
    ) -> None:
        self._plan = plan
        self._attachment = attachment
        self.owns_counting = counting is None
        self._is_serving = False
        self._anchors = Anchors()
        self._slots: set[int] = set()
        self._policies = PolicyCache(self._load)
        tcp_binds = sum(bind.protocol == "tcp" for bind in plan.binds)
        with ExitStack() as undo:
            slots = plan.slots + backup.COUNT
            self.counting = counting or Counting(slots * tcp_binds)
            undo.callback(self._close_counting)
            cpus = len(plan.topology.possible)
            kind = abi.BPF_MAP_TYPE_SOCKMAP if sockmap else abi.BPF_MAP_TYPE_REUSEPORT_SOCKARRAY
            self._groups = Groups(len(plan.binds), slots, len(plan.specs), cpus, kind)
            undo.callback(self._groups.close)
            self.backup = BackupListeners(
                plan.binds,
                plan.service,
                plan.slots,
                self.counting,
                self._join,
                self._prepare_for_backup,
                self._synchronize,
            )
            undo.callback(self.backup.close)
            undo.callback(self._anchors.close)
            undo.callback(self._policies.close)
            if not empty:
                self._policies.put_in_force(self._load(plan))
            self.close = undo.pop_all().close

    @property
    def programs(self) -> Sequence[Descriptor]:
        """Those in force, one for each bind."""
        return self._policy.programs

    def _load(self, plan: Plan) -> LoadedPolicy:
        shared = {**self.counting.maps, **self._attachment}
        groups = [{**maps, **shared} for maps in self._groups.maps]
        return LoadedPolicy.load(plan, groups, attached=bool(self._attachment))

    def _close_counting(self) -> None:
        if self.owns_counting:
            self.counting.close()

    def _prepare_for_backup(self) -> bool:
        """While no worker can be selected, select the backup listeners.

        Returns:
            Whether their queues can be moved, which takes a program that migrates.
        """
        if not self._is_serving:
            self._policy.prepare(self.backup.slots[0])
        return self._policy.migrates

    def _synchronize(self) -> None:
        self._policy.synchronize()

    @property
    def notes(self) -> Sequence[str]:
        lost = shortfalls.may_be_lost(self._plan.binds, self._policy.migrates)
        return (*lost, *shortfalls.of_load(self._plan, self.counting.why_not))

    def add_member(self, slot: int, fds: Sequence[int]) -> None:
        self._add(slot, fds, is_counted=False)

    def take_over(self, slot: int, fds: Sequence[int]) -> None:
        """If the former backend counted connections, its `counting` has these listeners."""
        self._add(slot, fds, is_counted=not self.owns_counting)

    def _add(self, slot: int, fds: Sequence[int], is_counted: bool) -> None:
        """Close the descriptors in any case: a duplicate would listen on, and be selected, after
        its worker has died."""
        try:
            if not is_counted:
                self.counting.add_listeners(slot, fds, self._plan.binds)
            for bind, fd in enumerate(fds):
                self._join(bind, slot, fd)
            self._slots.add(slot)
            self._spread_datagrams()
        finally:
            for fd in fds:
                os.close(fd)

    def _join(self, bind: int, slot: int, fd: int) -> None:
        self._groups.put(bind, slot, fd)
        # Each time, because a group loses its program with its last socket.
        groups.attach_through(fd, self._policy.programs[bind])
        self._anchors.renew(bind, self._plan.binds[bind])

    def remove_member(self, slot: int) -> None:
        self.counting.remove_listeners(slot)
        self._forget_flows(slot)
        self._groups.remove([slot])
        self._slots.discard(slot)
        self._spread_datagrams()

    def is_member(self, slot: int, bind: int) -> bool | None:
        return self._groups.has(bind, slot)

    def record_departure(self, slot: int, bind: int) -> None:
        """Nothing to do: a program that selects the slot tries others (`steer_select` of
        bpf/steer.h)."""

    def rejoin(self, slot: int, bind: int, sock: socket.socket) -> None:
        self._groups.put_back(bind, slot, sock.fileno())
        with suppress(group_program.NoMember):
            groups.attach_through(sock.fileno(), self._policy.programs[bind])

    def migrate_queue(self, slot: int, owned: Mapping[int, socket.socket]) -> None:
        if not self._policy.migrates:
            return
        for bind, sock in owned.items():
            if listeners.is_waited_for(sock):
                listeners.move_queue(sock)
                self._groups.put(bind, slot, sock.fileno())

    def held(self, slot: int) -> Sequence[int]:
        return ()

    @property
    def anchors(self) -> Mapping[int, socket.socket]:
        return self._anchors

    @property
    def controller_sockets(self) -> Sequence[socket.socket]:
        return (*self.backup.sockets, *self._anchors.values())

    def open_anchors(self) -> None:
        self._anchors.open(self._plan.binds, self._plan.service)

    def renew_anchors(self, service: Service) -> None:
        if is_left_to_hash(service):
            self._anchors.close()
        self._plan = msgspec.structs.replace(self._plan, service=service)

    def stored(self) -> tuple[object, Sequence[int]]:
        policy, policy_fds = self._policy.stored()
        counting, counting_fds = self.counting.stored()
        sockets = [sock.fileno() for sock in self.controller_sockets]
        value = StoredEbpf(policy, self.backup.numbers, counting, list(self._anchors))
        return value, [*policy_fds, *self._groups.descriptors(), *sockets, *counting_fds]

    def restore(self, value: object, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        stored = msgspec.convert(value, type=StoredEbpf, strict=False)
        rest = iter(fds)
        policy_fds = list(islice(rest, len(stored.policy.maps) + len(self._groups)))
        self._policies.put_in_force(LoadedPolicy.receive(self._plan, stored.policy, policy_fds))
        self._groups.receive(rest)
        self.backup.receive(stored.backups, rest)
        self._anchors.receive(stored.anchored, islice(rest, len(stored.anchored)))
        self.counting.restore(stored.counting, list(rest))
        self._is_serving = True

    def reassert(self, sockets: Mapping[int, Mapping[int, socket.socket]]) -> None:
        for bind, slot, sock in self.backup.listen_again():
            self.rejoin(slot, bind, sock)
        self._slots = set(sockets)
        for slot, socks in sockets.items():
            for bind, sock in socks.items():
                self.rejoin(slot, bind, sock)

    def release(self) -> None:
        """What waits at backup listeners moves to workers that have not closed theirs yet."""
        self.backup.close()
        self._anchors.close()
