"""What is at an address, and whether it can be steered."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import closing, suppress

from steer.attach import holders, leftover, watch
from steer.attach.counting import TRACEPOINT
from steer.attach.group import listeners_at
from steer.attach.holders import Holder
from steer.config import address
from steer.config.address import Bind
from steer.errors import AttachRefused, KernelError
from steer.linux import netns, processes, services, waiting
from steer.loader import tracing
from steer.loader.kernel_sockets import KernelSocket, Look
from steer.sockets import members, sock_diag
from steer.sockets.sock_diag import Listener
from steer.values import plural, several

_LOOKS = 3
_TCP, _NAMESPACES_MAX = 6, 8


class Target:
    """The listeners at an address, looked at once, before anything is attached.

    Args:
        bind: TCP.
        replace: whether a program that the group has may be replaced for a while.

    Attributes:
        left: whether the group still has the program of an attacher that was killed.
        replaced: the number of the program that is to be replaced; 0: none.

    Raises:
        AttachRefused: they cannot be steered; it says why and what would help.
        KernelError: it cannot be told.
    """

    def __init__(self, bind: Bind, replace: bool = False) -> None:
        self.bind = bind
        self._act = f"attach to {text_of(bind)}"
        self.listeners: Mapping[int, Listener] = {}
        self.holders: Mapping[int, Sequence[Holder]] = {}
        for _look in range(_LOOKS):
            self._look()
            if self.holders.keys() == self.listeners.keys():
                break
        if not self.listeners:
            raise self._refusal(*self._nobody())
        self._refuse_users()
        self._refuse_hidden()
        self._refuse_own()
        self.replaced = 0
        self.left = self._program(replace)
        self._refuse_unshared()
        self._refuse_one_for_all()

    @property
    def command(self) -> str:
        """The name of the program that holds the first socket."""
        first = min(each.pid for each in self._all_holders())
        return processes.command(first) or ""

    @property
    def name(self) -> str:
        """For a service that nobody has given a name."""
        program = re.sub(r"[^A-Za-z0-9_.-]", "", self.command).lstrip("_.-") or "port"
        return f"{program[:40]}-{self.bind.port}"

    @property
    def is_held_together(self) -> bool:
        """Whether a process has open what another one waits on."""
        return len(self.listeners) > 1 and any(
            len({each.pid for each in held}) > 1 for held in self.holders.values()
        )

    def _look(self) -> None:
        """Those that are closed while we look are left out."""
        found = listeners_at(self.bind)
        self.holders = holders.find(found.keys())
        there = listeners_at(self.bind)
        self.listeners = {inode: each for inode, each in found.items() if inode in there}
        self.holders = {
            inode: held for inode, held in self.holders.items() if inode in self.listeners
        }

    @property
    def pids(self) -> frozenset[int]:
        """The processes that have them open."""
        return frozenset(each.pid for each in self._all_holders())

    def _all_holders(self) -> Iterable[Holder]:
        return (each for held in self.holders.values() for each in held)

    def _refusal(self, cause: str, cure: str = "") -> AttachRefused:
        return AttachRefused(self._act, cause, cure)

    def _nobody(self) -> tuple[str, str]:
        there = {
            _text(each.address)
            for family in (socket.AF_INET, socket.AF_INET6)
            for each in sock_diag.listeners(family, self.bind.port)
        }
        if not there and (elsewhere := self._elsewhere()):
            cause = "nobody listens there in this network namespace, but in another"
            command = f"steer attach {text_of(self.bind)}"
            return cause, " or ".join(f"`{command} --netns {each}`" for each in elsewhere)
        if not there:
            return "nobody listens there", "`steer inspect` shows all that listen"
        others = [f"{host}:{self.bind.port}" for host in sorted(there)]
        cause = f"nobody listens at exactly that address, but at {' and '.join(others)}"
        return cause, " or ".join(f"`steer attach {each}`" for each in others)

    def _elsewhere(self) -> Sequence[str]:
        """Other network namespaces where somebody listens on the port: their names, or a process
        that is in each."""
        found: dict[int, str] = {}
        with suppress(KernelError), Look() as look:
            for each in look.held():
                if each.port == self.bind.port and each.protocol == _TCP:
                    found.setdefault(each.netns, str(each.pid))
        found.pop(netns.own(), None)
        names = netns.names()
        return [names.get(number, pid) for number, pid in found.items()][:_NAMESPACES_MAX]

    def _refuse_users(self) -> None:
        others = {each.uid for each in self.listeners.values()} - {os.geteuid()}
        if others and os.geteuid() != 0:
            raise self._refusal(f"it is uid {min(others)}'s", "run as root")

    def _refuse_hidden(self) -> None:
        hidden = self.listeners.keys() - self.holders.keys()
        if hidden:
            count = plural(len(hidden), "listener")
            cause = f"of {count} no process can be seen that has it open"
            raise self._refusal(cause, "run as root, where /proc shows all processes")

    def _refuse_own(self) -> None:
        for holder in self._all_holders():
            if name := services.name_of(holder.pid):
                cause = f"it is service {name} of steer's"
                raise self._refusal(cause, f"`steer policy {name} POLICY` changes its policy")

    def _program(self, replace: bool) -> bool:
        """Whether the group still has the program of an attacher that was killed.

        Raises:
            AttachRefused: it has somebody else's, or its attacher lives.
        """
        try:
            # These take a while, and are needed later when it has to be quick.
            tracing.tracepoint_number(TRACEPOINT)
            tracing.field_offset(*watch.PORT)
            with Look() as look:
                seen = {each.inode: each for each in look.in_this_netns()}
                found = [seen[inode] for inode in self.listeners if inode in seen]
                programs = {each.program: each for each in found if each.program}
                holders_of = look.holders(programs) if programs else {}
        except KernelError:
            return False  # without CAP_PERFMON nobody can tell
        for number, each in programs.items():
            pids = holders_of[number]
            if pids or not each.name.startswith(_OURS):
                self.replaced = each.program_id
                if not replace or not self.replaced or _service_of(pids):
                    raise self._refusal(*_somebodys(each, pids, replace))
                return False
        for each in programs.values():
            with suppress(KernelError):  # without CAP_SYS_ADMIN its name has to do
                leftover.refuse_unseen(each.program_id, self._act)
        return bool(programs)

    def _refuse_unshared(self) -> None:
        with closing(holders.each_borrowed(self.holders)) as lent:
            unshared = [inode for inode, sock in lent if not members.shares(sock)]
        if unshared:
            pids = sorted({each.pid for each in self.holders[unshared[0]]})
            raise self._refusal(*_one_socket(pids, unshared[0], "without SO_REUSEPORT"))

    def _refuse_one_for_all(self) -> None:
        if len(self.listeners) > 1:
            return
        (inode,) = self.listeners
        pids = sorted({each.pid for each in self.holders[inode]})
        if len(_waiting(pids, inode)) > 1:
            raise self._refusal(*_one_socket(pids, inode, ""))


def _waiting(pids: Sequence[int], inode: int) -> frozenset[int]:
    found = (waiting.waiters(pid, frozenset({inode})) for pid in holders.first_of(pids))
    return frozenset[int]().union(*found)


def _one_socket(pids: Sequence[int], inode: int, how: str) -> tuple[str, str]:
    """Cause and cure if there is only one socket to select."""
    count = len(_waiting(pids, inode)) or len(pids)
    waits = f"{count} processes wait" if count > 1 else "one process waits"
    cause = f"it is one socket {how}".rstrip() + f", and {waits} on it"
    return (
        cause,
        "`steer run -- COMMAND` gives each worker its own, or set SO_REUSEPORT in the server",
    )


_OURS = b"steer_"


def _service_of(pids: Iterable[int]) -> str | None:
    return next(filter(None, map(services.name_of, pids)), None)


def _somebodys(found: KernelSocket, pids: Set[int], replace: bool) -> tuple[str, str]:
    """Cause and cure where a program selects already."""
    if service := _service_of(pids):
        cause = f"service {service} steers it already ({several('pid', sorted(pids))})"
        return cause, f"`steer policy {service} POLICY`"
    if found.classic_length:
        what = f"a classic program of {plural(found.classic_length, 'instruction')}"
    else:
        name = found.name.partition(b"\0")[0].decode(errors="replace")
        began_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + found.loaded_ns / 1e9
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began_s))
        what = f"program {name} (id {found.program_id}, loaded by uid {found.program_uid}, {since})"
    by = f"; it is held by {several('pid', sorted(pids))}" if pids else ""
    if replace:
        cure = "no classic program can be read from the kernel, so it could not be put back"
    elif found.classic_length:
        cure = "end whoever attached it, see `steer inspect`"
    else:
        cure = "--replace takes its place, and puts it back at the end"
    return f"{what} selects there already{by}", cure


def _text(packed: bytes) -> str:
    if len(packed) == 4:
        return socket.inet_ntop(socket.AF_INET, packed)
    return f"[{socket.inet_ntop(socket.AF_INET6, packed)}]"


def text_of(bind: Bind) -> str:
    """An address of TCP as the commands take it."""
    label = bind.label.removeprefix("tcp ")
    return label.removeprefix("0.0.0.0") if bind.address == "0.0.0.0" else label


def other_family(text: str, bind: Bind) -> Bind | None:
    """The wildcard of the other family, if the text names both and somebody listens there, too.
    Each has a group of its own in the kernel. Raises KernelError."""
    if not text.startswith((":", "*:")) or bind.is_v6:
        return None
    other = Bind(bind.protocol, "::", bind.port)
    return other if listeners_at(other) else None


def bind_of(text: str) -> Bind:
    """The address that a user names; a wildcard without a host is that of either family.

    Raises:
        ConfigError: it is none.
        AttachRefused: UDP.
        KernelError
    """
    bind = address.parse(text)
    if bind.protocol == "udp":
        cause = "attach is over TCP: datagrams that wait at a closing socket cannot be moved"
        raise AttachRefused(f"attach to {text}", cause, "see `steer run`")
    if text.startswith((":", "*:")) and not listeners_at(bind):
        both = Bind(bind.protocol, "::", bind.port)
        return both if listeners_at(both) else bind
    return bind
