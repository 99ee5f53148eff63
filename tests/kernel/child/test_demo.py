"""The demo service over real sockets on loopback, served by a forked process.

A stopped process (SIGSTOP) makes the moment of a signal exact: what is sent to it meanwhile lies in
the kernel's queues, and is there when it goes on.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import pytest

from steer.child import demo
from steer.linux.cpu import current_cpu
from testkit.processes import DEADLINE_S, eventually, is_ready

FOREVER_MS = 600_000
GET = b"GET / HTTP/1.1\r\nHost: steer\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n123456789"

Client = tuple[socket.socket, BinaryIO]


@dataclass
class FakeProcess:
    """As `steer.child.api.Worker` to the demo, its signal handlers included."""

    sockets: list[socket.socket]
    ready_fd: int
    stopping: bool = False
    slot: int = 3
    name: str = "demo"
    generation: int = 7
    watchdog_s: float | None = None
    cpus: tuple[int, ...] = (0,)

    def ready(self) -> None:
        os.write(self.ready_fd, b"R")

    def stop(self, _number: int, _frame: object) -> None:
        self.stopping = True


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Running:
    """A served process; `addresses` are those of its sockets, in order."""

    pid: int
    addresses: list[Any]
    to_close: list[socket.socket | BinaryIO] = field(default_factory=list)
    ended: bool = False

    def connect(self, index: int = 0) -> Client:
        sock = socket.create_connection(self.addresses[index][:2], timeout=DEADLINE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = sock, sock.makefile("rb")
        self.to_close += client
        return client

    def datagram_client(self, index: int = 0) -> socket.socket:
        address = self.addresses[index]
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.settimeout(DEADLINE_S)
        sock.connect(address)  # so that an answer from another address is not ours
        self.to_close.append(sock)
        return sock

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def terminate_frozen(self) -> None:
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)

    def wait(self) -> int:
        """The exit code."""
        pidfd = os.pidfd_open(self.pid)
        assert is_ready(pidfd, DEADLINE_S), "does not end"
        os.close(pidfd)
        _, status = os.waitpid(self.pid, 0)
        self.ended = True
        return os.waitstatus_to_exitcode(status)

    def clean_up(self) -> None:
        for client in self.to_close:
            client.close()
        if not self.ended:
            self.signal(signal.SIGKILL)
            os.waitpid(self.pid, 0)


Start = Callable[..., Running]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Start]:
    """Serve on the named kinds of socket ("tcp4", "udp6"), one TCP over IPv4 when none is named.

    The grace is such that whatever waits for its end misses the deadline.
    """
    running: list[Running] = []

    def start_one(
        *kinds: str, stopping: bool = False, grace_s: float = 2 * DEADLINE_S, buffer_bytes: int = 0
    ) -> Running:
        monkeypatch.setattr(demo, "GRACE_S", grace_s)
        sockets = [bound(kind, buffer_bytes) for kind in kinds or ("tcp4",)]
        ready, ready_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            serve_and_exit(FakeProcess(sockets, ready_fd, stopping))
        os.close(ready_fd)
        running.append(Running(pid, [sock.getsockname() for sock in sockets]))
        for sock in sockets:
            sock.close()
        assert os.read(ready, 1) == b"R"
        os.close(ready)
        return running[-1]

    yield start_one
    for one in running:
        one.clean_up()
    assert capfd.readouterr().err == ""


def serve_and_exit(worker: FakeProcess) -> None:
    signal.signal(signal.SIGTERM, worker.stop)
    try:
        demo.serve(cast(Any, worker))
    except BaseException:  # noqa: BLE001 - nothing may get out of here into a second pytest
        traceback.print_exc()
        os._exit(70)
    os._exit(0)


def bound(kind: str, buffer_bytes: int) -> socket.socket:
    family = socket.AF_INET6 if kind.endswith("6") else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM if kind[:3] == "tcp" else socket.SOCK_DGRAM)
    sock.bind(("::1" if kind.endswith("6") else "127.0.0.1", 0))
    if buffer_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    if kind[:3] == "tcp":
        sock.listen(256)
    return sock


def read_answer(stream: BinaryIO, *, with_body: bool = True) -> Answer:
    version, status, _reason = stream.readline().decode().split(" ", 2)
    assert version == "HTTP/1.1"
    headers = {}
    while (line := stream.readline()) != b"\r\n":
        assert line.endswith(b"\r\n")
        name, value = line.decode().rstrip().split(": ", 1)
        headers[name] = value
    return Answer(int(status), headers, stream.read(int(headers["Content-Length"]) * with_body))


def ask(client: Client, request: bytes = GET) -> Answer:
    client[0].sendall(request)
    return read_answer(client[1], with_body=not request.startswith(b"HEAD"))


def get(target: str, *headers: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"GET {target} HTTP/{version}", *headers, "", ""]).encode()


def close(client: Client) -> None:
    for end in client:
        end.close()


def has_ended(client: Client) -> bool:
    return client[1].read(1) == b""


def is_silent(sock: socket.socket) -> bool:
    return not is_ready(sock)


def refuses(running: Running) -> bool:
    try:
        socket.create_connection(running.addresses[0][:2], timeout=DEADLINE_S).close()
    except (ConnectionRefusedError, ConnectionResetError):  # reset: met the very close
        return True
    return False


# What it says


def test_answer_names_the_worker(start: Start) -> None:
    running = start()
    answer = ask(running.connect())
    cpu = json.loads(answer.body)["cpu"]
    expected = f'{{"slot":3,"pid":{running.pid},"cpu":{cpu},"generation":7,"name":"demo"}}\n'
    assert answer.body == expected.encode()
    assert answer.status == 200
    assert answer.headers == {
        "Content-Type": "application/json",
        "Content-Length": str(len(expected)),
        "X-Steer-Slot": "3",
    }


def test_cpu_is_the_one_it_runs_on(start: Start) -> None:
    running = start()
    client = running.connect()
    for cpu in sorted(os.sched_getaffinity(0)):
        for thread in os.listdir(f"/proc/{running.pid}/task"):
            os.sched_setaffinity(int(thread), {cpu})
        assert json.loads(ask(client).body)["cpu"] == cpu


def test_current_cpu_is_one_of_the_allowed() -> None:
    assert current_cpu() in os.sched_getaffinity(0)


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /any/path?and=query HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://a/b?c HTTP/1.1\r\nHost: a\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        b"DELETE /\xc3\xa9 HTTP/1.1\r\nHost: a\r\nX: \xc3\xa9\r\nEmpty:\r\n\r\n",
        b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\nX:\ta\tb\t\r\n\r\n",
    ],
)
def test_anything_well_formed_is_answered(start: Start, request_: bytes) -> None:
    client = start().connect()
    assert ask(client, request_).status == 200
    assert ask(client).status == 200


def test_every_socket_is_served(start: Start) -> None:
    running = start("tcp4", "tcp6", "udp4", "udp6")
    assert ask(running.connect(0)).status == 200
    assert ask(running.connect(1)).status == 200
    for index in (2, 3):
        client = running.datagram_client(index)
        client.send(b"?")
        assert json.loads(client.recv(999))["pid"] == running.pid


# Connections


def test_connection_is_kept_until_close_is_asked(start: Start) -> None:
    client = start().connect()
    for _ in range(3):
        assert "Connection" not in ask(client).headers
    last = ask(client, get("/", "Connection: foo, Close"))
    assert last.headers["Connection"] == "close"
    assert has_ended(client)


def test_http_1_0_closes_unless_asked_to_keep(start: Start) -> None:
    client = start().connect()
    for _ in range(2):
        kept = ask(client, get("/", "Connection: keep-alive", version="1.0"))
        assert kept.headers["Connection"] == "keep-alive"
    assert ask(client, get("/", version="1.0")).headers["Connection"] == "close"
    assert has_ended(client)


def test_head_has_the_length_and_no_body(start: Start) -> None:
    client = start().connect()
    whole = ask(client)
    headers_only = ask(client, GET.replace(b"GET", b"HEAD"))
    assert headers_only.status == 200
    assert abs(int(headers_only.headers["Content-Length"]) - len(whole.body)) <= 2  # cpu's digits
    assert ask(client).status == 200


def test_pipelined_requests_are_answered_in_order(start: Start) -> None:
    client = start().connect()
    targets = ["/?sleep_ms=30", "/", "/?sleep_ms=x", "/?busy_ms=x", "/?busy_ms=1", "/"] * 5
    client[0].sendall(b"".join(map(get, targets)) + get("/", "Connection: close") + GET * 9)
    answers = [read_answer(client[1]) for _ in targets]
    assert [answer.status for answer in answers] == [200, 200, 400, 400, 200, 200] * 5
    assert b"sleep_ms" in answers[2].body
    assert b"busy_ms" in answers[3].body
    assert read_answer(client[1]).headers["Connection"] == "close"
    assert has_ended(client)


def test_request_may_come_byte_by_byte(start: Start) -> None:
    running = start()
    client, other = running.connect(), running.connect()
    post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n\r\n\r\n"
    for byte in post + GET + post[:-1]:
        client[0].sendall(bytes([byte]))
        for _ in range(2):  # after two rounds by another connection the byte has been read alone
            ask(other)
    client[0].sendall(post[-1:] + b"GET / HTTP/1.1\r\n\r\n")
    assert [read_answer(client[1]).status for _ in range(4)] == [200] * 4
    assert is_silent(client[0])


def test_bodies_are_skipped(start: Start) -> None:
    client = start().connect()
    body = GET * 20_000
    client[0].sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body))
    client[0].sendall(body + get("/", "Connection: close"))
    assert [read_answer(client[1]).status for _ in range(2)] == [200, 200]
    assert has_ended(client)


def test_client_that_ends_its_side_gets_its_answers(start: Start) -> None:
    client = start().connect()
    client[0].sendall(get("/?sleep_ms=50") + GET + b"GET / HT")
    client[0].shutdown(socket.SHUT_WR)
    assert [read_answer(client[1]).status for _ in range(2)] == [200, 200]
    assert has_ended(client)


def test_clients_that_leave_harm_nobody(start: Start) -> None:
    running = start()
    for request in (b"", b"GET /", get("/?sleep_ms=1"), get(f"/?sleep_ms={FOREVER_MS}"), GET * 9):
        leaver = running.connect()
        leaver[0].sendall(request)
        linger_on_for_0_s = struct.pack("ii", 1, 0)  # close() then sends a reset
        leaver[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_on_for_0_s)
        close(leaver)
    assert ask(running.connect()).status == 200
    running.signal(signal.SIGTERM)
    assert running.wait() == 0


def test_client_that_reads_late_is_waited_for(start: Start) -> None:
    running = start(buffer_bytes=1 << 16)
    ask(running.connect())
    before_kib = peak_kib(running.pid)
    client = running.connect()
    client[0].setblocking(False)
    sent_bytes = 0
    # A second without room to send, while the server is idle, is the end of its patience.
    while is_ready(client[0], 1.0, select.POLLOUT):
        sent_bytes += client[0].send(GET * 1000)
        assert sent_bytes < 100 << 20, "reads on without bound"
    assert peak_kib(running.pid) - before_kib < 8192
    client[0].settimeout(DEADLINE_S)
    assert all(read_answer(client[1]).status == 200 for _ in range(sent_bytes // len(GET)))


def peak_kib(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def test_accepting_goes_on_after_running_out_of_descriptors(start: Start) -> None:
    running = start()
    used = {int(name) for name in os.listdir(f"/proc/{running.pid}/fd")}
    free = next(fd for fd in range(1024) if fd not in used)
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (free + 1, free + 1))
    first, second = running.connect(), running.connect()
    assert ask(first).status == 200
    second[0].sendall(GET)
    ask(first)
    close(first)
    assert read_answer(second[1]).status == 200


def test_closing_waits_for_no_client_that_asked_for_it(start: Start) -> None:
    running = start()
    check_released(running, get("/", "Connection: close"), 200)


def test_refused_client_is_not_waited_for_without_end(start: Start) -> None:
    check_released(start(grace_s=0.05), b"nonsense\r\n\r\n", 400)


def check_released(running: Running, request: bytes, status: int) -> None:
    """The connection is closed for good although the client keeps its side open."""
    descriptors = f"/proc/{running.pid}/fd"
    before = os.listdir(descriptors)
    assert ask(running.connect(), request).status == status
    eventually(lambda: os.listdir(descriptors) == before)


# What it refuses


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1 \r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"G(T / HTTP/1.1\r\n\r\n",
        b"GET /\t HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nno-colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nspace : before\r\n\r\n",
        b"GET / HTTP/1.1\r\n: nameless\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\0\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\rC: d\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: \r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    ],
)
def test_malformed_request_gets_400_and_a_close(start: Start, request_: bytes) -> None:
    check_refused(start(), request_, 400)


def test_chunked_body_gets_411_and_a_close(start: Start) -> None:
    request = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"
    check_refused(start(), request, 411)


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_oversized_head_gets_431_and_a_close(start: Start, end: bytes) -> None:
    request = b"GET / HTTP/1.1\r\nA: "
    check_refused(start(), request + b"a" * (64 * 1024 - len(request + end) + 1) + end, 431)


def check_refused(running: Running, request: bytes, status: int) -> None:
    good, bad = running.connect(), running.connect()
    answer = ask(bad, request)
    assert answer.status == status
    assert answer.headers["Connection"] == "close"
    assert answer.headers["X-Steer-Slot"] == "3"
    assert set(json.loads(answer.body)) == {"error"}
    bad[0].sendall(GET * 100)  # must not turn the end into a reset
    assert has_ended(bad)
    bad[0].shutdown(socket.SHUT_WR)
    assert ask(good).status == 200


def test_largest_head_is_answered(start: Start) -> None:
    request = b"GET / HTTP/1.1\r\nA: "
    request += b"a" * (64 * 1024 - len(request) - 4) + b"\r\n\r\n"
    assert ask(start().connect(), request).status == 200


# Delays


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "+1", "1e3", "3600001", "9" * 5000])
@pytest.mark.parametrize("name", ["sleep_ms", "busy_ms"])
def test_bad_delay_gets_400_and_keeps_the_connection(start: Start, name: str, value: str) -> None:
    client = start().connect()
    answer = ask(client, get(f"/?a=b&{name}={value}"))
    assert answer.status == 400
    assert name in json.loads(answer.body)["error"]
    assert "Connection" not in answer.headers
    assert ask(client).status == 200


@pytest.mark.parametrize("query", ["sleep_ms=80", "busy_ms=80", "sleep_ms=40&busy_ms=40"])
def test_delay_is_no_shorter_than_asked(start: Start, query: str) -> None:
    client = start().connect()
    start_s = time.monotonic()
    client[0].sendall(get(f"/?{query}") + GET * 1000)  # more input is no reason to wake up
    assert read_answer(client[1]).status == 200
    assert time.monotonic() - start_s >= 0.08


def test_sleeping_requests_overlap(start: Start) -> None:
    running = start()
    slow, quick = running.connect(), running.connect()
    slow[0].sendall(get(f"/?sleep_ms={FOREVER_MS}"))
    assert ask(quick, get("/?sleep_ms=20")).status == 200
    assert ask(quick).status == 200
    assert is_silent(slow[0])


def test_busy_request_keeps_the_cpu_and_all_others_waiting(start: Start) -> None:
    running = start()
    busy, other = running.connect(), running.connect()
    ask(other)
    before_ticks = cpu_ticks(running.pid)
    busy[0].sendall(get(f"/?busy_ms={FOREVER_MS}"))
    eventually(lambda: cpu_ticks(running.pid) - before_ticks >= 5)
    descriptors = os.listdir(f"/proc/{running.pid}/fd")
    running.connect()  # waits where the kernel can still give it to another worker
    other[0].sendall(GET)
    eventually(lambda: cpu_ticks(running.pid) - before_ticks >= 10)
    assert is_silent(busy[0])
    assert is_silent(other[0])
    assert os.listdir(f"/proc/{running.pid}/fd") == descriptors


def test_sleeping_request_leaves_the_cpu_alone(start: Start) -> None:
    running = start()
    client = running.connect()
    ask(client)
    before_ticks = cpu_ticks(running.pid)
    ask(client, get("/?sleep_ms=400"))
    assert cpu_ticks(running.pid) - before_ticks < 5


def cpu_ticks(pid: int) -> int:
    """CPU time used, in ticks of usually 10 ms (proc_pid_stat(5): utime, stime)."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        user, system = stat.read().rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


