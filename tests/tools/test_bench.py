"""The benches: their arithmetic, their arguments, and that each runs. Never how fast."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise, permutations
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from bench import (
    crowd,
    figures,
    growth,
    lifetime,
    light,
    load,
    markdown,
    outcome,
    peers,
    plot,
    programs,
    swap,
    tail,
    victims,
    wrk,
)
from bench.__main__ import BENCHES, main
from bench.crowd import Contender
from bench.figures import Curve, Figure, Growth, Section, Timeline
from bench.flood import BATCH, Flood, Handshakes
from bench.growth import Subject
from bench.lifetime import Life
from bench.load import Plan, Request, schedule
from bench.peers import Peer
from bench.victims import Stop
from steer import abi
from steer.cli import tables
from steer.errors import SteerError
from steer.policy.bytecode import Code
from testkit.namespaces import Netns
from testkit.processes import DEADLINE_S, eventually, is_running


def test_median_and_middle_half() -> None:
    figure = Figure("cost", "ns", (5.0, 1.0, 3.0, 2.0, 4.0))
    assert (figure.median, figure.quartiles) == (3.0, (2.0, 4.0))
    assert Figure("once", "ns", (7.0,)).quartiles == (7.0, 7.0)


@pytest.mark.parametrize(
    "at_most, at_least, reached",
    [(None, None, None), (2, None, True), (1.9, None, False), (None, 2, True), (None, 3, False)],
)
def test_reached_compares_the_median(
    at_most: float | None, at_least: float | None, reached: bool | None
) -> None:
    assert Figure("cost", "ns", (1.0, 2.0, 9.0), at_most, at_least).reached is reached


def test_ratio_and_difference_are_taken_round_by_round() -> None:
    ours, theirs = (2.0, 30.0), (1.0, 10.0)
    assert figures.ratio("", ours, theirs, 1).values == (2.0, 3.0)
    assert figures.above("", "ns", ours, theirs).values == (1.0, 20.0)


def test_interleaved_goes_there_and_back_and_forgets_the_first_round() -> None:
    calls: list[str] = []

    def take(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = figures.interleaved({"a": lambda: take("a"), "b": lambda: take("b")}, 2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert found == {"a": (3.0, 6.0), "b": (4.0, 5.0)}


def test_table_shows_spread_and_what_was_wanted() -> None:
    section = Section("start", [Figure("ours", "ms", (9.876, 123.4, 55.55), at_most=60)])
    assert tables.plain(section.table()).splitlines() == [
        "start",
        "figure  median  middle half  min   max  unit  target",
        "ours    55.5    32.7 – 89.5  9.88  123  ms    ≤ 60    yes",
    ]


def test_counts_are_shown_whole() -> None:
    assert Section("leaks", [Figure("left", "", (0,), 0)]).table().rows[0][1] == "0"


def test_curve_says_what_so_many_percent_did_not_exceed() -> None:
    curve = Curve("us", [float(ms) for ms in range(1, 1001)])
    assert [curve.at_ms(percent) for percent in (50, 99, 99.9, 100)] == [501, 991, 1000, 1000]


@pytest.mark.parametrize(
    "make",
    [
        programs.one_slot,
        programs.by_hash,
        programs.in_turn,
        programs.by_chance,
        programs.by_address,
    ],
)
def test_programs_speak_of_their_maps_where_they_load_them(make: Callable[[int], Code]) -> None:
    code = make(4)
    loads = [index for index, insn in enumerate(code.instructions) if insn.startswith("18")]
    assert sorted(code.relocations) == loads
    assert set(code.relocations.values()) <= set(abi.MAPS)


def test_unknown_bench_is_a_usage_error_that_names_those_there_are() -> None:
    done = CliRunner().invoke(main, ["speed"])
    assert done.exit_code == 2
    assert all(name in done.output for name in BENCHES)


def test_help_lists_every_bench() -> None:
    done = CliRunner().invoke(main, ["--help"])
    assert all(f"{name} " in done.output for name in BENCHES)


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n"
RESET = struct.pack("ii", 1, 0)  # struct linger of socket(7): close() sends a reset


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def _answer(sock: socket.socket, answer: bytes = ANSWER, part: int | None = None) -> None:
    with sock:
        sock.recv(4096)
        sock.sendall(answer[:part])


@contextmanager
def _serving(handle: Callable[[socket.socket], object]) -> Iterator[int]:
    """One connection after the other is handled, then closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    handle(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    "handle, wanted",
    [
        (_answer, load.OK),
        (_reset, load.RESET),
        (lambda sock: sock.recv(4096), load.CLOSED),
        (lambda sock: _answer(sock, part=-1), load.CLOSED),
        (lambda sock: time.sleep(0.3), load.TIMEOUT),
        (lambda sock: _answer(sock, ANSWER.replace(b"200", b"503")), load.BAD),
    ],
)
def test_client_knows_what_became_of_each_request(
    handle: Callable[[socket.socket], object], wanted: str
) -> None:
    with _serving(handle) as port, load.load(Plan(port, 1, at_least=3, timeout_s=0.2)) as client:
        found = client.finish()
    assert len(found) == 3
    assert {request.outcome for request in found} == {wanted}


