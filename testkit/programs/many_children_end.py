"""Hears a signal after many children have ended."""

import asyncio
import os
import signal
from contextlib import closing

from steer.linux import signals
from steer.linux.child_ends import ChildEnds

MANY = 600
"""More than there is room for in the socket pair of a loop."""


async def main(ends):
    loop, terminated, ended = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, terminated.set)
    signals.release_signals()
    loop.add_reader(ends, ended.set)
    for _ in range(MANY):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitid(os.P_PID, pid, os.WEXITED)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.gather(terminated.wait(), ended.wait())
    ends.clear()
    ends.clear()
    ended.clear()
    os.posix_spawn("/bin/true", ["true"], {})
    await ended.wait()
    os.wait()


signals.hold_signals()
with closing(ChildEnds()) as ends:
    asyncio.run(main(ends))
print("heard")
