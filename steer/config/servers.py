"""What steer knows about servers that may run as workers, by the name of their program. Pure."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from signal import Signals

import msgspec

from steer.values import Invalid, did_you_mean


class Server(msgspec.Struct, frozen=True):
    """A server that exits at once on SIGTERM, and finishes its requests on another signal.

    Args:
        stop_signal: the signal on which the server finishes its requests and exits.
        source: where the documentation of the server says so.
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
"""Servers that finish their requests on SIGTERM need no row: gunicorn, uvicorn, hypercorn, granian.
uWSGI has no row, because by default it finishes gracefully on no signal (see its
hook-master-start)."""


class Reload(msgspec.Struct, frozen=True):
    """How a server reloads itself: it replaces its own workers, or reads its configuration again.

    Args:
        signal: the signal on which its first process does that.
        source: where the documentation of the server says so.
        options: it does so only with one of these options; (): always.
    """

    signal: Signals
    source: str
    options: tuple[str, ...] = ()


RELOADS: Mapping[str, Reload] = {
    "nginx": Reload(signal.SIGHUP, "https://nginx.org/en/docs/control.html"),
    "openresty": Reload(signal.SIGHUP, "https://nginx.org/en/docs/control.html"),
    "angie": Reload(signal.SIGHUP, "https://en.angie.software/angie/docs/configuration/control/"),
    "haproxy": Reload(
        signal.SIGUSR2, "HAProxy Management Guide, 4. Stopping and restarting", ("-W", "-Ws")
    ),
    "apache2": Reload(signal.SIGUSR1, "https://httpd.apache.org/docs/2.4/stopping.html"),
    "httpd": Reload(signal.SIGUSR1, "https://httpd.apache.org/docs/2.4/stopping.html"),
    "gunicorn": Reload(signal.SIGHUP, "https://docs.gunicorn.org/en/stable/signals.html"),
}
"""Servers that reload on a signal. granian has no row: on SIGHUP it ends each old worker a fixed
time after it has started the new one, ready or not (`_respawn_workers` of its server/common.py)."""

FORWARDERS = ("tini", "tini-static", "docker-init", "dumb-init", "catatonit")
"""Programs that forward every signal to the child they start. Other wrappers exit on some signals
(shells) or forward only some (sudo, timeout)."""


class ProcessInfo(msgspec.Struct, frozen=True):
    """What ps(1) shows of a process.

    Args:
        arguments: its command line, or the title that it has written over it.
        name: its command name.
    """

    arguments: Sequence[str]
    name: str = ""


class StopSignals(msgspec.Struct, frozen=True):
    """How a worker is told to finish.

    Args:
        first: the signal for its first process.
        others: the signal for processes that are left when the first process has ended.
        why: why these signals are sent, for the log; "": they are the default.
    """

    first: Signals
    others: Signals
    why: str = ""


DEFAULT_STOP_SIGNALS = StopSignals(signal.SIGTERM, signal.SIGTERM)

READY_EARLY = ("gunicorn",)
"""Servers that send READY=1 before their own workers have loaded the application."""

REUSEPORT_CURES: Mapping[str, str] = {
    "gunicorn": "add to its command: --reuse-port",
    "nginx": "write in its configuration: listen ADDRESS reuseport",
    "haproxy": "leave out noreuseport in its configuration, and the option -dR",
}
"""By server: how to make it open listeners with SO_REUSEPORT."""
_REUSEPORT_CURE = "set SO_REUSEPORT in the server, or leave out socket = adopt: "

