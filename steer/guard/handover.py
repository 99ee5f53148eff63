"""Adoption: what a guard process hands over to the next controller."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec

from steer.control import peer
from steer.control.protocol import REQUEST_MAX_BYTES
from steer.control.taken import already_running
from steer.errors import ControlError
from steer.guard import store
from steer.guard.channel import Channel, NotUnderstood, receive
from steer.guard.entry import Entry
from steer.guard.process import reap
from steer.guard.store import PEER_TIMEOUT_S, Settings
from steer.linux import fork

_LOOK_AGAIN_S = 0.01


class Guard(Protocol):
    """The guard of the controller that adopts."""

    def commit(self, has_all: bool) -> None:
        """Call this with `has_all` before the guard process that hands over ends, and without it
        afterwards."""


class Handover:
    """A service without a controller, handed over by its guard process.

    Until `taken`, only that guard process reads what workers write to standard error.

    Attributes:
        entries: the stored entries by key. Their descriptors belong to this process now.
        settings: the settings of the last controller.
        control: the listening control socket.
        guard_pid: the process ID of the guard process. That process waits for `taken`, with its
            adoption timeout suspended. If this process ends or calls `abandon`, it continues.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.guard_pid = peer.credentials(channel.sock)[0]
        self.entries: dict[str, Entry] = {}
        self.settings: Settings
        self.control: socket.socket
        try:
            self._receive()
        except OSError:
            self._close()
            raise

    def _receive(self) -> None:
        """Receive everything. The control socket comes last."""
        while (received := self.channel.receive()) is not None:
            frame, fds = received
            if frame.act == "put":
                self.entries[frame.key] = Entry(
                    frame.value, tuple(fds), frame.group, frame.stop_signal
                )
            elif frame.act == "configure":
                self.settings = _settings(frame.value)
            elif frame.act == "control" and fds and hasattr(self, "settings"):
                try:
                    self.control = socket.socket(fileno=fds[0])
                except OSError:
                    raise NotUnderstood("its control socket is none") from None
                return
        raise ConnectionResetError

    def taken(self, guard: Guard) -> None:
        """End the guard process that handed over, as `guard`, made with this handover, has
        everything.

        When this returns, the descriptors of that process are closed.
        """
        # If we end in the middle of this, the new guard process does the rest.
        guard.commit(has_all=True)
        pidfd = -1
        with suppress(OSError):
            pidfd = os.pidfd_open(self.guard_pid)
        store.end_predecessor(self.channel)
        if pidfd >= 0:
            fork.wait_for_end(pidfd, PEER_TIMEOUT_S)
            reap(pidfd)
            os.close(pidfd)
        guard.commit(has_all=False)

    def abandon(self) -> None:
        """Close all that was handed over. The guard process that handed it over carries on.

        A guard made with this handover has to be closed before.
        """
        self.control.close()
        self._close()

    def _close(self) -> None:
        for entry in self.entries.values():
            for fd in entry.fds:
                os.close(fd)
        self.channel.close()


def adopt(path: Path, timeout_s: float = 5.0) -> Handover | None:
    """Ask a guard process to hand over its service.

    Args:
        path: the path of the control socket.
        timeout_s: for the guard process to answer.

    Returns:
        None: there is no such socket, or nobody answers at it.

    Raises:
        ControlError: a controller is there, or does not answer; or the service is
            another user's, is ending, or is being adopted by another controller.
    """
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        try:
            with peer.connect(path, timeout_s) as sock:
                return _ask(sock, path)
        except (ConnectionResetError, BrokenPipeError):
            # The controller has just ended: its guard process will answer.
            time.sleep(_LOOK_AGAIN_S)
        except PermissionError:
            cure = "run as root or as the service's own user"
            raise ControlError(f"adopt {path.stem}", "EACCES", cure) from None
        except TimeoutError:
            break
        except NotUnderstood as error:
            act, cure = f"adopt {path.stem}", f"end it: `steer stop {path.stem}`"
            cause = f"the answer of its guard is not understood: {error.strerror}"
            raise ControlError(act, cause, cure) from None
        except OSError:
            return None
    raise already_running(path.stem, "it does not answer", path)


def _settings(value: bytes) -> Settings:
    try:
        return msgspec.msgpack.decode(value, type=Settings)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise NotUnderstood(f"settings: {error}") from None


def _ask(sock: socket.socket, path: Path) -> Handover:
    if peer.credentials(sock)[1] not in (0, os.geteuid()):
        # A guard of another user could name any process as a worker, and have us kill it.
        raise PermissionError
    sock.sendall(b'{"command": "adopt"}\n')
    line, fds = b"", []
    while not line.endswith(b"\n"):
        if len(line) > REQUEST_MAX_BYTES:
            raise NotUnderstood(f"an answer of more than {REQUEST_MAX_BYTES} bytes")
        data, more = receive(sock, max_fds=1)
        fds += more
        if not data:
            raise ConnectionResetError
        line += data
    if not fds:
        raise _refused(line, sock, path)
    channel = socket.socket(fileno=fds[0])
    channel.settimeout(sock.gettimeout())
    return Handover(Channel(channel))


def _refused(line: bytes, sock: socket.socket, path: Path) -> ControlError:
    """The error in an answer: the reason that a guard process gives, or that a controller is
    there."""
    try:
        answer = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError, RecursionError):
        return ControlError(f"adopt {path.stem}", "answer not understood")
    if "guard" in answer:
        return ControlError(f"adopt {path.stem}", str(answer.get("error")))
    return already_running(path.stem, f"pid {peer.credentials(sock)[0]}", path)
