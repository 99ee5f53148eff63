"""Classic BPF programs, run by a small interpreter and held against the kernel's own rules.

Sources: Documentation/networking/filter.rst, and of net/core/filter.c bpf_check_classic(),
check_load_and_stores() and chk_code_allowed(); for the order of sockets
net/core/sock_reuseport.c.
"""

from __future__ import annotations

import operator
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.loader import find
from steer.policy import builtin, classic
from steer.policy import layout as table
from steer.policy.builtin import POLICIES, LayoutContext
from steer.policy.classic import HASH_LENGTH, MAX_INSNS, Insn, Order, TooLong
from steer.policy.cpus import Topology
from steer.policy.layout import Layout, Member, empty_layout

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)

NO_SOCKET = 2**32 - 1
SEED = 0x12345678
OPTMEM_BYTES = 20480
"""net.core.optmem_max before Linux 6.8: what a program may take after translation."""


# The machine


@dataclass(frozen=True)
class Packet:
    """`network` from the IP header on; `data` behind the transport header."""

    network: bytes = b""
    data: bytes = b""
    cpu: int = 0
    random: int = 0

    def load(self, at: int, size: int) -> int | None:
        """None: outside the packet."""
        if at >= 0xFFFFF000:  # SKF_AD_OFF
            return {36: self.cpu, 56: self.random}[at - 0xFFFFF000]
        if at >= 0x80000000:
            assert at >= 0xFFF00000, "neither SKF_NET_OFF nor SKF_AD_OFF"
            at, source = at - 0xFFF00000, self.network
        else:
            source = self.data
        found = source[at : at + size]
        return int.from_bytes(found) if len(found) == size else None


SIZES = {0x00: 4, 0x08: 2, 0x10: 1}
OPERATIONS: dict[int, Callable[[int, int], int]] = {
    0x00: operator.add,
    0x10: operator.sub,
    0x20: operator.mul,
    0x30: operator.floordiv,
    0x40: operator.or_,
    0x50: operator.and_,
    0x60: operator.lshift,
    0x70: operator.rshift,
    0x90: operator.mod,
    0xA0: operator.xor,
}
CONDITIONS: dict[int, Callable[[int, int], int]] = {
    0x10: operator.eq,
    0x20: operator.gt,
    0x30: operator.ge,
    0x40: operator.and_,
}


class Machine:
    """A, X, M[] and a packet."""

    def __init__(self, packet: Packet) -> None:
        self.packet = packet
        self.a = self.x = 0
        self.memory = [0] * 16

    def run(self, program: Sequence[Insn]) -> int:
        at = 0
        while True:
            code, jt, jf, k = program[at]
            at += 1
            if code & 7 == 5:
                at += self._jump(code, jt, jf, k)
            elif code & 7 == 6:
                return self.a if code & 0x18 == 0x10 else k
            elif not self._step(code, k):
                return 0

    def _jump(self, code: int, jt: int, jf: int, k: int) -> int:
        if code & 0xF0 == 0:
            return k
        return jt if CONDITIONS[code & 0xF0](self.a, self.x if code & 8 else k) else jf

    def _step(self, code: int, k: int) -> bool:
        """False: a load outside the packet, which ends the program with 0."""
        match code & 7:
            case 0 | 1:
                value = self._value(code, k)
                if value is None:
                    return False
                if code & 7 == 0:
                    self.a = value
                else:
                    self.x = value
            case 2:
                self.memory[k] = self.a
            case 3:
                self.memory[k] = self.x
            case 4:
                operand = self.x if code & 8 else k
                self.a = OPERATIONS[code & 0xF0](self.a, operand) & 0xFFFFFFFF
            case 7 if code & 0xF8:
                self.a = self.x
            case 7:
                self.x = self.a
        return True

    def _value(self, code: int, k: int) -> int | None:
        match code & 0xE0:
            case 0x00:
                return k
            case 0x20:
                return self.packet.load(k, SIZES[code & 0x18])
            case 0x40:
                return self.packet.load(self.x + k & 0xFFFFFFFF, SIZES[code & 0x18])
            case 0x60:
                return self.memory[k]
            case 0xA0:
                byte = self.packet.load(k, 1)
                return None if byte is None else 4 * (byte & 15)
        raise AssertionError(f"load {code:#x}")


