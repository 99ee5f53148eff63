"""The worker's side: from a fresh process to the application, and what the application sees.

It comes with its sockets. Here everything else of the controller's is let go of and
privileges are dropped; then a command is executed in this process's place, or a Python
callable called with a `Worker`.
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
from steer.child.api import KNOCK_S, Worker
from steer.child.launch import COMMAND_NOT_RUN, FIRST_FD, Launch, Message
from steer.config.address import Bind
from steer.config.service import Service
from steer.linux import descriptors, fork, output, priority, reach, services, stdio, title
from steer.linux.reach import Barrier
from steer.policy.cpus import cpu_list, cpus_named
from steer.sockets import lifeline

_DESCRIPTORS = 64
"""Room for what a server opens until it serves, beside its sockets."""
_TEXT_MAX = 4000


class Unloadable(Exception):
    """The application cannot be loaded: why, and more lines on that."""

    def __init__(self, why: str, detail: str = "") -> None:
        super().__init__(why)
        self.detail = detail


def main(launch: Launch, channel: socket.socket, stderr: int, own: Sequence[socket.socket]) -> int:
    """Be a worker. Runs in the forked child; returns its exit status.

    Args:
        channel: to the controller.
        stderr: what to write standard error to.
        own: its sockets, one for each bind.
    """
    if stdio.file_of(2) and stdio.is_the_log(1):
        # So that it goes where the log goes from the day that somebody rotates it.
        os.dup2(stderr, 1)
    os.dup2(stderr, 2)
    output.stderr.reset()
    title.show(f"steer: worker {launch.slot} {launch.name}")
    # Whoever kills all that is called steer ends the service by its controller, gracefully.
    fork.rename("steer-worker")
    channel, *own = _keep_only(channel, own)
    # Not before we are told to: were the controller killed now, nobody would know of us.
    if not channel.recv(1):
        return 1
    with _if_allowed(launch, "set the limits on open files"):
        descriptors.limit_descriptors(launch.files, _DESCRIPTORS + len(launch.binds))
    try:
        import_for(launch.service)
        launch = _settle(launch)
        lifeline.tie(channel, launch.service.told_by)
        if launch.service.command:
            channel.set_inheritable(True)
            _execute(launch, _environment(launch))
        _change_environment(launch)
        descriptors.limit_descriptors(launch.files)
        application = _load(launch.service)
        return _call(application, Worker(launch, own), launch.service)
    except Unloadable as error:
        _tell(channel, Message(unloadable=_short(str(error)), detail=_short(error.detail)))
        return COMMAND_NOT_RUN


def import_for(service: Service) -> None:
    """What takes time to import, and not every worker needs. As the user that steer was
    started by: another may not reach it."""
    if service.app:
        from steer.config import applications  # noqa: F401

        if service.user is not None:
            import traceback  # noqa: F401
    elif not service.command:
        from steer.child import demo  # noqa: F401


def _keep_only(channel: socket.socket, own: Sequence[socket.socket]) -> list[socket.socket]:
    """Close all that is the controller's, and put the sockets where sd_listen_fds(3) has them:
    also where nobody looks for them there, as select(2) takes no descriptor above 1023.

    Returns:
        The channel, now above them, and the sockets.
    """
    descriptors.keep_only([channel.fileno(), *(sock.fileno() for sock in own)])
    beyond = FIRST_FD + len(own)
    # Above the range first: one may stand where another has to go.
    above, *theirs = (
        fcntl.fcntl(sock.detach(), fcntl.F_DUPFD_CLOEXEC, beyond) for sock in (channel, *own)
    )
    for index, fd in enumerate(theirs):
        os.dup2(fd, FIRST_FD + index, inheritable=False)
    descriptors.keep_only([above, *range(FIRST_FD, beyond)])
    places = {channel: above, **{sock: FIRST_FD + at for at, sock in enumerate(own)}}
    return [socket.socket(each.family, each.type, each.proto, fd) for each, fd in places.items()]


def _tell(channel: socket.socket, message: Message) -> None:
    """The controller may be gone."""
    with suppress(OSError):
        channel.send(msgspec.json.encode(message))


def _short(text: str) -> str:
    """Of a text that may be anything, what fits into a message and into UTF-8."""
    return text[:_TEXT_MAX].encode(errors="backslashreplace").decode()


def _settle(launch: Launch) -> Launch:
    """Take the place that was planned: CPUs, directory, user; and go with the controller.

    Returns:
        The same, with the CPUs that it came to be.

    Raises:
        Unloadable: the kernel does not let us.
    """
    directory, who = launch.service.chdir, launch.identity
    with _if_allowed(launch, f"run on {cpus_named(launch.spec.cpus)}"):
        os.sched_setaffinity(0, launch.spec.cpus)
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    if directory is not None:
        with _needed(f"chdir {directory}"):
            os.chdir(directory)
    with _needed(f"run as uid {who.uid}, gid {who.gid}"):
        privileges.settle(launch.service, who)
    if launch.niced:
        with _if_allowed(launch, "leave the CPUs to others until it is ready"):
            priority.be_nice()
    return replace(launch, spec=replace(launch.spec, cpus=cpus))


@contextmanager
def _if_allowed(launch: Launch, act: str) -> Iterator[None]:
    """For what a worker can do without: a cpuset may just have changed, seccomp may refuse."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        print(f"steer: worker {launch.slot}: {act}: {why}; it does without", file=sys.stderr)


