"""Maps, programs and the table on the kernel, as bpf(2) and bpftool(8) show them."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import socket
import struct
import subprocess
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from steer import abi, features
from steer.config import address
from steer.errors import KernelError, VerifierError
from steer.features import Answer, Finding
from steer.linux import cgroup, topology
from steer.loader import bpf_maps, compile, find, libbpf, probe, shared_memory
from steer.loader.programs import _KINDS, Link, Program, shorten
from steer.policy.builtin import CBPF, EBPF, POLICIES
from steer.policy.bytecode import Code, PolicyObject
from steer.policy.layout import Layout
from steer.sockets import group_program, listeners, reuseport
from testkit.bpf_objects import bpf_exists, bpf_ids
from testkit.confine import NOBODY, as_user
from testkit.harness import KINDS, Harness, sources
from testkit.processes import eventually

pytestmark = pytest.mark.needs("bpf")

CPUS = len(topology.read().possible)
SELECT = abi.BPF_SK_REUSEPORT_SELECT
PASS = Code(["b700000001000000", "9500000000000000"], {})
"""return SK_PASS"""


def own_bpf() -> set[tuple[str, int]]:
    return bpf_ids(os.getpid())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def shown(kind: str, number: int) -> dict[str, Any]:
    """The output of bpftool for a program or map."""
    command = ["bpftool", "--json", kind, "show", "id", str(number)]
    done = subprocess.run(command, capture_output=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """All files are closed at the end of the test, and no program or map is left."""
    before = open_files(), own_bpf()
    yield
    assert (open_files(), own_bpf()) == before


# ---- names


@pytest.mark.needs("bpftool", "netns")
@pytest.mark.usefixtures("netns")
@pytest.mark.parametrize(
    "name, program",
    [
        ("cpu", "steer_cpu"),
        ("round-robin", "steer_round_rob"),
        ("least-conn", "steer_least_con"),
        ("hash", "steer_hash"),
        ("source", "steer_source"),
        ("flow", "steer_flow"),
        ("random", "steer_random"),
    ],
)
def test_bpftool_shows_names(name: str, program: str) -> None:
    before = own_bpf()
    with Harness(EBPF, name, "tcp4", "udp6"):
        made = own_bpf() - before
        programs = [shown("prog", number) for kind, number in made if kind == "prog"]
        maps = [shown("map", number) for kind, number in made if kind == "map"]
    assert sorted((each["name"], each["type"]) for each in programs) == sorted(
        [(program, "sk_reuseport"), (program, "sk_reuseport"), ("steer_open", "sock_ops")]
    )
    per_group = [
        ("steer_counts", "percpu_array"),
        ("steer_cpus", "percpu_array"),
        ("steer_sockets", "reuseport_sockarray"),
    ]
    assert sorted((each["name"], each["type"]) for each in maps) == sorted(
        [*per_group, *per_group, *of_policy(name), *COUNTING]
    )


def of_policy(name: str) -> list[tuple[str, str]]:
    flows = [("steer_flows", "array")] if name == "flow" else []
    return [
        ("steer_table", "array"),
        ("steer_params", "array"),
        ("steer_own", "percpu_array"),
        ("steer_early", "lru_hash"),
        *flows,
    ]


COUNTING = [
    ("steer_slots", "array"),
    ("steer_owners", "sk_storage"),
    ("steer_listeners", "hash"),
    ("steer_moved", "hash"),
]


# ---- programs that are refused


def test_verifier_says_why() -> None:
    with pytest.raises(VerifierError, match=r"load program steer_bad: EACCES") as caught:
        Program("steer_bad", Code(["9500000000000000"], {}), {}, SELECT)
    assert caught.value.detail.endswith("R0 !read_ok")


@pytest.mark.usefixtures("no_leaks")
def test_verifier_log_is_shortened_to_its_end() -> None:
    """Hundreds of instructions, each in the log, and then one that reads what was never written."""
    many = ["b700000000000000"] * 500 + ["bf91000000000000", "9500000000000000"]
    with pytest.raises(VerifierError) as caught:
        Program("steer_bad", Code(many, {}), {}, SELECT)
    assert caught.value.log.count("(b7) r0 = 0") == 500
    assert "\nprocessed " in caught.value.log
    lines = caught.value.detail.splitlines()
    assert 2 <= len(lines) <= 12
    assert "!read_ok" in lines[-1]
    assert not any(line.startswith("processed") for line in lines)


def test_shortening_keeps_the_end() -> None:
    log = "".join(f"{i}: (b7) r0 = 0\n\n" for i in range(40)) + "R9 !read_ok\nprocessed 41 insns\n"
    assert shorten(log, 3) == "38: (b7) r0 = 0\n39: (b7) r0 = 0\nR9 !read_ok"
    assert shorten("") == ""


@pytest.mark.needs("netns")
@pytest.mark.usefixtures("netns", "no_leaks")
def test_refused_policy_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = compile.load(compile.sources() / "hash.c")
    bad = dict.fromkeys(made.programs, Code(["9500000000000000"], {}))
    load = compile.load

    def load_bad(source: Path, *more: Any) -> PolicyObject:
        found = load(source, *more)
        return replace(found, programs=bad) if source.name == "hash.c" else found

    monkeypatch.setattr(compile, "load", load_bad)
    with pytest.raises(VerifierError, match="load program steer_hash"):
        Harness(EBPF, "hash", "tcp4")


@pytest.mark.needs("migrate")  # others take any
def test_attach_type_that_no_kernel_knows_is_no_fault_of_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(_KINDS, 9999, abi.BPF_PROG_TYPE_SK_REUSEPORT)
    with pytest.raises(KernelError) as caught:
        Program("steer_probe", PASS, {}, 9999)
    assert type(caught.value) is KernelError
    assert (caught.value.cause, caught.value.errno) == ("EINVAL", errno.EINVAL)


def test_kernel_without_migration_gets_the_plain_program(
    netns: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux 5.10 takes any attach type, and refuses the field: here one that nobody has yet."""
    monkeypatch.setattr(probe, "_ASKED", Code(["7910380000000000", *PASS.instructions], {}))
    found = probe.migrate()
    assert found.answer is Answer.NO
    assert str(found.note).endswith("cannot migrate connections; use Linux 5.14 or later")
    with Harness(EBPF, "hash", "tcp4").serving() as harness:
        assert not harness.backend._policy.migrates
        got = harness.count(20)
        assert harness.selected() == got


