"""An asyncio server with one worker per CPU: the CPU that receives a packet serves it.

Stop it with Ctrl-C.

Run:  sudo ../.venv/bin/python asyncio_per_cpu.py
Try:  echo hello | nc -N 127.0.0.1 8000
"""

import asyncio
import os

import steer


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write((await reader.readline()).upper())
    writer.close()


async def serve(cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    await (await asyncio.start_server(answer, sock=sock)).serve_forever()


cpus = sorted(os.sched_getaffinity(0))
with steer.ReuseportGroup("127.0.0.1:8000", "cpu", slots=len(cpus)) as group:
    for slot, cpu in enumerate(cpus):
        with group.listen(slot, cpu=cpu) as sock:
            if os.fork() == 0:
                asyncio.run(serve(cpu))
        group.activate(slot)
    os.wait()
