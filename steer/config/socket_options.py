"""The table of socket options that a service may set on its sockets. Pure.

The name of an option is the kernel's constant without SO_, TCP_ or IP_, in lower case and with
dashes (socket(7), tcp(7), ip(7)). `defer-accept` and `fastopen` are options of listeners. Accepted
sockets inherit all others from their listener, so steer can set them without help from the worker.
Options for which that does not work are left out: SO_PRIORITY over TCP (it is 0 on an accepted
socket: sk_clone() of net/core/sock.c), and TCP_MAXSEG and TCP_WINDOW_CLAMP, which a listener loses
when its accept queue is moved (`listeners.move_queue`).
"""

from __future__ import annotations

import errno
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence

import msgspec

from steer import values
from steer.values import Invalid

_TCP, _UDP = ("tcp",), ("udp",)
_BOTH = ("tcp", "udp")
_NOTSENT_LOWAT = 25
"""TCP_NOTSENT_LOWAT of include/uapi/linux/tcp.h; Python has a name for it since 3.12."""
_IP_TRANSPARENT = 19
"""IP_TRANSPARENT of include/uapi/linux/in.h; Python has no name for it. IPv6 sockets accept it,
too: it sets the same bit of the socket as IPV6_TRANSPARENT (inet_sk(sk)->transparent)."""
_NEEDS_NET_ADMIN = "needs CAP_NET_ADMIN: run as root, or leave it out"


class Kind(msgspec.Struct, frozen=True):
    """A kind of value.

    Args:
        allowed: the allowed values, in words.
        read: returns the value for setsockopt(2). Raises ValueError.
    """

    allowed: str
    read: Callable[[str], int | bytes]


class Option(msgspec.Struct, frozen=True):
    """One socket option.

    Args:
        protocols: the option is set on sockets of these protocols only.
        cap: the sysctl that limits the value: the kernel silently reduces larger values to it; "":
            there is none.
        refusals: the cure, by the errno that setsockopt(2) fails with.
    """

    level: int
    number: int
    kind: Kind
    protocols: Sequence[str]
    cap: str = ""
    refusals: Mapping[int, str] = {}


class Setting(msgspec.Struct, frozen=True):
    """An option with its value.

    Args:
        text: the value as the user wrote it.
        value: the value for setsockopt(2).
    """

    name: str
    text: str
    value: int | bytes

    @property
    def option(self) -> Option:
        return OPTIONS[self.name]

    @property
    def raw(self) -> bytes:
        """The bytes that setsockopt(2) gets."""
        if isinstance(self.value, bytes):
            return self.value
        return self.value.to_bytes(4, sys.byteorder)

    def __str__(self) -> str:
        return f"{self.name}={self.text}"


_FLAGS = {
    **dict.fromkeys(("yes", "on", "true", "1"), 1),
    **dict.fromkeys(("no", "off", "false", "0"), 0),
}
_WHOLE = "0|[1-9][0-9]{0,9}|0x[0-9a-fA-F]{1,8}"
_DECIMAL = r"[0-9]{1,5}(\.[0-9]{1,3})?"
_BYTES = "[0-9]{1,10}[KMG]?"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_NAME_BYTES = 15
"""TCP_CA_NAME_MAX of include/net/tcp.h, without its final zero."""


def _flag(text: str) -> int:
    return _FLAGS[text.lower()]


def _whole(low: int, high: int, what: str) -> Kind:
    """A whole number. It may be hexadecimal, as marks are in `ip rule` and nft."""

    def read(text: str) -> int:
        return _within(int(_matched(_WHOLE, text), 0), low, high)

    return Kind(f"{what} from {low} to {high}", read)


def _seconds(low_s: int, high_s: int) -> Kind:
    return _whole(low_s, high_s, "whole seconds")


def _milliseconds_of(text: str) -> int:
    return _within(round(float(_matched(_DECIMAL, text)) * 1000), 0, 86_400_000)


def _bytes(low: int) -> Kind:
    high = (1 << 30) - 1  # the kernel doubles the value and stores it in an int

    def read(text: str) -> int:
        number, unit = _matched(_BYTES, text.upper()).rstrip("KMG"), text[-1:].upper()
        return _within(int(number) * _UNITS.get(unit, 1), low, high)

    return Kind(f"bytes from {low} to {high}, or with K, M or G", read)


def _algorithm(text: str) -> bytes:
    name = text.encode("ascii")
    if not 0 < len(name) <= _NAME_BYTES or not text.isprintable():
        raise ValueError(text)
    return name


def _matched(form: str, text: str) -> str:
    if not re.fullmatch(form, text):
        raise ValueError(text)
    return text


