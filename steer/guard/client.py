"""What a controller leaves in other hands, so that another can go on where it ended.

All that must outlive the controller is kept twice: by itself, and by its keeper (see
`keeper`), a small process forked from it, as systemd keeps descriptors for services
(FDSTORE=1 of sd_notify(3)). When the controller goes, however it does, the keeper hands
everything to the next one that asks, or after a time ends the workers.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from steer.control import claim, peer
from steer.control.protocol import REQUEST_MAX_BYTES
from steer.control.record import Record, Worker
from steer.control.taken import running
from steer.errors import ControlError
from steer.guard import standby, store
from steer.guard.channel import SAME, Channel, Frame, NotUnderstood, receive
from steer.guard.store import PATIENCE_S, Settings, Traces
from steer.linux import fork

_LOOK_AGAIN_S = 0.01
_TIES = 3
"""Descriptors of a worker's that are no sockets of its; see `Entry`."""


class Entry(msgspec.Struct, frozen=True):
    """Something kept.

    Args:
        value: what the controller wants to know of it again, up to some megabytes. A
            worker's is empty until it is complete: should the controller end before, so does
            the worker.
        fds: descriptors. Of a worker: its pidfd, the read end of its standard error, its
            channel (see `lifeline`), then any others; none once its first process has ended.
        group: of a worker: its process group; 0 once nobody is left in it. Else 0.
        stop_signal: of a worker: what tells it to finish.
    """

    value: bytes
    fds: tuple[int, ...] = ()
    group: int = 0
    stop_signal: int = signal.SIGTERM


_NOTHING = Entry(b"")


def _sockets(entry: Entry) -> Sequence[int]:
    return entry.fds[_TIES:] if entry.group else entry.fds