# UDP


@pytest.mark.parametrize("kind", ["udp4", "udp6"])
def test_datagram_gets_one_answer(start: Start, kind: str) -> None:
    running = start(kind)
    client = running.datagram_client()
    for datagram in (b"", b"hello", b"\xff" * 2000, b"sleep_ms=x", b"busy_ms=2", b"sleep_ms=2"):
        client.send(datagram)
        answer = client.recv(999)
        cpu = json.loads(answer)["cpu"]
        expected = f'{{"slot":3,"pid":{running.pid},"cpu":{cpu},"generation":7,"name":"demo"}}\n'
        assert answer == expected.encode()
    assert is_silent(client)


@pytest.mark.parametrize("kind", ["udp4", "udp6"])
def test_sleeping_datagram_lets_others_pass(start: Start, kind: str) -> None:
    running = start(kind)
    slow, quick = running.datagram_client(), running.datagram_client()
    slow.send(f"sleep_ms={FOREVER_MS}".encode())
    start_s = time.monotonic()
    quick.send(b"sleep_ms=50\n")
    assert quick.recv(999)
    assert time.monotonic() - start_s >= 0.05
    assert is_silent(slow)


# Stopping


def test_stop_of_an_idle_service(start: Start) -> None:
    running = start("tcp4", "udp4")
    idle = running.connect()
    ask(idle)
    running.signal(signal.SIGTERM)
    assert has_ended(idle)
    assert running.wait() == 0
    assert refuses(running)


