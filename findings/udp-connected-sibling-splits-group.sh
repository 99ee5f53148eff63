#!/bin/sh
# A UDP server that opens a connected socket for a client, with SO_REUSEPORT and at its own address, as
# servers of DTLS do, splits its SO_REUSEPORT group when the next socket is bound there.
#
# A socket that is bound joins the group of the first socket it finds with the same address, port, user and
# interface (udp_reuseport_add_sock() of net/ipv4/udp.c), and over IPv4 the one that was bound last is found
# first. Since Linux 6.13 connect(2) takes a socket out of its group (udp_lib_hash4()), but it is found all the
# same: so the newcomer and the connected socket make a group of their own, which has no program. A datagram of
# a new client finds the newest socket first, and so this group, in which nobody but the newcomer can get it.
# Over IPv6 both go by the oldest: once the connected socket is older than all that are left, as its server has
# closed its listener and finishes with that client, a newcomer gets nothing, whatever the program says.
# A wildcard address is not concerned, as a connected socket has an address of its own there.
#
# Before Linux 6.13 nothing is split. But the connected socket stays in the group, and the indexes of a classic
# program count it: what the program sends to the index that it takes for the newcomer's, the connected one gets.
#
# A way round, which needs no privilege since Linux 5.7: one more socket in the group, bound to an interface
# (SO_BINDTOIFINDEX), and all others bound to the same interface, so that they find it and nobody else, then
# released from it by connect(2) to AF_UNSPEC, which leaves them in the group.
#
# Binds two sockets with a connected one at the same address, has a classic program on their group, binds a
# third, and counts who gets 200 datagrams of new clients while the program chooses the first, then the third.
# Exits 1 if that is not as listed below. Needs root, for a network namespace.
set -eu

code=$(mktemp)
trap 'rm -f "$code"' EXIT
cat >"$code" <<'PYTHON'
import ctypes, platform, socket, struct, sys

SO_ATTACH_REUSEPORT_CBPF, SO_BINDTOIFINDEX, LOOPBACK, PORT, NUMBER = 51, 62, 1, 5000, 200
libc = ctypes.CDLL(None, use_errno=True)


def bound(address, interface=0, released=False):
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if interface:
        sock.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, interface)
    sock.bind((address, PORT))
    if released:
        assert libc.connect(sock.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16) == 0
    return sock


def choose(member, index):
    """Have the program of its group answer that, always."""
    answer = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, index))
    program = struct.pack("@HP", 1, ctypes.addressof(answer))
    member.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, program)


def received(sock, to):
    """How many of the datagrams of new clients this one gets."""
    drain(sock)
    for _ in range(NUMBER):
        with socket.socket(sock.family, socket.SOCK_DGRAM) as client:
            client.sendto(b"x", (to, PORT))
    return drain(sock)


def drain(sock):
    number = 0
    while True:
        try:
            sock.recv(10, socket.MSG_DONTWAIT)
            number += 1
        except BlockingIOError:
            return number


def look(address, anchored, outlives):
    """What the third gets while the program chooses another, and while it chooses index 2, which is the
    third unless the connected socket is counted; and what the connected one gets then."""
    to = "127.0.0.1" if address == "0.0.0.0" else address
    how = (LOOPBACK, True) if anchored else ()
    anchors = [bound(address, LOOPBACK)] if anchored else []
    server = bound(address, *how)
    others = [] if outlives else [bound(address, *how)]
    peer = socket.socket(server.family, socket.SOCK_DGRAM)
    peer.bind((to, 0))
    connected = bound(to)
    connected.connect(peer.getsockname())
    if outlives:
        # The last of the group moves into the place of the one that is closed.
        others = [bound(address, *how), bound(address, *how)]
        server.close()
    third = bound(address, *how)
    found = []
    for index in (0, 2):
        drain(connected)
        choose(others[0], len(anchors) + index)
        found.append(received(third, to))
    found.append(drain(connected))
    for sock in (*anchors, server, peer, connected, *others, third):
        sock.close()
    return found


def connected_stay():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        sock.connect(("127.0.0.1", 9))
        try:
            choose(sock, 0)
            return True
        except OSError:  # EINVAL: it is in no group
            return False


failed, stay = False, connected_stay()
print("a connected socket", "stays in its group" if stay else "is in no group")
for address, outlives, anchored, now, before in (
    ("127.0.0.1", False, False, [200, 200, 0], [0, 0, 200]),
    ("::1", False, False, [0, 200, 0], [0, 0, 200]),
    ("::1", True, False, [0, 0, 0], [0, 0, 0]),
    ("0.0.0.0", False, False, [0, 200, 0], [0, 200, 0]),
    ("127.0.0.1", False, True, [0, 200, 0], [0, 0, 200]),
    ("::1", True, True, [0, 200, 0], [0, 0, 0]),
):
    found, expected = look(address, anchored, outlives), before if stay else now
    what = f"{address}, connected socket {'outlives' if outlives else 'beside'} its server's"
    what += ", by an interface" if anchored else ""
    verdict = "as expected" if found == expected else f"CHANGED: expected {expected}"
    print(f"{what:<63} third gets {found[0]:3}, and {found[1]:3} (connected one {found[2]:3})  {verdict}")
    failed |= found != expected
sys.exit(failed)
PYTHON
echo "$(uname -sr), $(python3 --version)"
# shellcheck disable=SC2016 # $0 is the inner shell's
unshare --net sh -c 'ip link set lo up && exec python3 "$0"' "$code"
