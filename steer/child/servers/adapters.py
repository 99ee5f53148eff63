"""The servers that steer knows, and which one serves an application."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from steer.child.api import Worker
from steer.child.launch import Unloadable
from steer.config.applications import Interface, Look, interface_of, look_at
from steer.config.service import Service

Application = Callable[..., object]
Serve = Callable[[Worker], object]
"""Serves until the worker is told to finish."""


class Adapter(Protocol):
    """What a module of an adapter has."""

    def load(self, app: Application, interface: Interface, service: Service) -> Serve:
        """Check the options, and load all that workers can share: this may happen before the fork,
        once for many workers. It starts no thread, and has no event loop and no socket.

        Returns:
            What serves the application, called in the worker, after the fork. It calls
            `worker.ready()` when it does, and `worker.beat()` if there is a watchdog.

        Raises:
            Unloadable: an option is wrong.
            Exception: of the server.
        """


class Server(msgspec.Struct, frozen=True):
    """A server for which there is an adapter.

    Args:
        serves: the interfaces of applications that it serves.
    """

    name: str
    serves: tuple[Interface, ...]

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.name) is not None

    @property
    def cure(self) -> str:
        """How to install it."""
        return f"pip install 'steer-reuseport[{self.name}]'"

    def adapter(self) -> Adapter:
        """Its adapter, which imports the server.

        Raises:
            Unloadable: it is not installed.
        """
        if not self.is_installed:
            raise Unloadable(f"{self.name} is not installed; {self.cure}")
        adapter: Adapter = importlib.import_module(f"steer.child.servers.{self.name}")
        return adapter


SERVERS: Mapping[str, Server] = {
    each.name: each
    for each in (
        Server("uvicorn", (Interface.ASGI3, Interface.ASGI2)),
        Server("waitress", (Interface.WSGI,)),
        Server("hypercorn", (Interface.ASGI3, Interface.WSGI)),
    )
}
"""In the order in which `auto` takes them."""


def load(found: Application, service: Service) -> Serve:
    """Load the server of a service, with the application that it serves.

    Returns:
        What serves it in a worker; with `auto` the application itself, if that serves by itself.

    Raises:
        Unloadable: the server is not installed or does not serve such an application, or one of its
            options is wrong.
        Exception: of the server.
    """
    name, app = service.server, service.app
    assert name is not None
    assert app is not None
    chosen = _suited(found, app) if name == "auto" else _asked(found, SERVERS[name], app)
    if chosen is None:
        _say(f"{app} is {Interface.WORKER.value}: it serves by itself")
        return found
    server, interface = chosen
    if name == "auto":
        _say(f"{app} is {interface.value}: {server.name} serves it")
    return server.adapter().load(found, interface, service)


def _say(words: str) -> None:
    """Tell the user, once for all workers of a service."""
    if os.environ.get("STEER_SLOT", "0") == "0":
        print(f"steer: {words}", file=sys.stderr)


def _suited(found: Application, app: str) -> tuple[Server, Interface] | None:
    """The first installed server that serves the application; None: the application serves by
    itself.

    Raises:
        Unloadable: none is installed, or nothing serves it.
    """
    look = look_at(found)
    if look.interface is Interface.WORKER:
        return None
    suited = _that_serve(look.interface)
    if look.interface is None or not suited:
        raise Unloadable(_why_not(look, app))
    server = next((each for each in suited if each.is_installed), None)
    if server is None:
        names = " or ".join(each.name for each in suited)
        raise Unloadable(f"{look.words}, and {names} is not installed; {suited[0].cure}")
    return server, look.interface


def _asked(found: Application, server: Server, app: str) -> tuple[Server, Interface]:
    """The server that was asked for, if it serves the application. Raises Unloadable."""
    interface = interface_of(found, server.serves)
    if interface is None:
        serves = " and ".join(each.value for each in server.serves)
        why = _why_not(look_at(found), app)
        raise Unloadable(f"{server.name} serves {serves}; {why}")
    return server, interface


def _why_not(look: Look, app: str) -> str:
    """Why an object is not served, and what to do instead, if that is known."""
    if look.interface is Interface.WORKER:
        return "it looks like a function of the worker, that serves by itself; leave out --server"
    if others := _that_serve(look.interface):
        return f"{look.words}; use --server {others[0].name}"
    return f"{look.words}; {look.cure.format(app=app)}" if look.is_factory else look.words


def _that_serve(interface: Interface | None) -> list[Server]:
    return [each for each in SERVERS.values() if interface in each.serves]
