"""Which control sockets may be removed, as nobody will ever answer there."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from steer.control import claim


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    directory = tmp_path / "run"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(directory / "web.sock"))
        sock.listen()
        yield sock


def path_of(listener: socket.socket) -> Path:
    return Path(listener.getsockname())


def test_socket_that_was_left_goes_with_its_directory(listener: socket.socket) -> None:
    path = path_of(listener)
    listener.close()
    claim.remove_dead(path)
    assert not path.parent.exists()


def test_socket_that_listens_stays(listener: socket.socket) -> None:
    claim.remove_dead(path_of(listener))
    assert path_of(listener).exists()


def test_socket_with_a_record_of_workers_stays(listener: socket.socket) -> None:
    path = path_of(listener)
    listener.close()
    claim.record_of(path).touch()
    claim.remove_dead(path)
    assert path.exists()


def test_socket_stays_while_a_service_starts(listener: socket.socket) -> None:
    path = path_of(listener)
    listener.close()
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        claim.remove_dead(path)
        assert path.exists()
    finally:
        os.close(directory)


def test_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    path.touch()
    claim.remove_dead(path)
    assert path.exists()
