"""Whether a group is one, and still has the program of its attacher: any process that has one of
the sockets can attach another, or detach it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice

import msgspec

from steer.attach.refusals import LEFT
from steer.attach.wording import Wording
from steer.errors import KernelError, Note
from steer.loader.kernel_sockets import Glance, KernelSocket, Look
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


class OwnershipChecks:
    """Checks the ownership of one group, often.

    Args:
        protocol: "tcp" or "udp".
    """

    def __init__(self, protocol: str) -> None:
        self._protocol = protocol
        self._glance: Glance | None = None
        # Only UDP sockets leave their group: any listener tells it for all of them.
        self._most = 1 if protocol == "tcp" else None

    def look(self, inodes: Collection[int], ours: int, wording: Wording) -> Ownership:
        """Look at the group of these sockets.

        Args:
            ours: the number of our program.
        """
        try:
            found = list(islice(self._seen(inodes), self._most))
        except KernelError:
            return Ownership()
        return Ownership(taken_by(found, ours, wording), split([each.group for each in found]))

    def _seen(self, inodes: Collection[int]) -> Iterator[KernelSocket]:
        """Raises KernelError."""
        if self._glance is None:
            with Look() as looking:
                self._glance = looking.again_and_again(self._protocol)
        return (each for each in self._glance.in_this_netns() if each.inode in inodes)

    def close(self) -> None:
        if self._glance is not None:
            self._glance.close()
            self._glance = None


def program_of(inodes: Collection[int]) -> KernelSocket | None:
    """One of these sockets, with the program of its group; None: they are closed. Raises
    KernelError."""
    with Look() as looking:
        return next((each for each in looking.in_this_netns() if each.inode in inodes), None)


def taken_by(found: Collection[KernelSocket], ours: int, wording: Wording) -> Note | None:
    """What selects in place of our program."""
    first = next((each for each in found if each.group), None)
    if first is None or first.program_id == ours:
        return None
    go = f"{wording.traffic} go by"
    return Note(f"{_in_words(first, go)}, not by the policy", "start steer there again")


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
