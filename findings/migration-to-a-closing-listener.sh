#!/bin/sh
# A connection that the kernel migrates (net.ipv4.tcp_migrate_req, or a program for migration) to a listener that another
# CPU is closing at the same time is reset, although other listeners of the group stay open:
#
# inet_csk_listen_stop() of net/ipv4/inet_connection_sock.c selects a new listener with reuseport_migrate_sock() and then
# adds the connection to its accept queue. If that listener has been closed in between, inet_csk_reqsk_queue_add() finds it
# not listening and resets the connection; no other listener is tried. TCPMigrateReqFailure of /proc/net/netstat counts it.
#
# So a server that closes several listeners of a group at once can lose connections even with migration. A program that
# selects none of the listeners that are about to close avoids it; the kernel's own hash selects them, too.
#
# Closes two of three listeners with full queues at the same time, each on a CPU of its own, until a connection is
# reset, in a network namespace of its own (unshare: root). Needs two CPUs, iproute2 and python3. Exits 1 if no connection is
# reset within a minute, or if one is reset that the kernel did not count, or is missing. On Linux 6.18 it takes a second.
set -eu

if [ "${1:-}" != inside ]; then
    exec unshare --net "$0" inside
fi
ip link set lo up
echo 1 >/proc/sys/net/ipv4/tcp_migrate_req
uname -sr
exec python3 - <<'PYTHON'
import mmap, os, socket, sys, time

PORT, CLOSE, CONNECTIONS, AT_MOST_S = 7000, 2, 300, 60


def listener():
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", PORT))
    sock.listen(2 * CONNECTIONS)
    return sock


def failures():
    with open("/proc/net/netstat") as file:
        names, values = [line.split() for line in file if line.startswith("TcpExt:")]
    return int(values[names.index("TCPMigrateReqFailure")])


def start_closer(sock, others, cpu, shared):
    """A process that closes the listener as soon as it is told, on a CPU of its own."""
    pid = os.fork()
    if pid == 0:
        for each in others:
            each.close()
        os.sched_setaffinity(0, {cpu})
        shared[1 + cpu] = 1
        while not shared[0]:
            pass
        sock.close()
        os._exit(0)
    return pid


def is_reset(client):
    client.setblocking(False)
    try:
        client.recv(1)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def accepted(sock):
    sock.setblocking(False)
    count = 0
    while True:
        try:
            sock.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


def close_at_once():
    """How many connections were reset, and how many the listener that stays got."""
    shared = mmap.mmap(-1, 4096)
    stays, closing = listener(), [listener() for _ in range(CLOSE)]
    pids = []
    for cpu, sock in enumerate(closing):
        others = [each for each in (stays, *closing) if each is not sock]
        pids.append(start_closer(sock, others, cpu, shared))
    for sock in closing:
        sock.close()
    clients = [socket.create_connection(("127.0.0.1", PORT)) for _ in range(CONNECTIONS)]
    while not all(shared[1 : 1 + CLOSE]):
        time.sleep(0.001)
    shared[0] = 1
    for pid in pids:
        os.waitpid(pid, 0)
    found = sum(map(is_reset, clients)), accepted(stays)
    for sock in (stays, *clients):
        sock.close()
    return found


if os.cpu_count() < CLOSE:
    sys.exit("needs two CPUs")
began_s, before, reset, got, rounds = time.monotonic(), failures(), 0, 0, 0
while not reset and time.monotonic() - began_s < AT_MOST_S:
    found = close_at_once()
    reset, got, rounds = reset + found[0], got + found[1], rounds + 1
counted = failures() - before
made = rounds * CONNECTIONS
print(f"{rounds} times {CLOSE} of {CLOSE + 1} listeners closed, {made:,} connections: {reset} reset, TCPMigrateReqFailure {counted}")
sys.exit(not (reset and reset == counted and reset + got == made))
PYTHON
