"""The messages between the controller and a new worker, until the worker's application runs."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from steer import values
from steer.config.address import Bind
from steer.config.plan import WorkerSpec
from steer.config.service import Service
from steer.linux.identity import Identity
from steer.values import Invalid

FIRST_FD = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""


COMMAND_NOT_RUN = 127


class Unloadable(Exception):
    """The application cannot be loaded: the reason, and details."""

    def __init__(self, why: str, detail: str = "") -> None:
        super().__init__(why)
        self.detail = detail


class Message(msgspec.Struct, omit_defaults=True):
    """From a worker to its controller, before the application runs.

    Args:
        unloadable: why the application could not be loaded.
        detail: more lines about it.
    """

    unloadable: str = ""
    detail: str = ""


MESSAGE_MAX_BYTES = 65536
"""No message is longer, as both of its texts are shortened."""


def read(data: bytes) -> Message:
    """Read the message of a worker that could not load its application. The data are untrusted, as
    the code of the application can write to the channel, too.

    Raises:
        Invalid: the data are not such a message.
    """
    message = values.decode(data, Message)
    if not message.unloadable:
        raise Invalid("no reason why the application could not be loaded")
    return message


class Launch(msgspec.Struct, frozen=True):
    """Everything that the controller tells a new worker.

    Args:
        notify: the address of the notification socket, for NOTIFY_SOCKET.
        files: the limits on open files that the controller was started with.
        niced: whether the worker has a higher niceness until it is ready, to leave the CPUs to
            workers that serve.
        anchored: the binds whose group the worker joins through an anchor, a socket of the
            controller.
    """

    service: Service
    name: str
    binds: tuple[Bind, ...]
    spec: WorkerSpec
    slot: int
    generation: int
    identity: Identity
    notify: str
    files: tuple[int, int]
    niced: bool = False
    anchored: frozenset[int] = frozenset()


class NewWorker(NamedTuple):
    """What the process of a new worker starts with.

    Args:
        channel: the channel to the controller.
        stderr: where to write standard error.
        sockets: the sockets of the worker, one for each bind.
    """

    launch: Launch
    channel: socket.socket
    stderr: int
    sockets: Sequence[socket.socket]
