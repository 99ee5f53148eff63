r"""The server of a socket tutorial: answers each line in upper case, one client at a time.

Run:  cd examples && steer run upper_tcp:serve -b 127.0.0.1:8080
Try:  bash -c '(echo hello >&3; head -n 1 <&3) 3<>/dev/tcp/127.0.0.1/8080'
  or  python3 -c 'import socket; c = socket.create_connection(("127.0.0.1", 8080)); \
                  c.sendall(b"hello\n"); print(c.recv(100))'
"""

from contextlib import suppress

from steer import Worker


def serve(worker: Worker) -> None:
    listener = worker.sockets[0]
    worker.ready()
    while True:
        client, _ = listener.accept()
        with suppress(ConnectionError), client, client.makefile("rwb") as lines:
            for line in lines:
                lines.write(line.upper())
                lines.flush()
