"""The worker's side: from the forked process to the application.

A worker starts with its sockets. It closes everything else that it has from the controller, and
drops privileges. Then it executes a command, or calls a Python callable with a `Worker`.
"""

from __future__ import annotations

import atexit
import fcntl
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import msgspec
from msgspec.structs import replace

from steer.child import privileges
from steer.child.api import SIGNAL_EVERY_S, Worker
from steer.child.launch import COMMAND_NOT_RUN, FIRST_FD, Launch, Message
from steer.config.address import Bind
from steer.config.service import Service
from steer.linux import descriptors, fork, output, priority, reach, services, stdio, title
from steer.linux.reach import Barrier
from steer.policy.cpus import cpu_list, cpus_named
from steer.sockets import lifeline

_DESCRIPTORS = 64
"""How many descriptors a server may need until it serves, beside its sockets."""
_TEXT_MAX = 4000


class Unloadable(Exception):
    """The application cannot be loaded: the reason, and details."""

    def __init__(self, why: str, detail: str = "") -> None:
        super().__init__(why)
        self.detail = detail


def main(
    launch: Launch, channel: socket.socket, stderr: int, sockets: Sequence[socket.socket]
) -> int:
    """Run a worker in the forked child; return its exit status.

    Args:
        channel: the channel to the controller.
        stderr: where to write standard error.
        sockets: the sockets of the worker, one for each bind.
    """
    if stdio.file_of(2) and stdio.is_the_log(1):
        # Standard output then follows the log when that is rotated.
        os.dup2(stderr, 1)
    os.dup2(stderr, 2)
    output.stderr.reset()
    title.show(f"steer: worker {launch.slot} {launch.name}")
    # `killall steer` must end the service gracefully, by its controller, and not its workers.
    fork.rename("steer-worker")
    channel, *sockets = _keep_only(channel, sockets)
    # Wait until the controller has stored this worker in the guard: if the controller is killed
    # before, no process would know of this worker.
    if not channel.recv(1):
        return 1
    with _if_allowed(launch, "set the limits on open files"):
        descriptors.limit_descriptors(launch.files, _DESCRIPTORS + len(launch.binds))
    try:
        import_for(launch.service)
        launch = _apply(launch)
        lifeline.tie(channel, launch.service.finish_signal)
        if launch.service.command:
            channel.set_inheritable(True)
            _execute(launch, _environment(launch))
        _change_environment(launch)
        descriptors.limit_descriptors(launch.files)
        application = _load(launch.service)
        return _call(application, Worker(launch, sockets), launch.service)
    except Unloadable as error:
        _send(channel, Message(unloadable=_short(str(error)), detail=_short(error.detail)))
        return COMMAND_NOT_RUN


def import_for(service: Service) -> None:
    """Import the modules that only some workers need, as imports take time. This happens before the
    change of user, as another user may not be able to read the files."""
    if service.app:
        from steer.config import applications  # noqa: F401

        if service.user is not None:
            import traceback  # noqa: F401
    elif not service.command:
        from steer.child import demo  # noqa: F401


def _keep_only(channel: socket.socket, sockets: Sequence[socket.socket]) -> list[socket.socket]:
    """Close all descriptors of the controller, and move the sockets to 3 and up (sd_listen_fds(3)).

    Python callables need low numbers, too, as select(2) accepts no descriptor above 1023.

    Returns:
        The channel, with a number above the sockets, and the sockets.
    """
    descriptors.keep_only([channel.fileno(), *(sock.fileno() for sock in sockets)])
    beyond = FIRST_FD + len(sockets)
    # First move all of them above the range, as one may have the number that another gets.
    above, *theirs = (
        fcntl.fcntl(sock.detach(), fcntl.F_DUPFD_CLOEXEC, beyond) for sock in (channel, *sockets)
    )
    for index, fd in enumerate(theirs):
        os.dup2(fd, FIRST_FD + index, inheritable=False)
    descriptors.keep_only([above, *range(FIRST_FD, beyond)])
    places = {channel: above, **{sock: FIRST_FD + at for at, sock in enumerate(sockets)}}
    return [socket.socket(each.family, each.type, each.proto, fd) for each, fd in places.items()]


def _send(channel: socket.socket, message: Message) -> None:
    """Send a message to the controller, which may have ended."""
    with suppress(OSError):
        channel.send(msgspec.json.encode(message))