def test_kernel_too_old_for_a_table_is_told_which_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def before_5_5(*_: object) -> None:
        raise KernelError("create BPF map steer_table", "EINVAL", errno=errno.EINVAL)

    monkeypatch.setattr(bpf_maps, "Map", before_5_5)
    assert probe.ebpf().reason == "create BPF map steer_table: EINVAL"
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("", "", "5.4.0-1", "", "")))
    found = probe.ebpf()
    assert found == Finding(
        Answer.NO, "Linux 5.4.0-1 cannot map arrays into memory", "use Linux 5.5 or later"
    )


def test_sysctl_that_does_nothing_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's 5.10.262 has net.ipv4.tcp_migrate_req, and no code that looks at it."""
    for release, is_believed in (("5.14.0", True), ("5.10.0-46-amd64", False)):
        uname = os.uname_result(("", "", release, "", ""))
        monkeypatch.setattr(os, "uname", lambda told=uname: told)
        assert (listeners.tcp_migrate_req() is not None) == is_believed


@pytest.mark.needs("nobody")
@pytest.mark.parametrize(
    "attempt",
    [
        "Map('sockets')",
        "Program('steer_probe', Code(['b700000001000000', '9500000000000000'], {}), {}, 39)",
        # Not privileged matters more than that the program is bad.
        "Program('steer_probe', Code(['9500000000000000'], {}), {}, 39)",
    ],
)
def test_without_privilege_it_is_not_permitted(attempt: str) -> None:
    program = f"""
from steer.policy.bytecode import Code
from steer.errors import KernelError
from steer.loader.bpf_maps import Map
from steer.loader.programs import Program
try:
    {attempt}
except KernelError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        as_user(NOBODY, sys.executable, "-c", program), capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("KernelError "), done.stderr
    assert "EPERM; needs CAP_BPF: run as root" in done.stdout


def test_older_kernel_gets_the_plain_program(
    netns: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not know of migration refuses the attach type with EINVAL and no log."""
    load = Program._load

    def before_5_14(self: Program, name: str, insns: bytes, options: Any) -> int:
        if options.expected_attach_type == abi.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE:
            return -errno.EINVAL
        return load(self, name, insns, options)

    monkeypatch.setattr(Program, "_load", before_5_14)
    with Harness(EBPF, "round-robin", "tcp4").serving() as harness:
        assert "migration needs Linux 5.14" in " ".join(harness.backend.notes)
        assert harness.count(40).total() == sum(harness.selected().values()) == 40


