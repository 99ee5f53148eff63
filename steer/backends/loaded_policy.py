"""A policy in the kernel: a program for each group, and the table and numbers it reads."""

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
from steer.loader.programs import ATTACH_TYPES, Program
from steer.policy import builtin
from steer.policy.builtin import LayoutContext, Policy
from steer.policy.bytecode import PolicyObject
from steer.policy.layout import Layout, Member, all_to, read, spares

_FLOWS = 65536
"""Room for so many where a policy remembers flows, but has no parameter for it."""
_CAPACITY = "capacity"
_OWN_MAPS = ("table", "params", "own", "early")
_NEEDS_PERFMON = "give CAP_PERFMON too: without it the verifier is far stricter"


class StoredPolicy(msgspec.Struct):
    """For who goes on with it: the maps in their order; the programs come after them."""

    maps: list[str]
    migrates: bool


class LoadedPolicy:
    """One policy, from `load` or `receive` on.

    Args:
        plan: what to choose by.
        maps: the policy's own, by name.
        programs: one for each group.
        migrates: whether these are asked where the queue of a closing listener goes.
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
    def load(cls, plan: Plan, groups: Sequence[Mapping[str, bpf_maps.Map]]) -> Self:
        """Put it into the kernel.

        Args:
            groups: of each bind, the maps that are not the policy's.

        Raises:
            CompileError, VerifierError: a policy of the user's own is not right.
            KernelError: the kernel refuses.
        """
        _refuse_long_verification(plan.policy)
        code = compile.load(find.file_of(plan.policy), plan.policy.digest)
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
            loaded._table.forget()
            loaded._write_params()
            undo.pop_all()
        return loaded

    @classmethod
    def receive(cls, plan: Plan, saved: StoredPolicy, fds: Sequence[int]) -> Self:
        """Go on with what another controller left of the same plan; the fds become ours."""
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
        """It is in force from now on; programs of another may still run."""
        self._table.begin_grace_period()

    def left(self) -> None:
        """Another is in force from now on."""
        self._left_s = time.monotonic()

    @property
    def has_rested(self) -> bool:
        """Whether no program of its that ran when it was left can be running still."""
        return time.monotonic() - self._left_s > shared_memory.PROGRAMS_END_S

    def follow(self, before: Self) -> None:
        """Take the place of another: where both fill their table alike, as little as can be
        goes elsewhere."""
        if before._plan.policy.table == self._plan.policy.table:
            self._layout, self._layout_input = before._layout, before._layout_input

    def can_become(self, plan: Plan) -> bool:
        """Whether its programs would do for another plan."""
        has_room = not self.remembers() or _capacity(plan) == _capacity(self._plan)
        return plan.policy == self._plan.policy and has_room

    def become(self, plan: Plan) -> None:
        """The same policy, with other parameters; `steer` is to follow."""
        if self.has_rested:
            self._table.rested()
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
        """Before any program runs: whatever the policy answers, it is `slot`."""
        self._table.fill(all_to(slot).parts())
        self._in_table = None

    def steer(self, members: Sequence[Member], nobody: Layout) -> None:
        """Choose among these.

        Args:
            nobody: the table if there are none.
        """
        # That of nobody is not kept: when somebody is there again, only what must moves.
        layout = self._build_layout(members) if members else nobody
        if layout != self._in_table:
            self._table.publish(layout.parts())
            self._in_table = layout

    def _build_layout(self, members: Sequence[Member]) -> Layout:
        """What was laid for the same members last would be laid again, in milliseconds where
        there are a thousand."""
        topology, hash_length = self._plan.topology, self._plan.hash_length
        wanted = list(members), topology, hash_length
        if self._layout is None or wanted != self._layout_input:
            context = LayoutContext(topology, hash_length, previous=self._layout)
            self._layout = builtin.build_layout(self._plan.policy, members, context)
            self._layout_input = wanted
        return self._layout

    def spare(self, slots: Sequence[int]) -> None:
        """While nobody is chosen: try one of these."""
        self._table.amend({abi.SPARES_OFFSET: spares(slots).tobytes()})
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
        """Its parameters, and what it has counted."""
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


def _refuse_long_verification(chosen: Policy) -> None:
    """Without CAP_PERFMON the verifier prunes no state of the loop of least-conn: it takes ten
    seconds, while nothing else is done, and then refuses it with E2BIG.

    Raises:
        VerifierError: so it would be.
    """
    if chosen.reads_load and not chosen.is_custom and not capabilities.may_perfmon():
        raise VerifierError(f"load {chosen.name}", "the verifier refuses its loop", _NEEDS_PERFMON)


def _capacity(plan: Plan) -> int:
    return _named(plan).get(_CAPACITY, _FLOWS)


def _named(plan: Plan) -> dict[str, int]:
    params = plan.policy.declared.params
    return {param.name: value for param, value in zip(params, plan.params, strict=True)}


def _load(
    chosen: Policy, code: PolicyObject, kind: str, maps: Mapping[str, bpf_maps.Map], protocol: str
) -> Program:
    """Args: kind: which of its programs."""
    try:
        name, attach_type = f"steer_{chosen.name}", ATTACH_TYPES[kind]
        return Program(name, code.programs[kind], maps, attach_type, protocol)
    except VerifierError as error:
        raise _pointed(error, chosen, code.lines.get(kind, {})) from None


def _pointed(error: VerifierError, chosen: Policy, lines: Mapping[int, int]) -> VerifierError:
    """Of the user's own: with the line of C that it is about."""
    cure = "" if capabilities.may_perfmon() else _NEEDS_PERFMON
    if not chosen.is_custom:
        return VerifierError(error.what, error.cause, cure, error.detail, error.errno, error.log)
    from steer.loader import verifier

    detail = verifier.point(error.detail, lines, find.file_of(chosen))
    return VerifierError(error.what, error.cause, cure, detail, error.errno, error.log)