_WAITRESS = (
    "its command takes no socket from others: have steer serve the application: "
    "steer run --server waitress MODULE:NAME"
)
LISTEN_CURES: Mapping[str, str] = {
    "uvicorn": "add to its command: --fd {fd}",
    "hypercorn": "give it --bind fd://{fd}, and no other --bind",
    "daphne": "add to its command: --fd {fd}",
    "gunicorn": "leave out reuse_port, with which it ignores LISTEN_FDS",
    "granian": "it takes no socket from others: run another server, or steer run --server auto",
    "waitress-serve": _WAITRESS,
    "waitress": _WAITRESS,
    "nginx": "give steer -e 'NGINX=3;', and nginx the same address to listen on",
    "haproxy": "write in its configuration: bind fd@3",
}
"""By server: how to make it listen on the socket that steer gives it."""
WRAPPED_LISTEN_CURES: Mapping[str, str] = {
    "gunicorn": "LISTEN_FDS counts only for the process that steer starts: have that exec it, or "
    "add to its command: --bind fd://{fd}",
}
"""By server: how to make it listen on that socket if another program starts it as a child."""
_LISTEN_CURE = (
    "have it take descriptor 3, {fd} in its arguments; see LISTEN_FDS of sd_listen_fds(3)"
)
_LISTEN_CURE_CALLABLE = "have it accept from worker.sockets"

_IN_USE = ("address already in use", "eaddrinuse")
"""What servers print when bind(2) fails with EADDRINUSE: the texts of strerror(3) and of libuv."""
FOREGROUND_CURES: Mapping[str, str] = {
    "nginx": "add to its command: -g 'daemon off;'",
    "haproxy": "add to its command: -db",
    "gunicorn": "leave out --daemon",
}
"""By server: how to keep it from daemonizing."""
_FOREGROUND_CURE = "have it stay in the foreground, as long as it serves"
_FOREGROUND_CURE_CALLABLE = "have it serve until worker.stopping; see examples/"

ALLOWED = "the name of a signal on which a server ends: QUIT or SIGQUIT, TERM, INT, USR1, ..."
_NO_END: Mapping[Signals, str] = {
    **dict.fromkeys((signal.SIGKILL, signal.SIGSTOP), "no process can act on it"),
    **dict.fromkeys((signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU), "it stops a process"),
    **dict.fromkeys((signal.SIGCHLD, signal.SIGURG, signal.SIGCONT), "it ends no process"),
}
"""Why a signal is refused as the stop signal. SIGWINCH is allowed, because Apache exits on it."""
_NO_RELOAD: Mapping[Signals, str] = {
    **_NO_END,
    **dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGQUIT), "it ends a server"),
}
RELOAD_ALLOWED = "none, or the name of a signal on which the server reloads: HUP, USR1, USR2, ..."


def stop_signal(command: Sequence[str]) -> Signals:
    """The signal that tells a worker to finish, unless the user chose one.

    Args:
        command: the worker's command line; empty for a Python callable.
    """
    name = known(command)
    return SERVERS[name].stop_signal if name else signal.SIGTERM


def known(arguments: Sequence[str], name: str = "") -> str | None:
    """The name in `SERVERS` of the server that a process runs; None: another program.

    Args:
        arguments: its command line, or a title in its place ("nginx: master process nginx").
        name: its command name, as in ps(1).
    """
    shown = arguments[0].partition(": ")[0] if arguments else ""
    programs = [each.rpartition("/")[2] for each in (shown, shown.partition(" ")[0], name)]
    # Distributions append the version: php-fpm8.2.
    plain = [each.rstrip("0123456789.").rstrip("-") for each in programs]
    return next((each for each in (*programs, *plain) if each in SERVERS), None)


def stop_signals_of(line: Iterable[ProcessInfo]) -> StopSignals:
    """How to tell a worker to finish if its command is no known server, as the command may be a
    wrapper that starts one.

    Args:
        line: its first process, then the only child of that, and so on. Read as far as needed.
    """
    wrappers: list[str] = []
    for process in line:
        server = known(process.arguments, process.name)
        if server is not None:
            return _stop_signals_of_server(server, wrappers)
        wrappers.append(process.name)
    return DEFAULT_STOP_SIGNALS


def _stop_signals_of_server(server: str, wrappers: Sequence[str]) -> StopSignals:
    number = SERVERS[server].stop_signal
    why = f"{number.name}, as they run {server}, which ends at once on SIGTERM"
    ends = next((each for each in wrappers if each not in FORWARDERS), None)
    if ends is None:
        return StopSignals(number, number, why)
    why += f"; {ends}, which starts it, by SIGTERM before"
    return StopSignals(signal.SIGTERM, number, why)


