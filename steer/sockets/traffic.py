"""The kernel's counters of what arrived at all sockets of this network namespace."""

from __future__ import annotations

from collections.abc import Collection, Iterator

_SNMP, _SNMP6 = "/proc/self/net/snmp", "/proc/self/net/snmp6"
_PASSIVE_OPENS = b"PassiveOpens"
"""Connections to listeners over IPv4 and IPv6 (RFC 1213, tcpPassiveOpens)."""


def pulse(protocols: Collection[str]) -> bytes | None:
    """A value that differs after a client has connected to a listener (TCP), or after a datagram
    was read or dropped (UDP). A datagram that waits makes no difference. None if the counters
    cannot be read.

    Args:
        protocols: "tcp" or "udp", or both.
    """
    try:
        counts = list(_tcp()) if "tcp" in protocols else []
        return b" ".join(counts + (list(_udp()) if "udp" in protocols else []))
    except (OSError, ValueError):
        return None


def _tcp() -> Iterator[bytes]:
    names, numbers = _lines(_SNMP, b"Tcp: ")
    yield numbers.split()[names.split().index(_PASSIVE_OPENS)]


def _udp() -> Iterator[bytes]:
    yield from _lines(_SNMP, b"Udp: ")
    try:
        yield from _lines(_SNMP6, b"Udp6")
    except FileNotFoundError:
        return  # no IPv6


def _lines(path: str, start: bytes) -> list[bytes]:
    with open(path, "rb", buffering=0) as file:
        return [line for line in file.read().splitlines() if line.startswith(start)]
