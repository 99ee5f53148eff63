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
from steer.control.taken import running
from steer.errors import ControlError
from steer.guard import store
from steer.guard.channel import Channel, NotUnderstood, receive
from steer.guard.entry import Entry
from steer.guard.process import reap
from steer.guard.store import PATIENCE_S, Settings
from steer.linux import fork

_LOOK_AGAIN_S = 0.01


class Guard(Protocol):
    """The guard of the controller that adopts."""

    def settle(self, has_all: bool) -> None:
        """Tell it, before (`has_all`) and after the guard process that handed over has ended."""


class Handover:
    """A service without a controller, handed to us by its keeper.

    What workers write to standard error the keeper reads until `taken`, and nobody else may.

    Attributes:
        entries: by key; the descriptors are ours now.
        settings: as the last controller had them.
        control: the listening control socket, ours.
        keeper_pid: of the keeper, which waits for `taken`, or carries on should we end or
            `abandon`. Its adoption timeout does not strike meanwhile.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.keeper_pid = peer.credentials(channel.sock)[0]
        self.entries: dict[str, Entry] = {}
        self.settings: Settings
        self.control: socket.socket
        try:
            self._receive()
        except OSError:
            self._close()
            raise

    def _receive(self) -> None:
        """All there is, the control socket last."""
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
        """Everything is in `guard`, made with this handover: the old keeper ends, and when
        this returns its descriptors are closed. It is waited for if it is our child."""
        # Should we end in the middle of this the new keeper does the rest.
        guard.settle(has_all=True)
        pidfd = -1
        with suppress(OSError):
            pidfd = os.pidfd_open(self.keeper_pid)
        store.relieve(self.channel)
        if pidfd >= 0:
            fork.wait_for_end(pidfd, PATIENCE_S)
            reap(pidfd)
            os.close(pidfd)
        guard.settle(has_all=False)

    def abandon(self) -> None:
        """Take nothing: what was handed over is closed, and the keeper carries on.

        A guard made with this handover is to be closed first.
        """
        self.control.close()
        self._close()

    def _close(self) -> None:
        for entry in self.entries.values():
            for fd in entry.fds:
                os.close(fd)
        self.channel.close()


def adopt(path: Path, timeout_s: float = 5.0) -> Handover | None:
    """Ask for what a service's last controller left.

    Args:
        path: of its control socket.
        timeout_s: for the keeper to answer.

    Returns:
        None where nobody is: no socket, or one that nobody answers at.

    Raises:
        ControlError: a controller is there, or does not answer; or the service is
            another user's, is ending, or is being adopted by another.
    """
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        try:
            with peer.connect(path, timeout_s) as sock:
                return _ask(sock, path)
        except (ConnectionResetError, BrokenPipeError):
            # A controller that has just gone: its keeper will answer.
            time.sleep(_LOOK_AGAIN_S)
        except PermissionError:
            cure = "run as root or as the service's own user"
            raise ControlError(f"adopt {path.stem}", "EACCES", cure) from None
        except TimeoutError:
            break
        except NotUnderstood as error:
            act, cure = f"adopt {path.stem}", f"end it: `steer stop {path.stem}`"
            cause = f"what its guard says is not understood: {error.strerror}"
            raise ControlError(act, cause, cure) from None
        except OSError:
            return None
    raise running(path.stem, "it does not answer", path)


def _settings(value: bytes) -> Settings:
    try:
        return msgspec.msgpack.decode(value, type=Settings)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise NotUnderstood(f"settings: {error}") from None


def _ask(sock: socket.socket, path: Path) -> Handover:
    if peer.credentials(sock)[1] not in (0, os.geteuid()):
        # It could name any process for one of its workers, and have us kill that.
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
    """Only a keeper says that it is one."""
    try:
        answer = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError, RecursionError):
        return ControlError(f"adopt {path.stem}", "answer not understood")
    if "keeper" in answer:
        return ControlError(f"adopt {path.stem}", str(answer.get("error")))
    return running(path.stem, f"pid {peer.credentials(sock)[0]}", path)