# ---- maps


def test_map_without_room_in_the_file_table() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    libbpf.libbpf()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(KernelError, match="create BPF map steer_counts: EMFILE"):
            bpf_maps.Map("counts", 64)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_entry_past_the_end() -> None:
    with bpf_maps.Map("cpus") as made:
        with pytest.raises(KernelError, match="put entry 1: E2BIG"):
            made.put(1, bytes(made.spec.value_bytes * CPUS))
        with pytest.raises(KernelError, match="read entry 1: ENOENT"):
            made.per_cpu(1, 1)
    with bpf_maps.Map("sockets", 4) as made, pytest.raises(KernelError, match="put entry 4: E2BIG"):
        made.put_socket(4, 0)


def test_empty_entry_may_be_deleted() -> None:
    with bpf_maps.Map("sockets", 4) as made:
        made.delete(3)
        with pytest.raises(KernelError, match="delete entry 4: E2BIG"):
            made.delete(4)


def test_every_cpu_has_its_own_value() -> None:
    with bpf_maps.Map("counts", 8) as made:
        values = b"".join(abi.COUNT.pack(cpu, 10 * cpu, 2**60 + cpu) for cpu in range(CPUS))
        made.put(5, values)
        assert made.per_cpu(5, CPUS) == values
        assert made.per_cpu(4, CPUS) == bytes(len(values))


def test_socket_that_cannot_be_chosen_is_not_taken_in(netns: object) -> None:
    with bpf_maps.Map("sockets", 4) as made, group_program.scratch() as unbound:
        with pytest.raises(KernelError, match="put entry 0: EINVAL"):
            made.put_socket(0, unbound.fileno())
        with reuseport.member(address.parse(KINDS["tcp4"]), 16) as listener:
            made.put_socket(0, listener.fileno())
            with pytest.raises(KernelError, match="put entry 1: EBUSY"):
                made.put_socket(1, listener.fileno())
        # Closed, it is gone from the map, and its entry another's to have.
        with reuseport.member(address.parse(KINDS["tcp4"]), 16) as listener:
            made.put_socket(0, listener.fileno())


def looked_up(made: bpf_maps.Map, key: int) -> bytes | None:
    """What the kernel has there."""
    buffer = ctypes.create_string_buffer(made.spec.value_bytes)
    key_bytes = key.to_bytes(made.spec.key_bytes, sys.byteorder)
    found = libbpf.libbpf().bpf_map_lookup_elem(made.fileno(), key_bytes, buffer) == 0
    return buffer.raw if found else None


def test_cookies_are_keys_of_8_bytes() -> None:
    cookie = 0x1122334455667788
    with bpf_maps.Map("moved") as made:
        made.put(cookie, abi.OWNER.pack(3, 1, 7))
        assert looked_up(made, cookie) == abi.OWNER.pack(3, 1, 7)
        assert looked_up(made, cookie & 0xFFFFFFFF) is None
        made.delete(cookie)
        assert looked_up(made, cookie) is None