def run(program: Sequence[Insn], packet: Packet = Packet()) -> int:
    return Machine(packet).run(program)


# The kernel's rules

ALU = {4 | op | src for op in OPERATIONS for src in (0, 8)} | {0x84}
JUMPS = {5 | op | src for op in CONDITIONS for src in (0, 8)} | {0x05}
LOADS = {0x20, 0x28, 0x30, 0x40, 0x48, 0x50, 0x80, 0x00, 0x60, 0x81, 0xB1, 0x01, 0x61}
KNOWN = ALU | JUMPS | LOADS | {0x02, 0x03, 0x07, 0x87, 0x06, 0x16}


def accept(program: Sequence[Insn]) -> None:
    """What the kernel checks before it takes a program."""
    assert 1 <= len(program) <= 4096
    for at, (code, jt, jf, k) in enumerate(program):
        assert code in KNOWN, f"{at}: {code:#x}"
        assert 0 <= k < 2**32
        assert 0 <= jt < 256
        assert 0 <= jf < 256
        left = len(program) - at - 1
        if code in JUMPS:
            assert k < left if code == 0x05 else max(jt, jf) < left, f"{at}: jumps over the end"
        if code in (0x34, 0x94):
            assert k, f"{at}: divides by 0"
        if code in (0x64, 0x74):
            assert k < 32, f"{at}: shifts by {k}"
        if code in (0x20, 0x28, 0x30) and k >= 0xFFFFF000:
            assert k - 0xFFFFF000 in range(0, 64, 4), f"{at}: no such ancillary load"
    assert program[-1][0] in (0x06, 0x16)
    accept_memory(program)


def accept_memory(program: Sequence[Insn]) -> None:
    """No word of M[] is read that not every way to there has written."""
    every = 2**16 - 1
    known = [every] * len(program)
    valid = 0
    for at, (code, jt, jf, k) in enumerate(program):
        valid &= known[at]
        if code in (0x02, 0x03):
            valid |= 1 << k
        elif code in (0x60, 0x61):
            assert valid & 1 << k, f"{at}: M[{k}] is not set"
        elif code in JUMPS:
            for target in (at + 1 + k,) if code == 0x05 else (at + 1 + jt, at + 1 + jf):
                known[target] &= valid
            valid = every


# Packets


def ipv4(source: str, ports: tuple[int, int], options: bytes = b"") -> bytes:
    words = 5 + len(options) // 4
    head = struct.pack("!BBHIBBH", 0x40 | words, 0, 0, 0, 64, 6, 0)
    addresses = ip_address(source).packed + bytes([127, 0, 0, 1])
    return head + addresses + options + struct.pack("!HH", *ports) + bytes(16)


def ipv6(source: str, ports: tuple[int, int], traffic_class: int = 0) -> bytes:
    head = struct.pack("!IHBB", 6 << 28 | traffic_class << 20 | 0xABCDE, 20, 6, 64)
    return head + ip_address(source).packed + bytes(16) + struct.pack("!HH", *ports) + bytes(16)


def hashed(source: str, ports: tuple[int, int], layout: Layout, seed: int = SEED) -> int:
    number = classic.flow_hash(ip_address(source).packed, *ports, seed)
    return layout.entries[number % len(layout.entries)]


# Tables


def members(*weights: int) -> list[Member]:
    return [Member(slot, weight) for slot, weight in enumerate(weights)]


def slots(*slots: int) -> Layout:
    return Layout(array("H", slots))


def hash_layout(*weights: int) -> Layout:
    return table.consistent(members(*weights), None, HASH_LENGTH)


def scrambled(count: int) -> dict[int, int]:
    """Indexes in another order than the slots'."""
    return {slot: (slot + 1) * 7 % count if count % 7 else slot for slot in range(count)}


def many(count: int) -> Layout:
    return slots(*range(count))


ports = st.tuples(st.integers(0, 65535), st.integers(1, 65535))
seeds = st.integers(0, 2**32 - 1)


# by_hash