def _short(text: str) -> str:
    """The text, shortened to fit into a message, and without characters that UTF-8 lacks."""
    return text[:_TEXT_MAX].encode(errors="backslashreplace").decode()


def _apply(launch: Launch) -> Launch:
    """Apply the CPUs, directory, user and niceness of the launch to this process.

    Returns:
        The launch, with the CPUs that this process may use now.

    Raises:
        Unloadable: the kernel refuses.
    """
    directory, who = launch.service.chdir, launch.identity
    with _if_allowed(launch, f"run on {cpus_named(launch.spec.cpus)}"):
        os.sched_setaffinity(0, launch.spec.cpus)
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    if directory is not None:
        with _needed(f"chdir {directory}"):
            os.chdir(directory)
    with _needed(f"run as uid {who.uid}, gid {who.gid}"):
        privileges.apply(launch.service, who)
    if launch.niced:
        with _if_allowed(launch, "leave the CPUs to others until it is ready"):
            priority.be_nice()
    return replace(launch, spec=replace(launch.spec, cpus=cpus))


@contextmanager
def _if_allowed(launch: Launch, act: str) -> Iterator[None]:
    """Log a failure and continue, as the worker can run without the act. The cpuset may have
    changed, or seccomp may refuse."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        print(f"steer: worker {launch.slot}: {act}: {why}; it does without", file=sys.stderr)


@contextmanager
def _needed(act: str, more: Callable[[OSError], str] = lambda _: "") -> Iterator[None]:
    """Turn a failure of the act into Unloadable.

    Args:
        more: returns details of a failure, or "".
    """
    try:
        yield
    except OSError as error:
        known = more(error)
        raise Unloadable(f"{act}: {error.strerror}{known and '; '}{known}") from None
    except ValueError as error:  # a null byte, from a configuration file
        raise Unloadable(f"{act}: {error}") from None


_NOT_FOR_IT = ("LISTEN_", "WATCHDOG_")
"""Variables with this prefix are for this process, and not for the application."""


def _environment(launch: Launch) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_FOR_IT)}
    return {**inherited, **_variables(launch)}


def _variables(launch: Launch) -> dict[str, str]:
    given = dict(pair.split("=", 1) for pair in launch.service.env)
    return {
        **launch.identity.environment(),
        **given,
        "STEER_SLOT": str(launch.slot),
        "STEER_NAME": launch.name,
        "STEER_CPUS": cpu_list(launch.spec.cpus),
        services.MARK: str(os.getpid()),
        "NOTIFY_SOCKET": launch.notify,
        **_watchdog(launch.service),
    }


def _change_environment(launch: Launch) -> None:
    """Make `_environment` the environment of this process. Only differences are changed: to set all
    variables takes a millisecond in a process that was just forked."""
    for name in [name for name in os.environ if name.startswith(_NOT_FOR_IT)]:
        del os.environ[name]
    os.environ.update(_variables(launch))


def _watchdog(service: Service) -> dict[str, str]:
    """The variables of sd_watchdog_enabled(3). WATCHDOG_PID is left out, as a child of the process
    that we start may be the one that notifies."""
    if service.watchdog is None:
        return {}
    return {"WATCHDOG_USEC": str(round(service.watchdog * 1e6))}


def _execute(launch: Launch, environment: Mapping[str, str]) -> None:
    """Execute the command, with its sockets from descriptor 3 on, as sd_listen_fds(3) says.

    Raises:
        Unloadable: the command does not exist or cannot be executed.
    """
    arguments = fill_in(launch.service.command, launch.slot, launch.binds)
    for index in range(len(launch.binds)):
        os.set_inheritable(FIRST_FD + index, True)
    names = ":".join(f"{bind.protocol}-{bind.port}" for bind in launch.binds)
    protocol = {
        "LISTEN_FDS": str(len(launch.binds)),
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDNAMES": names,
    }
    descriptors.limit_descriptors(launch.files)
    with _needed(f"run {arguments[0]}", lambda error: _why(error, arguments[0], environment)):
        fork.execute(arguments, {**environment, **protocol})


def _why(error: OSError, program: str, environment: Mapping[str, str]) -> str:
    """What may have prevented the execution of a program, and what would help."""
    if isinstance(error, FileNotFoundError):
        return fork.venv_hint(program)
    with suppress(OSError):  # the current directory was removed
        if isinstance(error, PermissionError):
            return _describe(reach.to_command(program, os.get_exec_path(dict(environment))))
    return ""


def _describe(barrier: Barrier | None) -> str:
    return f"{barrier}; {barrier.cure}" if barrier else ""


def fill_in(command: Sequence[str], slot: int, binds: Sequence[Bind]) -> list[str]:
    """The command's arguments with {slot}, {fd}, {port} filled in.

    {fd} and {port} belong to the first bind, {fd1} and {port1} to the second, and so on. Other
    braces stay as they are.
    """
    marks = {"{slot}": str(slot), "{fd}": str(FIRST_FD), "{port}": str(binds[0].port)}
    for index, bind in enumerate(binds):
        marks[f"{{fd{index}}}"] = str(FIRST_FD + index)
        marks[f"{{port{index}}}"] = str(bind.port)
    filled = list(command)
    for mark, value in marks.items():
        filled = [argument.replace(mark, value) for argument in filled]
    return filled


def _load(service: Service) -> Callable[[Worker], object]:
    """Import the callable of the service, or the demo if it has none.

    Raises:
        Unloadable
    """
    if service.app is None:
        from steer.child import demo

        return demo.serve
    module_name, _, path = service.app.partition(":")
    try:
        if "" not in sys.path:
            sys.path.insert(0, os.getcwd())
        found: object = importlib.import_module(module_name)
        for name in path.split("."):
            found = getattr(found, name)
    # An import runs the user's code, which may raise anything.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        known = _why_not_found(error, service)
        raise Unloadable(f"{_in_words(error)}{known and '; '}{known}", _where(error)) from None
    if not callable(found):
        raise Unloadable(f"{path} is not callable")
    from steer.config import applications

    if why := applications.why_not(found, service.app):
        raise Unloadable(why)
    return found


def _why_not_found(error: BaseException, service: Service) -> str:
    """What may prevent our user from reading a module that seems to be missing."""
    if isinstance(error, ImportError | PermissionError):
        with suppress(OSError):  # the current directory was removed
            return _describe(privileges.to_imports(service))
    return ""


def _in_words(error: BaseException) -> str:
    """An error as text. Its class may be the user's, and its __str__ may fail."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:  # noqa: BLE001
        return name


