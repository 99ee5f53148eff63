"""Asking running services, from short-lived commands."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from steer.control import peer, schema, taken
from steer.control.outcomes import Outcome, outcome_of
from steer.errors import ControlError, NotRunning, Orphaned, Refused

_TIMEOUT_S = 5.0
_REPLACED_S, ASK_AGAIN_S = 10.0, 0.05
"""While a controller is re-executed, somebody else says that it will be back."""
_T = TypeVar("_T")
_DECODER = msgspec.json.Decoder(dict[str, Any])

Progress = Callable[[str, int, int], None]
"""Takes what a service says of how far it is: words, so many done, of so many (0: not counted)."""


class _Progress(msgspec.Struct):
    progress: str
    done: int = 0
    of: int = 0


def ask(
    path: Path,
    command: str,
    timeout_s: float | None = _TIMEOUT_S,
    act: str = "",
    progress: Progress | None = None,
    kept: Connections | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Send one request and wait for its answer.

    Args:
        timeout_s: for the answer; None: as long as it takes.
        act: what it is for, if not the command itself; for errors.
        progress: called with what the service says meanwhile.
        kept: connections to ask by, where there is no harm in asking twice.

    Raises:
        NotRunning: nobody is there.
        Refused: with the exit code and detail of the error that the service met;
            Orphaned: its controller is gone.
        ControlError: no answer within `timeout_s`, or none of steer's.
    """
    act = act or f"{command} {path.stem}"
    limit_s = _TIMEOUT_S if timeout_s is None else timeout_s
    end_s = time.monotonic() + _REPLACED_S
    if progress is not None:
        more["progress"] = True
    if kept is not None:
        more["stay"] = True
    request = msgspec.json.encode({"command": command, **more}) + b"\n"

    def exchange() -> dict[str, Any] | None:
        if kept is not None:
            return kept.exchange(path, request, limit_s)
        return _exchange(path, request, timeout_s, progress)

    with _in_words(act, limit_s):
        answer = exchange()
        while answer and answer.get("again") and time.monotonic() < end_s:
            time.sleep(ASK_AGAIN_S)
            answer = exchange()
    if answer is None:
        cause = "the controller ended before it answered"
        raise NotRunning(act, cause, "see `steer status`")
    if not answer.get("ok"):
        raise _refused(act, answer)
    return answer


@contextmanager
def _in_words(act: str, limit_s: float) -> Iterator[None]:
    """Raises NotRunning, ControlError: as `ask` does."""
    try:
        yield
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise ControlError(act, "answer not understood", "is it steer's?") from None
    except TimeoutError:
        cure = "is it stopped? see ps(1), then kill -CONT or -KILL"
        raise ControlError(act, f"no answer within {limit_s:g} s", cure) from None
    except PermissionError:
        raise ControlError(act, "EACCES", "ask as root or as the service's own user") from None
    except OSError as error:
        if error.errno is None:  # Python's own, of a path that no socket can have
            raise ControlError(act, f"{error}: {taken.PATH_MAX_BYTES} bytes at most") from None
        raise NotRunning(act, "not running", "see `steer status`") from None


def _exchange(
    path: Path, request: bytes, timeout_s: float | None, progress: Progress | None
) -> dict[str, Any] | None:
    limit_s = _TIMEOUT_S if timeout_s is None else timeout_s
    with peer.connect(path, limit_s) as sock:
        sock.settimeout(timeout_s)
        return _asked(sock, request, progress)


def _asked(
    sock: socket.socket, request: bytes, progress: Progress | None = None
) -> dict[str, Any] | None:
    with sock.makefile("rb") as lines:
        sock.sendall(request)
        return _answer(lines, progress)


