"""Addresses as users write them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.config.address import ALLOWED, Bind, is_of_any_host, parse
from steer.errors import ConfigError

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    "text, bind",
    [
        ("127.0.0.1:8080", Bind("tcp", "127.0.0.1", 8080)),
        ("tcp://127.0.0.1:8080", Bind("tcp", "127.0.0.1", 8080)),
        ("udp://127.0.0.1:53", Bind("udp", "127.0.0.1", 53)),
        (":80", Bind("tcp", "0.0.0.0", 80)),
        ("*:80", Bind("tcp", "0.0.0.0", 80)),
        ("udp://:53", Bind("udp", "0.0.0.0", 53)),
        ("localhost:1", Bind("tcp", "127.0.0.1", 1)),
        ("[::1]:65535", Bind("tcp", "::1", 65535)),
        ("udp://[::]:53", Bind("udp", "::", 53)),
        ("[2001:0DB8:0:0::1]:80", Bind("tcp", "2001:db8::1", 80)),
        ("[::ffff:192.0.2.1]:80", Bind("tcp", "::ffff:192.0.2.1", 80)),
        ("  :80\n", Bind("tcp", "0.0.0.0", 80)),
        (":00080", Bind("tcp", "0.0.0.0", 80)),
    ],
)
def test_parse(text: str, bind: Bind) -> None:
    assert parse(text) == bind


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "80",
            "localhost",
            "127.0.0.1",
            "127.0.0.1:",
            "::1:80",
            "[::1]",
            "[::1:80",
            "::1]:80",
        ),
        *(":-1", ":+1", ":1.5", ":http", ":123456", ":8 0", ":\u0661\u0662", "1.2.3.4:5:6"),
        *("http://:80", "TCP://:80", "udp:/:53", "unix:/run/x", "tcp://", "[::1]80"),
    ],
)
def test_malformed(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert (caught.value.what, caught.value.cause) == (f"read address {text!r}", "malformed")
    assert caught.value.cure.endswith(f"allowed: {ALLOWED}")


@pytest.mark.parametrize(
    "text, meant",
    [
        ("25082", ":25082"),
        (" 80 ", ":80"),
        ("127.0.0.1", "127.0.0.1:8080"),
        ("localhost", "localhost:8080"),
        ("http://127.0.0.1:80/", "127.0.0.1:80"),
        ("::1:80", "[::1]:80"),
        ("2001:db8::5:443", "[2001:db8::5]:443"),
        ("::1", "[::1]:8080"),
        ("fe80::a", "[fe80::a]:8080"),
    ],
)
def test_what_was_probably_meant_is_asked(text: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"; did you mean '{re.escape(meant)}'. allowed: "):
        parse(text)
    parse(meant)


@pytest.mark.parametrize("text, port", [(":0", 0), (":65536", 65536), ("[::1]:99999", 99999)])
def test_port_out_of_range(text: str, port: int) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value) == f"read address {text!r}: port {port} is not in 1..65535"


@pytest.mark.parametrize(
    "text, host",
    [
        ("example.com:80", "example.com"),
        ("127.1:80", "127.1"),
        ("256.0.0.1:80", "256.0.0.1"),
        ("1.2.3.4.5:80", "1.2.3.4.5"),
        ("0x7f000001:80", "0x7f000001"),
        ("[]:80", ""),
        ("[1.2.3.4]:80", "1.2.3.4"),
        ("[::1%lo]:80", "::1%lo"),
        ("[:::]:80", ":::"),
        ("a\0b:80", "a\0b"),
        ("\udcff:80", "\udcff"),
        ("a b:80", "a b"),
        ("//:80", "//"),
    ],
)
def test_not_numeric(text: str, host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.cause == f"{host!r} is no numeric address"
    assert caught.value.cure == "write it as 192.0.2.1 or [2001:db8::1]"


@pytest.mark.parametrize(
    "bind, label, is_v6",
    [
        (Bind("tcp", "127.0.0.1", 80), "tcp 127.0.0.1:80", False),
        (Bind("udp", "::1", 53), "udp [::1]:53", True),
    ],
)
def test_label(bind: Bind, label: str, is_v6: bool) -> None:
    assert bind.label == label
    assert bind.is_v6 == is_v6


@quick
@given(st.sampled_from(["tcp", "udp"]), st.ip_addresses(), st.integers(1, 65535))
def test_a_label_reads_back(protocol: str, address: object, port: int) -> None:
    host = f"[{address}]" if ":" in str(address) else str(address)
    bind = parse(f"{protocol}://{host}:{port}")
    assert (bind.protocol, bind.port, bind.is_v6) == (protocol, port, ":" in str(address))
    assert parse(bind.label.replace(" ", "://")) == bind


@quick
@given(st.text("[]:/.*%-+ \0019afx tcpudp"))
def test_no_text_is_more_than_an_error(text: str) -> None:
    try:
        bind = parse(text)
    except ConfigError:
        return
    assert 1 <= bind.port <= 65535


@pytest.mark.parametrize(
    "text, is_any",
    [(":80", True), ("udp://:53", True), ("tcp://*:80", True), ("0.0.0.0:80", False)],
)
def test_wildcard_of_either_family_has_no_host(text: str, is_any: bool) -> None:
    assert is_of_any_host(text) is is_any
