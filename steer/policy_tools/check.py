"""Checks a policy: compiles it, loads it, and measures its cost."""

from __future__ import annotations

from contextlib import ExitStack, closing

import msgspec

from steer import abi
from steer.backends.loaded_policy import LoadedPolicy
from steer.config.planning import plan
from steer.config.service import Service
from steer.errors import ConfigError, KernelError, VerifierError
from steer.linux import topology
from steer.loader import bpf_maps, compile, cost, find, verifier
from steer.loader.verifier import Figures
from steer.policy import layout
from steer.policy.builtin import Policy
from steer.policy.bytecode import PolicyObject
from steer.policy.declarations import Counter, Histogram, Param
from steer.policy.layout import Member

_SHARED = ("sockets", "counts", "cpus", "slots", "listeners", "moved")
"""The maps that exist once per service, not per policy."""


class Checked(msgspec.Struct, frozen=True):
    """The result of checking a policy.

    Args:
        programs: the verifier's figures of each program that could be loaded.
        cost_ns: time of a call minus that of an empty program; None if it cannot be measured.
        notes: what could not be checked, and why.
    """

    name: str
    summary: str
    table: str
    compiler: str
    params: tuple[Param, ...]
    counters: tuple[Counter, ...]
    histograms: tuple[Histogram, ...]
    programs: dict[str, Figures]
    cost_ns: float | None
    notes: list[str]


def check(asked: str, whole_log: bool = False) -> Checked:
    """Compile a policy, load it, and measure its cost.

    Args:
        asked: a name or path, as for --policy.
        whole_log: whether an error shows the verifier's whole log or only its end.

    Raises:
        ConfigError: there is no such policy, or it has no program.
        CompileError: it does not compile; `detail` names the line.
        VerifierError: the verifier rejects it; `detail` names the line.
    """
    found = find.find(asked)
    if found.source is None:
        raise ConfigError(f"check {found.name}", "it has no program", "it is the kernel's own hash")
    built = compile.load(find.file_of(found))
    notes: list[str] = []
    with ExitStack() as stack:
        programs = _verify(found, built, stack, notes, whole_log)
        cost_ns = _time(found, notes) if programs else None
    says = found.declared
    return Checked(
        found.name,
        found.summary,
        found.table,
        built.compiler,
        says.params,
        says.counters,
        says.histograms,
        programs,
        cost_ns,
        notes,
    )


def _verify(
    found: Policy, built: PolicyObject, stack: ExitStack, notes: list[str], whole_log: bool
) -> dict[str, Figures]:
    figures = {}
    try:
        maps = verifier.maps_of(built.programs.values(), stack)
    except KernelError as error:
        notes.append(f"not loaded: {error}")
        return {}
    for kind, code in built.programs.items():
        if why_not := verifier.why_not(kind):
            notes.append(f"{kind} not loaded: {why_not}")
            continue
        try:
            figures[kind] = verifier.figures(kind, code, maps)
        except VerifierError as error:
            source, shown = find.file_of(found), error.log if whole_log else ""
            raise error.replace(
                what=f"load {source.name}",
                cause="the kernel's verifier rejects it",
                cure="",
                detail=verifier.explain(error.detail, built.lines.get(kind, {}), source, shown),
            ) from None
        except KernelError as error:
            notes.append(f"{kind} not loaded: {error}")
    return figures


def _time(found: Policy, notes: list[str]) -> float | None:
    """The cost of a call, with a table filled for `cost.SLOTS` workers."""
    cpus = topology.read()
    decided = plan(Service(workers=cost.SLOTS), cpus, {}, found)
    members = [Member(spec.number, spec.weight, spec.cpu) for spec in decided.specs]
    with ExitStack() as stack:
        try:
            maps = {
                name: stack.enter_context(bpf_maps.Map(name, decided.slots)) for name in _SHARED
            }
            maps["cpus"].put(0, abi.CPU.pack(0, 1, 0, 0) * len(cpus.possible))
            choice = stack.enter_context(closing(LoadedPolicy.load(decided, [maps])))
            choice.steer(members, layout.empty_layout())
            return round(cost.cost_ns(choice.programs[0], maps["sockets"]), 1)
        except (KernelError, OSError) as error:
            notes.append(f"cost of a call not measured: {error}")
            return None
