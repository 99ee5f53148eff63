#!/bin/sh
# Processes that share one listening socket do not share its connections evenly, and how they wait decides who gets them
# (whoever is idle; a server that is busy all the time is another matter):
#
# - In accept(2) they are woken in turn: a waiter is queued at the tail each time (inet_csk_wait_for_connect() of
#   net/ipv4/inet_connection_sock.c, prepare_to_wait_exclusive()).
# - With EPOLLEXCLUSIVE one is woken, and as it stays in the socket's list of waiters where it registered, it is always
#   the same one: with a connection at a time, the first process that registered gets every one of them (ep_poll_callback()
#   of fs/eventpoll.c). nginx and others wait like that.
# - With an epoll without it all are woken, and whoever is quickest gets it.
#
# Runs four processes for each, in a network namespace of its own (unshare: root, or user namespaces), and opens
# connections one after the other. Exits 1 if that is not as listed, which is how Linux 5.10, 6.1 and 6.18 do it.
set -eu

if [ "${1:-}" != inside ]; then
    # As root a user namespace is not needed, and in a chroot it is refused.
    if [ "$(id -u)" = 0 ]; then exec unshare -n "$0" inside; else exec unshare -Urn "$0" inside; fi
fi
ip link set lo up
uname -sr
exec python3 - <<'PYTHON'
import os, select, signal, socket, sys, time

PROCESSES, CONNECTIONS = 4, 200


def serve(listener, how, me, told):
    epoll = select.epoll()
    if how != "accept":
        epoll.register(listener, select.EPOLLIN | (select.EPOLLEXCLUSIVE if how == "exclusive" else 0))
    os.write(told, b"r")
    while True:
        if how != "accept":
            epoll.poll()
        try:
            client, _ = listener.accept()
        except BlockingIOError:
            continue
        client.send(bytes([me]))
        client.close()


def is_idle(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "S"


def shares(how):
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(how == "accept")
    hears, told = os.pipe()
    pids = []
    for me in range(PROCESSES):
        pid = os.fork()
        if not pid:
            serve(listener, how, me, told)
        pids.append(pid)
        os.read(hears, 1)  # the next one registers after it
    got = [0] * PROCESSES
    for _ in range(CONNECTIONS):
        while not all(map(is_idle, pids)):
            time.sleep(0.001)
        with socket.create_connection(listener.getsockname()) as client:
            got[client.recv(1)[0]] += 1
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    listener.close()
    return got


EXPECTED = {
    "accept": ("in turn", lambda got: max(got) - min(got) <= 2),
    "exclusive": ("all to the first", lambda got: got[0] == CONNECTIONS),
    "epoll": ("whoever is quickest", lambda got: sum(got) == CONNECTIONS),
}
changed = False
for how, (words, is_so) in EXPECTED.items():
    got = shares(how)
    right = is_so(got)
    changed |= not right
    print(f"{how:<10} {str(got):<22} {'as expected' if right else 'CHANGED'}: {words}")
sys.exit(changed)
PYTHON