@pytest.mark.usefixtures("no_leaks")
def test_what_is_stored_at_a_listener_is_inherited_by_its_connections(netns: object) -> None:
    with (
        bpf_maps.Map("owners") as made,
        reuseport.member(address.parse(KINDS["tcp4"]), 16) as listener,
        socket.create_connection(listener.getsockname()) as before,
    ):
        # As it is when the handshake ends that counts, not when it is accepted.
        made.put(listener.fileno(), abi.OWNER.pack(5, 0, 9))
        with socket.create_connection(listener.getsockname()) as client:
            accepted = [listener.accept()[0] for _ in (before, client)]
            stored = [looked_up(made, sock.fileno()) for sock in accepted]
            assert stored == [None, abi.OWNER.pack(5, 0, 9)]
            assert looked_up(made, client.fileno()) is None
            made.put(listener.fileno(), abi.OWNER.pack(6, 0, 9))
            assert looked_up(made, accepted[1].fileno()) == abi.OWNER.pack(5, 0, 9)
            for sock in accepted:
                sock.close()


def test_only_at_sockets_something_is_stored() -> None:
    with (
        bpf_maps.Map("owners") as made,
        open(os.devnull) as other,
        pytest.raises(KernelError, match="ENOTSOCK"),
    ):
        made.put(other.fileno(), bytes(abi.OWNER.size))


def test_a_received_map_is_the_same() -> None:
    with (
        bpf_maps.Map("moved") as made,
        bpf_maps.Map.received("moved", os.dup(made.fileno())) as other,
    ):
        other.put(4, abi.OWNER.pack(1, 2, 3))
        assert looked_up(made, 4) == abi.OWNER.pack(1, 2, 3)


# ---- slots


@pytest.fixture
def slots() -> Iterator[shared_memory.Slots]:
    with bpf_maps.Map("slots") as made:
        all_slots = shared_memory.Slots(made)
        yield all_slots
        all_slots.close()


GIVEN = 99


def state(slots: shared_memory.Slots, slot: int) -> tuple[int, ...]:
    """The fields open, pending, stamp and flows in the kernel's map."""
    raw = looked_up(slots.map, 0)
    assert raw
    (opened,) = struct.unpack_from("=I", raw, abi.OPEN_OFFSET + 4 * slot)
    at = abi.SLOTS_OFFSET + slot * abi.SLOT.size
    pending, given, stamp, flows, _ = abi.SLOT.unpack_from(raw, at)
    assert given in (0, GIVEN), "only programs change that"
    return opened, pending, stamp, flows


def play(slots: shared_memory.Slots, slot: int, opened: int, pending: int, *stamps: int) -> None:
    """Write to the map as programs do."""
    struct.pack_into("=I", slots._memory, abi.OPEN_OFFSET + 4 * slot, opened)
    at = abi.SLOTS_OFFSET + slot * abi.SLOT.size
    abi.SLOT.pack_into(slots._memory, at, pending, GIVEN, *stamps, 0)


def test_the_next_worker_of_a_slot_has_another_stamp(slots: shared_memory.Slots) -> None:
    first = slots.begin(3)
    play(slots, 3, 7, 2, first, 0)
    assert slots.open(3) == 7
    slots.end(3)
    # What is still open is not lost sight of before the next comes.
    assert slots.open(3) == 7
    second = slots.begin(3)
    assert second != first
    assert state(slots, 3) == (0, 0, second, 1)
    # Without an end: the worker in a place has died, but its child may live on.
    assert slots.begin(3) not in (first, second)
    assert state(slots, 2) == state(slots, 4) == (0, 0, 0, 0)


def test_stamps_wrap_around(slots: shared_memory.Slots) -> None:
    play(slots, 1, 0, 0, 2**16 - 1, 2**16 - 1)
    slots.end(1)
    assert state(slots, 1) == (0, 0, 0, 0)
    play(slots, 1, 0, 0, 2**16 - 1, 5)
    assert slots.begin(1) == 0
    assert state(slots, 1) == (0, 0, 0, 5)


def test_flows_are_forgotten_and_nothing_else(slots: shared_memory.Slots) -> None:
    play(slots, 2, 5, 6, 7, 2**16 - 1)
    slots.forget_flows(2)
    assert state(slots, 2) == (5, 6, 7, 0)
    # What a program takes for a slot that is none: steer_get_slot_state() in bpf/steer.h.
    slots.forget_flows(abi.NO_SLOT)
    assert state(slots, abi.SLOTS - 1) == (0, 0, 0, 1)


