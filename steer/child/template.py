"""A template process: it loads the application once, and forks workers that share it.

It is forked by the controller, changes the user before it runs any code of the application, and
then waits for requests. For each batch of requests it forks a process that receives the requests
with their descriptors, forks the workers and exits. So the workers become children of the
controller, which is a child subreaper (PR_SET_CHILD_SUBREAPER of prctl(2)), and this process never
has a descriptor of a worker. clone(2) with CLONE_PARENT would need one fork less, but would skip
the handlers of pthread_atfork(3) and os.register_at_fork().
"""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import msgspec

from steer.child import (
    calling,
    hooks,
    leftovers,
    loading,
    main,
    reseeding,  # noqa: F401 - for the workers
    setup,
)
from steer.child.api import Worker
from steer.child.launch import COMMAND_NOT_RUN, FIRST_FD, NewWorker, Unloadable
from steer.child.preload import MESSAGE_MAX_BYTES, Answer, Preload, Request
from steer.linux import child_exit, descriptors, fork, output, stdio, title

_NAME = "steer-template"
_DECODER = msgspec.msgpack.Decoder(Request)
_FDS_BESIDE_SOCKETS = 2
Application = Callable[[Worker], object]


def run(preload: Preload, channel: socket.socket, stderr: int) -> int:
    """Run a template process in the forked child; return its exit status.

    Args:
        channel: the channel to the controller. This process ends when the other end is closed.
        stderr: where to write standard error.
    """
    if stdio.file_of(2) and stdio.is_the_log(1):
        os.dup2(stderr, 1)
    os.dup2(stderr, 2)
    output.stderr.reset()
    title.show(f"steer: template {preload.name}")
    fork.rename(_NAME)
    channel = _keep_only(channel, preload.binds)
    try:
        application = _load(preload)
    except Unloadable as error:
        why, detail = main.short(str(error)), main.short(error.detail)
        _send(channel, Answer(unloadable=why, detail=detail))
        return COMMAND_NOT_RUN
    leftovers.warn(channel.fileno())
    child_exit.flush()  # else each worker would write what is buffered
    gc.collect()
    gc.freeze()
    _send(channel, Answer(is_idle=True))
    while _has_request(channel):
        _fork_batch(preload, channel, application)
        _send(channel, Answer(is_idle=True))
    return 0


def _keep_only(channel: socket.socket, binds: int) -> socket.socket:
    """Close all descriptors but the channel, and occupy the numbers that the sockets of a worker
    get, so that the import of the application opens none of them."""
    descriptors.keep_only([channel.fileno()])
    above = fcntl.fcntl(channel.detach(), fcntl.F_DUPFD_CLOEXEC, FIRST_FD + binds)
    descriptors.keep_only([above])
    empty = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for fd in range(FIRST_FD, FIRST_FD + binds):
        if fd != empty:
            os.dup2(empty, fd, inheritable=False)
    if empty < FIRST_FD:
        os.close(empty)
    return socket.socket(fileno=above)


def _load(preload: Preload) -> Application:
    """Become the user of the workers, and load the application. Raises Unloadable."""
    loading.import_for(preload.service)
    setup.enter(preload.service, preload.identity)
    setup.change_environment_before_fork(preload)
    _limit_descriptors(preload)
    calling.forget_exit_functions()
    application = loading.load(preload.service)
    hooks.before_fork(preload.service)
    return application


def _limit_descriptors(preload: Preload, needed: int = 0) -> None:
    with setup.if_allowed("template process", "set the limits on open files"):
        descriptors.limit_descriptors(preload.files, needed)


def _has_request(channel: socket.socket) -> bool:
    """Wait for a request. Returns whether there is one: the controller may have closed the
    channel."""
    fork.wait_until_readable(channel.fileno(), None)
    return bool(channel.recv(1, socket.MSG_PEEK))


def _fork_batch(preload: Preload, channel: socket.socket, application: Application) -> None:
    """Fork the workers of one batch of requests, from a process that exits then."""
    try:
        pid = os.fork()
    except OSError as error:
        _send(channel, Answer(errno=error.errno or 0))
        return
    if pid == 0:
        child_exit.exit_with(partial(_answer_batch, preload, channel, application))
    with suppress(ChildProcessError):  # the application ignores SIGCHLD
        os.waitpid(pid, 0)


def _answer_batch(preload: Preload, channel: socket.socket, application: Application) -> int:
    pids: list[int] = []
    _limit_descriptors(preload, main.DESCRIPTORS + preload.binds)
    try:
        is_last = False
        while not is_last:
            is_last, new = _receive(channel, preload.binds)
            pids.append(_fork_worker(preload, channel, application, new))
    except OSError as error:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        _send(channel, Answer(errno=error.errno or 0))
        return 1
    _send(channel, Answer(pids=tuple(pids)))
    return 0


def _receive(channel: socket.socket, binds: int) -> tuple[bool, NewWorker]:
    """Receive a request. Raises OSError."""
    data, fds, _, _ = socket.recv_fds(channel, MESSAGE_MAX_BYTES, _FDS_BESIDE_SOCKETS + binds)
    request = _DECODER.decode(data)
    ours, stderr, *theirs = fds
    sockets = [socket.socket(fileno=fd) for fd in theirs]
    return request.is_last, NewWorker(request.launch, socket.socket(fileno=ours), stderr, sockets)


def _fork_worker(
    preload: Preload, channel: socket.socket, application: Application, new: NewWorker
) -> int:
    """Fork a worker, and close our descriptors of it. Returns its process ID."""

    def work() -> int:
        os.setpgid(0, 0)
        channel.close()
        _limit_descriptors(preload)
        return main.preloaded(new, application)

    pid = os.fork()
    if pid == 0:
        child_exit.exit_with(work)
    # Here and in the worker, as either may rely on it first.
    os.setpgid(pid, pid)
    os.close(new.stderr)
    for sock in (new.channel, *new.sockets):
        sock.close()
    return pid


def _send(channel: socket.socket, answer: Answer) -> None:
    with suppress(OSError):  # the controller has ended, which `_has_request` notices
        channel.send(msgspec.json.encode(answer))
