"""Whether the address of a bind is free, and who holds it if not."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from steer.config import socket_options
from steer.config.address import COPIES, Bind
from steer.config.socket_options import Setting
from steer.errors import BindError, KernelError, errno_name
from steer.linux import port_holders, services
from steer.sockets import sock_diag, sockopt
from steer.sockets.reuseport import new_socket


def check_free(bind: Bind, settings: Sequence[Setting] = ()) -> None:
    """Check that no process holds the address. With SO_REUSEPORT, bind(2) would succeed beside
    another process of the same user.

    Raises:
        BindError: a process holds the address, or the kernel refuses the address or an option.
    """
    if bind.protocol == "udp" and bind.ipv4 and _is_broadcast(bind.ipv4):
        cause = f"a broadcast address of this machine: {COPIES}"
        raise BindError(f"bind {bind.label}", cause, "choose another address")
    try:
        with new_socket(bind) as sock:
            sockopt.apply(sock, socket_options.for_protocol(settings, bind.protocol))
            sock.bind((bind.address, bind.port))
    except OSError as error:
        raise bind_error(bind, error) from None


def with_port(bind: Bind) -> Bind:
    """The bind itself, or with a port that is free now if its port is 0.

    Raises:
        BindError: the kernel refuses the address.
    """
    if bind.port:
        return bind
    try:
        with new_socket(bind) as sock:
            sock.bind((bind.address, 0))
            return msgspec.structs.replace(bind, port=sock.getsockname()[1])
    except OSError as error:
        raise bind_error(bind, error) from None


def _is_broadcast(address: str) -> bool:
    """Whether an IPv4 address is a broadcast address, by the routes in /proc/net/fib_trie."""
    here = False
    with suppress(OSError), open("/proc/net/fib_trie") as lines:
        for line in lines:
            node = line.strip()
            if node.startswith("|-- "):
                here = node[4:] == address
            elif here and node.endswith("BROADCAST"):
                return True
    return False


def refuse_strangers(bind: Bind, own_inodes: frozenset[int]) -> None:
    """Check that no other process has a socket in the group.

    Args:
        own_inodes: inodes of the sockets of this service.

    Raises:
        BindError: another process has one.
    """
    # To name the process takes long on a busy machine, and mostly there is none to name.
    if _are_all(bind, own_inodes):
        return
    others = port_holders.holders(
        _protocol(bind), bind.address, bind.port, except_inodes=own_inodes
    )
    strangers = [one for one in others if one.address == bind.address]
    if strangers:
        names = ", ".join(sorted({str(one) for one in strangers}))
        raise BindError(f"bind {bind.label}", f"{names} joined it too", "stop that first")


def _are_all(bind: Bind, own_inodes: frozenset[int]) -> bool:
    """Whether it is certain that no other socket is bound to the port without being connected."""
    ports, found_inodes = sock_diag.Ports(), set[int]()
    try:
        for family in (socket.AF_INET, socket.AF_INET6):
            found = ports.at(bind.protocol, family, bind.port)
            found_inodes |= {inode for inode, each in found.items() if not each.is_connected}
    except KernelError:
        return False
    return found_inodes <= own_inodes


def _protocol(bind: Bind) -> port_holders.Protocol:
    return "udp" if bind.protocol == "udp" else "tcp"


def bind_error(bind: Bind, error: OSError) -> BindError:
    """The error for a user when `reuseport.member` has failed, with who holds the port."""
    if isinstance(error, sockopt.Refused):
        return sockopt.error_of(bind, error)
    act = f"bind {bind.label}"
    if error.errno == errno.EADDRINUSE:
        cause, cure = _in_use(errno_name(error), holders(bind))
        return BindError.from_oserror(act, error, cure=cure, cause=cause)
    cures = {
        errno.EACCES: "ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE: "
        "run as root, or choose a higher port",
        errno.EADDRNOTAVAIL: "this machine has no such address",
        errno.EAFNOSUPPORT: "IPv6 is off on this machine",
    }
    return BindError.from_oserror(act, error, cures)


def holders(bind: Bind) -> list[port_holders.Holder]:
    """Which processes hold the port of a bind; see `port_holders.holders`."""
    return port_holders.holders(_protocol(bind), bind.address, bind.port)


def is_held(bind: Bind) -> bool:
    """Whether a process may hold the address. This tries bind(2), as reading the kernel's table of
    sockets takes milliseconds even if it is nearly empty."""
    family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
    kind = socket.SOCK_DGRAM if bind.protocol == "udp" else socket.SOCK_STREAM
    try:
        with socket.socket(family, kind) as sock:
            sock.bind((bind.address, bind.port))
    except OSError:
        return True
    return False


def _in_use(name: str, found: Sequence[port_holders.Holder]) -> tuple[str, str]:
    """Cause and cure. If the holder is a steer service, the cure is to stop that service."""
    if not found:
        return f"{name}, in use", "stop it, or choose another port"
    by = ", ".join(sorted({str(one) for one in found}))
    named = sorted({of for one in found if one.pid and (of := services.name_of(one.pid))})
    if not named:
        return f"{name}, in use by {by}", "stop it, or choose another port"
    whose = ", ".join(repr(each) for each in named)
    commands = " and ".join(f"`steer stop {each}`" for each in named)
    return f"{name}, in use by {by}, of service {whose}", f"{commands}, or choose another port"