def test_negative_counts_are_zero(slots: shared_memory.Slots) -> None:
    play(slots, 2, 2**32 - 1, 0, 0, 0)
    assert slots.open(2) == 0
    slots.set_open(2, 12)
    assert slots.open(2) == 12
    assert state(slots, 2) == (12, 0, 0, 0)


def test_slots_can_be_adopted(slots: shared_memory.Slots) -> None:
    play(slots, abi.SLOTS - 1, 1, 2, 3, 4)
    with bpf_maps.Map("slots") as other:
        later = shared_memory.Slots(other)
        later.become(os.dup(slots.map.fileno()))
        assert state(later, abi.SLOTS - 1) == (1, 2, 3, 4)
        later.end(abi.SLOTS - 1)
        assert state(slots, abi.SLOTS - 1) == (1, 2, 4, 5)
        later.close()


# ---- on a cgroup


@pytest.mark.usefixtures("no_leaks")
def test_a_link_keeps_its_program_on_the_cgroup_as_long_as_it_is_open() -> None:
    before = own_bpf()
    with cgroup.own() as directory:
        program = Program("steer_probe", PASS, {}, abi.BPF_CGROUP_SOCK_OPS)
        link = Link(program, directory)
        [made] = own_bpf() - before
        program.close()
        assert bpf_exists(*made)
        link.close()
        eventually(lambda: not bpf_exists(*made))