@quick
@given(st.ip_addresses(v=4), ports, seeds, st.binary(max_size=10).map(lambda raw: raw * 4))
def test_by_hash_over_ipv4(
    source: object, ports: tuple[int, int], seed: int, options: bytes
) -> None:
    layout, indexes = hash_layout(1, 2, 3, 4, 5), scrambled(5)
    program = classic.by_hash(layout, indexes, seed)
    packet = Packet(ipv4(str(source), ports, options))
    assert run(program, packet) == indexes[hashed(str(source), ports, layout, seed)]


@quick
@given(st.ip_addresses(v=6), ports, seeds, st.integers(0, 255))
def test_by_hash_over_ipv6(source: object, ports: tuple[int, int], seed: int, klass: int) -> None:
    """The traffic class lies in the byte that tells the version."""
    layout, indexes = hash_layout(1, 2, 3, 4, 5), scrambled(5)
    program = classic.by_hash(layout, indexes, seed)
    packet = Packet(ipv6(str(source), ports, klass))
    assert run(program, packet) == indexes[hashed(str(source), ports, layout, seed)]


def test_by_hash_looks_at_source_and_ports_only() -> None:
    program = classic.by_hash(many(HASH_LENGTH), {slot: slot for slot in range(HASH_LENGTH)}, SEED)
    packet = ipv4("192.0.2.1", (1024, 80))
    other = packet[:1] + b"\xff" * 11 + packet[12:20] + packet[20:24] + b"x" * 16
    assert run(program, Packet(packet)) == run(program, Packet(other, b"data", 3, 77))


def test_by_hash_follows_the_table_when_a_worker_goes() -> None:
    before = hash_layout(1, 1, 1, 1)
    after = table.consistent(members(1, 1, 1), before, HASH_LENGTH)
    programs = [classic.by_hash(layout, scrambled(4), SEED) for layout in (before, after)]
    for port in range(1024, 1624):
        packet = Packet(ipv4("198.51.100.7", (port, 443)))
        if hashed("198.51.100.7", (port, 443), before) != 3:
            assert run(programs[0], packet) == run(programs[1], packet)


@pytest.mark.parametrize("client", ["203.0.113.9", "2001:db8::9"])
def test_hash_spreads_evenly(client: str) -> None:
    """The ports of one client, which a weak hash would stripe: over 8 equal workers chi-square
    (7 degrees of freedom) stays below its 99.9th percentile."""
    layout = hash_layout(*[1] * 8)
    drawn = Counter(hashed(client, (port, 80), layout) for port in range(32768, 60999, 3))
    due = sum(drawn.values()) / 8
    assert sum((drawn[slot] - due) ** 2 / due for slot in range(8)) < 24.3


def test_another_seed_is_another_hash() -> None:
    one, other = (classic.flow_hash(bytes(4), 1, 2, seed) for seed in (1, 2))
    assert one != other


def test_flow_hash_by_hand() -> None:
    """A second writing of it, for one packet: multiply and fold, word by word."""

    def fold(value: int, factor: int, shift: int) -> int:
        value = value * factor % 2**32
        return value ^ value >> shift

    first = fold(7 ^ 0x0A000001, 0x9E3779B1, 15)
    second = fold(first ^ 0x04D20050, 0x9E3779B1, 15)
    assert classic.flow_hash(bytes([10, 0, 0, 1]), 1234, 80, 7) == fold(second, 0x85EBCA6B, 13)


# by_source


def prefix(source: str, bits: int) -> bytes:
    """The address with only its first `bits` left."""
    packed = ip_address(source).packed
    network = ip_network((packed, bits), strict=False)
    return network.network_address.packed


def source_hash(address: bytes, seed: int) -> int:
    """A second writing of what the program is to compute: multiply and fold, word by word."""

    def folded(value: int, factor: int, shift: int) -> int:
        value = value * factor % 2**32
        return value ^ value >> shift

    mixed = seed
    for (word,) in struct.iter_unpack(">I", address):
        mixed = folded(mixed ^ word, 0x9E3779B1, 15)
    return folded(mixed, 0x85EBCA6B, 13)


def of_source(source: str, bits: int, layout: Layout, seed: int = SEED) -> int:
    number = source_hash(prefix(source, bits), seed)
    return layout.entries[number % len(layout.entries)]


