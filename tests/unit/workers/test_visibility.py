"""Why a worker cannot be looked at."""

from __future__ import annotations

import errno

import pytest

from steer.errors import KernelError, Note
from steer.workers.access import Access, Facts, why_no_borrowing, why_no_look
from steer.workers.visibility import notes_on

CAUSES = {
    "hidden": (Facts(is_hidden=True), "hidepid", "gid="),
    "hidepid": (Facts(hidepid=True, same_user=False), "hidepid", "gid="),
    "another user": (Facts(same_user=False), "CAP_SYS_PTRACE is not held", "--cap-add SYS_PTRACE"),
    "yama": (Facts(ptrace_scope=2), "ptrace_scope is 2", "ptrace_scope=1"),
    "yama for all": (Facts(ptrace_scope=3, may_ptrace=True), "ptrace_scope is 3", "reboot"),
    "something else": (Facts(ptrace_scope=1), "access is refused", "security module"),
}


@pytest.mark.parametrize(("facts", "cause", "cure"), CAUSES.values(), ids=CAUSES.keys())
def test_why_it_cannot_be_looked_at(facts: Facts, cause: str, cure: str) -> None:
    found = why_no_look(facts)
    assert cause in found.found
    assert cure in found.cure


def refused(number: int) -> KernelError:
    return KernelError.from_oserror("borrow a socket", OSError(number, "refused"))


def test_why_sockets_cannot_be_borrowed() -> None:
    eperm = refused(errno.EPERM)
    new = Facts(release="6.1.0", is_filtered=True)
    assert "seccomp" in why_no_borrowing(new, eperm, None).found
    assert "5.6" in why_no_borrowing(Facts(release="5.4.0"), refused(errno.ENOSYS), None).cure
    look = Note("hidepid", "remount")
    assert why_no_borrowing(new, eperm, look) == look
    assert "EMFILE" in why_no_borrowing(new, refused(errno.EMFILE), None).found
    other = Facts(release="6.1.0", same_user=False, is_filtered=True)
    assert "CAP_SYS_PTRACE is not held" in why_no_borrowing(other, eperm, None).found


def test_nothing_is_said_of_what_can_be_seen() -> None:
    assert notes_on(Access()) == []