class GuardClient:
    """The controller's side. There is no keeper before `start`.

    Entries' descriptors stay the caller's, and open for as long as the entry is here.
    Should the keeper be killed nothing here fails: what changes is remembered, and
    `revive` starts another keeper with all of it.

    Args:
        control: the listening control socket. The keeper has a duplicate, so connections
            wait while no controller is there.
        say: how the keeper logs, in its own process; must not wait.
        handover: of the service that is adopted. Until `handover.taken(guard)` the new
            keeper steps back should we end.

    Attributes:
        entries: what is kept, by key.
        pid: of the keeper.
    """

    def __init__(
        self,
        control: socket.socket,
        settings: Settings,
        say: standby.Say = lambda *_: None,
        handover: Handover | None = None,
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self._workers: dict[str, Worker] = {}
        self._together = self._wait_together = False
        self._put_together: dict[str, Entry] = {}
        self._updated_together: dict[str, bytes] = {}
        self._control = control
        self._settings = settings
        self._inode = claim.inode(Path(settings.control))
        self._say = say
        self._predecessor = handover.channel.sock if handover is not None else None
        self._channel: Channel | None = None
        self._pidfd = -1
        self._record = Record(Path(settings.control))
        self._unrecorded: list[Worker] = []

    def start(self) -> None:
        """Fork the keeper, with all entries there are by now.

        Raises:
            OSError: no more processes, or no more files; see `process.fork_error`.
        """
        self._fork()
        for key, entry in self.entries.items():
            self._send(key, entry)

    def _fork(self) -> None:
        traces, predecessor = Traces(os.getpid(), self._inode), self._predecessor
        ours, theirs = socket.socketpair()

        def keep() -> int:
            return standby.main(
                traces, theirs, self._control, self._settings, self._say, predecessor
            )

        try:
            self.pid, self._pidfd = fork.fork(keep, standby.IGNORED)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.settimeout(PATIENCE_S)
        self._channel = Channel(ours)

    def fileno(self) -> int:
        """A pidfd of the keeper, readable once that has ended. Another after `revive`."""
        return self._pidfd

    @property
    def has_ended(self) -> bool:
        """Whether `fileno()` is readable."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def alive(self) -> bool:
        """Whether the keeper takes what it is told, as far as we know."""
        return self._channel is not None

    def expect_back(self) -> bool:
        """We end now, but another that is to adopt all is on its way: who asks meanwhile is
        to ask again. Whether the keeper is there."""
        self._tell(Frame("expect-back", wait=True))
        return self.alive

    def configure(self, settings: Settings) -> None:
        """From now on; the name and the control socket stay."""
        self._settings = settings
        self._tell(Frame("configure", value=msgspec.msgpack.encode(settings)))

    def give_up(self) -> None:
        """Should we end now, nobody is to adopt what is left: the workers end, too."""
        self.configure(msgspec.structs.replace(self._settings, adopt_timeout_s=0.0))

    def put(
        self,
        key: str,
        value: bytes,
        fds: Sequence[int] = (),
        group: int = 0,
        stop_signal: int = signal.SIGTERM,
    ) -> None:
        """Keep an entry, or another in place of that of the same key, at once.

        An entry that is the same in all is not sent again, and descriptors of the same
        numbers are taken for the same: drop an entry before closing any of its. Where an
        entry has some no more, the keeper has closed those when this returns, or `together` does.

        Args:
            group: not 0 makes it a worker's; see `Entry`.

        Raises:
            OSError: EBADF, a descriptor is not open.
        """
        assert not group or len(fds) != 1, "a worker has a pidfd and a standard error, or neither"
        old, new = self.entries.get(key), Entry(value, tuple(fds), group, stop_signal)
        if new == old:
            return
        if group and (old is None or old.stop_signal != stop_signal):
            self._workers[key] = group, stop_signal
            self._unrecorded.append((group, stop_signal))
            if not self._together:
                self._write_down()
        has_others = old is None or old.fds != new.fds
        has_less = old is not None and old.fds != new.fds[: len(old.fds)]
        if has_others and self._together:
            self._updated_together.pop(key, None)
            self._put_together[key] = new
            self._wait_together |= has_less
        elif has_others:
            self._send(key, new, wait=has_less)
        elif self._together and old and new == replace(old, value=value):
            self._updated_together[key] = value
        else:
            self._tell(Frame("put", key, value, SAME, group, stop_signal=stop_signal))
        self.entries[key] = new

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is put meanwhile, and is new, or has other descriptors or only another value, is
        sent at the end. It costs two messages and at most one wait; of all that has only another
        value the keeper has all or nothing.

        Raises:
            OSError: as `put`.
        """
        self._together = True
        try:
            yield
        finally:
            self._together = False
            self._send_together()
            self._write_down()

    def _send_together(self) -> None:
        new, self._put_together = self._put_together, {}
        values, self._updated_together = self._updated_together, {}
        wait, self._wait_together = self._wait_together, False
        if new:
            fds = [fd for entry in new.values() for fd in entry.fds]
            frames = [_frame(key, entry) for key, entry in new.items()]
            frames[-1].wait = wait
            self._tell(*frames, fds=fds)
        if values:
            self._tell(Frame("update", value=msgspec.msgpack.encode(values)))

    def _write_down(self) -> None:
        if self._unrecorded:
            self._record.add(self._unrecorded, self._workers.values())
            self._unrecorded = []

    def update(self, key: str, value: bytes) -> None:
        """Another value for an entry there is. Raises KeyError."""
        entry = self.entries[key]
        self.put(key, value, entry.fds, entry.group, entry.stop_signal)

    def drop(self, *keys: str) -> None:
        """Forget entries, if there; when this returns the keeper has closed their sockets. What
        ties a worker to us (see `Entry`) it closes soon: nobody has to wait for that."""
        dropped = {key: self.entries.pop(key) for key in keys if key in self.entries}
        for key in dropped:
            self._workers.pop(key, None)
        if dropped:
            wait = any(map(_sockets, dropped.values()))
            self._tell(Frame("drop", value=msgspec.msgpack.encode(list(dropped)), wait=wait))

    def let_go(self, *keys: str) -> None:
        """Of workers, if there, keep only what ties them to us (see `Entry`); when this returns
        the keeper has closed their sockets."""
        have = {key: self.entries[key] for key in keys if _sockets(self.entries.get(key, _NOTHING))}
        for key, entry in have.items():
            self.entries[key] = replace(entry, fds=entry.fds[:_TIES])
        if have:
            self._tell(Frame("let-go", value=msgspec.msgpack.encode(list(have)), wait=True))

    def reopen(self) -> None:
        """The keeper's standard output and error become what ours are now."""
        self._tell(Frame("reopen", fds=2), fds=(1, 2))

    def close(self) -> None:
        """Nothing is left to guard: the keeper ends, and ends nobody."""
        if self._pidfd < 0:
            return
        self._tell(Frame("close"))
        if not fork.wait_for_end(self._pidfd, PATIENCE_S):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._take_leave()
        os.close(self._pidfd)

    def revive(self) -> None:
        """Start another keeper in place of one that was killed, with all entries.

        To be called when `fileno()` is readable, after it was taken out of any loop.

        Raises:
            OSError: no more processes, or no more files; `alive` is then false, and this
                may be tried again.
        """
        self._lose()
        old = self._pidfd
        self.start()
        os.close(old)

    def relocate(self, settings: Settings) -> None:
        """The control socket is another, under the same descriptor: so is the keeper, which
        has its own copy. To be called after `fileno()` was taken out of any loop.

        Raises:
            OSError: as `revive`.
        """
        self._settings = settings
        control = Path(settings.control)
        self._inode = claim.inode(control)
        self._record = Record(control)
        self.renew_record()
        self.revive()

    def renew_record(self) -> None:
        """Have a file that tells of the workers, should both of us be killed. It may have been
        removed, with its directory or by who cleans directories."""
        if not self._record.is_there:
            self._record.renew(self._workers.values())

    def settle(self, has_all: bool) -> None:
        """Before (`has_all`) and after the keeper we adopted from has been relieved."""
        self._tell(Frame("has-all" if has_all else "alone", wait=True))
        if not has_all:
            self._predecessor = None

    def _send(self, key: str, entry: Entry, wait: bool = False) -> None:
        self._tell(_frame(key, entry, wait), fds=entry.fds)

    def _tell(self, *frames: Frame, fds: Sequence[int] = ()) -> None:
        self._send_together()  # the keeper does all in order
        if self._channel is None:
            return
        try:
            self._channel.send_all(frames, fds)
            if frames[-1].wait and self._channel.receive() is None:
                self._lose()
        except OSError as error:
            self._lose()
            if error.errno == errno.EBADF:
                raise

    def _lose(self) -> None:
        """Whatever it is at: it may have been stopped, and must not wake to an end of the
        channel that is none of the controller."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._take_leave()

    def _take_leave(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        _reap(self._pidfd)


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

    def taken(self, guard: GuardClient) -> None:
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
            _reap(pidfd)
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


def _frame(key: str, entry: Entry, wait: bool = False) -> Frame:
    count, number = len(entry.fds), entry.stop_signal
    return Frame("put", key, entry.value, count, entry.group, wait, number)


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


def _reap(pidfd: int) -> None:
    """If it is our child, and unless that was done before."""
    with suppress(ChildProcessError):
        if ended := os.waitid(os.P_PIDFD, pidfd, os.WEXITED):
            fork.is_done(ended.si_pid)
