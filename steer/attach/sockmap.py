"""Whether the sockets of a server are in a sockmap or sockhash, as nginx's are with quic_bpf.

A socket is in one sockarray or in any number of sockmaps, never both: either uses sk_user_data, see
reuseport_array_update_check() of kernel/bpf/reuseport_array.c and sk_psock_init() of
net/core/skmsg.c. A program can select from either (Linux 5.8).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable

from steer.abi import BPF_MAP_TYPE_SOCKMAP
from steer.errors import KernelError
from steer.loader.bpf_maps import Map


def is_needed(sockets: Iterable[socket.socket]) -> bool:
    """Whether one of them is in a sockmap, so that all have to be selected from one.

    Tries to add each to a sockarray that nobody uses. False also if that is not permitted: then
    attaching is refused with the reason.
    """
    try:
        with Map("sockets") as sockarray:
            return any(not _fits(sockarray, each) and _is_in_sockmap(each) for each in sockets)
    except KernelError:
        return False


def _is_in_sockmap(sock: socket.socket) -> bool:
    with Map("sockets", kind=BPF_MAP_TYPE_SOCKMAP) as sockmap:
        return _fits(sockmap, sock)


def _fits(array: Map, sock: socket.socket) -> bool:
    """Raises KernelError: for another reason than that the socket is in a map already."""
    try:
        array.put_socket(0, sock.fileno())
    except KernelError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    array.delete(0)
    return True
