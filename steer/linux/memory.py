"""The memory that processes use, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

from steer.linux.procfs import Files

_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


def rss_bytes(pids: Iterable[int], files: Files) -> int:
    """The resident memory of processes together (`statm` of proc(5)). Pages that several of them
    share count once for each, so it is an upper bound of `pss_bytes`, and quick to read. A process
    that has ended counts as nothing."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            total += int(files.read(f"{files.root}/{pid}/statm").split()[1])
    return total * _PAGE_BYTES


def pss_bytes(pids: Iterable[int], files: Files) -> int | None:
    """The memory of processes together, where a page that n processes share counts as 1/n for each
    (`smaps_rollup` of proc(5), Linux 4.14). The kernel walks all page tables for it.

    Returns:
        None: it may not be read of one of them. A process that has ended counts as nothing.
    """
    total = 0
    for pid in pids:
        try:
            text = files.read(f"{files.root}/{pid}/smaps_rollup")
        except (FileNotFoundError, ProcessLookupError):
            continue
        except OSError:
            return None
        found = (line.split() for line in text.splitlines() if line.startswith(b"Pss:"))
        total += sum(int(words[1]) for words in found) << 10
    return total
