"""What a template process sends is read without trust, and what an import left is named."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import msgspec
import pytest

from steer.child import leftovers, reseeding
from steer.child.launch import Launch
from steer.child.preload import MESSAGE_MAX_BYTES, Answer, Request, read
from steer.config.address import Bind
from steer.config.plan import WorkerSpec
from steer.config.service import Service
from steer.linux.identity import Identity
from steer.values import Invalid

LAUNCH = Launch(
    service=Service(app="shop:serve", env=("A=1",)),
    name="shop",
    binds=(Bind("tcp", "127.0.0.1", 80), Bind("udp", "::1", 81)),
    spec=WorkerSpec(3, (0, 1), None, 7),
    slot=4,
    generation=2,
    identity=Identity(1, 2, "shop", "/home"),
    notify="@steer",
    files=(1024, 4096),
    niced=True,
    anchored=frozenset({1}),
)


def test_request_arrives_as_it_was_sent() -> None:
    data = msgspec.msgpack.encode(Request(LAUNCH, is_last=True))
    assert msgspec.msgpack.decode(data, type=Request) == Request(LAUNCH, is_last=True)
    assert len(data) < MESSAGE_MAX_BYTES


@pytest.mark.parametrize(
    "answer", [Answer(), Answer(is_idle=True), Answer(pids=(7, 8)), Answer("no", "why", errno=11)]
)
def test_answer_arrives_as_it_was_sent(answer: Answer) -> None:
    assert read(msgspec.json.encode(answer)) == answer


@pytest.mark.parametrize(
    "data",
    [b"", b"1", b"{", b'{"pids": "7"}', b'{"errno": -1}', b'{"errno": 5000}', b'{"pids": [1.5]}'],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(Invalid):
        read(data)


def test_threads_are_named() -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="poller")
    before = leftovers.threads()
    thread.start()
    try:
        assert set(leftovers.threads()) - set(before) == {"poller"}
    finally:
        over.set()
        thread.join()


def test_sockets_are_named_by_their_addresses(tmp_path: Path) -> None:
    """Also those of other families, and those that have no address."""
    ours, theirs = socket.socketpair()
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        socket.socket(socket.AF_INET6) as unbound,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as local,
        ours,
        theirs,
    ):
        local.bind(str(tmp_path / "path"))
        found = "\n".join(leftovers.sockets(channel=theirs.fileno()))
        port = listener.getsockname()[1]
        assert f"on 127.0.0.1:{port} (descriptor {listener.fileno()})" in found
        assert f"to 127.0.0.1:{port} (descriptor {client.fileno()})" in found
        assert f"on [::]:0 (descriptor {unbound.fileno()})" in found
        assert f"on {tmp_path}/path (descriptor {local.fileno()})" in found
        assert f"AF_UNIX (descriptor {ours.fileno()})" in found
        assert f"(descriptor {theirs.fileno()})" not in found


def test_many_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [socket.socketpair() for _ in range(5)]
    leftovers.warn(channel=-1)
    said = capsys.readouterr().err
    assert "import left open sockets, which all workers share: " in said
    assert " and " in said
    assert "more; start and open such things in steer_post_fork(worker)" in said
    for pair in pairs:
        for sock in pair:
            sock.close()


@pytest.mark.parametrize("kind", ["MT19937", "PCG64"])
def test_global_generator_of_numpy_is_seeded(kind: str) -> None:
    """Whichever the application has set."""
    random = pytest.importorskip("numpy").random
    before = random.get_bit_generator()
    random.set_bit_generator(getattr(random, kind)(1))
    try:
        state = random.get_bit_generator().state
        first = random.random()
        random.get_bit_generator().state = state
        reseeding.reseed()
        assert random.random() != first
    finally:
        random.set_bit_generator(before)