def test_stop_from_before_the_start(start: Start) -> None:
    assert start(stopping=True).wait() == 0


def test_stop_answers_all_that_is_queued(start: Start) -> None:
    running = start()
    running.freeze()
    queued = [running.connect() for _ in range(100)]
    for sock, _ in queued:
        sock.sendall(GET)
    running.terminate_frozen()
    for client in queued:
        answer = read_answer(client[1])
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
        assert has_ended(client)
        client[0].shutdown(socket.SHUT_WR)
    assert running.wait() == 0


@pytest.mark.parametrize(
    ("kept", "sent", "rest"),
    [
        (False, b"", GET),
        (False, GET[:9], GET[9:]),
        (False, POST[:-9], POST[-9:]),
        (True, GET[:9], GET[9:]),
        (True, POST[:-9], POST[-9:]),
    ],
)
def test_stop_waits_for_the_rest_of_a_request(
    start: Start, kept: bool, sent: bytes, rest: bytes
) -> None:
    running = start()
    kept_client = running.connect()
    ask(kept_client)
    running.freeze()
    client = kept_client if kept else running.connect()
    client[0].sendall(sent)
    running.terminate_frozen()
    eventually(lambda: refuses(running))
    answer = ask(client, rest)
    assert (answer.status, answer.headers["Connection"]) == (200, "close")
    assert has_ended(client)
    client[0].sendall(GET * 100)  # the end is no reset
    client[0].shutdown(socket.SHUT_WR)
    assert running.wait() == 0