@quick
@given(st.ip_addresses(v=4), ports, seeds, st.integers(0, 32), st.binary(max_size=10))
def test_by_source_over_ipv4(
    source: object, ports: tuple[int, int], seed: int, bits: int, options: bytes
) -> None:
    """Of the whole address or of some bits; neither ports nor options of IP matter."""
    layout, indexes = hash_layout(1, 2, 3, 4, 5), scrambled(5)
    program = classic.by_source(layout, indexes, seed, bits, 64)
    accept(program)
    packet = Packet(ipv4(str(source), ports, options * 4))
    assert run(program, packet) == indexes[of_source(str(source), bits, layout, seed)]


@quick
@given(st.ip_addresses(v=6), ports, seeds, st.integers(0, 128), st.integers(0, 255))
def test_by_source_over_ipv6(
    source: object, ports: tuple[int, int], seed: int, bits: int, klass: int
) -> None:
    layout, indexes = hash_layout(1, 2, 3, 4, 5), scrambled(5)
    program = classic.by_source(layout, indexes, seed, 32, bits)
    accept(program)
    packet = Packet(ipv6(str(source), ports, klass))
    assert run(program, packet) == indexes[of_source(str(source), bits, layout, seed)]


@pytest.mark.parametrize("bits", [0, 1, 31, 32, 33, 48, 63, 64, 65, 96, 97, 127, 128])
def test_by_source_looks_at_so_many_bits_of_ipv6(bits: int) -> None:
    """A change of the last of them is another source, one of the bit after it is not."""
    layout = many(HASH_LENGTH)
    indexes = {slot: slot for slot in range(HASH_LENGTH)}
    program = classic.by_source(layout, indexes, SEED, 32, bits)
    here = int(ip_address("2001:db8:1234:5678:9abc:def0:1234:5678"))

    def chosen(address: int) -> int:
        return run(program, Packet(ipv6(str(ip_address(address)), (1, 2))))

    if bits:
        assert chosen(here ^ 1 << 128 - bits) != chosen(here)
    for bit in range(bits, 128):
        assert chosen(here ^ 1 << 127 - bit) == chosen(here)


@pytest.mark.parametrize("bits", [0, 1, 8, 24, 31, 32])
def test_by_source_looks_at_so_many_bits_of_ipv4(bits: int) -> None:
    layout = many(HASH_LENGTH)
    indexes = {slot: slot for slot in range(HASH_LENGTH)}
    program = classic.by_source(layout, indexes, SEED, bits, 64)
    here = int(ip_address("192.0.2.129"))

    def chosen(address: int) -> int:
        return run(program, Packet(ipv4(str(ip_address(address)), (1, 2))))

    if bits:
        assert chosen(here ^ 1 << 32 - bits) != chosen(here)
    for bit in range(bits, 32):
        assert chosen(here ^ 1 << 31 - bit) == chosen(here)


def test_by_source_looks_at_the_address_only() -> None:
    program = classic.by_source(many(700), {slot: slot for slot in range(700)}, SEED, 32, 64)
    packet = ipv4("192.0.2.1", (1024, 80))
    other = packet[:1] + b"\xff" * 11 + packet[12:16] + b"x" * 24
    assert run(program, Packet(packet)) == run(program, Packet(other, b"data", 3, 77))
    packet = ipv6("2001:db8::1", (1024, 80))
    other = packet[:1] + b"\xff" * 7 + packet[8:16] + b"y" * 44
    assert run(program, Packet(packet)) == run(program, Packet(other, b"data", 3, 77))


def test_by_source_follows_the_table_when_a_worker_goes() -> None:
    before = hash_layout(1, 1, 1, 1)
    after = table.consistent(members(1, 1, 1), before, HASH_LENGTH)
    programs = [classic.by_source(each, scrambled(4), SEED, 32, 64) for each in (before, after)]
    moved = 0
    for number in range(600):
        source = str(ip_address(int(ip_address("198.51.0.0")) + number))
        packet = Packet(ipv4(source, (1, 443)))
        if of_source(source, 32, before) == 3:
            moved += 1
        else:
            assert run(programs[0], packet) == run(programs[1], packet)
    assert 100 < moved < 200


