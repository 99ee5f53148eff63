"""The memory of processes, as the kernel tells it."""

from __future__ import annotations

import mmap
import os

from steer.linux import fork, memory
from steer.linux.procfs import Files

SIZE_BYTES = 32 << 20


def test_shared_pages_count_once_in_pss_and_for_each_in_rss() -> None:
    shared = mmap.mmap(-1, SIZE_BYTES)
    shared.write(b"x" * SIZE_BYTES)
    touched_r, touched_w = os.pipe()
    end_r, end_w = os.pipe()

    def child() -> int:
        assert shared[:: mmap.PAGESIZE].count(b"x") == SIZE_BYTES // mmap.PAGESIZE
        os.write(touched_w, b"x")
        os.read(end_r, 1)
        return 0

    pid, pidfd = fork.fork(child)
    try:
        os.read(touched_r, 1)
        both = (os.getpid(), pid)
        rss_bytes, pss_bytes = memory.rss_bytes(both, Files()), memory.pss_bytes(both, Files())
        assert pss_bytes is not None
        assert rss_bytes - pss_bytes >= SIZE_BYTES
        assert pss_bytes >= SIZE_BYTES
    finally:
        os.write(end_w, b"x")
        assert fork.reap(pid, pidfd, is_child=True) == 0
        for fd in (pidfd, touched_r, touched_w, end_r, end_w):
            os.close(fd)


def test_process_that_has_ended_uses_nothing() -> None:
    pid, pidfd = fork.fork(lambda: 0)
    fork.reap(pid, pidfd, is_child=True)
    os.close(pidfd)
    assert memory.rss_bytes([pid], Files()) == 0
    assert memory.pss_bytes([pid], Files()) == 0


def test_process_that_may_not_be_read() -> None:
    """The kernel refuses like this where ptrace(2) access is refused."""

    class Refusing(Files):
        def read(self, path: str) -> bytes:
            raise PermissionError

    assert memory.pss_bytes([os.getpid()], Refusing()) is None
