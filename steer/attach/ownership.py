"""Whether a group is one, and still has the program of its attacher: any process that has one of
the sockets can attach another, or detach it."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from steer.attach.refusals import LEFT
from steer.attach.wording import Wording
from steer.errors import KernelError, Note
from steer.loader.kernel_sockets import KernelSocket, Look
from steer.values import plural


class Ownership(msgspec.Struct, frozen=True):
    """What keeps the policy from selecting; None: nothing does, or nobody can tell without
    CAP_PERFMON and BTF.

    Args:
        taken: what selects in place of our program.
        split: why our program does not select among all sockets.
    """

    taken: Note | None = None
    split: Note | None = None


def look(inodes: Collection[int], ours: int, wording: Wording) -> Ownership:
    """Look at the group of these sockets.

    Args:
        ours: the number of our program.
    """
    try:
        found = _seen(inodes)
    except KernelError:
        return Ownership()
    return Ownership(taken_by(found, ours, wording), split([each.group for each in found]))


def program_of(inodes: Collection[int]) -> KernelSocket | None:
    """One of these sockets, with the program of its group; None: they are closed. Raises
    KernelError."""
    return next(iter(_seen(inodes)), None)


def _seen(inodes: Collection[int]) -> list[KernelSocket]:
    """Raises KernelError."""
    with Look() as looking:
        return [each for each in looking.in_this_netns() if each.inode in inodes]


def taken_by(found: Collection[KernelSocket], ours: int, wording: Wording) -> Note | None:
    """What selects in place of our program."""
    first = next((each for each in found if each.group), None)
    if first is None or first.program_id == ours:
        return None
    go = f"{wording.traffic} go by"
    return Note(f"{_in_words(first, go)}, not by the policy", "`steer detach` and attach again")


def _in_words(found: KernelSocket, go: str) -> str:
    if not found.program:
        return f"steer's program was detached: {go} the kernel's hash"
    if found.classic_length:
        return f"another program was attached: {go} that classic program"
    name = found.name.partition(b"\0")[0].decode(errors="replace")
    return f"another program was attached: {go} {name} (id {found.program_id})"


def split(groups: Collection[int]) -> Note | None:
    """Why no program selects among all of some sockets at one address.

    Args:
        groups: of each socket, the kernel's group; 0: it is in none.
    """
    if left := sum(1 for each in groups if not each):
        what = f"{plural(left, 'socket')} of the server {LEFT}"
        found = f"{what}: it is in no group, and may get all datagrams"
        return Note(found, "restart its process")
    if (count := len(set(groups))) > 1:
        found = (
            f"the sockets are in {count} groups, as a connected socket of the server split them: "
            "those of one group get all datagrams of new clients"
        )
        return Note(found, "restart the server, bound to the wildcard address (udp://0.0.0.0)")
    return None
