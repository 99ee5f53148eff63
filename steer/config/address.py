"""Addresses as users write them. Pure."""

from __future__ import annotations

import re
import socket

import msgspec

from steer import values
from steer.errors import ConfigError

_FORM = re.compile(
    r"(?:(?P<protocol>tcp|udp)://)?(?:\[(?P<v6>[^\]]*)\]|(?P<host>[^:\[\]]*)):(?P<port>[0-9]{1,5})"
)
COPIES = "every worker would get a copy of each datagram, whatever the policy"
"""What the kernel does with multicast and broadcast: see udp(7) on SO_REUSEADDR, and
__udp4_lib_mcast_deliver() of net/ipv4/udp.c, which never runs a group's program."""
ALLOWED = "host:port, [::1]:port, :port, udp://host:port"


_MAPPED = bytes(10) + b"\xff\xff"
"""How an IPv6 address begins that stands for an IPv4 one."""


class Bind(msgspec.Struct, frozen=True):
    """One address of a service, and so one group.

    Args:
        protocol: "tcp" or "udp".
        address: a numeric IPv4 or IPv6 address.
    """

    protocol: str
    address: str
    port: int

    @property
    def is_v6(self) -> bool:
        return ":" in self.address

    @property
    def ipv4(self) -> str | None:
        """The IPv4 address that packets to it have: also of an IPv4-mapped one, ::ffff:0:0/96,
        see ipv6(7)."""
        if not self.is_v6:
            return self.address
        packed = self._packed_v6
        return socket.inet_ntoa(packed[12:]) if packed.startswith(_MAPPED) else None

    @property
    def is_multicast(self) -> bool:
        """To many hosts at once, or to all: 224.0.0.0/4, ff00::/8, 255.255.255.255."""
        if self.ipv4 is None:
            return self._packed_v6[0] == 0xFF
        first = socket.inet_aton(self.ipv4)
        return first[0] >> 4 == 0xE or first == b"\xff" * 4

    @property
    def _packed_v6(self) -> bytes:
        return socket.inet_pton(socket.AF_INET6, self.address.partition("%")[0])

    @property
    def is_scoped(self) -> bool:
        """Of one interface only: fe80::/10, which names it behind a percent sign."""
        return "%" in self.address

    @property
    def is_wildcard(self) -> bool:
        return self.address in ("0.0.0.0", "::")

    @property
    def label(self) -> str:
        host = f"[{self.address}]" if self.is_v6 else self.address
        return f"{self.protocol} {host}:{self.port}"


def parse(text: str, *, any_port: bool = False) -> Bind:
    """Read an address.

    Args:
        any_port: port 0 may be given too, for one that is free.

    Raises:
        ConfigError: it is not one of ALLOWED.
    """
    match = _FORM.fullmatch(text.strip())
    act = f"read address {values.shown(text)}"
    if not match:
        raise ConfigError(act, "malformed", f"{did_you_mean(text)} allowed: {ALLOWED}".lstrip())
    port = int(match["port"])
    if not (0 if any_port else 1) <= port <= 65535:
        raise ConfigError(act, f"port {port} is not in 1..65535")
    return Bind(match["protocol"] or "tcp", _numeric(match["v6"], match["host"], act), port)


def did_you_mean(text: str) -> str:
    """A question that names the address that a malformed one was probably meant to be; or ""."""
    bare = text.strip()
    for form, meant in _MISTAKES.items():
        if re.fullmatch(form, bare):
            return f"did you mean {re.sub(form, meant, bare)!r}?"
    host, _, port = bare.rpartition(":")
    if port.isascii() and port.isdigit() and _is_v6(host):
        return f"did you mean {f'[{host}]:{port}'!r}?"
    return f"did you mean {f'[{bare}]:8080'!r}?" if _is_v6(bare) else ""


def _is_v6(text: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, text)
    except (OSError, ValueError):
        return False
    return True


_MISTAKES = {
    r"([0-9]{1,5})": r":\1",
    r"([0-9]{1,3}(?:\.[0-9]{1,3}){3}|localhost)": r"\1:8080",
    r"https?://([^/:]+:[0-9]{1,5})/*": r"\1",
}
"""What is written instead of an address -> what it becomes."""


def _numeric(v6: str | None, host: str | None, act: str) -> str:
    if v6 is None and host in ("", "*"):
        return "0.0.0.0"
    if host == "localhost":
        return "127.0.0.1"
    text = v6 if v6 is not None else host or ""
    try:
        family = socket.AF_INET if v6 is None else socket.AF_INET6
        return socket.inet_ntop(family, socket.inet_pton(family, text))
    except (OSError, ValueError):
        raise ConfigError(
            act,
            f"{values.shown(text)} is no numeric address",
            "write it as 192.0.2.1 or [2001:db8::1]",
        ) from None