@contextmanager
def _needed(act: str, more: Callable[[OSError], str] = lambda _: "") -> Iterator[None]:
    """Raises Unloadable for what fails in it. Args: more: what else is known of a failure."""
    try:
        yield
    except OSError as error:
        known = more(error)
        raise Unloadable(f"{act}: {error.strerror}{known and '; '}{known}") from None
    except ValueError as error:  # a null byte, which only a file can hold
        raise Unloadable(f"{act}: {error}") from None


_NOT_FOR_IT = ("LISTEN_", "WATCHDOG_")
"""What of our environment begins so is about ourselves."""


def _environment(launch: Launch) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_FOR_IT)}
    return {**inherited, **_told_by_environment(launch)}


def _told_by_environment(launch: Launch) -> dict[str, str]:
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
    """To `_environment`. What stays is left alone: all of it anew takes a millisecond in a process
    that was just forked."""
    for name in [name for name in os.environ if name.startswith(_NOT_FOR_IT)]:
        del os.environ[name]
    os.environ.update(_told_by_environment(launch))


def _watchdog(service: Service) -> dict[str, str]:
    """As sd_watchdog_enabled(3) has it, but for WATCHDOG_PID: the one who says so may be a
    child of the process we start."""
    if service.watchdog is None:
        return {}
    return {"WATCHDOG_USEC": str(round(service.watchdog * 1e6))}


def _execute(launch: Launch, environment: Mapping[str, str]) -> None:
    """Become the command, with the sockets from fd 3 on as sd_listen_fds(3) has it.

    Raises:
        Unloadable: there is no such command, or it cannot be run.
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
    """What is known of a program's not being executed, and would help."""
    if isinstance(error, FileNotFoundError):
        return fork.beside_us(program)
    with suppress(OSError):  # the current directory was removed
        if isinstance(error, PermissionError):
            return _told(reach.to_command(program, os.get_exec_path(dict(environment))))
    return ""


def _told(barrier: Barrier | None) -> str:
    return f"{barrier}; {barrier.cure}" if barrier else ""


def fill_in(command: Sequence[str], slot: int, binds: Sequence[Bind]) -> list[str]:
    """The command's arguments with {slot}, {fd}, {port} filled in.

    {fd} and {port} are the first bind's; {fd1} and {port1} the second's, and so on.
    Other braces are left alone.
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
    """Import the callable; with no app, the demo.

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
    # Whatever a module does while it is imported is the user's; steer has to say it.
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
    """What keeps our user from modules, where one is missing: importlib says no more than that."""
    if isinstance(error, ImportError | PermissionError):
        with suppress(OSError):  # the current directory was removed
            return _told(privileges.to_imports(service))
    return ""


def _in_words(error: BaseException) -> str:
    """Its class is the user's, and may fail to say anything."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:  # noqa: BLE001
        return name


def _where(error: BaseException) -> str:
    """The lines of the user's code that led to an error; importlib's and ours left out."""
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
    # Inherited: the controller's to do, at its own end.
    atexit._clear()
    if "logging" in sys.modules:
        atexit.register(sys.modules["logging"].shutdown)
    try:
        try:
            returned = application(worker)
        except BlockingIOError:
            # The end of an accept loop whose listener was told not to wait any more.
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
    """The exit status of a worker whose callable returned this, though nobody told it to finish."""
    from steer.config import applications

    why = applications.why_not_returned(returned, service.app or "")
    if why:
        print(f"steer: worker {worker.slot}: {service.app}: {why}", file=sys.stderr)
    return int(bool(why))


def _await_threads(worker: Worker, limit_s: float) -> None:
    """Those that are no daemons finish what they have, as at the end of any Python program.

    But not for ever: nobody may have told us to end. One that waits for a connection gets
    an error, as there will be none.
    """
    signal.setitimer(signal.ITIMER_REAL, max(limit_s, KNOCK_S))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for sock in worker.sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
    if "threading" in sys.modules:
        # Not public; but what concurrent.futures registers there wakes its threads.
        sys.modules["threading"]._shutdown()
