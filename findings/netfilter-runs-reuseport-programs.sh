#!/bin/sh
# Rules of netfilter look listeners up before the IP header is pulled, and so run the program of a
# SO_REUSEPORT group (SK_REUSEPORT) on other data than its documentation says, or more often, or not at all:
#
# - nft's `socket` expression (iptables -m socket) looks the listener up for each packet that belongs to no
#   connection. The program runs for it, with data that begin with the IP header, and what it selects is only
#   looked at. When the packet is delivered it runs again, with data that begin with the TCP header. A program that
#   takes turns, one for each SYN, gives every connection to every other socket; one that counts counts twice.
#   (nf_sk_lookup_slow_v4() of net/ipv4/netfilter/nf_socket_ipv4.c hands the packet to inet_lookup().)
# - `tproxy` looks the listener up and hands the packet to the one that was selected. The program runs once, with
#   data that begin with the IP header. (nf_tproxy_get_sock_v4() of net/ipv4/netfilter/nf_tproxy_ipv4.c)
# - `tproxy` over UDP looks the socket up without the packet, and the program does not run: the kernel's hash
#   selects. (The same function; reuseport_select_sock() of net/core/sock_reuseport.c.)
#
# include/uapi/linux/bpf.h says of struct sk_reuseport_md that data begin with the TCP or UDP header.
#
# As root, with python3 and Debian's nftables and iproute2 (bookworm: 1.0.6, 6.1.0), on a kernel with nft_tproxy and
# nft_socket. Exits 1 if the runs of the program for one client are not as listed below.
set -eu

if [ "${1:-}" != inside ]; then
    exec unshare --net "$0" inside
fi
ip link set lo up
ip rule add fwmark 1 lookup 100
ip route add local default dev lo table 100

exec /usr/bin/python3 - <<'PYTHON'
import ctypes, os, platform, socket, struct, subprocess, sys

SO_ATTACH_REUSEPORT_EBPF, IP_TRANSPARENT = 52, 19
PORT = 8080
PORTS = iter(range(0x8000, 0x8100))  # of clients, each once; 0x80 is no first byte of an IP header
LIBC = ctypes.CDLL(None, use_errno=True)
BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
MAP_CREATE, LOOKUP, DELETE, NEXT_KEY, PROG_LOAD = 0, 1, 3, 4, 5  # enum bpf_cmd


def bpf(command, form, *values):
    attr = ctypes.create_string_buffer(struct.pack(form, *values), 128)
    found = LIBC.syscall(BPF, command, attr, len(attr))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


COUNTS = bpf(MAP_CREATE, "=IIII", 1, 8, 8, 64)  # BPF_MAP_TYPE_HASH: (len, first byte) -> runs


def insn(code, dst=0, src=0, off=0, imm=0):
    return struct.pack("=BBhi", code, src << 4 | dst, off, imm)


MAP = insn(0x18, 1, 1, 0, COUNTS) + insn(0)  # r1 = the map
KEY = insn(0xBF, 2, 10) + insn(0x07, 2, imm=-8)  # r2 = fp - 8
PROGRAM = (
    insn(0xBF, 6, 1)  # r6 = ctx
    + insn(0x79, 2, 6, 0)  # r2 = ctx->data
    + insn(0x79, 3, 6, 8)  # r3 = ctx->data_end
    + insn(0xB7, 4)  # r4 = 0
    + insn(0xBF, 5, 2)
    + insn(0x07, 5, imm=1)
    + insn(0x2D, 5, 3, 1)  # if data + 1 > data_end, skip one
    + insn(0x71, 4, 2)  # r4 = data[0]
    + insn(0x63, 10, 4, -4)
    + insn(0x61, 4, 6, 16)  # r4 = ctx->len
    + insn(0x63, 10, 4, -8)
    + MAP + KEY + insn(0x85, imm=1)  # r0 = bpf_map_lookup_elem(r1, r2)
    + insn(0x15, 0, off=3)  # if none, skip three
    + insn(0xB7, 1, imm=1)
    + insn(0xDB, 0, 1)  # *r0 += 1
    + insn(0x05, off=9)
    + insn(0x7A, 10, off=-16, imm=1)
    + MAP + KEY + insn(0xBF, 3, 10) + insn(0x07, 3, imm=-16) + insn(0xB7, 4)
    + insn(0x85, imm=2)  # bpf_map_update_elem(r1, r2, fp - 16, 0)
    + insn(0xB7, 0, imm=1)  # SK_PASS
    + insn(0x95)
)
code, license = ctypes.create_string_buffer(PROGRAM), ctypes.create_string_buffer(b"GPL")
program = bpf(  # BPF_PROG_TYPE_SK_REUSEPORT
    PROG_LOAD, "=IIQQ", 21, len(PROGRAM) // 8, ctypes.addressof(code), ctypes.addressof(license)
)


def counted():
    """What the runs since the last call saw: {(len, first byte): runs}."""
    key, value, found = ctypes.create_string_buffer(8), ctypes.create_string_buffer(8), {}
    at = ctypes.addressof(key)
    while True:
        try:
            bpf(NEXT_KEY, "=IxxxxQQ", COUNTS, 0, at)
        except FileNotFoundError:
            return found
        bpf(LOOKUP, "=IxxxxQQQ", COUNTS, at, ctypes.addressof(value), 0)
        found[struct.unpack("=II", key)] = struct.unpack("=Q", value)[0]
        bpf(DELETE, "=IxxxxQ", COUNTS, at)


def nft(rule):
    text = "flush ruleset\n"
    if rule:
        text += "table inet t {\nchain c {\ntype filter hook prerouting priority -150\n" + rule + "\n}\n}\n"
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)


def runs(kind, rule):
    """How often the program ran for one client, by what the data began with and their length."""
    nft(rule)
    counted()
    with socket.socket(socket.AF_INET, kind) as server, socket.socket(socket.AF_INET, kind) as client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        server.bind(("0.0.0.0", PORT))
        if kind == socket.SOCK_STREAM:
            server.listen()
        server.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, program)
        server.settimeout(10)
        client.bind(("127.0.0.1", next(PORTS)))
        client.settimeout(10)
        client.connect(("127.0.0.1", PORT))
        if kind == socket.SOCK_STREAM:
            server.accept()[0].close()
        else:
            client.send(b"x")
            server.recv(1)
    return {("IP" if first == 0x45 else "transport", length): n for (length, first), n in counted().items()}


TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
EXPECTED = [
    ("TCP, no rule", TCP, "", {("transport", 40): 1}),
    ("TCP, socket", TCP, f"tcp dport {PORT} socket transparent 1 counter", {("IP", 60): 1, ("transport", 40): 1}),
    ("TCP, tproxy", TCP, f"tcp dport {PORT} tproxy ip to :{PORT} meta mark set 1 accept", {("IP", 60): 1}),
    ("UDP, no rule", UDP, "", {("transport", 9): 1}),
    ("UDP, socket", UDP, f"udp dport {PORT} socket transparent 1 counter", {("transport", 9): 1}),
    ("UDP, tproxy", UDP, f"udp dport {PORT} tproxy ip to :{PORT} meta mark set 1 accept", {}),
]
print(f"Linux {os.uname().release}; runs of the program, by what the data begin with and their length")
failed = False
for name, kind, rule, expected in EXPECTED:
    found = runs(kind, rule)
    failed |= found != expected
    print(f"{name:<14} {str(found):<44} {'as expected' if found == expected else f'CHANGED: expected {expected}'}")
sys.exit(failed)
PYTHON
