"""Reads the addresses of binds as users write them. Pure."""

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
"""Why multicast and broadcast addresses are refused: for these, the kernel delivers each datagram
to all sockets and never runs the group's program. See udp(7) on SO_REUSEADDR, and
__udp4_lib_mcast_deliver() of net/ipv4/udp.c."""
ALLOWED = "host:port, [::1]:port, :port, udp://host:port"


_MAPPED = bytes(10) + b"\xff\xff"
"""The first bytes of an IPv4-mapped IPv6 address."""


class Bind(msgspec.Struct, frozen=True):
    """One address of a service. Each bind has a reuseport group of its own.

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
        """The IPv4 address of packets that arrive here; None: they are IPv6. Packets to an
        IPv4-mapped address (::ffff:0:0/96, see ipv6(7)) are IPv4, too."""
        if not self.is_v6:
            return self.address
        packed = self._packed_v6
        return socket.inet_ntoa(packed[12:]) if packed.startswith(_MAPPED) else None

    @property
    def is_multicast(self) -> bool:
        """Whether the address is multicast (224.0.0.0/4, ff00::/8) or broadcast
        (255.255.255.255)."""
        if self.ipv4 is None:
            return self._packed_v6[0] == 0xFF
        first = socket.inet_aton(self.ipv4)
        return first[0] >> 4 == 0xE or first == b"\xff" * 4

    @property
    def _packed_v6(self) -> bytes:
        return socket.inet_pton(socket.AF_INET6, self.address.partition("%")[0])

    @property
    def is_scoped(self) -> bool:
        """Whether the address names an interface after a percent sign, as link-local addresses
        (fe80::/10) do."""
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
        any_port: whether port 0 is allowed, which stands for any free port.

    Raises:
        ConfigError: the text does not have one of the forms in ALLOWED.
    """
    match = _FORM.fullmatch(text.strip())
    act = f"read address {values.shown(text)}"
    if not match:
        raise ConfigError(act, "malformed", f"{did_you_mean(text)} allowed: {ALLOWED}".lstrip())
    port = int(match["port"])
    if not (0 if any_port else 1) <= port <= 65535:
        raise ConfigError(act, f"port {port} is not in 1..65535")
    return Bind(match["protocol"] or "tcp", _numeric(match["v6"], match["host"], act), port)


def is_of_any_host(text: str) -> bool:
    """Whether an address names a port only, and so the wildcard of either family."""
    return text.strip().removeprefix("tcp://").removeprefix("udp://").startswith((":", "*:"))


def did_you_mean(text: str) -> str:
    """A question that names the address that the user probably meant; "": no guess.

    Args:
        text: a malformed address.
    """
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
"""By the pattern of a malformed address: its replacement."""


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
