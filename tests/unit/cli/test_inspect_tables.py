"""What `steer inspect` shows, as rows."""

from __future__ import annotations

from steer.cli.inspect_tables import of_inspection
from steer.cli.tables import plain
from steer.inspect.schema import Group, Inspection, Program
from testkit.inspection import group, process, sock

NGINX = [process(1, "no", "nginx"), process(2, "epoll", "nginx"), process(3, "no", "nginx")]


def shown(*groups: Group, in_full: bool = True, notes: list[str] | None = None) -> str:
    tables = of_inspection(Inspection(1, list(groups), notes or []), in_full)
    return "\n\n".join(map(plain, tables))


def test_a_group_is_a_table_with_what_is_said_of_it() -> None:
    found = group(
        sock(*NGINX, cgroup="/web", queued=3),
        sock(process(4), inode=11, drops=None),
        decides="chance",
        advice=["this", "that"],
        user="www",
        service="shop",
    )
    assert shown(found) == (
        "tcp://*:80  reuseport  2 sockets  user www  service shop\n"
        "socket  held by    waiting           cpus  queue  drops  cgroup\n"
        "10      nginx 1-3  nginx 2 (epoll)   0     3/128  0      /web\n"
        "11      server 4   server 4 (epoll)  0     0/128  -      -\n"
        "decides: chance\n"
        "better: this\n"
        "better: that"
    )


def test_connections_that_were_counted_have_bars() -> None:
    found = group(sock(accepted=5), sock(inode=11, accepted=10), sock(inode=12, accepted=0))
    rows = [line.rpartition("-  ")[2].strip() for line in shown(found).splitlines()[2:]]
    assert rows[:3] == ["5 " + 15 * "#", "10 " + 30 * "#", "0"]


def test_datagrams_that_were_counted_have_bars() -> None:
    found = group(sock(received=5), sock(inode=11, received=10), protocol="udp")
    lines = shown(found).splitlines()
    assert lines[1].endswith("  received")
    assert [line.rpartition("-  ")[2].strip() for line in lines[2:4]] == [
        "5 " + 15 * "#",
        "10 " + 30 * "#",
    ]


def test_who_waits_is_not_guessed() -> None:
    lines = shown(group(sock(process(1, None)), sock(process(2, "no")), sock())).splitlines()
    assert [line.split()[-5] for line in lines[2:5]] == ["?", "nobody", "-"]


def test_those_that_wait_in_different_ways_are_told_apart() -> None:
    found = shown(group(sock(process(1), process(2, "poll"), process(3))))
    assert "server 1,3 (epoll), server 2 (poll)" in found


def test_a_program_is_told() -> None:
    ebpf = Program(7, "pick", "www", "ebpf", tag="ab", loaded_s=61, processes=[process(5)])
    assert "program: 7 pick, tag ab, loaded by www 1m01s ago, open in server 5" in shown(
        group(sock(), program=ebpf)
    )
    classic = Program(None, None, None, "classic", instructions=4)
    assert "program: classic BPF, 4 instructions" in shown(group(sock(), program=classic))


def test_where_it_is_is_told_if_it_is_not_here() -> None:
    here = group(sock(), netns_name="blue")
    there = group(sock(), netns=7, is_elsewhere=True, device=3)
    assert "netns" not in shown(here).splitlines()[0]
    assert shown(there).splitlines()[0].endswith("interface 3  netns 7")


def test_sockets_of_one_process_each_share_a_table() -> None:
    alone = [group(sock(process(1)), kind="single", port=port) for port in (1, 2)]
    many = group(sock(), sock(inode=11))
    assert len(of_inspection(Inspection(1, [*alone, many]), in_full=False)) == 2
    assert len(of_inspection(Inspection(1, [*alone, many]), in_full=True)) == 3
    lines = shown(*alone, in_full=False).splitlines()
    assert lines[0] == "one socket each"
    assert lines[2].startswith("tcp://*:1  root  -      10      server 1")


def test_addresses_are_written_as_they_are_asked_for() -> None:
    for address, wanted in (("::", "udp://[::]:80"), ("127.0.0.1", "udp://127.0.0.1:80")):
        assert shown(group(sock(), address=address, protocol="udp")).startswith(wanted)


def test_what_could_not_be_seen_is_told_last() -> None:
    assert shown(group(sock()), notes=["this", "that"]).endswith("notes\nthis\nthat")
