"""What a new worker is told, and what it may have to tell before its application runs."""

from __future__ import annotations

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


class Message(msgspec.Struct, omit_defaults=True):
    """From a worker to its controller, before the application runs.

    Args:
        unloadable: why the application could not be loaded.
        detail: more lines on that.
    """

    unloadable: str = ""
    detail: str = ""


MESSAGE_MAX_BYTES = 65536
"""More than any message of ours: of text there are twice _TEXT_MAX characters."""


def read(data: bytes) -> Message:
    """Why a worker could not load its application. It may be anything: what the application
    does when it is imported can write to the channel, too.

    Raises:
        Invalid: it is nothing that a worker says.
    """
    message = values.decode(data, Message)
    if not message.unloadable:
        raise Invalid("not why it could not be loaded")
    return message


class Launch(msgspec.Struct, frozen=True):
    """All that a new worker is told.

    Args:
        notify: address of the notification socket, as NOTIFY_SOCKET has it.
        files: limits on open files, as the controller found them.
        anchored: the binds whose group is joined through a socket of the controller's.
        niced: to leave the CPUs to those that serve, until it is ready.
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
