"""What is at an address, and whether it can be steered."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress

from steer.attach import elsewhere, holders, present_program, sockmap, watch
from steer.attach.binds import binds_of, exact_text_of, listeners_at, text_of
from steer.attach.counting import TRACEPOINT
from steer.attach.holders import Holder
from steer.attach.wording import BY_PROTOCOL
from steer.config.address import Bind
from steer.config.service import MAX_WORKERS
from steer.errors import AttachRefused, KernelError
from steer.linux import processes, services, waiting
from steer.loader import tracing
from steer.sockets import members
from steer.sockets.sock_diag import Listener
from steer.values import plural

_LOOKS = 3


class Target:
    """The sockets at an address, looked at once, before anything is attached.

    Args:
        replace: whether a program that the group has may be replaced for a while.

    Attributes:
        present: the program that the group has.
        in_sockmap: whether a sockmap is needed to select among them, see `sockmap.is_needed`.

    Raises:
        AttachRefused: they cannot be steered; it says why and what would help.
        KernelError: it cannot be told.
    """

    def __init__(self, bind: Bind, replace: bool = False) -> None:
        self.bind = bind
        self._act = f"attach to {text_of(bind)}"
        self._words = BY_PROTOCOL[bind.protocol]
        self.listeners: Mapping[int, Listener] = {}
        self.holders: Mapping[int, Sequence[Holder]] = {}
        for _look in range(_LOOKS):
            self._look()
            if self.holders.keys() == self.listeners.keys():
                break
        if not self.listeners:
            raise elsewhere.refusal(bind, self._act)
        self._refuse_own()
        self._refuse_users()
        self._refuse_hidden()
        _read_kernel_types()
        self.present = present_program.look(self.listeners.keys(), self._act, replace)
        self._refuse_unshared()
        self._refuse_one_for_all()
        with closing(holders.each_borrowed(self.holders)) as lent:
            self.in_sockmap = sockmap.is_needed(sock for _, sock in lent)

    @property
    def name(self) -> str:
        """For a service that nobody has given a name."""
        command = processes.command(min(self.pids)) or ""
        program = re.sub(r"[^A-Za-z0-9_.-]", "", command).lstrip("_.-") or "port"
        return f"{program[:40]}-{self.bind.port}"

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

    def _refusal(self, cause: str, cure: str) -> AttachRefused:
        return AttachRefused(self._act, cause, cure)

    def _refuse_users(self) -> None:
        others = {each.uid for each in self.listeners.values()} - {os.geteuid()}
        if others and os.geteuid() != 0:
            raise self._refusal(f"it is uid {min(others)}'s", "run as root")

    def _refuse_hidden(self) -> None:
        hidden = self.listeners.keys() - self.holders.keys()
        if hidden:
            count = plural(len(hidden), self._words.socket)
            cause = f"of {count} no process can be seen that has it open"
            raise self._refusal(cause, _cure_of_hidden())

    def _refuse_own(self) -> None:
        if name := services.name_of_any(self.pids):
            cause = f"it is service {name} of steer's"
            raise self._refusal(cause, f"`steer policy {name} POLICY` changes its policy")

    def _refuse_unshared(self) -> None:
        with closing(holders.each_borrowed(self.holders)) as lent:
            unshared = [inode for inode, sock in lent if not members.shares(sock)]
        if unshared:
            raise self._one_socket(unshared[0], " without SO_REUSEPORT")

    def _refuse_one_for_all(self) -> None:
        if len(self.listeners) > 1:
            return
        (inode,) = self.listeners
        if len(_waiting(self._pids_of(inode), inode)) > 1:
            raise self._one_socket(inode, "")

    def _pids_of(self, inode: int) -> Sequence[int]:
        return sorted({each.pid for each in self.holders[inode]})

    def _one_socket(self, inode: int, how: str) -> AttachRefused:
        """If there is only one socket to select."""
        pids = self._pids_of(inode)
        count = len(_waiting(pids, inode)) or len(pids)
        waits = f"{count} processes wait" if count > 1 else "one process waits"
        own = "`steer run -- COMMAND` gives each worker its own, or set SO_REUSEPORT in the server"
        cure = f"{own}; `steer inspect {text_of(self.bind)}` says how"
        return self._refusal(f"it is one socket{how}, and {waits} on it", cure)


def targets_at(text: str, replace: bool = False) -> list[Target]:
    """What is at the addresses that a user names, see `binds_of`.

    Raises:
        ConfigError: the text is no address.
        AttachRefused: the listeners at one of them cannot be steered.
        KernelError: it cannot be told.
    """
    binds = binds_of(text)
    found = [
        _target(text, bind, [each for each in binds if each != bind], replace) for bind in binds
    ]
    _refuse_too_many(f"attach to {text}", found)
    return found


def _refuse_too_many(act: str, targets: Sequence[Target]) -> None:
    count = sum(len(each.listeners) for each in targets)
    if count > MAX_WORKERS:
        sockets = plural(count, BY_PROTOCOL[targets[0].bind.protocol].socket)
        cause = f"there are {sockets}, and steer selects from at most {MAX_WORKERS}"
        raise AttachRefused(act, cause, "have the server open fewer")


def _target(text: str, bind: Bind, others: Sequence[Bind], replace: bool) -> Target:
    try:
        return Target(bind, replace)
    except AttachRefused as error:
        if not others:
            raise
        # Of a wildcard, as the text that stands for both families would name this one, too.
        cure = f"`steer attach {exact_text_of(others[0])}` leaves it out"
        raise error.under(f"attach to {text}", cure) from None


def _cure_of_hidden() -> str:
    """Root without a capability, as in a container, is no help; see ptrace(2)."""
    if os.geteuid() == 0:
        return "needs CAP_SYS_PTRACE, and the pid namespace of those processes"
    return "run as root, where /proc shows all processes"


def _waiting(pids: Sequence[int], inode: int) -> frozenset[int]:
    found = (waiting.waiters(pid, frozenset({inode})) for pid in holders.first_of(pids))
    return frozenset[int]().union(*found)


def _read_kernel_types() -> None:
    """This takes a while, and what is found is needed later when it has to be quick."""
    with suppress(KernelError):
        tracing.tracepoint_number(TRACEPOINT)
        for each in watch.FIELDS:
            tracing.field_offset(*each)
