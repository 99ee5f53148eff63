"""What is found at an address before an attach."""

from __future__ import annotations

import socket

import pytest

from steer.attach import target
from steer.attach.target import Target, targets_at
from steer.config import address
from steer.errors import AttachRefused

pytestmark = [
    pytest.mark.needs("netns", "root", "pidfd_getfd"),
    pytest.mark.usefixtures("netns"),
]

HOST, PORT = "127.0.0.1", 8732


def listener(host: str = HOST, reuse_port: bool = True) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, PORT), family=family, reuse_port=reuse_port)


def test_listeners_at_other_addresses_of_the_port_are_left_out() -> None:
    with listener(), listener(), listener("127.0.0.2"):
        found = Target(address.parse(f"{HOST}:{PORT}"))
    assert len(found.listeners) == 2
    assert found.holders.keys() == found.listeners.keys()


@pytest.mark.parametrize(
    "text, binds",
    [(":", ["0.0.0.0", "::"]), ("*:", ["0.0.0.0", "::"]), ("0.0.0.0:", ["0.0.0.0"])],
)
def test_text_without_a_host_names_both_families(text: str, binds: list[str]) -> None:
    with listener("0.0.0.0"), listener("::"):
        assert [each.bind.address for each in targets_at(f"{text}{PORT}")] == binds


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_family_where_nobody_listens_is_left_out(host: str) -> None:
    with listener(host):
        assert [each.bind.address for each in targets_at(f":{PORT}")] == [host]


def test_socket_without_reuseport_is_refused() -> None:
    with (
        listener(reuse_port=False),
        pytest.raises(AttachRefused, match=r"one socket without SO_REUSEPORT.*`steer run --"),
    ):
        Target(address.parse(f"{HOST}:{PORT}"))


def test_more_listeners_than_slots_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "MAX_WORKERS", 3)
    with listener("0.0.0.0"), listener("0.0.0.0"), listener("::"), listener("::"):
        assert targets_at(f"0.0.0.0:{PORT}")
        with pytest.raises(AttachRefused) as caught:
            targets_at(f":{PORT}")
    said = f"attach to :{PORT}: there are 4 listeners, and steer selects from at most 3; "
    assert str(caught.value).startswith(said)
