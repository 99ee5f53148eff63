"""The worker's side: from the forked process to the application.

A worker starts with its sockets. It closes everything else that it has from the controller, and
drops privileges. Then it executes a command, or calls a Python callable with a `Worker`.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from steer.child import loading, setup
from steer.child.api import Worker
from steer.child.launch import (
    COMMAND_NOT_RUN,
    FIRST_FD,
    Launch,
    Message,
    NewWorker,
    Unloadable,
)
from steer.linux import descriptors, fork, output, stdio, title
from steer.sockets import lifeline

DESCRIPTORS = 64
"""How many descriptors a server may need until it serves, beside its sockets."""
_TEXT_MAX = 4000


def main(new: NewWorker) -> int:
    """Run a worker in a child that the controller has forked; return its exit status."""
    launch, channel, stderr, sockets = new
    _appear(launch, stderr, with_output=bool(stdio.file_of(2)) and stdio.is_the_log(1))
    descriptors.keep_only([channel.fileno(), *(sock.fileno() for sock in sockets)])
    channel, *sockets = _place(channel, sockets)
    if not _is_stored(channel):
        return 1
    with setup.if_allowed(f"worker {launch.slot}", "set the limits on open files"):
        descriptors.limit_descriptors(launch.files, DESCRIPTORS + len(launch.binds))
    try:
        loading.import_for(launch.service)
        launch = setup.schedule(launch)
        setup.enter(launch.service, launch.identity)
        lifeline.tie(channel, launch.service.finish_signal)
        if launch.service.command:
            from steer.child import command

            channel.set_inheritable(True)
            command.execute(launch, setup.environment(launch))
        from steer.child import calling

        setup.change_environment(launch)
        descriptors.limit_descriptors(launch.files)
        calling.forget_exit_functions()
        application = loading.load(launch.service)
        worker = Worker(launch, sockets)
        if launch.service.preload:
            from steer.child import hooks

            hooks.before_fork(launch.service)
            hooks.after_fork(launch.service, worker)
        return calling.call(application, worker, launch.service)
    except Unloadable as error:
        _send(channel, error)
        return COMMAND_NOT_RUN


def preloaded(new: NewWorker, application: Callable[[Worker], object]) -> int:
    """Run a worker in a child that a template process has forked; return its exit status.

    The template process has no descriptors of the controller, and has changed the user. Descriptors
    that the import of the application has opened stay open.

    Args:
        application: the application of the service, which is loaded.
    """
    from steer.child import calling, hooks, reseeding

    launch, channel, stderr, sockets = new
    _appear(launch, stderr, with_output=stdio.is_the_log(1))
    os.close(stderr)
    channel, *sockets = _place(channel, sockets)
    if not _is_stored(channel):
        return 1
    try:
        launch = setup.schedule(launch)
        lifeline.tie(channel, launch.service.finish_signal)
        setup.change_environment_after_fork(launch)
        worker = Worker(launch, sockets)
        reseeding.reseed()
        hooks.after_fork(launch.service, worker)
        return calling.call(application, worker, launch.service)
    except Unloadable as error:
        _send(channel, error)
        return COMMAND_NOT_RUN


def _appear(launch: Launch, stderr: int, *, with_output: bool) -> None:
    """Take over standard error, and the names that ps(1) and killall(1) show.

    Args:
        with_output: whether standard output is the log of steer, too. If that is a file it then
            follows the log when that is rotated.
    """
    if with_output:
        os.dup2(stderr, 1)
    os.dup2(stderr, 2)
    output.stderr.reset()
    title.show(f"steer: worker {launch.slot} {launch.name}")
    # `killall steer` must end the service gracefully, by its controller, and not its workers.
    fork.rename("steer-worker")


def _is_stored(channel: socket.socket) -> bool:
    """Wait until the controller has stored this worker in the guard: if the controller is killed
    before, no process would know of this worker."""
    return bool(channel.recv(1))


def _place(channel: socket.socket, sockets: Sequence[socket.socket]) -> list[socket.socket]:
    """Move the sockets to 3 and up (sd_listen_fds(3)).

    Python callables need low numbers, too, as select(2) accepts no descriptor above 1023.

    Returns:
        The channel, with a number above the sockets, and the sockets.
    """
    beyond = FIRST_FD + len(sockets)
    given = [sock.detach() for sock in (channel, *sockets)]
    # First move all of them above the range, as one may have the number that another gets.
    above, *theirs = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, beyond) for fd in given)
    for fd in given:
        os.close(fd)
    for index, fd in enumerate(theirs):
        os.dup2(fd, FIRST_FD + index, inheritable=False)
        os.close(fd)
    places = {channel: above, **{sock: FIRST_FD + at for at, sock in enumerate(sockets)}}
    return [socket.socket(each.family, each.type, each.proto, fd) for each, fd in places.items()]


def _send(channel: socket.socket, error: Unloadable) -> None:
    """Tell the controller, which may have ended, why the application cannot be loaded."""
    message = Message(unloadable=short(str(error)), detail=short(error.detail))
    with suppress(OSError):
        channel.send(msgspec.json.encode(message))


def short(text: str) -> str:
    """The text, shortened to fit into a message, and without characters that UTF-8 lacks."""
    return text[:_TEXT_MAX].encode(errors="backslashreplace").decode()
