"""Recognizes objects that steer cannot call as a worker, and says how to run them. Pure.

Only signatures are judged, by what ASGI (https://asgi.readthedocs.io, "Applications") and WSGI
(PEP 3333) define. An object that takes one argument is accepted, unless a call would run none of
its code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from enum import Enum
from typing import NamedTuple


class Interface(Enum):
    """How an application is called."""

    ASGI3 = "ASGI 3"
    ASGI2 = "ASGI 2"
    WSGI = "WSGI"
    WORKER = "a function of the worker"


_ARGUMENTS = {Interface.ASGI3: 3, Interface.WSGI: 2}
"""How many arguments an application takes."""

_ASGI = "have a server serve it: steer run --server uvicorn {app}"
_WSGI = "have a server serve it: steer run --server waitress {app}"
_FACTORY = (
    "if it returns an application, have a server serve that: steer run --server auto '{app}()'"
)
_AIOHTTP = (
    "run a server for it: "
    "steer run ... -- gunicorn -w 1 --worker-class aiohttp.GunicornWebWorker {app}"
)
_WORKER = "give a function that takes one argument, the worker; see examples/"
_SOCKETS = (
    "give a function of the worker, that has a server listen on worker.sockets; see examples/"
)
_AWAIT = "give a plain function that calls asyncio.run(...)"
_ITERATE = "give a plain function, without yield"


class Look(NamedTuple):
    """What an object looks like.

    Args:
        interface: how it is called; None: nothing that steer or a server calls.
        words: what it looks like, if steer cannot call it with a worker.
        cure: how to run it then.
        is_factory: whether it may return an application if it is called.
    """

    interface: Interface | None = None
    words: str = ""
    cure: str = ""
    is_factory: bool = False


_CALLED_WITH_WORKER = Look(Interface.WORKER)
_ASGI3 = Look(Interface.ASGI3, "it looks like an ASGI 3 application (scope, receive, send)", _ASGI)


def why_not(found: Callable[..., object], app: str) -> str:
    """Why an object cannot be called with a worker, and what to type instead; "": it can be, or its
    signature does not show whether it can be.

    Args:
        app: its name, MODULE:CALLABLE.
    """
    look = look_at(found)
    return f"{look.words}; {look.cure.format(app=app)}" if look.words else ""


def look_at(found: Callable[..., object]) -> Look:
    """What an object looks like. If that cannot be seen, it may be called with a worker."""
    try:
        return _judge(found)
    # Reading the attributes of a user's object may run any code. If that fails, call the object and
    # let the call report the error.
    except Exception:  # noqa: BLE001
        return _CALLED_WITH_WORKER


def interface_of(found: Callable[..., object], allowed: Collection[Interface]) -> Interface | None:
    """The interface of an application, if it is one of those allowed. An object that does not show
    what it is, as a decorator hides its signature, counts as what it can be called as."""
    look = look_at(found)
    if look.interface in allowed:
        return look.interface
    if look.interface is not Interface.WORKER:
        return None
    try:
        takes = _takes(found)
        return next((each for each in allowed if takes(_ARGUMENTS.get(each, -1))), None)
    except Exception:  # noqa: BLE001  # as in `look_at`
        return next(iter(allowed))


def _judge(found: Callable[..., object]) -> Look:
    """What an object looks like.

    Raises:
        TypeError, ValueError: the object has no signature.
    """
    if inspect.isclass(found):
        return _judge_class(found)
    takes, waits = _takes(found), _is_async(found)
    if waits and takes(3):
        return _ASGI3
    if takes(1):
        return _judge_call(found, waits)
    if takes(3):
        return _ASGI3
    if takes(2) and not waits:
        words = "it looks like a WSGI application (environ, start_response)"
        return Look(Interface.WSGI, words, _WSGI)
    if type(found).__module__.startswith("aiohttp."):
        return Look(None, "it looks like an application of aiohttp", _AIOHTTP)
    if takes(0):
        return Look(None, "it takes no argument, so no worker", _FACTORY, True)
    return Look(None, f"it takes {inspect.signature(found)}, not one argument", _WORKER)


def _judge_call(found: Callable[..., object], waits: bool) -> Look:
    """As `_judge`, for an object that takes one argument: would a call run its code?

    Args:
        waits: whether it is a coroutine function.
    """
    if waits:
        return Look(None, "it is a coroutine function, which nobody would await", _AWAIT)
    if inspect.isgeneratorfunction(_code(found)):
        return Look(None, "it is a generator function, which nobody would iterate", _ITERATE)
    # The name of the only argument may show that it is not meant to be a worker.
    name = " ".join(inspect.signature(found).parameters)
    return _CALLED.get(name, _CALLED_WITH_WORKER)


_CALLED = {
    "scope": Look(
        Interface.ASGI2, "it looks like an ASGI 2 application, a function of (scope)", _ASGI
    ),
    "request": Look(None, "it looks like a handler of requests, a function of (request)", _SOCKETS),
}


def why_not_returned(returned: object, app: str) -> str:
    """Why a callable did not serve, and what to type instead, judged by what it returned; "": that
    shows nothing.

    Args:
        app: its name, MODULE:CALLABLE.
    """
    if inspect.iscoroutine(returned):
        returned.close()  # else Python warns that nobody awaited it
        return f"it returned a coroutine, which nobody awaits; {_AWAIT}"
    if inspect.isgenerator(returned):
        return f"it returned a generator, which nobody iterates; {_ITERATE}"
    if not callable(returned):
        return ""
    kind = "what looks like an ASGI application" if _is_async(returned) else "a callable"
    return f"it returned {kind}, which nobody calls; {_FACTORY.format(app=app)}"


def _judge_class(found: type) -> Look:
    takes = _takes(found)
    call = inspect.getattr_static(found, "__call__")
    instances_wait = inspect.iscoroutinefunction(call)
    if instances_wait and takes(1) and _takes(call)(3):  # with self
        words = "it looks like an ASGI 2 application, a class of (scope)"
        return Look(Interface.ASGI2, words, _ASGI)
    if instances_wait and takes(0) and _takes(call)(4):
        return Look(None, "it is a class of ASGI 3 applications, not one of them", _FACTORY, True)
    if takes(1):
        return _CALLED_WITH_WORKER
    if takes(2):
        words = "it looks like a WSGI application, a class of (environ, start_response)"
        return Look(Interface.WSGI, words, _WSGI)
    return Look(None, "it is a class that does not take one argument", _WORKER)


def _takes(found: Callable[..., object]) -> Callable[[int], bool]:
    """A function that says whether `found` takes a number of positional arguments."""
    signature = inspect.signature(found)

    def takes(count: int) -> bool:
        try:
            signature.bind(*[None] * count)
        except TypeError:
            return False
        return True

    return takes


def _is_async(found: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(_code(found))


def _code(found: Callable[..., object]) -> Callable[..., object]:
    """The function that a call executes: for an instance, its class's __call__."""
    is_function = inspect.isroutine(found) or hasattr(found, "func")
    return found if is_function else type(found).__call__
