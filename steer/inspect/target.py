"""The argument of `steer inspect`: an address, a port, a process, or nothing. Pure."""

from __future__ import annotations

import re

import msgspec

from steer.config import address
from steer.errors import ConfigError
from steer.inspect.seen import Seen
from steer.values import Invalid, shown, whole_number

_MOST_PID = 1 << 22
"""See PID_MAX_LIMIT of include/linux/threads.h."""
_PORTS = 65535
_PORT_ONLY = re.compile(r"(?:(tcp|udp)://)?\*?:([0-9]{1,5})")
ALLOWED = "an address (127.0.0.1:80, [::1]:80, udp://:53), a port (80) or a process id"


class Target(msgspec.Struct, frozen=True):
    """Which sockets to show. None: any.

    Args:
        number: a port; or, if nothing serves that port, a process id.
    """

    protocol: str | None = None
    address: str | None = None
    port: int | None = None
    number: int | None = None


def parse(text: str | None) -> Target:
    """Parse the argument.

    Raises:
        ConfigError: it is none of `ALLOWED`.
    """
    if text is None:
        return Target()
    if re.fullmatch("[0-9]+", text):
        try:
            return Target(number=whole_number(text, 1, _MOST_PID))
        except Invalid as error:
            act = f"read {shown(text)}"
            raise ConfigError(act, f"{error}, as ports and process ids are") from None
    if found := _PORT_ONLY.fullmatch(text):
        return Target(found[1], port=address.parse(f"0.0.0.0:{found[2]}").port)
    if ":" not in text:
        raise ConfigError(f"read {shown(text)}", "malformed", f"allowed: {ALLOWED}")
    bind = address.parse(text)
    protocol = bind.protocol if "://" in text else None
    return Target(protocol, bind.address, bind.port)


def matches(target: Target, seen: Seen) -> bool:
    """Whether to show a socket, judged by its address and not by its processes."""
    if target.protocol not in (None, seen.protocol):
        return False
    if target.number is not None:
        return target.number == seen.port
    if target.port not in (None, seen.port):
        return False
    return target.address is None or _covers(seen, target.address)


def _covers(seen: Seen, wanted: str) -> bool:
    """Whether the socket can get what is sent to that address."""
    if seen.address == wanted:
        return True
    is_v6 = ":" in wanted
    if seen.address == "0.0.0.0":
        return not is_v6
    return seen.address == "::" and (is_v6 or not seen.is_v6only)
