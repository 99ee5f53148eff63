"""waitress serves WSGI over HTTP/1.1 in threads; see
https://docs.pylonsproject.org/projects/waitress.

Its own `run` ends at an exception of a signal handler, and then sends nothing more. So its loop is
called here, until all answers are sent.
"""

from __future__ import annotations

import logging
import signal
from functools import partial
from importlib.metadata import version
from typing import Any

import waitress
from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.server import BaseWSGIServer
from waitress.trigger import trigger

from steer.child.api import Worker
from steer.child.servers import options
from steer.child.servers.adapters import Application, Serve
from steer.config.applications import Interface
from steer.config.service import Service

_OURS = {
    "asyncore_use_poll": "nothing: poll(2) is used",
    "backlog": "--backlog",
    "host": "--bind",
    "ipv4": "--bind",
    "ipv6": "--bind",
    "listen": "--bind",
    "port": "--bind",
    "socket_options": "--socket-option",
    "sockets": "--bind",
    "unix_socket": "--bind",
    "unix_socket_perms": "--bind",
}
_LOOK_S = 0.1
"""How often a stopping worker looks whether its requests are done."""


def load(app: Application, _interface: Interface, service: Service) -> Serve:
    """See `adapters.Adapter`. The server itself has threads and sockets, so a worker makes it."""
    known = {
        name: options.ANY
        for name, value in vars(Adjustments).items()
        if not name.startswith("_") and not isinstance(value, classmethod | staticmethod)
    }
    shown = f"waitress {version('waitress')}"
    given = options.read(shown, service.server_options, known, _OURS)
    Adjustments(**given)
    return partial(_serve, app, {**given, "backlog": service.backlog})


def _serve(app: Application, given: dict[str, Any], worker: Worker) -> None:
    logging.basicConfig()  # as waitress.serve() does
    channels: dict[int, Any] = {}
    server = waitress.create_server(app, map=channels, sockets=list(worker.sockets), **given)
    waker = trigger(channels)
    told: list[int] = []

    def stop(number: int, _frame: object) -> None:
        told.append(number)
        waker.pull_trigger()

    for number in worker.stop_signals:
        signal.signal(number, stop)
    loop = partial(wasyncore.loop, map=channels, use_poll=True, count=1)
    worker.ready()
    idle_s = min(server.adj.asyncore_loop_timeout, (worker.watchdog_s or 60) / 3)
    while not told and not worker.stopping:
        loop(timeout=idle_s)
        if worker.watchdog_s:
            worker.beat()
    for each in list(channels.values()):
        if isinstance(each, BaseWSGIServer):
            each.del_channel(channels)
            each.socket.close()
    loop(timeout=0)  # a request that has arrived is read, and answered
    while _are_open(channels):
        loop(timeout=_LOOK_S)
    server.task_dispatcher.shutdown()


def _are_open(channels: dict[int, Any]) -> bool:
    """Whether connections are open; those without a request are closed once all is sent."""
    connections = [each for each in channels.values() if isinstance(each, HTTPChannel)]
    for each in connections:
        with each.requests_lock:
            if not each.requests and each.request is None:
                each.close_when_flushed = True
    return bool(connections)
