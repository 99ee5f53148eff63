"""However many children end at once, no other signal is lost for it."""

from __future__ import annotations

import subprocess
import sys

MANY = 600
"""More than there is room for in the socket pair of a loop."""
PROGRAM = f"""
import asyncio, os, signal
from contextlib import closing
from steer.linux import fork as process
from steer.linux.child_ends import ChildEnds

async def main(ends):
    loop, terminated, ended = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, terminated.set)
    process.release_signals()
    loop.add_reader(ends, ended.set)
    for _ in range({MANY}):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitid(os.P_PID, pid, os.WEXITED)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.gather(terminated.wait(), ended.wait())
    ends.clear()
    ends.clear()
    ended.clear()
    os.posix_spawn("/bin/true", ["true"], {{}})
    await ended.wait()
    os.wait()

process.hold_signals()
with closing(ChildEnds()) as ends:
    asyncio.run(main(ends))
print("heard")
"""


def test_children_that_end_do_not_keep_others_signals_from_being_heard() -> None:
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert told.stdout == "heard\n", told.stderr
    assert not told.stderr