class Connections:
    """Those that stay open for another request, one to a path. A service may close one at any
    time, as where its controller is replaced: then a new one is made."""

    def __init__(self) -> None:
        self._open: dict[Path, socket.socket] = {}

    def exchange(self, path: Path, request: bytes, timeout_s: float) -> dict[str, Any] | None:
        """Ask, and wait for the answer. Raises as `_exchange`."""
        known = self._open.pop(path, None)
        if known is not None:
            with suppress(ConnectionError):
                if answer := self._ask(path, known, request):
                    return answer
        return self._ask(path, peer.connect(path, timeout_s), request)

    def _ask(self, path: Path, sock: socket.socket, request: bytes) -> dict[str, Any] | None:
        answer = None
        try:
            answer = _asked(sock, request)
        finally:
            if answer is None:
                sock.close()
            else:
                self._open[path] = sock
        return answer

    def listener(self, path: Path) -> int | None:
        """The process that one to `path` is to; None where there is none by now."""
        sock = self._open.get(path)
        if sock is None:
            return None
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        # Nothing is said unasked: what can be read is its end.
        return None if poll.poll(0) else peer.credentials(sock)[0]

    def close(self) -> None:
        for sock in self._open.values():
            sock.close()


def _answer(lines: Iterable[bytes], progress: Progress | None) -> dict[str, Any] | None:
    """The first line that tells no progress."""
    for line in lines:
        answer = _DECODER.decode(line)
        if progress is None or "ok" in answer:
            return answer
        told = msgspec.convert(answer, _Progress)
        progress(told.progress, told.done, told.of)
    return None


def _refused(act: str, answer: Mapping[str, Any]) -> Refused:
    code = answer.get("exit_code")
    kind = Orphaned if "guard" in answer else Refused
    return kind(
        act,
        str(answer.get("error")),
        str(answer.get("detail", "")),
        code if isinstance(code, int) and 0 < code < 256 else None,
    )


def status(path: Path, kept: Connections | None = None) -> schema.Status:
    """What a service says.

    Raises:
        ControlError
    """
    answer = ask(path, "status", kept=kept).get("service")
    service = _understood(answer, schema.Service, f"status {path.stem}")
    return schema.Status(schema=1, services=[service])


def _understood(answer: Any, kind: type[_T], act: str) -> _T:
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError:
        raise ControlError(act, "answer not understood", "is it of this version?") from None


def perform(path: Path, command: str, progress: Progress | None = None, **more: Any) -> Outcome:
    """Have a service carry out a command that has an outcome; return when it is done.

    Args:
        more: what the request carries, see `commands.COMMANDS`.

    Raises:
        NotRunning, ControlError
        Refused: it was not done.
    """
    answer = _ask_at_length(path, command, progress, **more)
    return _understood(answer, outcome_of(command), f"{command} {path.stem}")


def stop(path: Path, quick: bool, progress: Progress | None = None) -> None:
    """Stop a service and wait until its controller is gone.

    Raises:
        NotRunning, ControlError
    """
    from steer.linux import fork

    pidfd = None
    with suppress(OSError), peer.connect(path, _TIMEOUT_S) as sock:
        pidfd = os.pidfd_open(peer.credentials(sock)[0])
    _ask_at_length(path, "stop", progress, quick=quick)
    if pidfd is not None:
        fork.wait_for_end(pidfd, None)
        os.close(pidfd)


def _ask_at_length(
    path: Path, command: str, progress: Progress | None, **more: Any
) -> dict[str, Any]:
    """Ask what may rightly take long, once it is known that somebody listens."""
    # Who answers in place of a dead controller may refuse this and still do that.
    with suppress(Refused):
        ask(path, "status", act=f"{command} {path.stem}")
    return ask(path, command, timeout_s=None, progress=progress, **more)


def listener_at(path: Path, kept: Connections | None = None) -> int | None:
    """The process that answers there, None where nobody does; 0 where we may not ask, or the answer
    takes long: the question then says so."""
    if kept is not None and (known := kept.listener(path)) is not None:
        return known
    try:
        with peer.connect(path, _TIMEOUT_S) as sock:
            return peer.credentials(sock)[0]
    except (PermissionError, TimeoutError):
        return 0
    except OSError:
        return None