def _where(error: BaseException) -> str:
    """The lines of the user's code that led to an error, without importlib's and steer's."""
    import traceback

    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and frame.filename != __file__
    ]
    lines = [f"{frame.filename}:{frame.lineno}: {frame.line}" for frame in frames]
    if isinstance(error, SyntaxError):
        lines.append(f"{error.filename}:{error.lineno}: {(error.text or '').strip()}")
    return "\n".join(lines)


def _call(application: Callable[[Worker], object], worker: Worker, service: Service) -> int:
    limit_s, returned = service.graceful_timeout, None
    # The fork inherited exit functions of the controller, which only the controller may run.
    atexit._clear()
    if "logging" in sys.modules:
        atexit.register(sys.modules["logging"].shutdown)
    try:
        try:
            returned = application(worker)
        except BlockingIOError:
            # This ends an accept loop, as the listener does not block any more.
            if not worker.stopping:
                raise
        except SystemExit:
            _await_threads(worker, limit_s)
            raise
        _await_threads(worker, limit_s)
    finally:
        atexit._run_exitfuncs()
    return 0 if returned is None or worker.stopping else _judge(returned, worker, service)


def _judge(returned: object, worker: Worker, service: Service) -> int:
    """The exit status of a callable that returned a value before the worker was told to finish. If
    the value shows a mistake, print what is wrong."""
    from steer.config import applications

    why = applications.why_not_returned(returned, service.app or "")
    if why:
        print(f"steer: worker {worker.slot}: {service.app}: {why}", file=sys.stderr)
    return int(bool(why))


def _await_threads(worker: Worker, limit_s: float) -> None:
    """Wait for non-daemon threads, as every Python program does at its end.

    The wait is limited: if nobody has told the worker to end, nobody will kill it after a time. A
    thread that waits for a connection gets an error, as no connection will arrive.
    """
    signal.setitimer(signal.ITIMER_REAL, max(limit_s, SIGNAL_EVERY_S))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for sock in worker.sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
    if "threading" in sys.modules:
        # Not public, but it calls what concurrent.futures has registered to wake its threads.
        sys.modules["threading"]._shutdown()
