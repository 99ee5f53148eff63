"""A policy loaded into the kernel: a program for each group, the table, and other maps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Self

import msgspec

from steer import abi, features
from steer.backends.base import PolicyValues
from steer.config.plan import Plan
from steer.errors import VerifierError
from steer.features import Answer
from steer.linux import capabilities
from steer.loader import bpf_maps, compile, find, libbpf, probe, shared_memory
from steer.loader.programs import ATTACH_TYPES, NEEDS_PERFMON, Program
from steer.policy import builtin
from steer.policy.builtin import LayoutContext, Policy
from steer.policy.bytecode import PolicyObject
from steer.policy.layout import Layout, Member, fallbacks, read, uniform

_FLOWS = 65536
"""How many flows a policy can remember if it has no parameter `capacity`."""
_CAPACITY = "capacity"
_OWN_MAPS = ("table", "params", "own", "early")


class StoredPolicy(msgspec.Struct):
    """The names of the maps, in the order of their descriptors; those of programs follow."""

    maps: list[str]
    migrates: bool


class LoadedPolicy:
    """A policy in the kernel. Made by `load` or `receive`.

    Args:
        plan: has the policy, its parameters and weights.
        maps: the maps of this policy, by name.
        programs: one for each group.
        migrates: whether the programs select where the queue of a closing listener goes.
    """

    def __init__(
        self,
        plan: Plan,
        maps: Mapping[str, bpf_maps.Map],
        programs: Sequence[libbpf.Descriptor],
        migrates: bool,
    ) -> None:
        self.programs = programs
        self.migrates = migrates
        self._plan = plan
        self._maps = maps
        self._table = shared_memory.Table(maps["table"])
        self._cpus = len(plan.topology.possible)
        self._layout: Layout | None = None
        self._layout_input: object = None
        self._in_table: Layout | None = None
        self._left_s = math.inf
        self._seed = int.from_bytes(os.urandom(4))

    @classmethod
    def load(
        cls, plan: Plan, groups: Sequence[Mapping[str, bpf_maps.Map]], attached: bool = False
    ) -> Self:
        """Load the policy of a plan.

        Args:
            groups: for each bind, the maps that stay when the policy changes.
            attached: select among sockets of other servers; see `compile.load`.

        Raises:
            CompileError, VerifierError: a custom policy has an error.
            KernelError: the kernel refuses the program or a map.
        """
        _refuse_long_verification(plan.policy)
        code = compile.load(find.file_of(plan.policy), plan.policy.digest, attached)
        with ExitStack() as undo:
            maps = {name: undo.enter_context(bpf_maps.Map(name)) for name in _OWN_MAPS}
            if any("flows" in each.relocations.values() for each in code.programs.values()):
                sets = -(-_capacity(plan) // abi.FLOWS_OF_SET)
                maps["flows"] = undo.enter_context(bpf_maps.Map("flows", sets))
            migrates = probe.ask(features.MIGRATE).answer is not Answer.NO
            kind = "migrate" if migrates else "plain"
            programs = [
                undo.enter_context(_load(plan.policy, code, kind, {**maps, **group}, bind.protocol))
                for group, bind in zip(groups, plan.binds, strict=True)
            ]
            loaded = cls(plan, maps, programs, migrates)
            loaded._table.clear()
            loaded._write_params()
            undo.pop_all()
        return loaded

    @classmethod
    def receive(cls, plan: Plan, saved: StoredPolicy, fds: Sequence[int]) -> Self:
        """Continue with the policy of an earlier controller, and own its descriptors."""
        maps = {
            name: bpf_maps.Map.received(name, fd) for name, fd in zip(saved.maps, fds, strict=False)
        }
        programs = [libbpf.Descriptor(fd) for fd in fds[len(maps) :]]
        received = cls(plan, maps, programs, saved.migrates)
        received._layout = read(received._table.active())
        params = maps["params"].per_cpu(0, cpus=1)
        _, _, received._seed, *_ = abi.PARAMS.unpack(params)
        return received

    def stored(self) -> tuple[StoredPolicy, Sequence[int]]:
        """See `receive`."""
        held = [each.fileno() for each in (*self._maps.values(), *self.programs)]
        return StoredPolicy(list(self._maps), self.migrates), held

    def close(self) -> None:
        self._table.close()
        for each in (*self._maps.values(), *self.programs):
            each.close()

    def begin(self) -> None:
        """Note that this policy selects from now on; programs of another policy may still run."""
        self._table.begin_grace_period()

    def left(self) -> None:
        """Note that another policy selects from now on."""
        self._left_s = time.monotonic()

    @property
    def has_rested(self) -> bool:
        """Whether all programs that ran when another policy replaced this one have ended."""
        return time.monotonic() - self._left_s > shared_memory.PROGRAMS_END_S

    def follow(self, before: Self) -> None:
        """Start from the layout of another policy that fills its table the same way, so that as few
        connections as possible go to another worker."""
        if before._plan.policy.table == self._plan.policy.table:
            self._layout, self._layout_input = before._layout, before._layout_input

    def can_become(self, plan: Plan) -> bool:
        """Whether another plan needs no other programs and maps."""
        has_room = not self.remembers() or _capacity(plan) == _capacity(self._plan)
        return plan.policy == self._plan.policy and has_room

    def become(self, plan: Plan) -> None:
        """Use the parameters and weights of another plan. Call `steer` after that."""
        if self.has_rested:
            self._table.assume_no_readers()
        self._left_s = math.inf
        self._plan = plan
        self._write_params()

    def _write_params(self) -> None:
        given = self._plan.params
        rest = [0] * (abi.VALUES - len(given))
        ticks = bpf_maps.ticks_per_s()
        known = (ticks, (ticks - 1).bit_length(), self._seed, self._plan.slots)
        value = abi.PARAMS.pack(*known, *given, *rest)
        self._maps["params"].put(0, value)

    def prepare(self, slot: int) -> None:
        """Before any program runs: fill the table so that it always selects `slot`."""
        self._table.fill(uniform(slot).parts())
        self._in_table = None

    def steer(self, members: Sequence[Member], without_members: Layout) -> None:
        """Select among these members.

        Args:
            without_members: the layout if there are no members.
        """
        # `without_members` is not kept in `_layout`: once there are members again, as few flows as
        # possible move.
        layout = self._build_layout(members) if members else without_members
        if layout != self._in_table:
            self._table.publish(layout.parts())
            self._in_table = layout

    def _build_layout(self, members: Sequence[Member]) -> Layout:
        """The layout for these members. The last one is kept, as computing a layout for a thousand
        members takes milliseconds."""
        topology, hash_length = self._plan.topology, self._plan.hash_length
        wanted = list(members), topology, hash_length
        if self._layout is None or wanted != self._layout_input:
            context = LayoutContext(topology, hash_length, previous=self._layout)
            self._layout = builtin.build_layout(self._plan.policy, members, context)
            self._layout_input = wanted
        return self._layout

    def spare(self, slots: Sequence[int]) -> None:
        """Change the slots that are tried while no member can be selected."""
        self._table.amend({abi.FALLBACKS_OFFSET: fallbacks(slots).tobytes()})
        self._in_table = None

    def synchronize(self) -> None:
        self._table.synchronize()

    def grace_period(self) -> int | None:
        return self._table.grace_period()

    def grace_period_ended(self, publication: int) -> None:
        self._table.grace_period_ended(publication)

    def remembers(self) -> bool:
        return "flows" in self._maps

    def memory_bytes(self) -> int:
        return sum(each.memory_bytes() for each in self._maps.values())

    def policy_values(self) -> PolicyValues:
        """The parameters, counters and histograms of the policy."""
        declared = self._plan.policy.declared
        raw = self._maps["own"].per_cpu(0, self._cpus)
        columns = zip(*abi.OWN.iter_unpack(raw), strict=True)
        totals = [sum(column) for column in columns]
        buckets = totals[abi.VALUES :]
        return PolicyValues(
            _named(self._plan),
            {counter.name: totals[index] for index, counter in enumerate(declared.counters)},
            {
                each.name: buckets[index * abi.BUCKETS : (index + 1) * abi.BUCKETS]
                for index, each in enumerate(declared.histograms)
            },
        )


def _refuse_long_verification(policy: Policy) -> None:
    """Refuse a policy that the verifier would refuse after ten seconds, for which the controller
    would wait.

    Without CAP_PERFMON the verifier prunes no states of the loop of least-conn, and gives up with
    E2BIG.

    Raises:
        VerifierError: the policy has that loop, and CAP_PERFMON is missing.
    """
    if policy.reads_load and not policy.is_custom and not capabilities.may_perfmon():
        raise VerifierError(f"load {policy.name}", "the verifier refuses its loop", NEEDS_PERFMON)


def _capacity(plan: Plan) -> int:
    return _named(plan).get(_CAPACITY, _FLOWS)


def _named(plan: Plan) -> dict[str, int]:
    params = plan.policy.declared.params
    return {param.name: value for param, value in zip(params, plan.params, strict=True)}


def _load(
    policy: Policy, code: PolicyObject, kind: str, maps: Mapping[str, bpf_maps.Map], protocol: str
) -> Program:
    """Load one program.

    Args:
        kind: "migrate" or "plain".
    """
    try:
        name, attach_type = f"steer_{policy.name}", ATTACH_TYPES[kind]
        return Program(name, code.programs[kind], maps, attach_type, protocol)
    except VerifierError as error:
        raise _pointed(error, policy, code.lines.get(kind, {})) from None


def _pointed(error: VerifierError, policy: Policy, lines: Mapping[int, int]) -> VerifierError:
    """The error, for a custom policy with the line of C that it is about."""
    if not policy.is_custom:
        return error
    from steer.loader import verifier

    detail = verifier.explain(error.detail, lines, find.file_of(policy))
    return error.replace(detail=detail)