@pytest.mark.parametrize("step", [1, 256])
def test_sources_spread_evenly(step: int) -> None:
    """Clients of one network, which a weak hash would stripe: over 8 equal workers chi-square
    (7 degrees of freedom) stays below its 99.9th percentile."""
    layout = hash_layout(*[1] * 8)
    first = int(ip_address("10.0.0.0"))
    drawn = Counter(
        of_source(str(ip_address(first + step * number)), 32, layout) for number in range(8192)
    )
    due = sum(drawn.values()) / 8
    assert sum((drawn[slot] - due) ** 2 / due for slot in range(8)) < 24.3


# by_share


@pytest.mark.parametrize(
    "weights", [(1,), (1, 1), (1, 2, 3), (7, 1, 7), (1,) * 64, (100, 99), tuple(range(1, 30))]
)
def test_by_share_is_exact(weights: tuple[int, ...]) -> None:
    """Over all remainders that chance can have each socket is hit as often as it weighs."""
    layout, indexes = table.by_share(members(*weights)), scrambled(len(weights))
    program = classic.by_share(layout, indexes)
    length = len(layout.entries)
    assert length == sum(weights)
    high = 2**32 // length * length
    for base in (0, high - length):
        hit = Counter(run(program, Packet(random=base + rest)) for rest in range(length))
        assert hit == {indexes[slot]: weight for slot, weight in enumerate(weights)}


def test_by_share_of_any_weights_is_short() -> None:
    some = members(*(1000 - slot % 3 for slot in range(1024)))
    program = classic.by_share(table.by_share(some), {slot: slot for slot in range(1024)})
    accept(program)
    assert len(program) < 2200


def test_by_share_of_one_needs_no_chance() -> None:
    assert classic.by_share(slots(4, 4), {4: 2}) == [(0x06, 0, 0, 2)]


# by_cpu


def test_by_cpu_is_exact() -> None:
    layout = slots(3, 1, 1, 0, 2)
    program = classic.by_cpu(layout, scrambled(4))
    for cpu, slot in enumerate(layout.entries):
        assert run(program, Packet(cpu=cpu)) == scrambled(4)[slot]


@quick
@given(st.data())
def test_by_cpu_as_the_table_says(data: st.DataObject) -> None:
    possible = sorted(data.draw(st.sets(st.integers(0, 60), min_size=1, max_size=12)))
    cpus = data.draw(st.lists(st.sampled_from(possible), min_size=1, max_size=24))
    crew = [Member(slot, 1 + slot % 3, cpu) for slot, cpu in enumerate(cpus)]
    layout = table.by_cpu(crew, Topology(tuple(possible), tuple(possible), {}))
    indexes = scrambled(len(cpus))
    program = classic.by_cpu(layout, indexes)
    accept(program)
    for cpu in possible:
        row = layout.row(layout.entries[cpu])
        hit = Counter(run(program, Packet(cpu=cpu, random=draw)) for draw in range(len(row)))
        assert hit == Counter(indexes[slot] for slot in row)


def test_by_cpu_of_a_cpu_past_the_table() -> None:
    """Hot-plugged after all: it is served like the last."""
    assert run(classic.by_cpu(slots(0, 1), {0: 0, 1: 1}), Packet(cpu=700)) == 1


# All of them

ASSEMBLED = [name for name, row in POLICIES.items() if row.assemble]


def assembled(name: str, layout: Layout, indexes: Mapping[int, int]) -> list[Insn]:
    """With the parameters as they are if nobody sets any."""
    row = find.find(name)
    assert row.assemble is not None
    params = [param.default for param in row.declared.params]
    return row.assemble(layout, indexes, SEED, params)


@pytest.mark.parametrize("name", ASSEMBLED)
@pytest.mark.parametrize("workers", [1, 2, 3, 8, 64, 257, 700, 1024])
def test_the_kernel_would_take_it(name: str, workers: int) -> None:
    crew = [Member(slot, 1 + slot % 3, slot % 64) for slot in range(workers)]
    topology = Topology(tuple(range(64)), tuple(range(64)), {})
    layout = builtin.build_layout(POLICIES[name], crew, LayoutContext(topology, HASH_LENGTH))
    program = assembled(name, layout, {slot: slot for slot in range(workers)})
    accept(program)
    assert classic.pack(program) == b"".join(struct.pack("=HBBI", *insn) for insn in program)


