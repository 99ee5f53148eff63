"""The program that a group has already, before an attach."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Set
from contextlib import suppress

import msgspec

from steer.attach import leftover, ownership, there
from steer.attach.replaced import StoredProgram
from steer.errors import AttachRefused, KernelError
from steer.linux import services
from steer.loader.kernel_sockets import KernelSocket, Look
from steer.values import plural, several

_OURS = b"steer_"


class Present(msgspec.Struct, frozen=True):
    """What attach has to do about the program of a group.

    Args:
        left: whether it is that of an attacher that was killed.
        replaced: one that is to be replaced for a while; None: none.
    """

    left: bool = False
    replaced: StoredProgram | None = None


def look(inodes: Collection[int], act: str, replace: bool) -> Present:
    """Look at the program of the group of these listeners.

    Args:
        replace: whether a program of somebody else may be replaced.

    Raises:
        AttachRefused: it is somebody else's, or its attacher lives; or no program can select among
            all of them.
    """
    try:
        with Look() as looking:
            seen = [each for each in looking.in_this_netns() if each.inode in inodes]
            found = _programs(looking, seen)
    except KernelError:
        return Present()  # without CAP_PERFMON nobody can tell
    # A socket without SO_REUSEPORT is in no group, and refused for that.
    if split := ownership.split([each.group for each in seen if each.is_reuseport]):
        raise AttachRefused(act, split.found, split.cure)
    for each, pids in found:
        if pids or not each.name.startswith(_OURS):
            if not replace or services.name_of_any(pids):
                raise AttachRefused(act, *_in_words(each, pids))
            return Present(replaced=_stored(each, act))
    for each, _ in found:
        with suppress(KernelError):  # without CAP_SYS_ADMIN its name has to do
            leftover.refuse_unseen(each.program_id, act)
    return Present(left=bool(found))


def _programs(looking: Look, seen: Iterable[KernelSocket]) -> list[tuple[KernelSocket, Set[int]]]:
    """A socket for each program that selects among them, and the processes that have that open.
    Raises KernelError."""
    found: Mapping[int, KernelSocket] = {each.program: each for each in seen if each.program}
    held_by = looking.holders(found) if found else {}
    return [(each, held_by[program]) for program, each in found.items()]


def _stored(found: KernelSocket, act: str) -> StoredProgram:
    """Raises AttachRefused: it could not be put back."""
    if not found.classic_length:
        return StoredProgram(found.program_id)
    try:
        with Look() as looking:
            return StoredProgram(classic=looking.classic(found))
    except KernelError as error:
        cause = f"its classic program could not be put back: {error}"
        raise AttachRefused(act, cause, "end whoever attached it") from None


def _in_words(found: KernelSocket, pids: Set[int]) -> tuple[str, str]:
    """Cause and cure."""
    if service := services.name_of_any(pids):
        cause = f"service {service} steers it already ({several('pid', sorted(pids))})"
        return cause, there.cure(service, min(pids))
    if found.classic_length:
        what = f"a classic program of {plural(found.classic_length, 'instruction')}"
    else:
        name = found.name.partition(b"\0")[0].decode(errors="replace")
        began_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + found.loaded_ns / 1e9
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began_s))
        what = f"program {name} (id {found.program_id}, loaded by uid {found.program_uid}, {since})"
    by = f"; it is held by {several('pid', sorted(pids))}" if pids else ""
    cure = "--replace takes its place, and puts it back at the end"
    return f"{what} selects there already{by}", cure
