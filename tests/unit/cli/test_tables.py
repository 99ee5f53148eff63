"""What status says, as JSON and as rows."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.cli.tables import Table, duration, plain, service_table
from steer.control.schema import Address, Connections, Histogram, Service, Status, Totals, Worker

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def worker(slot: int = 0, **changes: Any) -> Worker:
    return Worker(
        slot=slot,
        **{
            "pid": 2,
            "state": "ready",
            "generation": 1,
            "cpus": [0],
            "weight": 1,
            "restarts": 0,
            "uptime_s": 3.1,
            "connections": Connections(selected=10, open=1, queued=0, migrated=0),
            **changes,
        },
    )


PLAIN: dict[str, Any] = {
    "name": "demo",
    "pid": 1,
    "state": "running",
    "generation": 1,
    "policy": "cpu",
    "backend": "ebpf",
    "backend_reason": None,
    "uptime_s": 3.2,
}


def service(*workers: Worker, **changes: Any) -> Service:
    return Service(
        workers=list(workers),
        **{
            **PLAIN,
            "binds": [Address("tcp", "127.0.0.1", 8080)],
            "totals": Totals(selected=40, fallback=0, migrated=0),
            **changes,
        },
    )


CONTRACT = {
    "schema": 1,
    "services": [
        {
            **PLAIN,
            "binds": [{"protocol": "tcp", "address": "127.0.0.1", "port": 8080}],
            "workers": [
                {
                    "slot": 0,
                    "pid": 2,
                    "state": "ready",
                    "generation": 1,
                    "cpus": [0],
                    "weight": 1,
                    "restarts": 0,
                    "uptime_s": 3.1,
                    "connections": {"selected": 10, "open": 1, "queued": 0, "migrated": 0},
                }
            ],
            "totals": {"selected": 40, "fallback": 0, "migrated": 0},
        }
    ],
}


def test_status_is_as_the_contract_has_it() -> None:
    """With more keys, but every one of its own, in its place."""
    assert covers(msgspec.to_builtins(Status(1, [service(worker())])), CONTRACT)


def covers(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return wanted.keys() <= found.keys() and all(covers(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(covers, found, wanted))
    return bool(found == wanted)


def test_status_reads_back() -> None:
    status = Status(1, [service(worker(), worker(1, pid=None, sockets=[4711]))])
    assert msgspec.json.decode(msgspec.json.encode(status), type=Status) == status


def test_what_is_not_counted_is_null() -> None:
    counted = msgspec.to_builtins(Connections())
    assert counted == dict.fromkeys(("selected", "open", "queued", "queued_bytes", "migrated"))
    assert set(msgspec.to_builtins(Totals()).values()) == {None}


def test_workers_do_not_share_their_sockets() -> None:
    one, other = worker(0), worker(1)
    one.sockets.append(1)
    assert other.sockets == []


# For people


def cells(*workers: Worker) -> list[dict[str, str]]:
    table = service_table(service(*workers))
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_the_title() -> None:
    binds = [Address("tcp", "127.0.0.1", 8080), Address("udp", "::1", 53)]
    title = service_table(service(binds=binds, uptime_s=3725)).title
    assert title == (
        "demo  running  cpu on ebpf  tcp://127.0.0.1:8080, udp://[::1]:53  pid 1  up 1h02m"
    )


def test_a_fallback_is_said_aloud() -> None:
    reason = "ebpf: load a program: EPERM; run as root"
    title = service_table(service(backend="cbpf", backend_reason=reason)).title
    assert title.splitlines()[1] == f"not on a better backend: {reason}"


def test_a_row() -> None:
    assert cells(worker(3, cpus=[0, 1, 2, 8], weight=5, restarts=2, uptime_s=185.0)) == [
        {
            "slot": "3",
            "pid": "2",
            "state": "ready",
            "gen": "1",
            "cpus": "0-2,8",
            "weight": "5",
            "selected": "10",
            "open": "1",
            "queued": "0",
            "restarts": "2",
            "up": "3m05s",
        }
    ]


def test_what_is_not_known_is_a_dash() -> None:
    (row,) = cells(worker(pid=None, cpus=[], uptime_s=None, connections=Connections()))
    assert {key for key, cell in row.items() if cell == "-"} == {
        *("pid", "cpus", "selected", "open", "queued", "up")
    }


def below(**own: Any) -> list[str]:
    """What is printed under the workers."""
    return plain(service_table(service(worker(), **own))).splitlines()[3:]


def test_nothing_is_said_of_a_policy_that_has_nothing_of_its_own() -> None:
    assert below() == []


def test_the_policy_s_own() -> None:
    found = below(
        params={"capacity": 1 << 20, "idle": 120},
        counters={"known": 41, "new": 0},
        histograms={
            "pause": Histogram("us", [(0, 0), (1, 1), (2, 80), (4, 0), (8, 40), (16, 0)]),
            "depth": Histogram("connections", [(0, 0), (1, 0)]),
        },
    )
    assert found == [
        "with capacity=1048576, idle=120",
        "known: 41",
        "new: 0",
        "pause, us:",
        "  1   1  #",
        "  2  80  " + "#" * 40,
        "  4   0",
        "  8  40  " + "#" * 20,
        "depth, connections:",
        "  nothing yet",
    ]


@quick
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=32))
def test_bars_are_as_long_as_counts_are_large(counts: list[int]) -> None:
    """To one character, and what there is at all is seen."""
    buckets = [(1 << place >> 1, count) for place, count in enumerate(counts)]
    lines = below(histograms={"size": Histogram("bytes", buckets)})[1:]
    drawn = {int(line.split()[0]): line.count("#") for line in lines if any(counts)}
    for least, count in buckets:
        bar = drawn.get(least, 0)
        assert abs(bar - count * 40 / (max(counts) or 1)) <= 1
        assert bool(bar) == bool(count)


def test_a_policy_s_own_in_json() -> None:
    own = {
        "params": {"idle": 120},
        "counters": {"known": 41},
        "histograms": {"pause": {"unit": "us", "buckets": [[1, 2], [2, 0]]}},
    }
    found = msgspec.convert(own | msgspec.to_builtins(service()) | own, Service)
    assert covers(msgspec.json.decode(msgspec.json.encode(found)), own)


@pytest.mark.parametrize(
    "queued, queued_bytes, shown",
    [
        (None, None, "-"),
        (0, None, "0"),
        (3, None, "3"),
        (None, 0, "0 B"),
        (None, 1200, "1200 B"),
        (3, 1200, "3 + 1200 B"),
    ],
)
def test_queued(queued: int | None, queued_bytes: int | None, shown: str) -> None:
    (row,) = cells(worker(connections=Connections(queued=queued, queued_bytes=queued_bytes)))
    assert row["queued"] == shown


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (None, "-"),
        (0, "0.0s"),
        (4.21, "4.2s"),
        (59.94, "59.9s"),
        (59.96, "1m00s"),
        (60, "1m00s"),
        (185, "3m05s"),
        (3599, "59m59s"),
        (3599.7, "1h00m"),
        (3600, "1h00m"),
        (7859, "2h10m"),
        (86399, "23h59m"),
        (86400, "1d00h"),
        (273600, "3d04h"),
        (86400 * 400, "400d00h"),
    ],
)
def test_duration(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


@quick
@given(st.floats(0, 1e8))
def test_a_duration_is_short_and_near(seconds: float) -> None:
    """To one of its lower unit; and no count reaches the unit above."""
    shown = duration(seconds)
    sizes = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if "." in shown:
        assert float(shown[:-1]) < 60
        assert abs(float(shown[:-1]) - seconds) <= 0.05 + 1e-9
        return
    upper, lower = shown[-4], shown[-1]
    read = int(shown[:-4]) * sizes[upper] + int(shown[-3:-1]) * sizes[lower]
    assert abs(read - seconds) <= sizes[lower]
    assert int(shown[-3:-1]) * sizes[lower] < sizes[upper]


def test_plain_is_aligned() -> None:
    table = Table(
        "workers", ("slot", "state", "up"), [("0", "ready", "1s"), ("10", "backoff", "-")]
    )
    assert plain(table).splitlines() == [
        "workers",
        "slot  state    up",
        "0     ready    1s",
        "10    backoff  -",
    ]


def test_plain_without_title_or_rows() -> None:
    assert plain(Table("", ("a", "b"), [])) == "a  b"


def test_plain_refuses_a_ragged_table() -> None:
    with pytest.raises((ValueError, IndexError)):
        plain(Table("", ("a", "b"), [("1",)]))
