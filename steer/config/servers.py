"""What is known of servers that steer may run as workers, by the name of their program. Pure."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from signal import Signals

import msgspec

from steer.values import Invalid, did_you_mean


class Server(msgspec.Struct, frozen=True):
    """A server that differs from what steer does by default.

    Args:
        stop_signal: on which it finishes the requests it has and ends. SIGTERM ends it at once.
        source: where its documentation says so.
    """

    stop_signal: Signals
    source: str


SERVERS: Mapping[str, Server] = {
    "nginx": Server(signal.SIGQUIT, "https://nginx.org/en/docs/control.html"),
    "openresty": Server(signal.SIGQUIT, "https://nginx.org/en/docs/control.html"),
    "angie": Server(signal.SIGQUIT, "https://en.angie.software/angie/docs/configuration/control/"),
    "haproxy": Server(signal.SIGUSR1, "HAProxy Management Guide, 4. Stopping and restarting"),
    "apache2": Server(signal.SIGWINCH, "https://httpd.apache.org/docs/2.4/stopping.html"),
    "httpd": Server(signal.SIGWINCH, "https://httpd.apache.org/docs/2.4/stopping.html"),
    "lighttpd": Server(signal.SIGINT, "doc/initscripts.txt of lighttpd"),
    "php-fpm": Server(signal.SIGQUIT, "php-fpm(8)"),
    "unicorn": Server(signal.SIGQUIT, "SIGNALS of unicorn"),
}
"""Left out: uWSGI, which finishes gracefully on no signal unless it is configured to
(hook-master-start), and all that do so on SIGTERM, as gunicorn, uvicorn, hypercorn and granian."""

FORWARD = ("tini", "tini-static", "docker-init", "dumb-init", "catatonit")
"""They send each signal that they get on to the child they started. Others end on it, as shells
do, or send on some only, as sudo and timeout."""


class Shown(msgspec.Struct, frozen=True):
    """What a process shows of itself.

    Args:
        arguments: its command line, or the title that it has written over it.
        name: as in ps(1).
    """

    arguments: Sequence[str]
    name: str = ""


class Finish(msgspec.Struct, frozen=True):
    """How a worker is told to finish.

    Args:
        first: sent to its first process.
        others: sent to those that are left once that has ended.
        why: in words, where it was found out by what runs; else "".
    """

    first: Signals
    others: Signals
    why: str = ""


BY_DEFAULT = Finish(signal.SIGTERM, signal.SIGTERM)

SAY_READY_EARLY = ("gunicorn",)
"""They send READY=1 before their own workers have loaded the application."""

_WAITRESS = (
    "its command takes no socket from others: give steer a function that calls "
    "waitress.serve(APPLICATION, sockets=worker.sockets), and raises SystemExit on SIGTERM"
)
HAND_OVER: Mapping[str, str] = {
    "uvicorn": "add to its command: --fd {fd}",
    "hypercorn": "give it --bind fd://{fd}, and no other --bind",
    "daphne": "add to its command: --fd {fd}",
    "gunicorn": "leave out reuse_port, with which it ignores LISTEN_FDS",
    "granian": "it takes no socket from others: run another server",
    "waitress-serve": _WAITRESS,
    "waitress": _WAITRESS,
    "nginx": "give steer -e 'NGINX=3;', and nginx the same address to listen on",
    "haproxy": "write in its configuration: bind fd@3",
}
"""What has each server listen on the socket that it is given."""
WRAPPED: Mapping[str, str] = {
    "gunicorn": "LISTEN_FDS counts only for the process that steer starts: have that exec it, or "
    "add to its command: --bind fd://{fd}",
}
"""The same where another program starts the server as its child."""
_HAND_OVER = "have it take descriptor 3, {fd} in its arguments; see LISTEN_FDS of sd_listen_fds(3)"
_HAND_OVER_CALLABLE = "have it accept from worker.sockets"

_IN_USE = ("address already in use", "eaddrinuse")
"""What servers write when bind(2) fails with it: of strerror(3), and of libuv."""
FOREGROUND: Mapping[str, str] = {
    "nginx": "add to its command: -g 'daemon off;'",
    "haproxy": "add to its command: -db",
    "gunicorn": "leave out --daemon",
}
"""What has each server not end its first process, and serve on in another."""
_FOREGROUND = "have it stay in the foreground, as long as it serves"
_FOREGROUND_CALLABLE = "have it serve until worker.stopping; see examples/"

ALLOWED = "the name of a signal on which a server ends: QUIT or SIGQUIT, TERM, INT, USR1, ..."
_NO_END: Mapping[Signals, str] = {
    **dict.fromkeys((signal.SIGKILL, signal.SIGSTOP), "no process can act on it"),
    **dict.fromkeys((signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU), "it stops a process"),
    **dict.fromkeys((signal.SIGCHLD, signal.SIGURG, signal.SIGCONT), "it ends no process"),
}
"""Why these are refused. SIGWINCH is not, which ends no process either, as Apache ends on it."""


def stop_signal(command: Sequence[str]) -> Signals:
    """What tells a worker to finish, if nothing else is asked for.

    Args:
        command: the worker's command line; empty for a Python callable.
    """
    name = known(command)
    return SERVERS[name].stop_signal if name else signal.SIGTERM


def known(arguments: Sequence[str], name: str = "") -> str | None:
    """Which of `SERVERS` a program is; None if it is none of them.

    Args:
        arguments: its command line, or a title in its place ("nginx: master process nginx").
        name: as in ps(1).
    """
    shown = arguments[0].partition(": ")[0] if arguments else ""
    programs = [each.rpartition("/")[2] for each in (shown, shown.partition(" ")[0], name)]
    # Distributions add versions: php-fpm8.2.
    plain = [each.rstrip("0123456789.").rstrip("-") for each in programs]
    return next((each for each in (*programs, *plain) if each in SERVERS), None)


def finish(line: Iterable[Shown]) -> Finish:
    """How a worker is told to finish whose command is no known server.

    Args:
        line: its first process, then the only child of each; read as far as needed.
    """
    wrappers: list[str] = []
    for process in line:
        server = known(process.arguments, process.name)
        if server is not None:
            return _finish(server, wrappers)
        wrappers.append(process.name)
    return BY_DEFAULT


def _finish(server: str, wrappers: Sequence[str]) -> Finish:
    number = SERVERS[server].stop_signal
    why = f"{number.name}, as they run {server}, which ends at once on SIGTERM"
    ends = next((each for each in wrappers if each not in FORWARD), None)
    if ends is None:
        return Finish(number, number, why)
    why += f"; {ends}, which starts it, by SIGTERM before"
    return Finish(signal.SIGTERM, number, why)


def says_ready_early(arguments: Sequence[str]) -> bool:
    """Whether READY=1 of this process does not mean that it can serve.

    Args:
        arguments: its command line: the program, or Python with a script or `-m`; or what the
            program shows in its place ("gunicorn: master [app]").
    """
    return not set(SAY_READY_EARLY).isdisjoint(_names(arguments))


def how_to_hand_over(
    command: Sequence[str], first: Sequence[str] = (), arguments: Sequence[str] = ()
) -> str:
    """What to change, that a server listens on the socket it is given.

    Args:
        command: the worker's command line; empty for a Python callable.
        first: that of its first process now, as `says_ready_early` has it.
        arguments: that of its process that listens.
    """
    if not command:
        return _HAND_OVER_CALLABLE
    names = (*_names(command), *_names(arguments))
    is_wrapped = _names(first) != _names(arguments)
    cures = {**HAND_OVER, **WRAPPED} if is_wrapped else HAND_OVER
    return next((cures[name] for name in names if name in cures), _HAND_OVER)


def why_it_ended(command: Sequence[str], status: int | None, words: str) -> tuple[str, str]:
    """Why a worker ended before it served, and what to change; twice "" if that is not known.

    Args:
        command: the worker's command line; empty for a Python callable.
        status: its exit status.
        words: the last lines that it wrote to standard error.
    """
    if any(each in words.lower() for each in _IN_USE):
        at_fault = "it binds an address itself, which is in use"
        # Of one that was given its sockets as it expects them this cannot be.
        return at_fault, how_to_hand_over(command, first=command)
    if status != 0:
        return "", ""
    if not command:
        return "the callable returned", _FOREGROUND_CALLABLE
    names = _names(command)
    cure = next((FOREGROUND[name] for name in names if name in FOREGROUND), _FOREGROUND)
    return "its first process ended as if all was done", cure


def _names(arguments: Sequence[str]) -> list[str]:
    """What may be the name of the program."""
    return [each.rpartition("/")[2].partition(":")[0] for each in arguments[:3]]


def note(command: Sequence[str]) -> str:
    """What is done differently for a command's program, in words; "" if nothing is."""
    number = stop_signal(command)
    if number == signal.SIGTERM:
        return ""
    return f"workers are told to finish by {number.name}, as {command[0]} ends at once on SIGTERM"


def read_signal(name: str) -> Signals:
    """A signal by its name, with or without SIG.

    Raises:
        Invalid: there is none of that name, or no server ends on it.
    """
    names = {each.removeprefix("SIG"): Signals[each] for each in Signals.__members__}
    short = name.strip().upper().removeprefix("SIG")
    if short not in names:
        likely = [each for each, found in names.items() if found not in _NO_END]
        raise Invalid("no such signal", did_you_mean(short, likely))
    if names[short] in _NO_END:
        raise Invalid(_NO_END[names[short]])
    return names[short]
