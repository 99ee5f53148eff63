"""Gives listeners back after their attacher was killed: what the guard is for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

import msgspec

from steer.attach import holders, leftover, ownership
from steer.attach.attachment import Attachment
from steer.attach.binds import listeners_at
from steer.attach.freed import when_freed
from steer.attach.replaced import ReplacedProgram
from steer.config.address import Bind
from steer.control.claim import Claim
from steer.errors import SteerError
from steer.linux.log import Log


class Attached(msgspec.Struct, frozen=True):
    """A group that the attacher steered.

    Args:
        replaced: the program that it had before; None: none.
    """

    bind: Bind
    attachment: Attachment
    replaced: ReplacedProgram | None

    def descriptors(self) -> Iterator[int]:
        yield from (each.fileno() for each in self.attachment.maps.values())
        if self.replaced is not None:
            yield from self.replaced.descriptors()


class Restore:
    """Removes all that an attacher has left, and puts back what it has replaced.

    Args:
        claim: its control socket.
    """

    def __init__(self, attached: Sequence[Attached], claim: Claim, log: Log) -> None:
        self._attached = attached
        self._claim = claim
        self._log = log

    def descriptors(self) -> Iterable[int]:
        """Those that it needs in a forked child."""
        return [fd for each in self._attached for fd in each.descriptors()]

    def __call__(self) -> bool:
        """Do it, in a process that is not the attacher. Whether all of it could be done."""
        for each in self._attached:
            each.attachment.abandon()  # from here on the kernel's hash selects
        try:
            with self._claim.turn():
                done = [self._give_back(each) for each in self._attached]
        except (SteerError, OSError) as error:
            self._log.error("the attacher is gone: %s", error)
            done = [False]
        self._claim.remove()
        return all(done)

    def _give_back(self, attached: Attached) -> bool:
        act = f"detach from {attached.bind.label}"
        try:
            leftover.remove(attached.bind, act)
            what = _put_back(attached.bind, attached.replaced)
        except SteerError as error:
            self._log.error("the attacher is gone: %s", error.under(act))
            return False
        label = attached.bind.label
        self._log.warning("the attacher is gone: detached from %s: %s", label, what)
        return True


def _put_back(bind: Bind, replaced: ReplacedProgram | None) -> str:
    """Put back a program, unless the group has another by now. Returns: what selects from now on.
    Raises KernelError."""
    there = listeners_at(bind)
    found = ownership.program_of(there.keys())
    wanted = (0, replaced.number) if replaced else (0,)
    if found is not None and (found.classic_length or found.program_id not in wanted):
        return "another program was attached, and stays"
    if replaced is None:
        return "the kernel's hash selects"
    before = replaced

    def put_back() -> None:
        with closing(holders.each_borrowed(holders.find(there.keys()))) as lent:
            before.put_back((there[inode].cookie, sock) for inode, sock in lent)

    when_freed(put_back)
    return "the program that was there before selects again"