@pytest.mark.parametrize("name", ASSEMBLED)
def test_a_slot_without_socket_is_left_to_the_kernel(name: str) -> None:
    program = assembled(name, slots(0, 9), {0: 0})
    answers = {
        run(program, Packet(ipv4(f"192.0.2.{port}", (port, 80)), cpu=port % 2, random=port))
        for port in range(64)
    }
    assert answers == {0, NO_SOCKET}


@pytest.mark.parametrize("name", ASSEMBLED)
def test_with_nobody_all_is_left_to_the_kernel(name: str) -> None:
    program = assembled(name, empty_layout(), {0: 0})
    accept(program)
    assert run(program, Packet(ipv4("192.0.2.1", (1, 80)))) == NO_SOCKET


def test_1024_runs_fit() -> None:
    layout, indexes = many(1024), {slot: slot for slot in range(1024)}
    accept(classic.by_hash(layout, indexes, SEED))
    accept(classic.by_source(layout, indexes, SEED, 32, 64))
    by_cpu, by_share = classic.by_cpu(layout, indexes), classic.by_share(layout, indexes)
    for at in range(1024):
        assert run(by_cpu, Packet(cpu=at)) == run(by_share, Packet(random=at)) == at


def test_the_largest_hash_table_fits_an_older_kernel() -> None:
    """Measured: what does not choose takes 1,224 bytes, a return 16, a jump 8."""
    program = classic.by_hash(many(HASH_LENGTH), {slot: slot for slot in range(HASH_LENGTH)}, SEED)
    accept(program)
    start, chosen = _halves(program)
    assert 1224 + sum(16 if code == 0x06 else 8 for code in chosen) <= OPTMEM_BYTES
    by_source = classic.by_source(
        many(HASH_LENGTH), {slot: slot for slot in range(HASH_LENGTH)}, SEED, 32, 64
    )
    shorter, same = _halves(by_source)
    assert len(shorter) < len(start)
    assert same == chosen


def _halves(program: Sequence[Insn]) -> tuple[list[int], list[int]]:
    """The codes that make the number, and those that choose by it."""
    codes = [code for code, *_ in program]
    end = codes.index(0x94) + 1
    return codes[:end], codes[end:]


def test_as_long_as_the_kernel_takes_and_no_longer() -> None:
    program = classic.by_share(many(2044), {slot: slot for slot in range(2044)})
    assert len(program) == MAX_INSNS
    accept(program)
    with pytest.raises(TooLong, match=r"^4097 instructions; the limit of classic BPF is 4096$"):
        classic.by_cpu(many(2045), {})


# Order


def test_order_by_hand() -> None:
    order = Order([5, 6, 7, 8])
    order.left(6)
    assert order.indexes() == {5: 0, 8: 1, 7: 2}
    order.left(7)
    assert order.indexes() == {5: 0, 8: 1}
    order.joined(6)
    assert order.indexes() == {5: 0, 8: 1, 6: 2}


def test_order_does_not_know_a_stranger() -> None:
    with pytest.raises(ValueError, match="not in list"):
        Order([1]).left(2)


class KernelArray:
    """reuseport_add_sock() and reuseport_detach_sock(), as they stand in C."""

    def __init__(self) -> None:
        self.socks: list[int | None] = [None] * 128
        self.num_socks = 0

    def add(self, sock: int) -> None:
        self.socks[self.num_socks] = sock
        self.num_socks += 1

    def detach(self, sock: int) -> None:
        for i in range(self.num_socks):
            if self.socks[i] == sock:
                self.socks[i] = self.socks[self.num_socks - 1]
                self.num_socks -= 1
                return


@quick
@given(st.lists(st.integers(0, 20), max_size=80))
def test_order_is_the_kernels(changes: list[int]) -> None:
    """A slot that is not there joins, one that is there leaves."""
    order, array_ = Order(), KernelArray()
    for slot in changes:
        if slot in order.indexes():
            order.left(slot)
            array_.detach(slot)
        else:
            order.joined(slot)
            array_.add(slot)
        kernels = {array_.socks[i]: i for i in range(array_.num_socks)}
        assert order.indexes() == kernels


def test_no_socket_is_past_every_array() -> None:
    """Which grows to 32,768 sockets."""
    assert run(classic.by_share(slots(1), {})) >= 32768
