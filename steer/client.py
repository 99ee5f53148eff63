"""Asking running services, from short-lived commands."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from steer import report
from steer.errors import ControlError, NotRunning, Orphaned, Refused
from steer.kernel import rundir, services
from steer.kernel.title import Title
from steer.values import plural, several, shown

if TYPE_CHECKING:
    from steer.kernel.abandoned import Abandoned

FINISH_S, QUICK_S = 30.0, 1.0
"""What workers get to finish that nobody looks after any more."""
_TIMEOUT_S = 5.0
_REPLACED_S, _ASK_AGAIN_S = 10.0, 0.05
"""While a controller executes itself anew, somebody else says that it will be back."""
_T = TypeVar("_T")
_DECODER = msgspec.json.Decoder(dict[str, Any])

Progress = Callable[[str, int, int], None]
"""Takes what a service says of how far it is: words, so many done, of so many (0: not counted)."""


class Reloaded(msgspec.Struct):
    generation: int
    workers: int
    took_s: float

    def __str__(self) -> str:
        return f"generation {self.generation}, {_workers(self.workers)}, {self.took_s:.1f} s"


class Scaled(msgspec.Struct):
    workers: int
    took_s: float

    def __str__(self) -> str:
        return f"{_workers(self.workers)}, {self.took_s:.1f} s"


class Drained(msgspec.Struct):
    """Also what is drained no longer."""

    slot: int

    def __str__(self) -> str:
        return f"slot {self.slot}"


class Restarted(msgspec.Struct):
    slot: int
    new_slot: int
    took_s: float

    def __str__(self) -> str:
        return f"slot {self.new_slot} in place of slot {self.slot}, {self.took_s:.1f} s"


class Swapped(msgspec.Struct):
    policy: str
    backend: str
    took_s: float

    def __str__(self) -> str:
        return f"{self.policy} on {self.backend}, {1000 * self.took_s:.1f} ms"


Outcome = Reloaded | Scaled | Drained | Restarted | Swapped
"""What was done, in the words of the answer; as text, what to tell of it."""

_OUTCOMES: Mapping[str, type[Outcome]] = {
    "reload": Reloaded,
    "scale": Scaled,
    "drain": Drained,
    "undrain": Drained,
    "restart": Restarted,
    "policy": Swapped,
}


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
            time.sleep(_ASK_AGAIN_S)
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
            raise ControlError(act, f"{error}: {rundir.PATH_MAX_BYTES} bytes at most") from None
        raise NotRunning(act, "not running", "see `steer status`") from None


def _exchange(
    path: Path, request: bytes, timeout_s: float | None, progress: Progress | None
) -> dict[str, Any] | None:
    limit_s = _TIMEOUT_S if timeout_s is None else timeout_s
    with rundir.connect(path, limit_s) as sock:
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
        return self._ask(path, rundir.connect(path, timeout_s), request)

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
        return None if poll.poll(0) else rundir.peer(sock)[0]

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
    kind = Orphaned if "keeper" in answer else Refused
    return kind(
        act,
        str(answer.get("error")),
        str(answer.get("detail", "")),
        code if isinstance(code, int) and 0 < code < 256 else None,
    )


def locate(
    name: str | None,
    control_socket: str | None,
    environment: Mapping[str, str],
    kept: Connections | None = None,
) -> Path:
    """The control socket of a service; NAME may be left out where one runs.

    Raises:
        NotRunning: there is none, or of that name.
        ControlError: there are several, and no name was given.
    """
    if control_socket:
        return Path(control_socket)
    for path in rundir.find(environment, name):
        if path.stem == name and _listener(path, kept) is not None:
            return path
    there = _look(environment, kept).running
    named = [each for each in there if name is None or each.is_named(name)]
    if not named:
        raise _not_found(name, there, environment)
    if len(named) > 1:
        if name is None:
            cause, cure = f"several are running: {_names(named)}", "name one"
        else:
            cause = "several of that name are running"
            cure = " or ".join(f"--control-socket {each.path}" for each in named)
        raise ControlError("find the service", cause, cure)
    return named[0].path


class _Found(msgspec.Struct, frozen=True):
    """A service at whose control socket somebody answers.

    Args:
        shown: what its process shows, where that is how it was found.
    """

    path: Path
    shown: Title | None = None

    @property
    def name(self) -> str:
        return self.shown.name if self.shown else self.path.stem

    def is_named(self, name: str) -> bool:
        return self.shown.may_name(name) if self.shown else self.path.stem == name


def _not_found(
    name: str | None, there: Sequence[_Found], environment: Mapping[str, str]
) -> NotRunning:
    if not there:
        _tell_left(name, environment)
    for each in services.find(environment):
        if each.is_gone and (name is None or each.title.may_name(name)):
            return NotRunning(f"find service {shown(name or each.title.name)}", *_of_lost(each))
    others = of_others(environment)
    if name is not None:
        words = f"running: {_names(there)}" if there else "no service is running"
        if others:
            words += f"; of other users: {', '.join(others)}"
        return NotRunning(f"find service {shown(name)}", "not running", words)
    if others:
        return NotRunning("find a service", *none_of_ours(others))
    return NotRunning("find a service", "none is running", "start one with `steer run`")


def _of_lost(service: services.Running) -> tuple[str, str]:
    """Cause and cure where a service cannot be asked."""
    cause = f"its control socket {service.path} was removed, and is not made again"
    return cause, f"is pid {service.pid} stopped? see ps(1) and its log"


def _names(found: Iterable[_Found]) -> str:
    return ", ".join(each.name for each in found)


def left(
    environment: Mapping[str, str], name: str | None = None, control_socket: str | None = None
) -> list[Abandoned]:
    """What is left of services, or of the one of that name or control socket, whose controller
    and guard were killed while workers go on."""
    paths = [Path(control_socket)] if control_socket else rundir.find(environment, name)
    named = (path for path in paths if name is None or control_socket or path.stem == name)
    dead = [path for path in named if _listener(path) is None]
    found = _left_at(dead, environment)
    if control_socket:
        return [each for each in found if each.control is not None]
    return [each for each in found if name in (None, each.name)]


def _left_at(dead: Sequence[Path], environment: Mapping[str, str]) -> list[Abandoned]:
    """The same, wherever they were.

    Args:
        dead: control sockets at which nobody answers.
    """
    members = services.unattended(environment)
    if not (dead or members):
        return []
    from steer.kernel import abandoned

    return abandoned.find(dead, members)


def end_left(what: Abandoned, quick: bool, directory: bool) -> None:
    """End the workers of a service whose controller and guard were killed.

    Args:
        directory: whether that of the control socket may go, too, if it is empty then.

    Raises:
        ControlError: some are still there.
    """
    from steer.kernel import abandoned

    if there := abandoned.end(what, QUICK_S if quick else FINISH_S, directory):
        pids = several("pid", there)
        raise ControlError(f"stop {what.name}", f"{pids} cannot be ended", "see ps(1)")


def _tell_left(name: str | None, environment: Mapping[str, str]) -> None:
    """Raises NotRunning: that is what there is of the service."""
    for each in left(environment, name):
        raise NotRunning(f"find service {shown(each.name)}", *_of_left(each))


def _of_left(what: Abandoned) -> tuple[str, str]:
    """What there is of such a service, and what can be done."""
    count = plural(len(what.workers), "worker")
    pids = several("pid", (pid for pid, _ in what.workers))
    state = f"its controller and guard were killed, and {count} ({pids}) go on, unsteered"
    return state, f"`steer stop {what.name}` ends them, and so does `steer run`"


def status(path: Path, kept: Connections | None = None) -> report.Status:
    """What a service says.

    Raises:
        ControlError
    """
    answer = ask(path, "status", kept=kept).get("service")
    service = _understood(answer, report.Service, f"status {path.stem}")
    return report.Status(schema=1, services=[service])


def status_of_all(environment: Mapping[str, str], kept: Connections | None = None) -> report.Status:
    """The same of every service that runs, and which go on without a controller.

    Raises:
        ControlError
    """
    seen = _look(environment, kept)
    found = report.Status(schema=1, services=[])
    for each in seen.running:
        try:
            found.services += status(each.path, kept).services
        except Orphaned as error:
            found.orphaned.append(report.Orphan(each.path.stem, error.cause))
        except NotRunning:
            pass  # it has ended since
    for left_over in _left_at(seen.dead, environment):
        found.orphaned.append(report.Orphan(left_over.name, "; ".join(_of_left(left_over))))
    for lost in seen.lost:
        found.orphaned.append(report.Orphan(lost.title.name, "; ".join(_of_lost(lost))))
    found.others = len(of_others(environment))
    return found


def _understood(answer: Any, kind: type[_T], act: str) -> _T:
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError:
        raise ControlError(act, "answer not understood", "is it of this version?") from None


class _Seen(msgspec.Struct):
    """Of the services of this user.

    Args:
        running: those at whose control sockets somebody answers whom we may ask.
        dead: control sockets in the usual places at which nobody answers.
        lost: those whose control sockets were removed.
    """

    running: list[_Found]
    dead: list[Path]
    lost: list[services.Running]


def _look(environment: Mapping[str, str], kept: Connections | None = None) -> _Seen:
    """In the usual places, then for processes: they listen elsewhere, or make a socket again
    that was removed."""
    listeners = {path: _listener(path, kept) for path in rundir.find(environment)}
    usual = [
        path for path, pid in listeners.items() if pid is not None and os.access(path, os.W_OK)
    ]
    by_process = _by_process(environment, {pid for path in usual if (pid := listeners[path])})
    elsewhere = [_Found(each.path, each.title) for each in by_process if each.path not in usual]
    return _Seen(
        [*map(_Found, usual), *(each for each in elsewhere if _may_ask(each.path, kept))],
        [path for path, pid in listeners.items() if pid is None],
        [each for each in by_process if each.is_gone],
    )


def _by_process(environment: Mapping[str, str], known: set[int]) -> list[services.Running]:
    end_s = time.monotonic() + rundir.RENEWED_S
    while True:
        found = services.find(environment, known)
        if time.monotonic() >= end_s or not any(each.is_gone for each in found):
            return found
        time.sleep(_ASK_AGAIN_S)


def _may_ask(path: Path, kept: Connections | None) -> bool:
    return os.access(path, os.W_OK) and _listener(path, kept) is not None


def of_others(environment: Mapping[str, str]) -> list[str]:
    """The names of services that run and that we may not ask."""
    return [path.stem for path in rundir.of_others(environment)]


def none_of_ours(others: Sequence[str]) -> tuple[str, str]:
    """Cause and cure where only these run."""
    count = f"{plural(len(others), 'service')} of other users"
    user = "its user" if len(others) == 1 else "their users"
    return f"{count}: {', '.join(others)}; none of yours", f"ask as root or as {user}"


def perform(path: Path, command: str, progress: Progress | None = None, **more: Any) -> Outcome:
    """Have a service reload, scale, drain, undrain, restart or change its policy; return when
    it is done.

    Args:
        more: of the request: `workers`, `slot`, or `policy`, `params` and `weights`.

    Raises:
        NotRunning, ControlError
        Refused: it was not done.
    """
    answer = _ask_at_length(path, command, progress, **more)
    return _understood(answer, _OUTCOMES[command], f"{command} {path.stem}")


def stop(path: Path, quick: bool, progress: Progress | None = None) -> None:
    """Stop a service and wait until its controller is gone.

    Raises:
        NotRunning, ControlError
    """
    from steer.kernel import process

    pidfd = None
    with suppress(OSError), rundir.connect(path, _TIMEOUT_S) as sock:
        pidfd = os.pidfd_open(rundir.peer(sock)[0])
    _ask_at_length(path, "stop", progress, quick=quick)
    if pidfd is not None:
        process.wait_for_end(pidfd, None)
        os.close(pidfd)


def _ask_at_length(
    path: Path, command: str, progress: Progress | None, **more: Any
) -> dict[str, Any]:
    """Ask what may rightly take long, once it is known that somebody listens."""
    # Who answers in place of a dead controller may refuse this and still do that.
    with suppress(Refused):
        ask(path, "status", act=f"{command} {path.stem}")
    return ask(path, command, timeout_s=None, progress=progress, **more)


def _listener(path: Path, kept: Connections | None = None) -> int | None:
    """The process that answers there, None where nobody does; 0 where we may not ask, or the answer
    takes long: the question then says so."""
    if kept is not None and (known := kept.listener(path)) is not None:
        return known
    try:
        with rundir.connect(path, _TIMEOUT_S) as sock:
            return rundir.peer(sock)[0]
    except (PermissionError, TimeoutError):
        return 0
    except OSError:
        return None


def _workers(count: int) -> str:
    return plural(count, "worker")
