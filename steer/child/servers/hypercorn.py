"""hypercorn serves ASGI and WSGI over HTTP/1.1, HTTP/2 and websockets; see
https://hypercorn.readthedocs.io."""

from __future__ import annotations

import asyncio
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from socket import socket
from typing import Any, Literal

from hypercorn.asyncio import serve
from hypercorn.config import Config, Sockets
from hypercorn.utils import LifespanFailureError, LifespanTimeoutError

from steer.child.api import Worker
from steer.child.launch import Unloadable
from steer.child.servers import finish, options
from steer.child.servers.adapters import Application, Serve
from steer.child.servers.request_limit import RequestLimit
from steer.config.applications import Interface
from steer.config.service import Service

_OURS = {
    "application_path": "MODULE:NAME",
    "backlog": "--backlog",
    "bind": "--bind",
    "daemon": "steer run, which stays in the foreground",
    "debug": "PYTHONASYNCIODEBUG=1 in --env",
    "group": "--group",
    "insecure_bind": "--bind",
    "logger_class": "logconfig_dict",
    "pid_path": "--pid",
    "quic_bind": "--bind",
    "umask": "umask of the shell",
    "use_reloader": "steer reload",
    "user": "--user",
    "workers": "--workers",
}
_TLS = frozenset(
    (
        "ca_certs",
        "certfile",
        "ciphers",
        "keyfile",
        "keyfile_password",
        "verify_flags",
        "verify_mode",
    )
)
_LOOPS: Mapping[str, Callable[[], Callable[[], asyncio.AbstractEventLoop] | None]] = {
    "asyncio": lambda: None,
    "uvloop": lambda: _uvloop(),
}
_MODES: Mapping[Interface, Literal["asgi", "wsgi"]] = {
    Interface.ASGI3: "asgi",
    Interface.WSGI: "wsgi",
}


class _Config(Config):
    """Has sockets that are bound already."""

    given: Sequence[socket] = ()

    def create_sockets(self) -> Sockets:
        secure, insecure = (self.given, ()) if self.ssl_enabled else ((), self.given)
        return Sockets(list(secure), list(insecure), [])


def load(app: Application, interface: Interface, service: Service) -> Serve:
    """See `adapters.Adapter`."""
    shown = f"hypercorn {version('hypercorn')}"
    given = options.read(shown, service.server_options, _known(), _OURS)
    options.refuse_half_tls(given, _TLS, ("certfile", "keyfile"))
    kind = given.pop("worker_class", "asyncio")
    if kind not in _LOOPS:
        known = " and ".join(_LOOPS)
        raise Unloadable(f"server option worker_class = {kind!r}: steer knows {known}")
    loop_factory = _LOOPS[kind]()
    limit = given.pop("max_requests", None), given.pop("max_requests_jitter", 0)
    config = _Config()
    config.backlog = service.backlog
    config.graceful_timeout = finish.time_s(service)
    config.access_log_format = f"worker %({{steer_slot}}e)s {config.access_log_format}"
    for name, value in given.items():
        setattr(config, name, value)
    config.create_ssl_context()  # fails now if it would fail later

    def serve_app(worker: Worker) -> None:
        counted = RequestLimit(*limit, worker).counted(app, interface)
        _serve(counted, _MODES[interface], config, loop_factory, service, worker)

    return serve_app


def _known() -> dict[str, Any]:
    """The types of its options, by name. Some have a default and no declared type."""
    hints = typing.get_type_hints(Config)
    plain = {
        name: type(value)
        for name, value in vars(Config).items()
        if not name.startswith("_") and not callable(value) and not isinstance(value, property)
    }
    return {**plain, **{n: hint for n, hint in hints.items() if n[0] != "_"}, "root_path": str}


def _uvloop() -> Callable[[], asyncio.AbstractEventLoop]:
    import uvloop

    new: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return new


def _serve(
    app: Any,
    mode: Literal["asgi", "wsgi"],
    config: _Config,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None,
    service: Service,
    worker: Worker,
) -> None:
    config.given = worker.sockets
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(_run(app, mode, config, worker))
    except (LifespanFailureError, LifespanTimeoutError) as error:
        finish.fail(worker, service, str(error))


async def _run(app: Any, mode: Literal["asgi", "wsgi"], config: _Config, worker: Worker) -> None:
    stop = asyncio.Event()
    for number in worker.stop_signals:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if worker.stopping:  # told so before the loop handled signals
        stop.set()

    async def told_to_stop() -> None:
        """hypercorn awaits it once it listens, after the startup of the lifespan."""
        worker.ready()
        while not stop.is_set():
            if worker.watchdog_s:
                worker.beat()
            within_s = worker.watchdog_s and worker.watchdog_s / 3
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), within_s)

    await serve(app, config, shutdown_trigger=told_to_stop, mode=mode)
