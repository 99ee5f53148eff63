"""uvicorn serves ASGI over HTTP/1.1 and websockets; see https://uvicorn.dev."""

from __future__ import annotations

import copy
import time
import typing
from functools import partial
from socket import socket
from typing import Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from steer.child.api import Worker
from steer.child.servers import finish, options
from steer.child.servers.adapters import Application, Serve
from steer.child.servers.request_limit import RequestLimit
from steer.config.applications import Interface
from steer.config.service import Service

_SHOWN = f"uvicorn {uvicorn.__version__}"
_OURS = {
    "app": "MODULE:NAME",
    "backlog": "--backlog",
    "factory": "MODULE:NAME()",
    "fd": "--bind",
    "host": "--bind",
    "port": "--bind",
    "reload": "steer reload",
    "timeout_worker_healthcheck": "--watchdog",
    "uds": "--bind",
    "workers": "--workers",
}
_INTERFACES = {Interface.ASGI3: "asgi3", Interface.ASGI2: "asgi2"}


def load(app: Application, interface: Interface, service: Service) -> Serve:
    """See `adapters.Adapter`. uvicorn configures logging and makes its TLS context here."""
    known = typing.get_type_hints(uvicorn.Config.__init__)
    given = options.read(_SHOWN, service.server_options, known, _OURS)
    options.refuse_half_tls(
        given, {each for each in known if each[:4] == "ssl_"}, ("ssl_certfile",)
    )
    defaults = {
        "interface": _INTERFACES[interface],
        "log_config": _log_config(),
        "timeout_graceful_shutdown": finish.time_s(service),
    }
    limit = given.pop("limit_max_requests", None), given.pop("limit_max_requests_jitter", 0)
    ours = {"backlog": service.backlog, "workers": 1}
    config = uvicorn.Config(app, **{**defaults, **given, **ours})
    config.load()
    config.get_loop_factory()  # imports the event loop
    return partial(_serve, config, limit, service)


def _log_config() -> dict[str, Any]:
    """uvicorn's own, and the access log has the slot of the worker."""
    config = copy.deepcopy(LOGGING_CONFIG)
    access = config["formatters"]["access"]
    access["fmt"] = access["fmt"].replace("%(client_addr)s", "worker %(slot)s %(client_addr)s")
    config["filters"] = {"slot": {"()": "steer.child.servers.slot_filter.SlotFilter"}}
    config["handlers"]["access"]["filters"] = ["slot"]
    return config


def _serve(
    config: uvicorn.Config, limit: tuple[int | None, int], service: Service, worker: Worker
) -> None:
    server = _Server(config, RequestLimit(*limit, worker), worker)
    try:
        server.run(sockets=list(worker.sockets))
    except SystemExit:
        if server.started:
            raise
        finish.fail(worker, service, "Lifespan failure in startup")


class _Server(uvicorn.Server):
    """Tells steer how it is."""

    def __init__(self, config: uvicorn.Config, limit: RequestLimit, worker: Worker) -> None:
        super().__init__(config)
        self._limit = limit
        self._worker = worker
        self._beat_s = 0.0

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        # It came before uvicorn handled signals.
        self.should_exit = self.should_exit or self._worker.stopping
        if not self.should_exit:
            self._worker.ready()

    async def on_tick(self, counter: int) -> bool:
        now_s, watchdog_s = time.monotonic(), self._worker.watchdog_s
        if watchdog_s and now_s - self._beat_s >= watchdog_s / 3:
            self._beat_s = now_s
            self._worker.beat()
        self._limit.served(self.server_state.total_requests)
        return await super().on_tick(counter)
