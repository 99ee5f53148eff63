"""Tells which options its sockets have."""

import contextlib
import json
import os
import socket

from testkit.programs.tells_options import options


def own():
    for name in os.listdir("/proc/self/fd"):
        try:
            sock = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with sock:
            try:
                peer = sock.family == socket.AF_INET and sock.getpeername()
            except OSError:
                continue
            if peer:
                return options(sock)
    return None


async def app(scope, receive, send):
    body = json.dumps(own()).encode()
    headers = [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serve(worker):
    import asyncio

    async def on_client(reader, writer):
        await reader.readline()
        body = json.dumps(options(writer.get_extra_info("socket"))).encode()
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + body)
        writer.close()

    async def main():
        server = await asyncio.start_server(on_client, sock=worker.sockets[0])
        asyncio.get_running_loop().add_signal_handler(15, server.close)
        with contextlib.suppress(asyncio.CancelledError):
            await server.serve_forever()

    asyncio.run(main())