def says_ready_early(arguments: Sequence[str]) -> bool:
    """Whether a process sends READY=1 before it can serve.

    Args:
        arguments: its command line, which names the program, or Python with a script or `-m`; or
            the title that it shows in its place ("gunicorn: master [app]").
    """
    return not set(READY_EARLY).isdisjoint(_names(arguments))


def reload_signal(command: Sequence[str]) -> Signals | None:
    """The signal on which a server reloads itself; None: there is none, or none is known."""
    found = next((RELOADS[name] for name in _names(command) if name in RELOADS), None)
    if found is None or (found.options and not set(found.options) & set(command)):
        return None
    return found.signal


def reuseport_cure(command: Sequence[str]) -> str:
    """How to make a server open listeners with SO_REUSEPORT."""
    known_ones = (REUSEPORT_CURES[name] for name in _names(command) if name in REUSEPORT_CURES)
    return next(known_ones, "") or _REUSEPORT_CURE + listen_cure(command)


def listen_cure(
    command: Sequence[str], first: Sequence[str] = (), arguments: Sequence[str] = ()
) -> str:
    """How to make a server listen on the socket that steer gives it.

    Args:
        command: the worker's command line; empty for a Python callable.
        first: the command line, or title, of the worker's first process now.
        arguments: the command line, or title, of the worker's process that listens.
    """
    if not command:
        return _LISTEN_CURE_CALLABLE
    names = (*_names(command), *_names(arguments))
    is_wrapped = _names(first) != _names(arguments)
    cures = {**LISTEN_CURES, **WRAPPED_LISTEN_CURES} if is_wrapped else LISTEN_CURES
    return next((cures[name] for name in names if name in cures), _LISTEN_CURE)


def why_it_ended(
    command: Sequence[str], status: int | None, words: str, adopts: bool = False
) -> tuple[str, str]:
    """Cause and cure if a worker ended before it served; both are "" if the cause is not known.

    Args:
        command: the worker's command line; empty for a Python callable.
        adopts: whether the command has to bind its address itself.
        status: its exit status.
        words: the last lines that it wrote to standard error.
    """
    if any(each in words.lower() for each in _IN_USE):
        if adopts:
            return "the address is in use by a socket without SO_REUSEPORT", reuseport_cure(command)
        at_fault = "it binds an address itself, which is in use"
        # A server that uses the socket it was given does not bind one.
        return at_fault, listen_cure(command, first=command)
    if status != 0:
        return "", ""
    if not command:
        return "the callable returned", _FOREGROUND_CURE_CALLABLE
    names = _names(command)
    cure = next(
        (FOREGROUND_CURES[name] for name in names if name in FOREGROUND_CURES), _FOREGROUND_CURE
    )
    return "its first process exited while it should serve", cure


def _names(arguments: Sequence[str]) -> list[str]:
    """Words at the start of a command line that may be the name of the program."""
    return [each.rpartition("/")[2].partition(":")[0] for each in arguments[:3]]


def note(command: Sequence[str]) -> str:
    """Says that the workers are told to finish by a signal other than SIGTERM, and why; "": they
    are not."""
    number = stop_signal(command)
    if number == signal.SIGTERM:
        return ""
    return f"workers are told to finish by {number.name}, as {command[0]} ends at once on SIGTERM"


def read_signal(name: str) -> Signals:
    """A signal by its name, with or without SIG.

    Raises:
        Invalid: there is no signal of that name, or no server exits on it.
    """
    return _read(name, _NO_END)


def read_reload_signal(name: str) -> Signals:
    """The same for a signal on which a server reloads itself.

    Raises:
        Invalid: there is no signal of that name, or no server can reload on it.
    """
    return _read(name, _NO_RELOAD)


def _read(name: str, refused: Mapping[Signals, str]) -> Signals:
    names = {each.removeprefix("SIG"): Signals[each] for each in Signals.__members__}
    short = name.strip().upper().removeprefix("SIG")
    if short not in names:
        likely = [each for each, found in names.items() if found not in refused]
        raise Invalid("no such signal", did_you_mean(short, likely))
    if names[short] in refused:
        raise Invalid(refused[names[short]])
    return names[short]
