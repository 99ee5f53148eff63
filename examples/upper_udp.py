r"""The UDP server of a socket tutorial: answers each datagram in upper case.

Run:  cd examples && steer run upper_udp:serve -b udp://127.0.0.1:8053
Try:  bash -c '(echo hello >&3; head -n 1 <&3) 3<>/dev/udp/127.0.0.1/8053'
  or  python3 -c 'import socket; c = socket.socket(type=socket.SOCK_DGRAM); \
                  c.sendto(b"hello", ("127.0.0.1", 8053)); print(c.recv(100))'
"""

from steer import Worker


def serve(worker: Worker) -> None:
    sock = worker.sockets[0]
    worker.ready()
    while True:
        data, client = sock.recvfrom(65535)
        sock.sendto(data.upper(), client)