def test_client_is_refused_where_nobody_listens(netns: Netns) -> None:
    with load.load(Plan(9, concurrency=2, at_least=4)) as client:
        found = client.finish()
    assert {request.outcome for request in found} == {load.REFUSED}
    assert all(request.port for request in found)


def test_closed_loop_keeps_as_many_at_once_as_it_was_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with load.load(Plan(listener.getsockname()[1], 3)):
            taken = [listener.accept()[0] for _ in range(3)]
            listener.settimeout(0.2)
            with pytest.raises(TimeoutError):
                listener.accept()
            _answer(taken.pop())  # it is closed with that
            taken.append(listener.accept()[0])
        for sock in taken:
            sock.close()


def test_open_loop_counts_from_when_a_request_was_due() -> None:
    with _serving(_answer) as port, load.load(Plan(port, rate=100)) as client:
        time.sleep(1)
        client.send_signal(signal.SIGSTOP)  # as if the client had no CPU
        time.sleep(0.5)
        client.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        found = client.finish()
    begun_s = sorted(request.begun_s for request in found)
    assert begun_s[-1] - begun_s[0] == pytest.approx((len(found) - 1) / 100)
    assert sum(request.took_s > 0.25 for request in found) in range(20, 40)


MIX = ((0.75, 0.01), (0.25, 0.5))


def test_open_loop_is_drawn_beforehand_and_with_one_seed_the_same() -> None:
    plan = Plan(1, rate=50, seed=3, at_most=4000, mix=MIX)
    drawn = list(schedule(plan))
    assert drawn == list(schedule(msgspec.structs.replace(plan, port=2)))
    assert drawn != list(schedule(msgspec.structs.replace(plan, seed=4)))
    assert drawn[-1].at_s == pytest.approx(4000 / 50, rel=0.1)
    assert sum(due.takes_s == 0.5 for due in drawn) / 4000 == pytest.approx(0.25, abs=0.03)


def test_client_asks_for_as_long_as_was_drawn_and_ends_by_itself() -> None:
    paths = []

    def note(sock: socket.socket) -> None:
        paths.append(sock.recv(4096).split()[1].decode())
        sock.sendall(ANSWER)

    with _serving(note) as port:
        plan = Plan(port, rate=200, seed=3, at_most=20, mix=MIX, roams=True)
        with load.load(plan) as client:
            found = client.finish()
    assert [request.body for request in found] == ["hello\n"] * 20
    assert sorted(paths) == sorted(f"/{due.takes_s}" for due in schedule(plan))


def test_one_queue_gives_the_next_to_whoever_is_idle() -> None:
    plan = Plan(1, rate=2, at_most=4, mix=((1, 1.0),))  # one every 0.5 s, that takes 1
    assert [each.took_s for each in tail.one_queue(plan, 1)] == [1, 1.5, 2, 2.5]
    assert [each.took_s for each in tail.one_queue(plan, 2)] == [1, 1, 1, 1]


def test_uneven_is_the_share_of_whoever_is_farthest_off() -> None:
    assert light.off_even(Counter({"1": 25, "2": 25, "3": 25, "4": 25})) == 0
    assert light.off_even(Counter({"1": 40, "2": 20, "3": 20, "4": 20})) == 60
    assert light.off_even(Counter({"1": 30, "2": 30, "3": 40})) == 100  # the fourth had none


def test_walk_goes_from_each_policy_to_each() -> None:
    way = list(swap.walk("abcd", 400))
    steps = set(pairwise(way))
    assert steps == set(permutations("abcd", 2))


def test_failed_requests_are_counted_and_named() -> None:
    outcomes = ["ok", "reset", "ok", "closed", "reset"]
    figure = outcome.failed("us", [Request(0, 1, each, 9) for each in outcomes], at_most=0)
    assert (figure.name, figure.values) == ("us, of 5: 2 reset, 1 closed", (3,))
    assert figure.reached is False
    assert outcome.failed("us", [], 0).reached is True