def test_stop_waits_for_silent_connections_only_so_long(start: Start) -> None:
    running = start(grace_s=0.05)
    clients = [running.connect() for _ in range(3)]
    clients[1][0].sendall(GET[:9])
    clients[2][0].sendall(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n1")
    running.signal(signal.SIGTERM)
    assert all(has_ended(client) for client in clients)
    assert running.wait() == 0


def test_stop_answers_a_request_already_sent_on_a_kept_connection(start: Start) -> None:
    running = start()
    clients = [running.connect() for _ in range(20)]
    for client in clients:
        ask(client)
    running.freeze()
    for sock, _ in clients:
        sock.sendall(GET)
    running.terminate_frozen()
    for client in clients:
        assert read_answer(client[1]).status == 200
        assert has_ended(client)


def test_stop_lets_a_sleeping_request_finish(start: Start) -> None:
    running = start(grace_s=0.01)
    sleeping, idle = running.connect(), running.connect()
    sleeping[0].sendall(get("/?sleep_ms=500"))
    ask(idle)
    ask(idle)
    running.signal(signal.SIGTERM)
    assert has_ended(idle)
    answer = read_answer(sleeping[1])
    assert (answer.status, answer.headers["Connection"]) == (200, "close")
    assert has_ended(sleeping)
    assert running.wait() == 0


@pytest.mark.parametrize("datagram", [b"", b"sleep_ms=20"])
def test_stop_answers_queued_datagrams(start: Start, datagram: bytes) -> None:
    running = start("udp4")
    client = running.datagram_client()
    running.freeze()
    for _ in range(60):
        client.send(datagram)
    running.terminate_frozen()
    assert all(json.loads(client.recv(999))["slot"] == 3 for _ in range(60))
    assert running.wait() == 0


def test_stop_lets_a_sleeping_datagram_finish(start: Start) -> None:
    running = start("udp4")
    client, other = running.datagram_client(), running.datagram_client()
    client.send(b"sleep_ms=300")
    other.send(b"")
    other.recv(999)
    running.signal(signal.SIGTERM)
    assert json.loads(client.recv(999))["slot"] == 3
    assert running.wait() == 0


def test_stop_closes_the_listener_before_datagrams_have_slept(start: Start) -> None:
    running = start("tcp4", "udp4")
    client, other = running.datagram_client(1), running.datagram_client(1)
    client.send(f"sleep_ms={FOREVER_MS}".encode())
    other.send(b"")
    other.recv(999)
    running.signal(signal.SIGTERM)
    eventually(lambda: refuses(running))
