#!/bin/sh
# asyncio is told of each signal by a byte in a socket pair, and 278 such bytes fit. What comes after them in the same turn
# of the loop is lost, whichever signal it was: a supervisor that handles SIGCHLD with add_signal_handler() and has more
# children than that never hears a SIGTERM that is sent while they end. Only warnings on standard error tell of it
# (signal.set_wakeup_fd(), warn_on_full_buffer). With SIGCHLD blocked and a signalfd(2) in the loop nothing is lost, as a
# standard signal is pending only once, however many children end.
#
# Starts 400 processes that end at once, and sends itself SIGTERM after the last, in one turn of the loop; then counts
# what the handlers heard. Exits 1 if that is not as listed, which is how CPython 3.11 does it on Linux 6.18.
set -eu

warnings=$(mktemp)
trap 'rm -f "$warnings"' EXIT
status=0
python3 - 2>"$warnings" <<'PYTHON' || status=$?
import asyncio, os, platform, signal, sys

CHILDREN = 400


async def main():
    loop, heard = asyncio.get_running_loop(), []
    loop.add_signal_handler(signal.SIGCHLD, heard.append, "SIGCHLD")
    loop.add_signal_handler(signal.SIGTERM, heard.append, "SIGTERM")
    for _ in range(CHILDREN):
        pid = os.posix_spawn("/bin/true", ["true"], {})
        os.waitid(os.P_PID, pid, os.WEXITED)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(1)
    return heard.count("SIGCHLD"), heard.count("SIGTERM")


chld, term = asyncio.run(main())
print(f"Python {platform.python_version()}, Linux {platform.release()}: {CHILDREN} children ended,"
      f" SIGCHLD was heard {chld} times, SIGTERM {term} times")
sys.exit((chld, term) != (278, 0))
PYTHON
echo "warnings on standard error: $(grep -c 'signal wakeup fd' "$warnings")"
exit "$status"