def test_percentile_and_slow_ones() -> None:
    requests = [Request(0, took_ms / 1000, "ok", 9) for took_ms in range(1000, 0, -1)]
    assert outcome.percentile_ms(requests, 0.999) == 1000
    assert outcome.percentile_ms(requests, 0.5) == 501
    assert outcome.over(requests, 0.9) == 100


def test_accepted_are_those_on_its_ports_that_were_under_way() -> None:
    stop = Stop(10.0, frozenset({1, 2}))
    before, under_way, after = Request(8, 1, "ok", 1), Request(9, 2, "ok", 1), Request(11, 1, "", 2)
    another = Request(9, 2, "ok", 3)
    requests = [before, under_way, after, another]
    assert victims.apart(requests, [stop]) == ([before, after, another], [under_way])


@pytest.mark.needs("root", "pidfd_getfd")
def test_stopped_worker_tells_what_it_had_accepted_and_not_what_waits() -> None:
    code = """
import socket, time
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    sock, _ = listener.accept()
    print("accepted", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        address = ("127.0.0.1", int(process.stdout.readline()))
        with socket.create_connection(address) as taken, victims.victim(process.pid) as victim:
            process.stdout.readline()
            with socket.create_connection(address):
                stop = victim.stop(address[1])
            assert stop.ports == {taken.getsockname()[1]}
            victim.kill()


def test_flood_comes_from_as_many_addresses_as_there_are_flows(netns: Netns) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(DEADLINE_S)
        with Flood(sock.getsockname()[1], 7) as flood:
            flood.send(1)
        assert len({sock.recvfrom(64)[1] for _ in range(50)}) == 7


@pytest.mark.needs("root")
def test_handshakes_are_taken_for_such(netns: Netns) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Handshakes(listener.getsockname()[1], 7) as flood,
    ):
        flood.send(1)
        # Each is answered, and taken back by the reset that says that nobody asked.
        eventually(lambda: tcp_total("AttemptFails"), BATCH)
    assert tcp_total("InCsumErrors") == 0


def tcp_total(name: str) -> int:
    """One of RFC 4022's, of this thread's network namespace."""
    lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(dict(zip(names, values, strict=True))[name])


def test_wrks_words_are_understood() -> None:
    words = "  1 threads\n  36848 requests in 3.02s, 5.20MB read\n"
    assert wrk.counts(words) == wrk.Counts(36848, 0)
    more = "  Socket errors: connect 1, read 2, write 0, timeout 3\n  Non-2xx or 3xx responses: 4\n"
    rate = "Requests/sec:  12186.41\n"
    assert wrk.counts(words + more + rate) == wrk.Counts(36848, 10, 12186.41)
    took = "     50%   60.00us\n     75%    2.50ms\n     99%    1.01s \n"
    assert wrk.counts(words + took).took_us == {50: 60.0, 75: 2500.0, 99: 1_010_000.0}


STEER, GUNICORN = (
    Contender(name, lambda _site, _workers: [], re.compile(b""), 10, tool)
    for name, tool in ((growth.STEER, "steer"), (growth.GUNICORN, None))
)
SLOW = Contender("slow", lambda _site, _workers: [], re.compile(b""), 25, most=64, most_again=0)


def test_rounds_of_growth_go_there_and_back_and_fewer_are_of_many() -> None:
    wanted = list(growth.subjects([STEER, GUNICORN, SLOW], {4: 2, 64: 1, 256: 1}))
    assert [(each.contender, each.workers, each.round) for each in wanted] == [
        *((contender, 4, 0) for contender in (STEER, GUNICORN, SLOW)),
        *((contender, 64, 0) for contender in (STEER, GUNICORN, SLOW)),
        *((contender, 256, 0) for contender in (STEER, GUNICORN)),
        *((contender, 4, 1) for contender in (GUNICORN, STEER)),
    ]


def life(**values: list[float]) -> Life:
    return Life({getattr(lifetime, name): each for name, each in values.items()})


LIVES = {
    Subject(STEER, 4, 0): life(FIRST=[0.2], POLICY=[1.0, 9.0], RELOAD=[0.1]),
    Subject(STEER, 1000, 0): life(FIRST=[0.3], POLICY=[60.0], RELOAD=[3.0]),
    Subject(GUNICORN, 1000, 0): life(FIRST=[0.5], RELOAD=[30.0]),
    Subject(STEER, 4, 1): life(FIRST=[0.4], POLICY=[2.0], RELOAD=[0.1]),
}


def test_growth_is_told_by_quantity_and_compared_within_a_round() -> None:
    first, reload, policy = growth.sections(LIVES, [STEER, GUNICORN, SLOW], ["one failed"])
    assert [each.title for each in (first, reload, policy)] == [
        *("growth: first answer", "growth: reload", "growth: policy change")
    ]
    assert (first.failures, reload.failures, policy.failures) == (["one failed"], (), ())
    assert [each.name for each in first.growths] == ["steer", "gunicorn"]
    assert first.growths[0].values == {4: [0.2, 0.4], 1000: [0.3]}
    ratio = first.figures[-1]
    assert (ratio.name, ratio.at_most) == ("steer, 1,000 workers to 4", 1.3)
    assert ratio.values == pytest.approx([1.5])
    to_gunicorn = reload.figures[-1]
    assert (to_gunicorn.name, to_gunicorn.at_most) == ("steer to gunicorn, 1,000 workers", 0.15)
    assert to_gunicorn.values == pytest.approx([0.1])
    wished = [(each.name, each.values, each.reached) for each in policy.figures]
    assert wished == [
        ("steer, 4 workers", (1.0, 9.0, 2.0), None),
        ("steer, 4 workers, p99", (9.0,), False),
        ("steer, 1,000 workers", (60.0,), False),
    ]


def test_what_was_given_up_is_shown_as_more() -> None:
    lives = {Subject(STEER, 4, 0): life(RELOAD=[120.0])}
    lives[Subject(STEER, 4, 0)].given_up.add(lifetime.RELOAD)
    (section,) = growth.sections(lives, [STEER])
    assert section.growths[0].more_than == {4}
    assert section.figures[0].name == "steer, 4 workers, given up"
    assert "| reload, s | steer | > 120 |\n" in markdown.text([section])


def test_growth_in_markdown_is_a_row_for_each_server_and_then_what_was_wished() -> None:
    sections = list(growth.sections(LIVES, [STEER, GUNICORN]))
    assert markdown.text(sections[1:2]).splitlines() == [
        "|  |  | 4 workers | 1,000 workers |",
        "| --- | --- | --- | --- |",
        "| reload, s | steer | 0.10 | 3.00 |",
        "|  | gunicorn |  | 30.0 |",
        "",
        "| reload | median (middle half) | target |  |",
        "| --- | --- | --- | --- |",
        "| steer to gunicorn, 1,000 workers | 0.10 × | ≤ 0.15 | yes |",
    ]


def test_figures_in_markdown_show_spread_and_what_was_wanted() -> None:
    section = Section("start", [Figure("ours", "ms", (9.876, 123.4, 55.55), at_most=50)])
    assert markdown.text([section]).splitlines() == [
        "| start | median (middle half) | target |  |",
        "| --- | --- | --- | --- |",
        "| ours | 55.5 (32.7 – 89.5) ms | ≤ 50 | **no** |",
    ]


def test_delays_between_two_looks_are_told_by_the_end_of_their_bucket() -> None:
    def look(*counts: int) -> dict[str, object]:
        return {"buckets": list(zip((0.0, 1.0, 5.0, 20.0), counts, strict=True)), "max": 31.5}

    before, after = look(1000, 0, 9, 0), look(1998, 1, 9, 1)
    assert lifetime.delay_ms(before, after, 0.99) == 1.0
    assert lifetime.delay_ms(before, after, 0.999) == 5.0
    assert lifetime.delay_ms(before, after, 1.0) == 31.5


def test_there_is_room_for_so_many_workers_or_it_is_said_what_they_would_take() -> None:
    assert growth.no_room(Subject(SLOW, 256, 0), 6400) == ""
    assert "6,400 MB of memory, and 6,399 are" in growth.no_room(Subject(SLOW, 256, 0), 6399)
    assert growth.available_mb() > 0


def test_memory_is_waited_for_that_was_there_at_first() -> None:
    big, paused = Subject(SLOW, 256, 0), list[float]()
    rising = iter([100.0, 6399.0, 6400.0, 9000.0])
    assert growth.wait_for_room(big, 9000.0, lambda: next(rising), paused.append) == 6400
    assert len(paused) == 2
    assert growth.wait_for_room(big, 6399.0, lambda: 100.0, paused.append) == 100
    assert len(paused) == 2
    assert growth.wait_for_room(big, 9000.0, lambda: 100.0, paused.append) == 100
    assert sum(paused[2:]) == growth.FREE_AGAIN_S


def test_time_is_for_what_was_not_measured_yet() -> None:
    assert growth.no_time(Subject(SLOW, 256, 0), 10 * growth.AGAIN_S) == ""
    assert growth.no_time(Subject(SLOW, 4, 1), growth.AGAIN_S) == ""
    assert growth.no_time(Subject(SLOW, 4, 1), growth.AGAIN_S + 1) == "780 s are over"


def test_the_other_build_has_to_be_set_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(growth.BASE, raising=False)
    assert growth.OTHER not in [each.name for each in growth.contenders()]
    assert f"left out, as {growth.BASE} names no checkout" in capsys.readouterr().err
    monkeypatch.setenv(growth.BASE, str(tmp_path))
    with pytest.raises(SteerError, match="set it up"):
        growth.contenders()


@pytest.mark.needs("root", "netns", "bpf", "gunicorn", "pidfd_getfd")
@pytest.mark.parametrize("name", [growth.STEER, growth.GUNICORN])
def test_crowd_is_replaced_killed_and_stopped(netns: Netns, name: str) -> None:
    (contender,) = (each for each in growth.contenders() if each.name == name)
    with crowd.crowd(contender, 3, 9900) as it:
        it.wait_ready(3)
        first = it.pids()
        it.reload()
        second = it.pids()
        assert (len(first), len(second)) == (3, 3)
        assert not set(first) & set(second)
        it.kill_one()
        assert len(set(it.pids()) & set(second)) == 2
        last = it.pids()
        it.stop()
        assert not any(map(is_running, last))


def test_who_does_not_go_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd, "LIMIT_S", 0.01)
    with crowd.Leaving([os.getpid()]) as leaving, pytest.raises(crowd.TooLong):
        leaving.wait()


@pytest.mark.needs("matplotlib")
def test_growth_is_drawn_over_the_sizes(tmp_path: Path) -> None:
    none = Growth("us", {4: [0, 0], 1000: [0]}, frozenset({1000}), is_steer=True)
    some = Growth("them", {4: [1.0, 3.0], 1000: [8.0]})
    drawn = [Section("growth: failed", [], growths=[none, some])]
    drawn += [Section("growth: reload", [], growths=[some], unit="s")]
    paths = list(plot.draw({"growth": drawn}, tmp_path))
    assert [path.name for path in paths] == ["growth.svg", "growth-1.svg", "growth-2.svg"]
    for path in paths:
        assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")


@pytest.mark.needs("matplotlib")
def test_sections_are_drawn(tmp_path: Path) -> None:
    lines = [Timeline("us", [(0.1, 2.0)], [], [0.2]), Timeline("them", [], [0.3], [])]
    counts = [Figure("us", "failed", (0,), 0), Figure("them", "failed", (380,))]
    curves = [Curve("us", [1.0, 2.0, 3.0], is_steer=True), Curve("them", [5.0])]
    drawn = Section("reload: failed", counts, (), lines, curves)
    found = {"reload": [drawn, Section("empty", [])]}
    paths = list(plot.draw(found, tmp_path / "new"))
    names = ["reload-1.svg", "reload-1-timeline.svg", "reload-1-percentiles.svg"]
    assert [path.name for path in paths] == names
    for path in paths:
        assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")


def _needs(peer: Peer) -> pytest.MarkDecorator:
    """A peer is called by what it is of."""
    words = re.findall(r"\w+", peer.name)
    return pytest.mark.needs("root", "netns", *(("bpf", "uvicorn") if peer.is_steer else words[:1]))


@pytest.mark.parametrize(
    "peer", [pytest.param(peer, id=peer.name, marks=_needs(peer)) for peer in peers.ALL]
)
def test_peer_runs_and_reloads(peer: Peer, netns: Netns) -> None:
    with peers.running(peer, 9900) as running:
        workers = running.workers()
        assert len(workers) == peers.WORKERS
        if peer.reload:
            peer.reload(running)
            assert not set(workers).intersection(running.workers())
        if peer.scale:
            peer.scale(running, 2)
            assert len(running.workers()) == 2


@pytest.mark.needs("root", "netns", "bpf", "bpftool", "gunicorn", "uvicorn", "wrk")
@pytest.mark.needs("apache", "granian", "haproxy", "nginx", "node", "tcc")
@pytest.mark.timeout(600)  # some start every server there is
@pytest.mark.parametrize("name", BENCHES)
def test_bench_runs(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", name, "--quick", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sections = msgspec.json.decode(done.stdout)["benches"][name]
    assert all(figure["values"] for section in sections for figure in section["figures"])
