"""The messages between the controller and a template process."""

from __future__ import annotations

import msgspec

from steer import values
from steer.child.launch import Launch
from steer.config.service import Service
from steer.linux.identity import Identity
from steer.values import Invalid

MESSAGE_MAX_BYTES = 1 << 18
"""No message is longer: a socket of default size takes no longer one (net.core.wmem_default)."""
_MOST_ERRNO = 4095
"""MAX_ERRNO of include/linux/err.h."""


class Preload(msgspec.Struct, frozen=True):
    """What a template process is started with.

    Args:
        files: the limits on open files that the controller was started with.
        binds: how many sockets each worker gets.
    """

    service: Service
    name: str
    identity: Identity
    files: tuple[int, int]
    binds: int


class Request(msgspec.Struct, frozen=True):
    """Asks for one worker. The descriptors of its channel, its standard error and its sockets come
    with the message.

    Args:
        is_last: whether no other request of this batch follows.
    """

    launch: Launch
    is_last: bool


class Answer(msgspec.Struct, omit_defaults=True):
    """From a template process to the controller: one when it can fork workers or why it cannot, two
    for each batch of requests.

    Args:
        unloadable: why the application could not be loaded.
        detail: more lines about it.
        pids: the workers of a batch.
        errno: why the workers of a batch could not be forked; none of them is left.
        is_idle: whether it waits for requests. Workers that it forked are children of the
            controller by then.
    """

    unloadable: str = ""
    detail: str = ""
    pids: tuple[int, ...] = ()
    errno: int = 0
    is_idle: bool = False


def read(data: bytes) -> Answer:
    """Read an answer. The data are untrusted, as the code of the application can write to the
    channel, too.

    Raises:
        Invalid: the data are not such an answer.
    """
    answer = values.decode(data, Answer)
    if not 0 <= answer.errno <= _MOST_ERRNO:
        raise Invalid(f"{answer.errno} is no error number")
    return answer
