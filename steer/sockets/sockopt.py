"""Sets socket options, and says what the kernel refuses or reduces; see `socket_options`."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence

from steer.config import socket_options
from steer.config.address import Bind
from steer.config.socket_options import Setting
from steer.errors import BindError, Note

_FASTOPEN = "net.ipv4.tcp_fastopen"
_FASTOPEN_SERVER = 2
"""The bit of that sysctl which lets listeners accept it (ip-sysctl.rst)."""

_UNSTEERED = (
    "for UDP from TPROXY the kernel's hash selects, whatever the policy, also workers that drain"
)
"""nf_tproxy_get_sock_v4() looks the socket up without the packet, and without one no program is
asked (reuseport_select_sock() of net/core/sock_reuseport.c)."""


class Refused(OSError):
    """The kernel refuses a socket option.

    Args:
        setting: "mark=7".
    """

    def __init__(self, number: int, setting: str) -> None:
        super().__init__(number, setting)
        self.setting = setting


def apply(sock: socket.socket, settings: Iterable[Setting]) -> None:
    """Set the options of a socket, before it is bound.

    Raises:
        Refused
    """
    for each in settings:
        try:
            sock.setsockopt(each.option.level, each.option.number, each.raw)
        except OSError as error:
            raise Refused(error.errno or 0, str(each)) from None


def error_of(bind: Bind, error: Refused) -> BindError:
    """The error for a user after `Refused`, with what would help."""
    option = socket_options.OPTIONS.get(error.setting.partition("=")[0])
    return BindError.from_oserror(
        f"set socket option {error.setting} on {bind.label}",
        error,
        option.refusals if option else {},
        cure="leave it out: this kernel does not take it",
    )


def refused(binds: Iterable[Bind], settings: Sequence[Setting]) -> Iterator[BindError]:
    """The options that the kernel refuses, each once, tried on unbound sockets."""
    told = set()
    for bind in binds:
        for each in socket_options.for_protocol(settings, bind.protocol):
            refusal = _refusal(bind, each)
            if refusal and each not in told:
                told.add(each)
                yield error_of(bind, refusal)


def _refusal(bind: Bind, setting: Setting) -> Refused | None:
    """None if the kernel takes the option, or if it cannot be tried."""
    kind = socket.SOCK_STREAM if bind.protocol == "tcp" else socket.SOCK_DGRAM
    family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
    try:
        with socket.socket(family, kind) as sock:
            apply(sock, [setting])
    except Refused as error:
        return error
    except OSError:
        pass
    return None


def shortfalls(binds: Iterable[Bind], settings: Iterable[Setting]) -> list[Note]:
    """What the kernel accepts without an error, but does not do for these binds."""
    over_udp = any(bind.protocol == "udp" for bind in binds)
    return [each for setting in settings for each in _shortfalls(setting, over_udp)]


def _shortfalls(setting: Setting, over_udp: bool) -> Iterator[Note]:
    cap, value = setting.option.cap, setting.value
    if not isinstance(value, int) or not value:
        return
    most = _sysctl(cap) if cap else None
    if most is not None and value > most:
        yield Note(f"{setting}: limited to {most} by {cap}", f"sysctl -w {cap}={value}")
    flags = _sysctl(_FASTOPEN) if setting.name == "fastopen" else None
    if flags is not None and not flags & _FASTOPEN_SERVER:
        on = flags | _FASTOPEN_SERVER
        found = f"{setting}: not answered while {_FASTOPEN} is {flags}"
        yield Note(found, f"sysctl -w {_FASTOPEN}={on}")
    if setting.name == "transparent" and over_udp:
        yield Note(f"{setting}: {_UNSTEERED}", "use a rule that redirects instead")


def _sysctl(name: str) -> int | None:
    """The value of a sysctl; None if it cannot be read."""
    try:
        with open("/proc/sys/" + name.replace(".", "/")) as stream:
            return int(stream.read())
    except (OSError, ValueError):
        return None
