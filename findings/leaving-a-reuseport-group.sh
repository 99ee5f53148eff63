#!/bin/sh
# A member of a group of SO_REUSEPORT sockets can leave it by calls that say nothing of that, and then gets
# nothing, or all that comes, whatever program the group has:
#
# - A UDP socket that connect(2) has connected and AF_UNSPEC has released, or that was bound to a device, also
#   for an instant, is in no group any more (udp_lib_rehash() of net/ipv4/udp.c detaches it), cannot join one again,
#   and takes everything if it is found first. An attach through it fails with EINVAL.
# - A member that sets SO_REUSEPORT to 0 stays in the group, and takes everything if it is found first: no program is
#   asked (inet_lookup_reuseport() of net/ipv4/inet_hashtables.c). Setting it to 1 again is all it takes.
# - A TCP listener that is bound to a device stays in the group, too. The program may choose it for a SYN that came by
#   another device, but the ACK is not let in: such a connection times out, and none of the others gets it.
#
# Runs four sockets in a network namespace of its own (unshare: root, or user namespaces), with a classic program
# that chooses by chance, has the last one do each of these, and counts who gets what. Exits 1 if that is not as
# listed, which is how Linux 6.18 does it. On Linux 6.1 and 6.12 the first, on a specific IPv4 address, is harmless.
set -eu

if [ "${1:-}" != inside ]; then
    # As root a user namespace is not needed, and in a chroot it is refused.
    if [ "$(id -u)" = 0 ]; then exec unshare -n "$0" inside; else exec unshare -Urn "$0" inside; fi
fi
ip link set lo up
ip link add up0 type veth peer name up1
ip link set up0 up
uname -sr
exec python3 - <<'PYTHON'
import collections, ctypes, errno, select, socket, struct, sys

PORT, MEMBERS, ASKED = 7000, 4, 60
SO_REUSEPORT, SO_BINDTODEVICE, SO_ATTACH_REUSEPORT_CBPF = 15, 25, 51
libc = ctypes.CDLL(None, use_errno=True)


class Fprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def attach(sock):
    """By chance: load SKF_AD_RANDOM, modulo MEMBERS, return it."""
    insns = [(0x20, 0, 0, 0xFFFFF000 + 56), (0x94, 0, 0, MEMBERS), (0x16, 0, 0, 0)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in insns))
    program = bytes(Fprog(len(insns), ctypes.addressof(code)))
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, program)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"


def member(kind, host):
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 1)
    sock.bind((host, PORT))
    if kind == socket.SOCK_STREAM:
        sock.listen(100)
    return sock


def dissolve(sock):
    sock.connect(("::1" if sock.family == socket.AF_INET6 else "127.0.0.1", 9))
    assert libc.connect(sock.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16) == 0


def bind_to(name):
    return lambda sock: sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, name + b"\0")


def bind_and_release(sock):
    bind_to(b"lo")(sock)
    bind_to(b"")(sock)


def alone(sock):
    sock.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 0)


def and_back(sock):
    alone(sock)
    sock.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 1)


def ask(kind, host, members):
    """Who gets it; None if nobody does."""
    to = {"0.0.0.0": "127.0.0.1"}.get(host, host)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as client:
        client.settimeout(0.2)
        try:
            client.connect((to, PORT))
        except TimeoutError:
            return None
        if kind == socket.SOCK_DGRAM:
            client.send(b"x")
        for sock in select.select(members, [], [], 0.2)[0]:
            sock.recv(1) if kind == socket.SOCK_DGRAM else sock.accept()[0].close()
            return members.index(sock)


def share(kind, host, members):
    got = collections.Counter(ask(kind, host, members) for _ in range(ASKED))
    last = got[MEMBERS - 1]
    words = "everything" if last == ASKED else "nothing" if not last else "a share"
    return words + (", and some connections time out" if got[None] else "")


TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
EXPECTED = [
    (UDP, "0.0.0.0", "nothing is done", lambda sock: None, "a share", "ok"),
    (UDP, "0.0.0.0", "connect, dissolve", dissolve, "everything", "EINVAL"),
    (UDP, "127.0.0.1", "connect, dissolve", dissolve, "everything", "EINVAL"),
    (UDP, "::1", "connect, dissolve", dissolve, "everything", "EINVAL"),
    (UDP, "127.0.0.1", "device", bind_to(b"lo"), "everything", "EINVAL"),
    (UDP, "127.0.0.1", "device and back", bind_and_release, "everything", "EINVAL"),
    (UDP, "::1", "device and back", bind_and_release, "nothing", "EINVAL"),
    (UDP, "127.0.0.1", "SO_REUSEPORT 0", alone, "everything", "ok"),
    (UDP, "127.0.0.1", "SO_REUSEPORT 0, then 1", and_back, "a share", "ok"),
    (TCP, "127.0.0.1", "SO_REUSEPORT 0", alone, "everything", "ok"),
    (TCP, "127.0.0.1", "SO_REUSEPORT 0, then 1", and_back, "a share", "ok"),
    (TCP, "127.0.0.1", "another device", bind_to(b"up0"), "nothing, and some connections time out", "ok"),
]
changed = False
for kind, host, act, do, wanted, attaches in EXPECTED:
    members = [member(kind, host) for _ in range(MEMBERS)]
    attach(members[0])
    do(members[-1])
    found = share(kind, host, members), attach(members[-1])
    right = found == (wanted, attaches)
    changed |= not right
    verdict = "as expected" if right else f"CHANGED: expected {wanted}; {attaches}"
    where = f"{'udp' if kind == UDP else 'tcp'} {host}"
    print(f"{where:<14} {act:<23} gets {found[0]}; attach: {found[1]:<7} {verdict}")
    for sock in members:
        sock.close()
sys.exit(changed)
PYTHON
