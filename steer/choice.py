"""A policy in the kernel: a program for each group, and the table and numbers it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from steer import abi, policies, policy, table
from steer.bytecode import PolicyObject
from steer.errors import KernelError, VerifierError
from steer.kernel import bpf, compile, verifier
from steer.plan import Plan
from steer.policy import Policy, Scene
from steer.steering import Own
from steer.table import Layout, Member

_FLOWS = 65536
"""Room for so many where a policy remembers flows, but has no parameter for it."""
_CAPACITY = "capacity"


class Choice:
    """One policy, as long as it is in force.

    Args:
        plan: what to choose by.
        groups: of each group, the maps that are not the policy's.

    Attributes:
        programs: one for each group.
        migrates: whether these are asked where the queue of a closing listener goes.

    Raises:
        CompileError, VerifierError: a policy of the user's own is not right.
        KernelError: the kernel refuses.
    """

    def __init__(self, plan: Plan, groups: Sequence[Mapping[str, bpf.Map]]) -> None:
        self._plan = plan
        self._cpus = len(plan.topology.possible)
        self._layout: Layout | None = None
        code = compile.load(policies.file_of(plan.policy))
        with ExitStack() as undo:
            self._maps = {"table": undo.enter_context(bpf.Map("table"))}
            self._table = bpf.Table(self._maps["table"])
            undo.callback(self._table.close)
            self._maps["params"] = undo.enter_context(bpf.Map("params"))
            self._maps["own"] = undo.enter_context(bpf.Map("own"))
            if any("flows" in each.relocations.values() for each in code.programs.values()):
                self._maps["flows"] = undo.enter_context(bpf.Map("flows", _capacity(plan)))
            self.programs = []
            self.migrates = True
            for maps in groups:
                program, self.migrates = _load(plan.policy, code, {**self._maps, **maps})
                self.programs.append(undo.enter_context(program))
            self._write_params()
            self.close: Callable[[], None] = undo.pop_all().close

    def can_become(self, plan: Plan) -> bool:
        """Whether its programs would do for another plan."""
        return plan.policy == self._plan.policy and _capacity(plan) == _capacity(self._plan)

    def become(self, plan: Plan) -> None:
        """The same policy, with other parameters; `steer` is to follow."""
        self._plan = plan
        self._write_params()

    def _write_params(self) -> None:
        given = self._plan.params
        rest = [0] * (abi.VALUES - len(given))
        ticks = bpf.ticks_per_s()
        value = abi.PARAMS.pack(ticks, (ticks - 1).bit_length(), *given, *rest)
        self._maps["params"].put(0, value)

    def prepare(self, slot: int) -> None:
        """Before any program runs: whatever the policy answers, it is `slot`."""
        self._table.fill(table.all_to(slot).parts())

    def steer(self, members: Sequence[Member], nobody: Layout) -> None:
        """Choose among these.

        Args:
            nobody: the table if there are none.
        """
        layout = nobody
        if members:
            scene = Scene(self._plan.topology, self._plan.hash_length, previous=self._layout)
            # That of nobody is not kept: when somebody is there again, only what must moves.
            self._layout = layout = policy.lay(self._plan.policy, members, scene)
        self._table.flip(layout.parts())

    def settle(self) -> None:
        self._table.settle()

    def remembers(self) -> bool:
        return "flows" in self._maps

    def memory_bytes(self) -> int:
        return sum(each.memory_bytes() for each in self._maps.values())

    def own(self) -> Own:
        """Its parameters, and what it has counted."""
        declared = self._plan.policy.declared
        raw = self._maps["own"].per_cpu(0, self._cpus)
        columns = zip(*abi.OWN.iter_unpack(raw), strict=True)
        totals = [sum(column) for column in columns]
        buckets = totals[abi.VALUES :]
        return Own(
            _named(self._plan),
            {counter.name: totals[index] for index, counter in enumerate(declared.counters)},
            {
                each.name: buckets[index * abi.BUCKETS : (index + 1) * abi.BUCKETS]
                for index, each in enumerate(declared.histograms)
            },
        )

    def descriptors(self) -> Sequence[int]:
        return [each.fileno() for each in (*self._maps.values(), *self.programs)]

    def receive(self, fds: Sequence[int]) -> None:
        """Go on with what another controller left of the same plan; the fds become ours."""
        for each, fd in zip((*self._maps.values(), *self.programs), fds, strict=True):
            if each is self._maps["table"]:
                self._table.become(fd)
            else:
                each.become(fd)
        self._layout = table.read(self._table.active())


def _capacity(plan: Plan) -> int:
    return _named(plan).get(_CAPACITY, _FLOWS)


def _named(plan: Plan) -> dict[str, int]:
    params = plan.policy.declared.params
    return {param.name: value for param, value in zip(params, plan.params, strict=True)}


def _load(
    chosen: Policy, code: PolicyObject, maps: Mapping[str, bpf.Map]
) -> tuple[bpf.Program, bool]:
    """The policy's program, and whether it migrates: not where the kernel cannot."""
    name = f"steer_{chosen.name}"
    kind, programs = abi.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE, code.programs
    try:
        return bpf.Program(name, programs["migrate"], maps, kind), True
    except VerifierError as error:
        raise _pointed(error, chosen, code) from None
    except KernelError as error:
        if error.cause != "EINVAL":
            raise
    return bpf.Program(name, programs["plain"], maps, abi.BPF_SK_REUSEPORT_SELECT), False


def _pointed(error: VerifierError, chosen: Policy, code: PolicyObject) -> VerifierError:
    """Of the user's own: with the line of C that it is about."""
    if not chosen.is_own:
        return error
    detail = verifier.point(error.detail, code.lines.get("migrate", {}), policies.file_of(chosen))
    return VerifierError(error.what, error.cause, error.cure, detail)
