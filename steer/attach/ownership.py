"""Whether a group still has the program of its attacher: any process that has one of the listeners
can attach another, or detach it."""

from __future__ import annotations

from collections.abc import Collection

from steer.errors import KernelError, Note
from steer.loader.kernel_sockets import KernelSocket, Look


def taken_by(inodes: Collection[int], ours: int) -> Note | None:
    """What selects among listeners in place of our program.

    Args:
        inodes: of the listeners.
        ours: the number of our program.

    Returns:
        None: our program does, or nobody can tell without CAP_PERFMON and BTF.
    """
    try:
        found = program_of(inodes)
    except KernelError:
        return None
    if found is None or found.program_id == ours:
        return None
    return Note(f"{_in_words(found)}, not by the policy", "`steer detach` and attach again")


def program_of(inodes: Collection[int]) -> KernelSocket | None:
    """One of these listeners, with the program of its group; None: they are closed. Raises
    KernelError."""
    with Look() as look:
        return next((each for each in look.in_this_netns() if each.inode in inodes), None)


def _in_words(found: KernelSocket) -> str:
    if not found.program:
        return "steer's program was detached: connections go by the kernel's hash"
    if found.classic_length:
        return "another program was attached: connections go by that classic program"
    name = found.name.partition(b"\0")[0].decode(errors="replace")
    return f"another program was attached: connections go by {name} (id {found.program_id})"
