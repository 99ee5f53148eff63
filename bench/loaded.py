"""Programs as steer has them in the kernel, of this checkout, or of the one that BASE names.

The other checkout's programs are loaded by its own copy of this file, in a process that has its
steer: so nothing but steer is imported here. That process hands over the programs and ends; they
are measured on the very same sockets.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from steer import abi
from steer.backends.loaded_policy import LoadedPolicy
from steer.config.planning import plan
from steer.config.service import Service
from steer.errors import KernelError
from steer.linux import topology
from steer.loader import bpf_maps, compile, find, libbpf, shared_memory
from steer.loader.programs import Program
from steer.policy import layout
from steer.policy.cpus import Topology
from steer.policy.layout import Member
from steer.sockets import reuseport

BASE = "STEER_BENCH_BASE"
"""Path of another checkout to compare with; not set: with none."""
CAPACITY = 2048
"""Of a map of sockets: slots, and room for two generations."""
_LOADS = 4
"""Workers have 1 to so many connections open: nobody is idle, which would end the search."""
_MOST_FDS = 250
"""In one message: SCM_MAX_FD of include/net/scm.h is 253."""
_SLOT, _STAMP = 1, 0
_CPU = struct.pack("=QIIQ", 0, 1, 0, 0)
"""Struct steer_cpu: all zero but `random`, which of each build stands at the same place."""


def base() -> Path | None:
    name = os.environ.get(BASE)
    return Path(name).resolve() if name else None


def policy_programs(
    stack: ExitStack,
    sockets_map: bpf_maps.Map,
    address: str,
    slots: int,
    wanted: Sequence[tuple[str, bool]],
) -> list[libbpf.Descriptor]:
    """Each laid as steer would for as many workers as there are slots.

    Args:
        sockets_map: what they choose from.
        wanted: policies, and whether all workers are on this machine's CPUs, so that those of a
            CPU take turns; else there are as many CPUs as workers.
    """
    here = topology.read()
    names = ("counts", "cpus", "slots", "listeners", "moved")
    maps = {name: stack.enter_context(bpf_maps.Map(name, CAPACITY)) for name in names}
    maps["cpus"].put(0, _CPU * len(here.possible))
    known = stack.enter_context(closing(shared_memory.Slots(maps["slots"])))
    for slot in range(slots):
        known.set_open(slot, 1 + slot * 5 // 3 % _LOADS)
    maps["sockets"] = sockets_map
    programs = []
    for name, crowded in wanted:
        cpus = here if crowded else _roomy(here, slots)
        service = Service(workers=slots, bind=(address,), policy=name)
        decided = plan(service, cpus, {}, find.find(name))
        members = [Member(spec.number, spec.weight, spec.cpu) for spec in decided.specs]
        choice = stack.enter_context(closing(LoadedPolicy.load(decided, [maps])))
        choice.steer(members, layout.empty_layout())
        programs.append(choice.programs[0])
    return programs


def _roomy(here: Topology, slots: int) -> Topology:
    """This machine, had it a CPU for every slot."""
    cpus = tuple(range(max(slots, here.possible[-1] + 1)))
    return Topology(cpus[:slots], cpus, {})


def counting_program(stack: ExitStack, listener: int) -> libbpf.Descriptor:
    """What counts connections, with the listener as that of a worker."""
    names = ("slots", "listeners", "moved", "owners")
    maps = {name: stack.enter_context(bpf_maps.Map(name)) for name in names}
    owner = abi.OWNER.pack(_SLOT, _STAMP, 0)
    maps["owners"].put(listener, owner)
    maps["listeners"].put(reuseport.cookie(listener), owner)
    code = compile.load(compile.sources() / "open.c").programs["count"]
    return stack.enter_context(Program("bench", code, maps, abi.BPF_CGROUP_SOCK_OPS))


def of_base(stack: ExitStack, act: str, fd: int, *arguments: object) -> list[libbpf.Descriptor]:
    """What `act` loads with the steer of the other checkout; none if there is no other.

    Args:
        act: "policies" or "counting".
        fd: the map of sockets, or the listener.
    """
    checkout = base()
    if checkout is None:
        return []
    loader = checkout / "bench" / "loaded.py"
    if not loader.exists():
        raise KernelError(f"load the programs of {checkout}", "it is too old: no bench/loaded.py")
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            given = json.dumps([act, theirs.fileno(), fd, *arguments])
            child = subprocess.Popen(
                [sys.executable, "-P", str(loader), given],
                pass_fds=[theirs.fileno(), fd],
                env={**os.environ, "PYTHONPATH": str(checkout)},
            )
        _, received, _, _ = socket.recv_fds(ours, 1, _MOST_FDS)
    if child.wait() != 0 or not received:
        raise KernelError(f"load the programs of {checkout}", "its steer has other functions")
    return [stack.enter_context(libbpf.Descriptor(fd)) for fd in received]


def main(given: str) -> None:
    act, channel, fd, *arguments = json.loads(given)
    with ExitStack() as stack, socket.socket(fileno=channel) as theirs:
        if act == "policies":
            programs = policy_programs(stack, bpf_maps.Map.received("sockets", fd), *arguments)
        else:
            programs = [counting_program(stack, fd)]
        socket.send_fds(theirs, [b"x"], [each.fileno() for each in programs])


if __name__ == "__main__":
    main(sys.argv[1])
