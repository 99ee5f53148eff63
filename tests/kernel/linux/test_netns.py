"""Network namespaces: found by name, path and process, and entered."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from steer.errors import ConfigError, KernelError
from steer.linux import netns
from testkit.namespaces import network_namespace
from testkit.processes import python, running

pytestmark = pytest.mark.needs("netns")


def test_ours_is_that_of_the_thread() -> None:
    before = netns.own()
    assert before == os.stat("/proc/self/ns/net").st_ino
    with network_namespace():
        assert netns.own() != before
    assert netns.own() == before


def test_one_that_was_entered_is_left_again() -> None:
    before = netns.own()
    with network_namespace():
        inside = netns.own()
        with running(*python("import sys; sys.stdin.read()")) as process:
            path = netns.path_of(str(process.pid))
            with netns.entered(f"/proc/{os.getpid()}/task/{os.getpid()}/ns/net"):
                assert netns.own() == inside
            assert os.stat(path).st_ino == inside
    assert netns.own() == before


def test_sockets_are_made_where_it_entered() -> None:
    with network_namespace(), running(*python("import sys; sys.stdin.read()")) as process:
        path = netns.path_of(str(process.pid))
        with network_namespace():
            with netns.entered(path), socket.create_server(("127.0.0.1", 0)) as sock:
                port = sock.getsockname()[1]
                assert f":{port:04X} " in Path("/proc/thread-self/net/tcp").read_text()
            assert f":{port:04X} " not in Path("/proc/thread-self/net/tcp").read_text()


def test_names_are_those_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "blue").touch()
    assert netns.names(str(tmp_path)) == {(tmp_path / "blue").stat().st_ino: "blue"}
    assert netns.names(str(tmp_path / "none")) == {}


@pytest.mark.parametrize(
    "asked, words",
    [
        ("no-such-name", "find network namespace 'no-such-name': No such file or directory; `ip"),
        ("/no/such/path", "find network namespace '/no/such/path': No such file or directory"),
        ("4194304", "there is no such process"),
        ("a\0b", "null byte"),
        ("/a\0b", "null byte"),
        ("", "find network namespace ''"),
    ],
)
def test_one_that_is_not_there_is_told(asked: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        netns.path_of(asked)
    assert words in str(caught.value)


def test_what_is_none_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = netns.own()
    with (
        pytest.raises(KernelError, match="enter network namespace"),
        netns.entered(str(tmp_path / "file")),
    ):
        pass
    assert netns.own() == before


def test_file_of_no_namespace_is_not_about_privileges() -> None:
    with pytest.raises(KernelError) as caught, netns.entered(__file__):
        pass
    assert str(caught.value).endswith(": EINVAL; name a network namespace")
