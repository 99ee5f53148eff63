#!/bin/sh
# asyncio sets TCP_NODELAY on an accepted connection only if the *Python object* of the listener says
# family AF_INET or AF_INET6 and proto IPPROTO_TCP; what the kernel's socket is, it does not ask
# (_set_nodelay() of asyncio/base_events.py). A listener made as socket.socket(AF_INET, SOCK_STREAM) says
# proto 0, and `uvicorn --fd` says AF_UNIX, so under both each request of a kept connection whose answer is
# written in two pieces takes 40 ms: Nagle's algorithm waits for the client's delayed acknowledgement.
# With uvloop the option is not set there either. In 0.22.1 that did no harm, as it sent what was written in
# one turn of the loop together; 0.23.0 sends each piece at once, as asyncio does, and is 100 times slower.
#
# Runs uvicorn 0.54.0 with asyncio and with both versions of uvloop, and a server of asyncio's streams, and
# asks each in one kept connection. Exits 1 if TCP_NODELAY of an accepted socket, or the number of segments
# that an answer comes in, is not as listed below.
set -eu

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

for version in 0.22.1 0.23.0; do
    python3 -m venv "uvloop-$version"
    "uvloop-$version/bin/pip" install -q --disable-pip-version-check \
        uvicorn==0.54.0 h11==0.16.0 "uvloop==$version" 2>pip.log || { cat pip.log >&2; exit 1; }
done

cat >app.py <<'PYTHON'
import os, socket


def accepted():
    """TCP_NODELAY of the one connection that this process has."""
    for name in os.listdir("/proc/self/fd"):
        try:
            sock = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with sock:
            try:
                if sock.family == socket.AF_INET and sock.getpeername():
                    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            except OSError:
                pass


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = b"%d" % accepted()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
PYTHON

cat >streams.py <<'PYTHON'
import asyncio, socket, sys

from app import accepted


async def answer(reader, writer):
    try:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n")
            writer.write(b"%d" % accepted())
    except asyncio.IncompleteReadError:
        writer.close()


async def main(how, port):
    if how == "host":
        server = await asyncio.start_server(answer, "127.0.0.1", port)
    else:
        proto = socket.IPPROTO_TCP if how == "sock-tcp" else 0
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, proto)
        sock.bind(("127.0.0.1", port))
        server = await asyncio.start_server(answer, sock=sock)
    await server.serve_forever()


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
PYTHON

cat >ask.py <<'PYTHON'
"""ask.py NODELAY SEGMENTS WHAT COMMAND...: PORT in the command is a free port, FD a listener's descriptor."""
import socket, statistics, struct, subprocess, sys, time

DATA_SEGS_IN = 152  # offset of tcpi_data_segs_in in struct tcp_info (linux/tcp.h)
expected, what, command = sys.argv[1:3], sys.argv[3], sys.argv[4:]
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
port = listener.getsockname()[1]
inherits = "FD" in command
if inherits:
    listener.listen()
    command = [str(listener.fileno()) if word == "FD" else word for word in command]
else:
    listener.close()
    command = [str(port) if word == "PORT" else word for word in command]
fds = (listener.fileno(),) if inherits else ()
server = subprocess.Popen(command, pass_fds=fds, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    until = time.monotonic() + 30
    while True:
        try:
            sock = socket.create_connection(("127.0.0.1", port), 30)
            break
        except OSError:
            assert time.monotonic() < until and server.poll() is None, "does not start"
            time.sleep(0.02)
    took = []
    with sock, sock.makefile("rb") as stream:
        for _ in range(20):
            begun = time.monotonic()
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            while stream.readline() != b"\r\n":
                pass
            seen = stream.read(1).decode()
            took.append(time.monotonic() - begun)
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, DATA_SEGS_IN + 4)
        segments = round(struct.unpack_from("=I", info, DATA_SEGS_IN)[0] / len(took))
finally:
    server.kill()
    server.wait()
    listener.close()
ms = 1000 * statistics.median(took)
changed = [seen, str(segments)] != expected
verdict = f"CHANGED: expected {expected}" if changed else "as expected"
print(f"{what:<42} TCP_NODELAY {seen}  segments {segments}  median {ms:4.1f} ms  {verdict}", flush=True)
sys.exit(changed)
PYTHON

echo "$(uname -sr), $(python3 --version), uvicorn 0.54.0"
failed=0
new=uvloop-0.23.0/bin
ask() {
    python3 ask.py "$@" || failed=1
}
ask 1 2 'asyncio, start_server(host, port)' python3 streams.py host PORT
ask 0 2 'asyncio, start_server(sock=), proto 0' python3 streams.py sock PORT
ask 1 2 'asyncio, start_server(sock=), IPPROTO_TCP' python3 streams.py sock-tcp PORT
ask 1 2 'uvicorn --port, asyncio' $new/uvicorn app:app --http h11 --loop asyncio --port PORT
ask 0 2 'uvicorn --fd, asyncio' $new/uvicorn app:app --http h11 --loop asyncio --fd FD
ask 0 1 'uvicorn --fd, uvloop 0.22.1' uvloop-0.22.1/bin/uvicorn app:app --http h11 --loop uvloop --fd FD
ask 0 2 'uvicorn --fd, uvloop 0.23.0' $new/uvicorn app:app --http h11 --loop uvloop --fd FD
exit $failed
