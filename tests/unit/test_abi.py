"""The layout of maps: Python's own constants agree with one another."""

from __future__ import annotations

from steer import abi
from steer.policy import layout


def test_maps_hold_what_the_structs_say() -> None:
    sizes = {name: spec.value_bytes for name, spec in abi.MAPS.items()}
    assert sizes == {
        "sockets": 8,  # bpf_fd_reuseport_array_update_elem() takes an fd of 8 bytes, or 4
        "table": abi.TABLE_BYTES,
        "counts": abi.COUNT.size,
        "cpus": abi.CPU.size,
        "slots": 2 * 4 * abi.SLOTS + abi.SLOTS * abi.SLOT.size + abi.PACE.size,
        "params": abi.PARAMS.size,
        "own": abi.OWN.size,
        "flows": abi.SET_BYTES,
        "owners": abi.OWNER.size,
        "listeners": abi.OWNER.size,
        "moved": abi.OWNER.size,
        "early": abi.EARLY_BYTES,
    }
    per_cpu = abi.BPF_MAP_TYPE_PERCPU_ARRAY
    read_back_to_back = {name for name, spec in abi.MAPS.items() if spec.kind == per_cpu}
    assert read_back_to_back == {"counts", "cpus", "own"}
    assert all(sizes[name] % 8 == 0 for name in read_back_to_back), "the kernel rounds up to 8"


def test_maps_are_found_by_what_they_are_keyed_with() -> None:
    """A number of 4 bytes, if not a packet or the 8 bytes of a socket's cookie.
    Of socket storage it is a descriptor (bpf_fd_sk_storage_update_elem())."""
    keys = {name: spec.key_bytes for name, spec in abi.MAPS.items() if spec.key_bytes != 4}
    assert keys == {
        "listeners": 8,
        "moved": 8,
        "early": abi.PACKET_BYTES,
    }


def test_slots_fit_an_entry() -> None:
    assert abi.MAX_SLOTS <= abi.NO_SLOT < abi.ROW
    assert abi.TURNS <= abi.ROW
    assert abi.MAX_SLOTS < abi.SLOTS, "backup listeners have a load, too"
    assert abi.SLOTS & abi.SLOTS - 1 == abi.VALUES & abi.VALUES - 1 == 0, "masked with it less one"


def test_the_head_of_the_table_has_room() -> None:
    """For the offset of a buffer, the length of a ring and the length of the table."""
    assert abi.BUFFER_BYTES < 1 << abi.RING_BIT
    assert layout.MAX_RING < 1 << abi.LENGTH_BIT - abi.RING_BIT
    assert abi.ENTRIES < 1 << 64 - abi.LENGTH_BIT


def test_a_ring_fits_the_table() -> None:
    assert 2 * abi.SCAN_MAX <= abi.TURNS
    assert 2 * (2 * abi.SCAN_MAX) <= abi.TURNS, "a word is two numbers of 16 bits"
    assert 2 * layout.MAX_RING <= abi.TURNS
    assert abi.SLOTS * abi.LOAD_SIZE <= 1 << 16, "an offset into the loads is half a word"
