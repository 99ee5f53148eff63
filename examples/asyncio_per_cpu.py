"""An asyncio server with one worker per CPU: the CPU that receives a packet serves it.

The slot of a worker has the number of its CPU. Stop the server with Ctrl-C, or kill its first
process: the workers get SIGTERM when that ends (PR_SET_PDEATHSIG of prctl(2), which is 1).

Run:  sudo ../.venv/bin/python asyncio_per_cpu.py
Try:  bash -c '(echo hello >&3; head -n 1 <&3) 3<>/dev/tcp/127.0.0.1/8000'
"""

import asyncio
import ctypes
import os
import signal

import steer


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write((await reader.readline()).upper())
    writer.close()


async def serve(cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    await (await asyncio.start_server(answer, sock=sock)).serve_forever()


signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback
with steer.ReuseportGroup("127.0.0.1:8000", "cpu", slots=max(os.sched_getaffinity(0)) + 1) as group:
    for cpu in os.sched_getaffinity(0):
        with group.listen(cpu, cpu=cpu) as sock:
            if os.fork() == 0:
                ctypes.CDLL(None).prctl(1, signal.SIGTERM)
                asyncio.run(serve(cpu))
        group.activate(cpu)
    os.wait()