def _within(value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise ValueError(value)
    return value


_FLAG = Kind("yes or no", _flag)
_SOCKET, _IPPROTO_TCP = socket.SOL_SOCKET, socket.IPPROTO_TCP

OPTIONS: Mapping[str, Option] = {
    "nodelay": Option(
        _IPPROTO_TCP,
        socket.TCP_NODELAY,
        _FLAG,
        _TCP,
    ),
    "keepalive": Option(_SOCKET, socket.SO_KEEPALIVE, _FLAG, _TCP),
    "keepidle": Option(_IPPROTO_TCP, socket.TCP_KEEPIDLE, _seconds(1, 32767), _TCP),
    "keepintvl": Option(_IPPROTO_TCP, socket.TCP_KEEPINTVL, _seconds(1, 32767), _TCP),
    "keepcnt": Option(_IPPROTO_TCP, socket.TCP_KEEPCNT, _whole(1, 127, "probes"), _TCP),
    "user-timeout": Option(
        _IPPROTO_TCP,
        socket.TCP_USER_TIMEOUT,
        Kind("seconds from 0 to 86400", _milliseconds_of),
        _TCP,
    ),
    "notsent-lowat": Option(_IPPROTO_TCP, _NOTSENT_LOWAT, _bytes(0), _TCP),
    "congestion": Option(
        _IPPROTO_TCP,
        socket.TCP_CONGESTION,
        Kind("a congestion control's name: bbr", _algorithm),
        _TCP,
        refusals={
            errno.ENOENT: "this kernel has no congestion control of that name; available: sysctl "
            "net.ipv4.tcp_available_congestion_control",
            errno.EPERM: "without CAP_NET_ADMIN, only the ones in sysctl "
            "net.ipv4.tcp_allowed_congestion_control",
        },
    ),
    "defer-accept": Option(
        _IPPROTO_TCP,
        socket.TCP_DEFER_ACCEPT,
        _seconds(0, 600),
        _TCP,
    ),
    "fastopen": Option(
        _IPPROTO_TCP,
        socket.TCP_FASTOPEN,
        _whole(0, 65535, "connections"),
        _TCP,
        cap="net.core.somaxconn",
    ),
    "rcvbuf": Option(
        _SOCKET,
        socket.SO_RCVBUF,
        _bytes(1152),
        _BOTH,
        cap="net.core.rmem_max",
    ),
    "sndbuf": Option(
        _SOCKET,
        socket.SO_SNDBUF,
        _bytes(2304),
        _BOTH,
        cap="net.core.wmem_max",
    ),
    "priority": Option(
        _SOCKET,
        socket.SO_PRIORITY,
        _whole(0, 2**31 - 1, "a number"),
        _UDP,
        refusals={errno.EPERM: "above 6 it needs CAP_NET_ADMIN: run as root, or choose 0 to 6"},
    ),
    "mark": Option(
        _SOCKET,
        socket.SO_MARK,
        _whole(0, 2**32 - 1, "a number"),
        _BOTH,
        refusals={errno.EPERM: _NEEDS_NET_ADMIN},
    ),
    "transparent": Option(
        socket.IPPROTO_IP,
        _IP_TRANSPARENT,
        _FLAG,
        _BOTH,
        refusals={errno.EPERM: "needs CAP_NET_ADMIN or CAP_NET_RAW: run as root, or leave it out"},
    ),
}
DEFAULTS = {"nodelay": "yes"}
"""Options that steer sets by default. Without nodelay, a server that sends the head and the body
of an answer separately takes 40 ms for each request on a kept-alive connection: Nagle's algorithm
waits for an acknowledgement that the client delays."""
ALLOWED = f"NAME=VALUE; {', '.join(OPTIONS)}"


def parse(texts: Sequence[str]) -> tuple[Setting, ...]:
    """Read settings of the form "NAME=VALUE". Defaults that are not overridden come first.

    Raises:
        Invalid: a name is unknown or given twice, or a value is not allowed.
    """
    given: dict[str, Setting] = {}
    for text in texts:
        setting = _parse(text)
        if setting.name in given:
            raise Invalid(f"{setting.name} is given twice")
        given[setting.name] = setting
    defaults = [_parse(f"{name}={v}") for name, v in DEFAULTS.items() if name not in given]
    return (*defaults, *given.values())


def _parse(text: str) -> Setting:
    name, _, value = text.partition("=")
    name, value = name.strip().lower().replace("_", "-"), value.strip()
    option = OPTIONS.get(name)
    if option is None:
        raise Invalid(f"unknown {values.shown(name)}", values.did_you_mean(name, OPTIONS))
    try:
        return Setting(name, value, option.kind.read(value))
    except (ValueError, KeyError):
        raise Invalid(f"{name} is {option.kind.allowed}, not {values.shown(value)}") from None


def for_protocol(settings: Sequence[Setting], protocol: str) -> tuple[Setting, ...]:
    """The settings for sockets of this protocol."""
    return tuple(each for each in settings if protocol in each.option.protocols)


def unused_setting(settings: Sequence[Setting], protocols: Sequence[str]) -> Setting | None:
    """A setting of the user's that applies to no socket of these protocols; None: there is none."""
    for each in settings:
        is_default = DEFAULTS.get(each.name) == each.text
        if not is_default and not set(protocols).intersection(each.option.protocols):
            return each
    return None
