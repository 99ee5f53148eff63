"""Sends requests to running services, for short-lived commands."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from steer.control import peer, schema, taken
from steer.control.outcomes import Outcome, outcome_of
from steer.errors import ControlError, NotRunning, Orphaned, Refused

_TIMEOUT_S = 5.0
_REPLACED_S, ASK_AGAIN_S = 10.0, 0.05
"""While a controller re-executes itself, its guard process answers that it will be back."""
_T = TypeVar("_T")
_DECODER = msgspec.json.Decoder(dict[str, Any])

Progress = Callable[[str, int, int], None]
"""Is called with the progress of a request: words, how many are done, of how many (0: unknown)."""


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
    connections: Connections | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Send one request and wait for its answer.

    Args:
        timeout_s: how long to wait for the answer; None: without limit.
        act: the act that errors name; "": the command.
        progress: is called with the progress of the request.
        connections: open connections to use. Only for requests that may be sent twice.

    Raises:
        NotRunning: the service is not running.
        Refused: the service refused, with the exit code and detail of its error;
            Orphaned: it has no controller.
        ControlError: no answer within `timeout_s`, or one that steer did not send.
    """
    act = act or f"{command} {path.stem}"
    limit_s = _TIMEOUT_S if timeout_s is None else timeout_s
    if progress is not None:
        more["progress"] = True
    if connections is not None:
        more["stay"] = True
    request = msgspec.json.encode({"command": command, **more}) + b"\n"

    def exchange() -> dict[str, Any] | None:
        if connections is not None:
            return connections.exchange(path, request, limit_s)
        return _exchange(path, request, timeout_s, progress)

    with _in_words(act, limit_s):
        answer = _until_answered(exchange)
    if answer is None:
        cause = "the controller ended before it answered"
        raise NotRunning(act, cause, "see `steer status`")
    if not answer.get("ok"):
        raise _refused(act, answer)
    return answer


def _until_answered(exchange: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Repeat an exchange while the answer is to ask again."""
    end_s = time.monotonic() + _REPLACED_S
    answer = exchange()
    while answer and answer.get("again") and time.monotonic() < end_s:
        time.sleep(ASK_AGAIN_S)
        answer = exchange()
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
        if error.errno is None:  # Python itself refuses a path that is too long
            raise ControlError(act, f"{error}: {taken.PATH_MAX_BYTES} bytes at most") from None
        raise NotRunning(act, "not running", "see `steer status`") from None


def _exchange(
    path: Path, request: bytes, timeout_s: float | None, progress: Progress | None
) -> dict[str, Any] | None:
    limit_s = _TIMEOUT_S if timeout_s is None else timeout_s
    with peer.connect(path, limit_s) as sock:
        sock.settimeout(timeout_s)
        return _send_request(sock, request, progress)


def _send_request(
    sock: socket.socket, request: bytes, progress: Progress | None = None
) -> dict[str, Any] | None:
    with sock.makefile("rb") as lines:
        sock.sendall(request)
        return _answer(lines, progress)


class Connections:
    """Connections that stay open for more requests, one for each path. A service may close one at
    any time, for example if its controller is replaced: then a new one is made."""

    def __init__(self) -> None:
        self._open: dict[Path, socket.socket] = {}

    def exchange(self, path: Path, request: bytes, timeout_s: float) -> dict[str, Any] | None:
        """Send a request and wait for the answer. Raises as `_exchange`."""
        known = self._open.pop(path, None)
        if known is not None:
            with suppress(ConnectionError):
                if answer := self._exchange_on(path, known, request):
                    return answer
        return self._exchange_on(path, peer.connect(path, timeout_s), request)

    def _exchange_on(
        self, path: Path, sock: socket.socket, request: bytes
    ) -> dict[str, Any] | None:
        answer = None
        try:
            answer = _send_request(sock, request)
        finally:
            if answer is None:
                sock.close()
            else:
                self._open[path] = sock
        return answer

    def listener(self, path: Path) -> int | None:
        """The process at the other end of the open connection to `path`; None: there is none."""
        sock = self._open.get(path)
        if sock is None:
            return None
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        # A service sends nothing without a request, so anything to read is the end of the
        # connection.
        return None if poll.poll(0) else peer.credentials(sock)[0]

    def close(self) -> None:
        for sock in self._open.values():
            sock.close()


def _answer(lines: Iterable[bytes], progress: Progress | None) -> dict[str, Any] | None:
    """The first line that is not progress."""
    for line in lines:
        answer = _DECODER.decode(line)
        if progress is None or "ok" in answer:
            return answer
        report = msgspec.convert(answer, _Progress)
        progress(report.progress, report.done, report.of)
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


def status(path: Path, connections: Connections | None = None) -> schema.Status:
    """The status of a service.

    Raises:
        ControlError
    """
    answer = ask(path, "status", connections=connections).get("service")
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
        more: the arguments of the request, see `commands.COMMANDS`.

    Raises:
        NotRunning, ControlError
        Refused: the service did not do it.
    """
    answer = _ask_at_length(path, command, progress, **more)
    return _understood(answer, outcome_of(command), f"{command} {path.stem}")


def stop(path: Path, quick: bool, progress: Progress | None = None) -> None:
    """Stop a service and wait until its controller is gone. If the controller runs in a program
    that called `steer.run`, wait until its control socket is gone, as the program may go on.

    Raises:
        NotRunning, ControlError
    """
    from steer.linux import fork

    with ExitStack() as undo:
        pidfd, before = None, _inode(path)
        with suppress(OSError), peer.connect(path, _TIMEOUT_S) as sock:
            pidfd = os.pidfd_open(peer.credentials(sock)[0])
            undo.callback(os.close, pidfd)
        answer = _ask_at_length(path, "stop", progress, quick=quick)
        if pidfd is None:
            return
        look_s = ASK_AGAIN_S if answer.get("is_in_program") else None
        while not fork.wait_for_end(pidfd, look_s) and _inode(path) == before:
            pass


def _inode(path: Path) -> int | None:
    with suppress(OSError):
        return path.stat().st_ino
    return None


def _ask_at_length(
    path: Path, command: str, progress: Progress | None, **more: Any
) -> dict[str, Any]:
    """Send a request without a timeout, after a quick one has shown that somebody answers."""
    # A guard process refuses to report the status, but may carry out the request.
    with suppress(Refused):
        ask(path, "status", act=f"{command} {path.stem}")
    return ask(path, command, timeout_s=None, progress=progress, **more)


def listener_at(path: Path, connections: Connections | None = None) -> int | None:
    """The process that answers at a control socket; None: nobody does; 0: we may not connect, or
    the answer takes long. A request will then fail with that reason."""
    if connections is not None and (known := connections.listener(path)) is not None:
        return known
    try:
        with peer.connect(path, _TIMEOUT_S) as sock:
            return peer.credentials(sock)[0]
    except (PermissionError, TimeoutError):
        return 0
    except OSError:
        return None