def test_a_link_needs_a_cgroup(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with (
            Program("steer_probe", PASS, {}, abi.BPF_CGROUP_SOCK_OPS) as program,
            pytest.raises(KernelError, match=r"^attach to the cgroup: EBADF"),
        ):
            Link(program, directory)
    finally:
        os.close(directory)


def test_only_such_programs_go_on_a_cgroup() -> None:
    with (
        cgroup.own() as directory,
        Program("steer_probe", PASS, {}, SELECT) as program,
        pytest.raises(KernelError, match=r"^attach to the cgroup: E"),
    ):
        Link(program, directory)


def test_ticks_are_those_of_the_kernel() -> None:
    assert bpf_maps.ticks_per_s() in (100, 250, 300, 1000)


# ---- the table


def test_publication_is_seen_by_programs(netns: object) -> None:
    """The same flow goes where the table says at that moment."""
    with Harness(EBPF, "hash", "udp4", workers=3).serving() as harness:
        [flow] = sources("127.0.0.1", 1)
        for slot in (0, 2, 1, 1, 0):
            everywhere = Layout(
                array("H", [slot]) * 7, fallbacks=array("H", [slot]) * abi.FALLBACKS
            )
            harness.backend._policy._table.publish(everywhere.parts())
            assert harness.flows([flow]) == {flow: slot}


def test_programs_that_were_waited_for_are_those_before_a_later_publication() -> None:
    with bpf_maps.Map("table") as made:
        table = shared_memory.Table(made)
        try:
            table.clear()
            assert table.grace_period() is None
            table.publish({0: bytes(8)})
            first = table.grace_period()
            assert first is not None
            table.publish({0: bytes(8)})
            table.grace_period_ended(first)
            second = table.grace_period()
            assert second not in (None, first)
            table.grace_period_ended(second)
            assert table.grace_period() is None
        finally:
            table.close()


def test_table_starts_empty_and_alternates_between_buffers() -> None:
    with bpf_maps.Map("table") as made:
        table = shared_memory.Table(made)
        table.clear()
        try:
            buffers = {abi.HEADER.size, abi.HEADER.size + abi.BUFFER_BYTES}
            nobody = abi.NO_SLOT.to_bytes(2, sys.byteorder)
            for buffer in buffers:
                at = buffer + abi.ENTRIES_OFFSET
                assert content(made)[at : at + 2] == nobody
            for turn in range(4):
                before = content(made)
                *_, active = told(before)
                table.publish({0: abi.LENGTH.pack(turn, 7), abi.FALLBACKS_OFFSET: b"fallbacks"})
                after = content(made)
                length, ring, idle = told(after)
                assert {active, idle} == buffers
                assert (length, ring) == (turn, 7)
                assert after[idle : idle + 8] == abi.LENGTH.pack(turn, 7)
                assert after[idle + abi.FALLBACKS_OFFSET :].startswith(b"fallbacks")
                # What programs may still be reading is not touched.
                assert (
                    after[active : active + abi.BUFFER_BYTES]
                    == (before[active : active + abi.BUFFER_BYTES])
                )
        finally:
            table.close()


def told(table: bytes) -> tuple[int, int, int]:
    """From the head: the length of the active buffer, that of its ring, and its offset."""
    head, _, _ = abi.HEADER.unpack_from(table)
    ring = (1 << abi.LENGTH_BIT - abi.RING_BIT) - 1
    begins = abi.HEADER.size + (head & (1 << abi.RING_BIT) - 1)
    return head >> abi.LENGTH_BIT, head >> abi.RING_BIT & ring, begins


def content(table: bpf_maps.Map) -> bytes:
    """All of the table, as the kernel has it."""
    found = looked_up(table, 0)
    assert found
    return found


# ---- nothing is left


@pytest.mark.needs("netns")
@pytest.mark.usefixtures("netns", "no_leaks")
@pytest.mark.parametrize(
    "name, backend", [(p.name, b) for p in POLICIES.values() for b in p.backends]
)
def test_backend_lets_go_of_everything(name: str, backend: str) -> None:
    before = own_bpf()
    with Harness(backend, name, *KINDS).serving() as harness:
        harness.count(10)
        harness.leave(1)
        harness.steer()
        made = own_bpf() - before
        # A program and its maps for each group, those of the policy, and what counts.
        due = len(KINDS) * 4 + len(of_policy(name)) + len(COUNTING) + 1
        assert len(made) == (due if backend == EBPF else 0)
    eventually(lambda: [each for each in made if bpf_exists(*each)], [])


def test_descriptors_are_closed_once() -> None:
    made = bpf_maps.Map("cpus")
    fd = made.fileno()
    made.close()
    with open(os.devnull) as other:
        assert other.fileno() == fd
        made.close()
        os.fstat(fd)


def test_mount_point_is_read_as_it_is_called() -> None:
    """As proc_pid_mountinfo(5) has it: only what would end a field is written as its number."""
    assert cgroup._unescaped("/mnt/é b") == "/mnt/é b"
    assert cgroup._unescaped(r"/mnt/é\040\134b") == "/mnt/é \\b"


def settle(harness: Harness) -> None:
    """As the controller does, once programs were waited for."""
    publication = harness.backend.grace_period()
    assert publication is not None
    harness.backend.grace_period_ended(publication)
    assert harness.backend.grace_period() is None


@pytest.mark.parametrize("backend", [EBPF, CBPF])
def test_programs_are_waited_for_after_a_publication(netns: object, backend: str) -> None:
    with Harness(backend, "hash", "udp4", workers=3).serving() as harness:
        settle(harness)
        harness.steer(0, 1)
        before = harness.backend.grace_period()
        harness.steer(0)
        assert before is not None
        harness.backend.grace_period_ended(before)
        settle(harness)


def test_programs_are_to_be_waited_for_after_another_policy_also_where_nothing_is_written(
    netns: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the policy before may still choose."""
    with Harness(EBPF, "hash", "udp4", workers=2).serving() as harness:
        monkeypatch.setattr(shared_memory, "PROGRAMS_END_S", -1.0)
        members = [harness.member(slot) for slot in (0, 1)]
        first = harness.plan
        second = replace(first, policy=find.find("random"))

        @contextmanager
        def lend() -> Iterator[dict[int, socket.socket]]:
            yield dict(enumerate(harness.sockets[0]))

        for plan in (second, first):
            settle(harness)
            harness.backend.swap(plan, members, lend)
        settle(harness)


@pytest.mark.needs("bpf", "migrate")
def test_this_kernel_has_every_feature() -> None:
    for feature in features.FEATURES:
        assert probe.ask(feature) == features.Finding(Answer.YES), feature.name
